import json
import re
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from fmsam_lib import records
from fmsam_lib.checking import ConfigError, Parameters, from_notebook, read
from fmsam_lib.parameters import (
    Between,
    ByHand,
    Coarse,
    Compare,
    Doubt,
    Evaluate,
    Fair,
    Landscape,
    Look,
    Register,
    Registering,
    RegisterYourOwn,
    Start,
    Train,
)  # fmt: skip
from fmsam_lib.training.checkpoint import trained_with

NOTEBOOKS = records.PROJECT / "notebooks"
KIND = {
    "00_start_here": Start,
    "01_look_at_the_data": Look,
    "02_registration_by_hand": ByHand,
    "03_the_network": Coarse,
    "04_sam_explained": Start,
    "05_how_far_to_climb": Start,
    "06_does_sam_help": Fair,
    "10_train": Train,
    "20_evaluate": Evaluate,
    "30_loss_landscape": Landscape,
    "35_between_minima": Between,
    "40_compare": Compare,
    "50_register_your_own": RegisterYourOwn,
    "60_when_not_to_trust_it": Doubt,
}


def parameter_cell(kind: type[Parameters]) -> str:
    """What the notebook's parameter cell must be: every field with its type, default and help."""
    lines = ["# Parameters: change them here, or run the notebook with papermill -f parameters.yaml"]
    for name, field in kind.model_fields.items():
        value = json.dumps(field.default) if isinstance(field.default, str | list) else repr(field.default)
        lines.append(f"{name}: {type(field.default).__name__} = {value}  # {field.description}")
    return "\n".join(lines)


