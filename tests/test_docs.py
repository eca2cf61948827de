"""README and docs: links lead somewhere, tables are those of the CSVs, commands and code run."""

import functools
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mistune
import pandas as pd
import pytest
import scipy.stats
import torch

from fmsam_lib import SAM, parameters
from fmsam_lib.checking import read
from fmsam_lib.evaluation.anatomies import NEW, THESE
from fmsam_lib.phantoms.anatomies import DOMAINS
from fmsam_lib.registration.command import main as register
from fmsam_lib.study.file import read_study
from fmsam_lib.study.grid import grid
from fmsam_lib.study.notebooks import jobs
from tests.conftest import PROJECT, as_module
from tests.test_parameters import KIND

README = PROJECT / "README.md"
PAGES = [README, PROJECT / "CHANGELOG.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
NAMES = [str(page.relative_to(PROJECT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATHS = r"`((?:fmsam_lib|notebooks|studies|tests|figures|benchmarks|docs)/[\w./-]+)`"
BESIDE = re.compile(r"-?\d\.\d+ \[-?\d\.\d+, -?\d\.\d+\]")  # a difference and its interval
MODELS = {name[:2]: kind.__name__ for name, kind in KIND.items()}


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
    return request.param


@pytest.fixture(scope="module")
def tables():
    return as_module("docs/tables.py")


def blocks(language):
    """(page, block) of every fenced block in this language."""
    found = [(p.name, m[2]) for p in PAGES for m in FENCE.finditer(p.read_text()) if m[1] == language]
    assert found
    return found


def prose(page):
    return FENCE.sub("", page.read_text())


def told(notebook):
    """A notebook's Markdown cells, without what is fenced in them."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return FENCE.sub("", "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))


def anchors(page):
    """The names that GitHub gives to a page's or a notebook's headings."""
    text = told(page) if page.suffix == ".ipynb" else prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def local_links(text):
    """Targets of links and pictures that are files of the project or headings."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"https?://", target)]


def leads_somewhere(target, page):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return file.exists() and (not anchor or anchor in anchors(file))


# --- README


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 9000


def test_the_first_screen_has_the_answer():
    screen = README.read_text().split("\n## ")[0]
    answer = pd.read_csv(PROJECT / "figures" / "unseen.csv").query("role == 'primary'").set_index("anatomy")
    these, new = ("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**answer.loc[name]) for name in (THESE, NEW))
    assert screen.index(these) < 500
    assert new in screen
    assert f"{answer.seeds[THESE]} seeds" in screen
    networks = pd.read_csv(PROJECT / "figures" / "networks.csv").query("study == 'unseen' and not seen")
    assert f"{networks.drop_duplicates('test_domain').pairs.sum()} test pairs" in screen
    assert f"{100 * answer['mean'][THESE] / answer.mean_baseline[THESE]:+.1f} %" in screen
    assert answer.verdict[THESE] in screen


# --- links and names


def test_every_link_and_picture_leads_somewhere(page):
    assert "](" in page.read_text()
    assert not [target for target in local_links(prose(page)) if not leads_somewhere(target, page)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_link_of_a_notebook_leads_somewhere(notebook):
    text = told(notebook)
    assert not [target for target in local_links(text) if not leads_somewhere(target, notebook)]
    for name in re.findall(r"`(\d\d_\w+)`", text):
        assert (PROJECT / "notebooks" / f"{name}.ipynb").exists(), name
    for path in re.findall(PATHS, text):
        assert (PROJECT / path).exists(), path


@pytest.mark.parametrize("target", ["../docs/none.md", "../docs/register.md#none", "#none", "00_start.ipynb"])
def test_a_link_of_a_notebook_to_nowhere_is_found(target):
    notebook = PROJECT / "notebooks" / "60_when_not_to_trust_it.ipynb"
    assert local_links(f"see [this]({target})") == [target]
    assert not leads_somewhere(target, notebook)
    assert "../docs/register.md#can-i-trust-it" in local_links(told(notebook))


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README.read_text()))
    assert linked == {name for name in NAMES if name.startswith("docs/")}


def test_every_path_that_is_named_exists(page):
    for path in re.findall(PATHS, page.read_text()):
        assert (PROJECT / path).exists(), path


def test_every_notebook_that_is_named_exists(page):
    for name in re.findall(r"`(\d\d_\w+)`", page.read_text()):
        assert (PROJECT / "notebooks" / f"{name}.ipynb").exists(), name


def test_every_study_that_is_named_exists(page):
    text = page.read_text()
    known = {path.stem for path in (PROJECT / "studies").glob("*.yaml")}
    named = re.findall(r"STUDY=(\w+)", text) + re.findall(r"fmsam_lib\.study (\w+)", text)
    named += re.findall(r"[Ss]tud(?:y|ies) `(\w+)`", text)
    assert set(named) <= known


def test_the_table_of_studies_is_complete():
    text = (PROJECT / "docs" / "extending.md").read_text()
    rows = text.partition("| study | what for |")[2].partition("\n\n")[0]
    studies = sorted(path.stem for path in (PROJECT / "studies").glob("*.yaml"))
    assert sorted(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == studies


def gradients_of(run):
    """Of a training: one a step, one more where SAM climbs."""
    every = run.every if run.optimizer in ("sam-every", "looksam") else 1
    climbs = [s for s in range(run.updates) if s >= run.late * run.updates and s % every == 0]
    return run.updates + len(climbs) * (not run.optimizer.startswith("adam"))


def test_the_table_of_costs_counts_what_the_study_files_ask_for():
    costs = pd.read_csv(PROJECT / "figures" / "table_costs.csv", index_col="study")
    for name, row in costs[~costs.index.str.contains(",")].iterrows():
        study = read_study(path := PROJECT / "studies" / f"{name}.yaml")
        work, gradients = jobs(study, Path("runs"), "", path), int(row.gradients.replace(",", ""))
        assert (row.trainings, row.notebooks) == (len(grid(study)), len(work)), name
        trainings = [read(parameters.Train, job.values) for job in work if job.notebook == "10_train"]
        assert gradients == pytest.approx(sum(map(gradients_of, trainings)), rel=1e-3), name
        hours = gradients * (0.027 if len(study.shape) > 2 else 0.0072) / 3600
        told = row["hours on a GPU, training alone"]
        assert hours < 0.01 if told == "below 0.01" else float(told) == pytest.approx(hours, rel=0.15, abs=0.006), name


def test_every_parameter_that_is_named_exists(page):
    known = {name for model in MODELS.values() for name in getattr(parameters, model).model_fields}
    named = re.findall(r"`(\w+): (?:[\w.]+|\[\.\.\.\])`", page.read_text())
    assert set(named) <= known | {"landscape", "leave_one_out"}


# --- tables


def test_tables_are_those_of_the_csvs():
    run(sys.executable, "docs/tables.py", "--check")


def test_no_table_of_results_lacks_its_numbers():
    lacking = [
        path.name for path in (PROJECT / "figures").glob("table_*.csv") if re.search(r"\bnan\b", path.read_text())
    ]
    assert not lacking


def test_a_changed_number_is_found(tables):
    text = (PROJECT / "docs" / "results.md").read_text()
    assert tables.rendered(text) == text
    changed = text.replace("| -0.004 [", "| -0.005 [")
    assert changed != text
    assert tables.rendered(changed) == text


def test_a_share_is_a_ratio_of_means(tables):
    """Where every loss is half of its gap, so is the mean, and the interval has no width; else it is Fieller's."""
    gap = pd.DataFrame({"heart": [0.01, 0.02, 0.03], "knee": [0.02, 0.04, 0.06]})
    exact = tables.share(-0.5 * gap, gap)
    assert exact.to_numpy() == pytest.approx(-0.5)
    assert list(exact.index) == ["heart", "knee", THESE]
    lost = gap.knee * [0.5, 1, 0.2]
    found = tables.share(gap.assign(knee=lost), gap).loc["knee"]
    assert found["mean"] == pytest.approx(lost.mean() / gap.knee.mean())
    for end in (found.low, found.high):  # where the t test is at its border
        assert scipy.stats.ttest_1samp(lost - end * gap.knee, 0).pvalue == pytest.approx(0.1)


def test_every_table_of_numbers_comes_from_a_csv(page, tables):
    others = tables.BLOCK.sub("", prose(page))
    rows = [line for line in others.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\| *-?\d+\.\d+ *\|", row)]


def test_every_difference_in_a_sentence_stands_in_a_table(page):
    shown = "\n".join(path.read_text() for path in (PROJECT / "figures").glob("table_*.csv"))
    for difference in BESIDE.findall(prose(page)):
        assert difference in shown, difference


def test_tables_render_as_tables(page):
    html = mistune.create_markdown(escape=False, plugins=["table"])(page.read_text())
    assert html.count("<table>") == len(re.findall(r"^\| *:?---", page.read_text(), re.MULTILINE))
    assert "| --- |" not in html


def test_numbers_keep_four_digits(tables):
    cells = ("0.06792289", "1.053", "0.710", "<= 0.1", "0.2 / 0.3", "12", "", "3ca01132e576")
    assert [tables.short(cell) for cell in cells] == ["0.06792", *cells[1:]]


def write_study(folder, optimizers):
    """What `record` reads of a computed study, of the brain's networks on the brain and the heart."""
    run = folder / "brain-mr" / "sam" / "seed0"
    run.mkdir(parents=True)
    config = {"parameters": {"shape": [32, 32], "steps": 60}, "provenance": {"commit": "0123456789ab"}}
    (run / "config.json").write_text(json.dumps(config))
    cells = pd.DataFrame({"train_domain": "brain-mr", "test_domain": ["brain-mr", "heart-mr"]})
    dice = {"before": 0.5, "ants-syn": 0.7, "adam": 0.6, "sam": 0.61, "folding adam %": 0.1, "folding sam %": 0.2}
    cells.assign(seen=["yes", "no"], pairs=3, **dice).to_csv(folder / "summary.csv", index=False)
    difference = {"metric": "dice", "baseline": "adam", "treatment": "sam", "mean": 0.01, "low": -0.01, "high": 0.03}
    cells.assign(**difference).to_csv(folder / "comparison.csv", index=False)
    metrics = pd.DataFrame({"metric": ["dice", "tre", "inverse_error"], "mean": [0.61, 5.04, 2.5], "seconds": 0.25})
    methods = cells.merge(pd.DataFrame({"optimizer": optimizers}), "cross").merge(metrics, "cross")
    methods.to_csv(folder / "methods.csv", index=False)
    shutil.copy(PROJECT / "studies" / "smoke.yaml", folder / "40_compare.study.yaml")


@pytest.mark.parametrize(
    ("optimizers", "row"),
    [
        (["sam"], 'brain-mr,heart-mr,no,0.500,0.700,0.600,0.610,"0.010 [-0.010, 0.030]",0.100 / 0.200'),
        (["sam", "sam+io"], "SAM + IO,0.610,0.610,5.0,2.50,0.25"),
    ],
)
def test_a_study_is_recorded(tables, tmp_path, monkeypatch, optimizers, row):
    (tmp_path / "figures").mkdir()
    shutil.copy(PROJECT / "figures" / "table_studies.csv", tmp_path / "figures")
    before = (tmp_path / "figures" / "table_studies.csv").read_text()
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    write_study(tmp_path / "mine", optimizers)
    for _ in range(2):  # once more replaces the line of the first time
        tables.record(tmp_path / "mine")
    line = "mine,`make study STUDY=mine`,0123456789ab,0,32 x 32,60,3,\n"
    assert (tmp_path / "figures" / "table_studies.csv").read_text() == before + line
    assert (tmp_path / "figures" / "table_mine.csv").read_text().splitlines()[-1] == row


@pytest.mark.parametrize("name", ["real3d", pytest.param("unseen", marks=pytest.mark.slow)])  # unseen: 15 s
def test_the_kept_pairs_give_the_answer_again(tables, name, tmp_path, monkeypatch):
    kept, again = pd.read_csv(tables.FIGURES / f"{name}.csv"), tables.refitted(name)
    pd.testing.assert_frame_equal(again.reset_index(drop=True), kept, rtol=1e-3, atol=2e-5)
    rows = pd.read_csv(tables.FIGURES / f"{name}_pairs.csv")
    monkeypatch.setattr(tables, "FIGURES", tmp_path)
    tables.keep_pairs(rows.assign(difference=rows.treatment - rows.baseline), name)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"{name}_pairs.csv"), rows)


def test_the_table_of_lengths_takes_whole_seeds_of_its_own_arms(tables, tmp_path, monkeypatch):
    kept = pd.read_csv(PROJECT / "figures" / "networks.csv")
    unseen = kept[kept.study == "unseen"]
    lacks = unseen[(unseen.optimizer == "adam-4x") & (unseen.seed == 14) & (unseen.test_domain == "ChestJSRT")]
    own = unseen[unseen.optimizer == "sam"]
    more = [own.assign(optimizer="sam-0.003", dice=0.1), own[own.seed == 10].assign(optimizer="sam-8x", gradients=9)]
    pd.concat([kept.drop(lacks.index), *more]).to_csv(tmp_path / "networks.csv", index=False)
    monkeypatch.setattr(tables, "FIGURES", tmp_path)
    found = tables.longer()
    kept[kept.seed != 14].to_csv(tmp_path / "networks.csv", index=False)
    pd.testing.assert_frame_equal(found, tables.longer())


def test_an_answer_has_what_needs_no_training_beside_it(tables):
    answer = pd.DataFrame({"anatomy": ["heart", "spine", THESE, "heart"], "metric": ["dice"] * 3 + ["hd95"]})
    sets = {"test_domain": ["h1", "h2", "s1"], "metric": "dice", "optimizer": "none", "mean": [0.4, 0.6, 0.9]}
    found = tables.answered(answer, pd.DataFrame(sets), {"heart": ["h1", "h2", "synthetic"], "spine": ["s1"]})
    assert found.before.tolist() == pytest.approx([0.5, 0.9, 0.7, float("nan")], nan_ok=True)
    assert found["ants-syn"].isna().all()


# --- commands


def commands():
    lines = [(name, line.partition(" # ")[0].strip()) for name, block in blocks("sh") for line in block.splitlines()]
    return sorted({line: name for name, line in lines if line}.items())


@functools.cache
def run(*command):
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("command", "where"), commands(), ids=[command for command, _ in commands()])
def test_command(command, where, capsys):
    """Those of seconds run; studies, tests, benchmarks, trainings and downloads are looked through."""
    program, *given = itertools.dropwhile(lambda word: word.startswith("FMSAM_"), shlex.split(command))
    program, given = ("pytest", given[2:]) if given[:2] == ["-m", "pytest"] else (program, given)
    if program == "make":
        assert run("make", "--dry-run", *given)
    elif program == "papermill":
        papermill(given)
    elif program == "python" and given[0] == "-m":
        module, *rest = given[1:]
        accepted(run(sys.executable, "-m", module, "--help"), rest)
    elif program == "python" and (given == ["docs/tables.py"] or given[1:] == ["--check"]):
        run(sys.executable, given[0], "--check")
    elif program.endswith("fmsam-register"):
        with pytest.raises(SystemExit):
            register([*["apply"][: given[:1] == ["apply"]], "--help"])
        accepted(capsys.readouterr().out, given)
    elif program == "pytest":
        assert all((PROJECT / path).exists() for path in given if not path.startswith("-"))
    else:
        known = ("conda env create -f environment.yml", "conda activate fmsam", ". .venv/bin/activate")
        known += ("nvidia-cuda-mps-control -d",)
        assert command in known, "how is this to be tested?"


def accepted(help_text, given):
    for flag in (word for word in given if word.startswith("--")):
        assert flag in help_text.split(), flag


def papermill(given):
    notebook = next(word for word in given if word.endswith(".ipynb"))
    kind = getattr(parameters, MODELS[notebook.removeprefix("notebooks/")[:2]])
    assert (PROJECT / notebook).exists()
    if "--help-notebook" in given:
        told = run(sys.executable, "-m", "papermill", *given)
        assert all(f"{name}:" in told for name in kind.model_fields)
    named = [given[i + 1] for i, word in enumerate(given) if word in ("-p", "-y")]
    assert set(named) <= kind.model_fields.keys()


def test_commands_in_sentences_exist(page):
    for script in re.findall(r"`python ([\w/]+\.py)[^`]*`", page.read_text()):
        assert (PROJECT / script).exists(), script
    targets = re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", page.read_text())) <= set(targets)


# --- code


@pytest.mark.parametrize(("where", "code"), blocks("python"))
def test_python_compiles(where, code):
    compile(code, where, "exec")


def small(code, changes):
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    code = next(code for where, code in blocks("python") if "fm.train" in code)
    there = {}
    changes = {"steps=400": "steps=4", "pairs=20": "pairs=2", "shape=(64, 64)": "shape=(32, 32)"}
    exec(small(code, changes), there)
    assert len(there["history"]) > 0
    assert set(there["table"].metric) >= {"dice", "folding_percent"}
    assert there["table"].pair.nunique() == 2
    assert not os.listdir(folder)  # nothing is kept unless asked for


def test_the_loop_of_sam_runs():
    code = next(code for where, code in blocks("python") if "sam.perturbed()" in code)
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batch = torch.tensor([[1.0, 2.0]])
    before = net.weight.detach().clone()
    there = {
        "net": net,
        "optimizer": optimizer,
        "batch": batch,
        "my_loss": lambda net, x: (net(x) ** 2).sum(),
    }
    exec(code, there)
    assert not torch.equal(net.weight, before)
    assert there["sam"].step_norm == pytest.approx(0.01)


def test_the_variants_of_sam_are_its_arguments():
    known = inspect.signature(SAM).parameters
    text = (PROJECT / "docs" / "sam.md").read_text()
    calls = re.findall(r"`SAM\(\.\.\.([^)]*)\)`", text)
    assert len(calls) == 6
    assert {name for call in calls for name in re.findall(r"(\w+)=", call)} <= set(known)


def test_the_readmes_domain_is_one():
    assert set(re.findall(r'open_domain\("([\w-]+)"', README.read_text())) <= set(DOMAINS)
