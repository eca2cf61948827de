"""A list of pairs, with a stand-in for the registration: what is checked first, done again, left out, and written."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fmsam_lib.records import DataError
from fmsam_lib.registration.batch import COLUMNS, register_all

OPTIONS = {"io": 50, "shape": (40, 40), "weights": ["w.pt", 3, 4]}


class Registering:
    """Leaves a summary in which the size of the moving file counts; keeps the calls; `fails` on names of folders."""

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails or {}

    def __call__(self, files, folder):
        self.calls.append((folder.name, files))
        if error := self.fails.get(folder.name):
            raise error
        size = os.path.getsize(files["moving"])
        folder.mkdir(parents=True, exist_ok=True)
        summary = {
            "similarity": {"measure": "mean LNCC", "before": 0.1, "after": size / 10},
            "folding_percent": 0.25,
            "sdlogj": 0.5,
            "seconds": 7.5,
            "verdict": {"verdict": "look at it", "reason": 'much folds, "here"'},
            "files": ["summary.json"],
        }
        if "labels" in files:
            summary["dice"] = {"1": {"before": 0.25, "after": 0.5}, "2": {"before": 0.75, "after": 1.0}}
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def table(tmp_path):
    """Writes `pairs.csv` in a folder of five images of one to five bytes."""
    folder = tmp_path / "my data"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.nii.gz", "b.nii.gz", "sub/a.nii.gz", "é.mha", "l.nii.gz"), 1):
        (folder / name).write_bytes(b"x" * i)

    def write(text, encoding="utf-8"):
        (folder / "pairs.csv").write_text(text, encoding=encoding)
        return folder / "pairs.csv"

    return write


def names(one):
    return [name for name, _ in one.calls]


PAIRS = "fixed,moving,labels\na.nii.gz,b.nii.gz,\nb.nii.gz,é.mha,l.nii.gz\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_every_pair_is_registered_and_stands_in_one_table(tmp_path, table, encoding, line, capsys):
    one, out = Registering(), tmp_path / "out"
    text = PAIRS.replace("fixed,moving,labels\n", "fixed, moving ,labels,\n").replace("\n", line) + f",,{line}{line}"
    assert register_all(table(text, encoding), out, one, OPTIONS) == 0
    data = tmp_path / "my data"
    assert one.calls == [
        ("a_b", {"fixed": str(data / "a.nii.gz"), "moving": str(data / "b.nii.gz")}),
        ("b_é", {"fixed": str(data / "b.nii.gz"), "moving": str(data / "é.mha"), "labels": str(data / "l.nii.gz")}),
    ]
    found = pd.read_csv(out / "pairs.csv")
    assert list(found.columns) == COLUMNS
    first, second = (found.iloc[i].dropna().to_dict() for i in (0, 1))
    common = {"status": "done", "similarity_before": 0.1, "folding_percent": 0.25, "sdlogj": 0.5, "seconds": 7.5}
    common |= {"verdict": "look at it", "reason": 'much folds, "here"'}
    assert first == common | {"name": "a_b", "similarity_after": 0.2}
    assert second == common | {"name": "b_é", "similarity_after": 0.4, "dice_before": 0.5, "dice_after": 0.75}
    assert sorted(path.name for path in out.iterdir()) == ["a_b", "b_é", "pairs.csv"]
    assert "0 of 2 pairs failed" in capsys.readouterr().out


def test_what_is_complete_is_not_done_again_wherever_the_data_are(tmp_path, table):
    out, path = tmp_path / "out", table(PAIRS)
    register_all(path, out, Registering(), OPTIONS)
    before = (out / "pairs.csv").read_bytes()
    (tmp_path / "my data").rename(tmp_path / "moved")
    out.rename(tmp_path / "out2")
    one = Registering()
    assert register_all(tmp_path / "moved/pairs.csv", tmp_path / "out2", one, OPTIONS) == 0
    assert one.calls == []
    assert (tmp_path / "out2/pairs.csv").read_bytes() == before


@pytest.mark.parametrize(
    "change", ["a file's size", "a file's date", "another file", "an option", "no summary", "a damaged one", "by hand"]
)
def test_what_was_made_of_other_files_or_options_is_done_again(tmp_path, table, change):
    out, path, options, data = tmp_path / "out", table(PAIRS), dict(OPTIONS), tmp_path / "my data"
    register_all(path, out, Registering(), options)
    if change == "a file's size":
        stat = (data / "a.nii.gz").stat()
        (data / "a.nii.gz").write_bytes(b"yy")
        os.utime(data / "a.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "a file's date":
        os.utime(data / "a.nii.gz", ns=(1, 1))
    elif change == "another file":
        shutil.copy2(data / "a.nii.gz", data / "sub/a.nii.gz")
        path = table(PAIRS.replace("\na.nii.gz", "\nsub/a.nii.gz"))
    elif change == "an option":
        options["io"] = 0
    elif change == "no summary":
        (out / "a_b/summary.json").unlink()
    elif change == "a damaged one":
        (out / "a_b/summary.json").write_text("{")
    else:
        Registering()({"moving": str(data / "b.nii.gz")}, out / "a_b")
    one = Registering()
    assert register_all(path, out, one, options) == 0
    assert names(one) == (["a_b", "b_é"] if change == "an option" else ["a_b"])


@pytest.mark.parametrize("changed", ["b.raw", "c.img", "series/2.dcm"])
def test_what_belongs_to_the_named_file_counts_too(tmp_path, table, changed):
    path = table("fixed,moving\na.nii.gz,b.mhd\na.nii.gz,c.hdr\na.nii.gz,series\n")
    out, data = tmp_path / "out", path.parent
    (data / "series").mkdir()
    (data / "b.mhd").write_text("ElementDataFile = b.raw\n")
    for name in ("b.raw", "c.hdr", "c.img", "series/1.dcm", "series/2.dcm"):
        (data / name).write_bytes(b"x")
    assert register_all(path, out, Registering(), OPTIONS) == 0
    os.utime(data / changed, ns=(1, 1))
    one = Registering()
    assert register_all(path, out, one, OPTIONS) == 0
    assert names(one) == [f"a_{Path(changed).parts[0].split('.')[0]}"]


def test_a_pair_of_which_a_file_is_gone_is_done_again(tmp_path, table):
    one = Registering()
    assert register_all(table(PAIRS), tmp_path / "out", one, OPTIONS) == 0
    summary = tmp_path / "out" / "a_b" / "summary.json"
    made = json.loads(summary.read_text()) | {"files": ["warped.nii.gz", "summary.json"]}
    summary.write_text(json.dumps(made))
    again = Registering()
    assert register_all(table(PAIRS), tmp_path / "out", again, OPTIONS) == 0
    assert names(again) == ["a_b"]


def test_a_pair_that_fails_is_named_and_the_others_done(tmp_path, table, capsys):
    out, path = tmp_path / "out", table(PAIRS)
    one = Registering({"a_b": ValueError("a.nii.gz: expected an image,\nfound none")})
    assert register_all(path, out, one, OPTIONS) == 1
    assert names(one) == ["a_b", "b_é"]
    found = pd.read_csv(out / "pairs.csv")
    assert found.status.tolist() == ["failed", "done"]
    assert found.iloc[0].dropna().to_dict() == {
        "name": "a_b", "status": "failed", "reason": "a.nii.gz: expected an image,\nfound none"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "1 of 2 pairs failed" in said
    assert "- a_b: a.nii.gz: expected an image" in said
    again = Registering()
    assert register_all(path, out, again, OPTIONS) == 0
    assert names(again) == ["a_b"]


def test_quiet_tells_of_failures_alone(tmp_path, table, capsys):
    out, path = tmp_path / "out", table(PAIRS)
    assert register_all(path, out, Registering({"a_b": ValueError("no image")}), OPTIONS, quiet=True) == 1
    assert capsys.readouterr().out == f"1 of 2 pairs failed; {out / 'pairs.csv'}\n- a_b: no image\n"
    assert register_all(path, out, Registering(), OPTIONS, quiet=True) == 0
    assert capsys.readouterr().out == ""


def test_interrupted_and_run_again_the_table_is_the_same(tmp_path, table):
    path = table(PAIRS)
    register_all(path, tmp_path / "whole", Registering(), OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        register_all(path, tmp_path / "out", Registering({"b_é": KeyboardInterrupt()}), OPTIONS)
    assert not (tmp_path / "out/pairs.csv").exists()
    one = Registering()
    register_all(path, tmp_path / "out", one, OPTIONS)
    assert names(one) == ["b_é"]
    assert (tmp_path / "out/pairs.csv").read_bytes() == (tmp_path / "whole/pairs.csv").read_bytes()


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("fixed;moving\na;b\n", ["expected commas between columns, found semicolons or tabs"]),
        ("fixed\tmoving\na\tb\n", ["expected commas between columns, found semicolons or tabs"]),
        ("", ["column fixed: missing", "column moving: missing"]),
        ("fixed,moving\n", ["no pair in it"]),
        ("fixed,movin\n", ["column moving: missing", r"column 'movin': .*\(did you mean moving\?\)"]),
        ("fixed,moving,fixed\n", ["column 'fixed': expected each once of fixed, moving, labels, "]),
        ("fixed,moving\na.nii.gz,b.nii.gz,c\n", ["line 2: a cell without a column"]),
        (
            "fixed,moving,labels\n\na.nii.gz,nob.nii.gz,nol.nii.gz\n,b.nii.gz\n",
            ["line 3: no file .*/my data/nob.nii.gz", "line 3: no file .*/nol.nii.gz", "line 4: no fixed"],
        ),
        (
            "fixed,moving\na.nii.gz,b.nii.gz\nsub/a.nii.gz,b.nii.gz\n",
            ["line 3: expected a name for a folder of its own, in a column `name`, found 'a_b'"],
        ),
        *(
            (f"name,fixed,moving\n{name},a.nii.gz,b.nii.gz\n", [f"line 2: expected a name .* found '{name}'"])
            for name in ("..", "../x", "/x", "pairs.csv", ".hidden")
        ),
        (f"name,fixed,moving\n{'x' * 256},a.nii.gz,b.nii.gz\n", [r"line 2: expected a name for a folder of its own"]),
    ],
)
def test_all_that_is_wrong_is_named_before_the_work(tmp_path, table, text, problems):
    one = Registering()
    with pytest.raises(DataError) as error:
        register_all(table(text), tmp_path / "out", one, OPTIONS)
    for problem in problems:
        error.match(problem)
    assert one.calls == []
    assert not (tmp_path / "out").exists()


def test_the_same_names_do_where_pairs_are_named(tmp_path, table):
    one = Registering()
    register_all(
        table("name,fixed,moving\none,a.nii.gz,b.nii.gz\ntwo,sub/a.nii.gz,b.nii.gz\n"), tmp_path / "out", one, OPTIONS
    )
    assert names(one) == ["one", "two"]


def test_long_names_of_images_give_a_folder_that_can_be(tmp_path, table):
    path, one = table(f"fixed,moving\n{'f' * 200}.nii.gz,{'m' * 200}.nii.gz\n"), Registering()
    for letter in "fm":
        (path.parent / f"{letter * 200}.nii.gz").write_bytes(b"x")
    assert register_all(path, tmp_path / "out", one, OPTIONS) == 0
    assert len(names(one)[0]) <= 255


def test_the_list_itself_is_not_replaced_by_the_results_table(table):
    path = table(PAIRS)
    with pytest.raises(DataError, match="would replace it: choose another folder"):
        register_all(path, path.parent, Registering(), OPTIONS)
    assert path.read_text(encoding="utf-8") == PAIRS


def test_a_list_that_is_no_utf8_is_refused(tmp_path, table):
    with pytest.raises(DataError, match="expected a CSV file in UTF-8"):
        register_all(table(PAIRS, "latin-1"), tmp_path / "out", Registering(), OPTIONS)
    with pytest.raises(DataError, match="No such file"):
        register_all(tmp_path / "none.csv", tmp_path / "out", Registering(), OPTIONS)