@pytest.mark.parametrize("name", KIND)
def test_the_parameter_cell_repeats_the_models_defaults_and_help(name):
    cell = next(c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code")
    assert cell.metadata.tags == ["parameters"]
    assert cell.source == parameter_cell(KIND[name])


def test_every_notebook_with_parameters_has_a_model():
    tagged = {
        path.stem
        for path in NOTEBOOKS.glob("*.ipynb")
        if any("parameters" in c.metadata.get("tags", []) for c in nbformat.read(path, 4).cells)
    }
    assert tagged == KIND.keys()


@pytest.mark.parametrize("kind", [*KIND.values(), Register, Registering])
def test_defaults_are_valid_and_each_has_its_help(kind):
    kind()
    assert not [name for name, field in kind.model_fields.items() if not field.description]


@pytest.mark.parametrize("kind", KIND.values())
def test_no_default_leaves_the_project(kind):
    """A notebook's own results go to the project's runs/, from whichever folder it was started."""
    values = kind().model_dump()
    assert not [value for value in values.values() if isinstance(value, str) and ".." in value]
    for name in {"out", "run", "folder", "baseline", "treatment", "study"} & values.keys():
        if kind is not Compare or name in ("study", "folder"):
            assert Path(values[name]).is_relative_to(records.PROJECT)


def test_an_absolute_folder_and_an_empty_one_stay_as_they_are(tmp_path):
    assert Train(out=tmp_path / "a b").out == str(tmp_path / "a b")
    assert Evaluate(run="", out="runs/x", methods=["none"]).run == ""


@pytest.mark.parametrize("model", [Evaluate, Landscape])
def test_tables_go_beside_the_run_unless_another_folder_is_named(model):
    assert model().out == model().run
    assert model(run="runs/x", out="").out == str(records.PROJECT / "runs/x")
    assert model(run="runs/x", out="runs/y").out == str(records.PROJECT / "runs/y")


def test_tables_without_a_run_have_a_folder_of_their_own():
    assert Evaluate(run="", methods=["none"]).out == str(records.PROJECT / "runs/mine/brain-mr/none")


def test_data_and_a_home_are_found_wherever_a_notebook_is_started(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert (Train(data="data").data, Train(data="").data) == (str(records.PROJECT / "data"), "")
    assert Train(out="~/runs/x").out == "/home/of/runs/x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 1.5}, "steps: expected a whole number, got 1.5"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"lr": "1e-3"}, r"lr: expected a number, got '1e-3' \(YAML reads 1e-3 as text: write 1.0e-3\)"),
        ({"lr": None}, "lr: expected a number, got None$"),
        ({"seed": 10**14}, r"seed: expected below 4\.29497e\+09, got 100000000000000"),
        ({"lr": 0}, "lr: expected above 0, got 0"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        (
            {"optimizer": "samm"},
            r"one of adam, adam-2x, sam, asam, .*random, got 'samm' \(did you mean sam\?\)",
        ),
        ({"shape": [32]}, r"shape: expected at least 2, got \[32\]"),
        ({"shape": [32, 8]}, "shape: expected at least 16, got 8"),
        ({"shape": [16] * 4}, "shape: expected at most 3"),
        ({"shape": "32"}, "shape: expected a list, got '32'"),
        ({"train_domain": ""}, "train_domain: expected at least one character, got ''"),
        ({"out": ""}, "out: expected at least one character, got ''"),
        ({"sigma": 0.4}, "sigma: expected at least 0.5, got 0.4"),
        ({"rhoo": 1}, r"rhoo: unknown; known are out, .*did you mean rho\?"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(change, message):
    with pytest.raises(ConfigError, match=message):
        read(Train, change)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)^3 problems in the study .*steps: .*lr: .*sead: unknown"):
        read(Train, {"steps": 0, "lr": -1, "sead": 1}, source="the study")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("20_evaluate", {"methods": []}, r"methods: expected at least 1, got \[\]"),
        (
            "20_evaluate",
            {"methods": ["sam"]},
            r"methods: expected one of none, ants-syn, io, network, network\+io, .*, got 'sam'",
        ),
        ("20_evaluate", {"methods": ["none", "none"]}, "methods: expected each once"),
        ("20_evaluate", {"methods": "none"}, "methods: expected a list, got 'none'"),
        ("20_evaluate", {"corruptions": ["fog"]}, "corruptions: expected one of noise, bias_field, .*'fog'"),
        ("20_evaluate", {"corrupted_pairs": 0}, "corrupted_pairs: expected at least 1, got 0"),
        ("20_evaluate", {"io_lr": 0}, "io_lr: expected above 0, got 0"),
        ("20_evaluate", {"alone_lr": -1}, "alone_lr: expected above 0, got -1"),
        ("20_evaluate", {"io": -1}, "io: expected at least 0, got -1"),
        ("20_evaluate", {"fields": 1}, "fields: expected True or False, got 1"),
        ("30_loss_landscape", {"normalisation": "weight"}, "normalisation: expected one of filter, layer or none"),
        ("30_loss_landscape", {"rhos": []}, "rhos: expected at least 1"),
        ("30_loss_landscape", {"rhos": [0.1, 0]}, "rhos: expected above 0"),
        ("30_loss_landscape", {"draws": 1}, "draws: expected at least 2, got 1"),
        ("30_loss_landscape", {"eigenvalues": -1}, "eigenvalues: expected at least 0"),
        ("30_loss_landscape", {"lanczos_steps": 1}, "lanczos_steps: expected at least 2"),
        ("35_between_minima", {"path_points": 2}, "path_points: expected at least 3, got 2"),
        ("35_between_minima", {"plane_points": 4}, "plane_points: expected an odd number, got 4"),
        ("35_between_minima", {"run": "x"}, "run: unknown; known are baseline, treatment, out"),
        ("10_train", {"snapshots": -1}, "snapshots: expected at least 0, got -1"),
    ],
)
def test_wrong_values_of_evaluation_and_landscape_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        read(KIND[name], change)


def test_what_can_be_left_out_may_be_nothing():
    """No corruption, no instance optimisation, no Hessian, flatness on all domains."""
    read(Evaluate, {"corruptions": [], "io": 0})
    read(Landscape, {"measured_on": [], "eigenvalues": 0, "probes": 0, "ascent_steps": 0})


def test_even_numbers_of_points_miss_the_trained_weights():
    with pytest.raises(ConfigError, match="plane_points: expected an odd number, got 8"):
        read(Landscape, {"plane_points": 8})


START = (
    '# Parameters: ...\ndomain: str = "brain-mr"\nshape: list = [32, 32]\nsteps: int = 5\nrho: float = 0\nseed: int = 0'
)


def session(*cells):
    """The globals of a notebook in which `cells` were run."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return namespace | {"In": ["", *cells, "from_notebook(...)"]}


def test_injected_parameters_take_the_place_of_defaults():
    assert from_notebook(Start, session(START, "# Parameters\nsteps = 7")).steps == 7


def test_parameters_may_be_assigned_together():
    run = from_notebook(Start, session(START + "\nsteps, rho = 7, 0.5"))
    assert (run.steps, run.rho) == (7, 0.5)


def test_an_unknown_injected_parameter_is_found():
    with pytest.raises(ConfigError, match="stepps: unknown; known are domain, shape, steps, rho, seed"):
        from_notebook(Start, session(START, "# Parameters\nstepps = 7"))


def test_variables_of_other_cells_are_not_parameters():
    assert from_notebook(Start, session("stepps = 3", START, "import json", "x = 1")).steps == 5


def test_a_corrected_parameter_cell_forgets_the_wrong_one():
    assert from_notebook(Start, session(START + "\nstepps = 7", "x = 1", START)).steps == 5


@pytest.mark.parametrize("between", [[], ["import json"]])
def test_parameters_before_the_defaults_are_refused(between):
    """So papermill does where no cell has the tag: the defaults would be used."""
    with pytest.raises(ConfigError, match=r"given steps, seed came before the cell of defaults.*`parameters`"):
        from_notebook(Start, session("# Parameters\nsteps = 7\nseed = 1\n", *between, START))


def test_defaults_run_again_after_given_parameters_are_a_persons_wish():
    """Of an executed notebook, by hand."""
    given = "# Parameters\nsteps = 7\n"
    assert from_notebook(Start, session(START, given, START)).steps == 5
    assert from_notebook(Start, session(START, given, "x = 1", START, given)).steps == 7


def test_running_the_second_cell_first_says_so():
    with pytest.raises(ConfigError, match="run the first code cell"):
        from_notebook(Start, {"In": ["", "x = 1"]})


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError), records.written_whole(path) as partial:
        partial.write_text("half of it, then \ud800", encoding="utf-8")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_provenance_names_commit_versions_and_hardware():
    made = records.provenance()
    assert made["packages"]["torch"].startswith("2.")
    assert made["cores"] >= 1
    assert made["commit"]
    assert made["cpu"]


def test_a_strangers_commit_is_not_the_projects(tmp_path, monkeypatch):
    own, copied, aside = (tmp_path / name for name in ("own", "own/site/copy", "aside"))
    for folder in (own, copied):
        (folder / "fmsam_lib").mkdir(parents=True)
        (folder / "fmsam_lib/records.py").write_text("")

    def git(*words):
        who = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        return subprocess.check_output(["git", *who, *words], cwd=own, text=True, stderr=subprocess.STDOUT).strip()

    def recorded(folder):
        monkeypatch.setattr(records, "PACKAGE", folder / "fmsam_lib")
        return records._commit()

    git("init")
    git("commit", "--allow-empty", "--message=a stranger's")
    assert recorded(own) == "unknown"  # which does not have the package
    git("add", ".")
    git("commit", "--message=ours")
    git("worktree", "add", aside)
    commit = git("rev-parse", "HEAD")[:12]
    assert [recorded(folder) for folder in (own, aside, copied)] == [commit, commit, "unknown"]
    (own / "fmsam_lib/records.py").write_text("changed")
    assert recorded(own) == f"{commit}+"


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="expected a run of notebook 10_train"):
        trained_with(tmp_path)


def test_a_record_must_have_every_parameter(tmp_path):
    recorded = Train().model_dump()
    (tmp_path / "config.json").write_text(json.dumps({"parameters": recorded}))
    assert trained_with(tmp_path) == Train(out=str(tmp_path))
    del recorded["rho"]
    (tmp_path / "config.json").write_text(json.dumps({"parameters": recorded}))
    with pytest.raises(ConfigError, match=r"expected every parameter in .*config.json, got none for rho"):
        trained_with(tmp_path)


def test_tuples_and_numpys_numbers_are_welcome():
    run = read(Train, {"shape": (32, np.int64(48)), "steps": np.int32(7), "lr": np.float32(0.5), "rho": np.array(0.25)})
    assert (run.shape, run.steps, run.lr, run.rho) == ([32, 48], 7, 0.5, 0.25)
    assert type(run.steps) is int
    assert json.loads(json.dumps(run.model_dump())) == run.model_dump()


def test_a_model_stays_as_it_is():
    with pytest.raises(ValidationError, match="frozen"):
        Train().rho = 0.5


def test_the_hash_of_the_sources_tells_two_dirty_trees_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    first = records.sources.__wrapped__()
    (tmp_path / "a.py").write_text("x = 2")
    assert records.sources.__wrapped__() != first
    (tmp_path / "a.py").write_text("x = 1")
    assert records.sources.__wrapped__() == first


def test_a_table_is_written_with_its_columns_in_order_and_numbers_in_full(tmp_path):
    table = pd.DataFrame({"b": [0.1 + 0.2], "a": ["x"], "more": [1]})
    records.write_csv(table, tmp_path / "t.csv", ["a", "b", "absent"])
    assert (tmp_path / "t.csv").read_text() == "a,b,absent\nx,0.30000000000000004,\n"


OPENS = re.compile(r"(?:read_text|write_text)\((?!\))|read_text\(\)|(?<![\w.])open\(")


@pytest.mark.parametrize("pattern", ["fmsam_lib/**/*.py", "Snakefile", "docs/*.py", "benchmarks/*.py"])
def test_text_is_utf_8_whatever_the_locale(pattern):
    """Files of text are opened with `encoding`, whichever the person's machine would take."""
    lines = [(path.name, line) for path in records.PROJECT.glob(pattern) for line in path.open(encoding="utf-8")]
    assert lines
    assert not [
        (name, line) for name, line in lines if OPENS.search(line) and not re.search('encoding=|"[rw]b[+]?"', line)
    ]
