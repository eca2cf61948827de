"""What is computed again when a study or a notebook changes, and how long a plan takes: all without training.

Stand-ins for papermill and nbconvert leave empty files in place of results and note what ran.
"""

import os
import resource
import shutil
import subprocess
import sys

import pytest
import yaml

from fmsam_lib.study.file import read_study
from fmsam_lib.study.notebooks import NOTEBOOKS, jobs, plan
from tests.conftest import PROJECT
from tests.study.test_sweeps import STUDY

PAPERMILL = """
import pathlib, sys, yaml
notebook, given = pathlib.Path(sys.argv[sys.argv.index("-") + 1]), sys.argv[sys.argv.index("-f") + 1]
notebook.touch()
values = yaml.safe_load(pathlib.Path(given).read_text())
for name in MAKES[notebook.stem]:
    pathlib.Path(values.get("out", "."), name).write_text("")
with open("ran.txt", "a") as ran:
    ran.write(str(notebook.with_suffix("")) + "\\n")
"""
JUPYTER = "import pathlib, sys; pathlib.Path(sys.argv[sys.argv.index('--output') + 1]).write_text('')"
GRID = STUDY | {"landscape": {"pairs": 2}, "between": {"pairs": 1}}
REPORT = "40_compare"


class Checkout:
    """A copy of what runs a study."""

    def __init__(self, folder):
        self.folder, self.root = folder / "checkout", folder / "runs/s"
        for name in ("notebooks", "profiles"):
            shutil.copytree(PROJECT / name, self.folder / name)
        shutil.copy(PROJECT / "Snakefile", self.folder)
        fakes = folder / "fakes"
        fakes.mkdir()
        makes = {name: notebook.makes for name, notebook in NOTEBOOKS.items()}
        (fakes / "papermill.py").write_text(f"MAKES = {makes}\n{PAPERMILL}")
        (fakes / "jupyter.py").write_text(JUPYTER)
        self.path = os.pathsep.join([str(fakes), str(PROJECT)])

    def snakemake(self, *arguments):
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(self.folder / "Snakefile")]
        command += ["--directory", str(self.root), "--profile", str(self.folder / "profiles/default"), "--cores", "2"]
        given = {"env": os.environ | {"PYTHONPATH": self.path}, "capture_output": True, "text": True}
        return subprocess.run([*command, *arguments], **given)

    def plan(self, stamps=None, **changes):
        file = self.folder / "s.yaml"
        file.write_text(yaml.safe_dump(GRID | changes))
        plan(jobs(read_study(file), self.root, "", file, stamps), self.root)
        (self.root / "left_out.json").touch()

    def compute(self, **changes):
        """The notebooks that ran, by their folder."""
        self.plan(**changes)
        (self.root / "ran.txt").write_text("")
        done = self.snakemake()
        assert done.returncode == 0, done.stderr
        return sorted((self.root / "ran.txt").read_text().split())


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    checkout = Checkout(tmp_path_factory.mktemp("replanning"))
    return checkout, checkout.compute()


@pytest.fixture
def checkout(computed, tmp_path):
    """A study that is computed, to change."""
    again = Checkout(tmp_path)
    shutil.copytree(computed[0].root, again.root)  # with the dates of its files
    return again


def test_the_first_time_everything_runs(computed):
    of_runs = [f"brain-mr/{o}/seed0/{n}" for o in ("adam", "sam") for n in [*NOTEBOOKS][:3]]
    assert computed[1] == sorted(["none/20_evaluate", *of_runs, "brain-mr/between/seed0/35_between_minima", REPORT])


def test_another_seed_runs_that_seed_alone_and_the_report(checkout):
    ran = checkout.compute(seeds=[0, 1])
    assert len(ran) == 8
    assert [name for name in ran if "/seed1/" not in name] == [REPORT]


def test_another_optimizer_or_another_value_of_a_sweep_runs_that_alone_and_the_report(checkout):
    ran = checkout.compute(optimizers=["adam", "sam", "asam"], train={"steps": 10})
    assert [name for name in ran if "/asam/" not in name] == [REPORT]
    sweep = {"optimizers": ["adam", "sam", "asam"], "variants": {"asam": {"optimizer": "asam", "rho": [0.1, 1.0]}}}
    ran = checkout.compute(**sweep | {"optimizers": ["adam", "sam", "v"], "variants": {"v": sweep["variants"]["asam"]}})
    assert {name.split("/")[1] for name in ran if name != REPORT} == {"v-rho=0.1", "v-rho=1.0"}


def test_prose_and_code_of_a_notebook_run_nothing(checkout):
    for name in NOTEBOOKS:
        path = checkout.folder / f"notebooks/{name}.ipynb"
        path.write_text(path.read_text().replace("You will learn", "You will see"))
        assert "You will see" in path.read_text()
    assert checkout.compute() == []


@pytest.mark.parametrize("table", ["summary.csv", "trainings.csv"])
def test_a_table_of_the_whole_study_that_was_removed_is_made_again(checkout, table):
    (checkout.root / table).unlink()
    assert checkout.compute() == [REPORT]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"evaluate": {"pairs": 3}}, {"none/20_evaluate", "adam/20_evaluate", "sam/20_evaluate"}),
        ({"landscape": {"pairs": 3}}, {"adam/30_loss_landscape", "sam/30_loss_landscape"}),
        ({"between": {"pairs": 2}}, {"between/35_between_minima"}),
        (
            {"test_domains": ["heart-mr", "lung-ct"]},
            {f"{o}/{n}" for o in ("adam", "sam") for n in ("20_evaluate", "30_loss_landscape")}
            | {"none/20_evaluate", "between/35_between_minima"},
        ),
        (
            {"optimizers": ["adam", "sam"], "variants": {}, "train": {"steps": 10, "lr": 0.5}},
            {f"{o}/{n}" for o in ("adam", "sam") for n in [*NOTEBOOKS][:3]} | {"between/35_between_minima"},
        ),
        (
            {"optimizers": ["adam", "sam"], "variants": {}, "train": {"steps": 10, "save_memory": True}},
            {f"{o}/{n}" for o in ("adam", "sam") for n in [*NOTEBOOKS][:3]} | {"between/35_between_minima"},
        ),
        (
            {"stamps": {"heart-mr": "of other files"}},
            {f"{o}/{n}" for o in ("adam", "sam") for n in ("20_evaluate", "30_loss_landscape")}
            | {"none/20_evaluate", "between/35_between_minima"},
        ),
        ({"description": "other words"}, set()),
        ({"resources": {"10_train": {"minutes": 5, "cpus": 2}}}, set()),
    ],
)
def test_a_parameter_runs_what_depends_on_it(checkout, change, expected):
    ran = checkout.compute(**change)
    assert {name.replace("brain-mr/", "").replace("seed0/", "") for name in ran} - {REPORT} == expected
    assert (REPORT in ran) == bool(expected)


def test_the_report_of_what_is_there_has_the_resources_that_a_scheduler_is_told(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.plan(resources={REPORT: {"minutes": 7, "memory_mb": 800}})
    told = checkout.snakemake("-n", "what_there_is")
    assert "runtime=7" in told.stdout, told.stderr
    assert "mem_mb=800" in told.stdout


def test_a_thousand_runs_are_planned_in_seconds(tmp_path):
    """Processor seconds: others may compute on the machine."""
    checkout, start = Checkout(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    grid = {"train_domains": ["brain-mr", "lung-ct", "knee-mr", "abdomen-ct", "heart-mr"], "seeds": list(range(50))}
    checkout.plan(**grid | {"train": {"steps": 10, "lr": [0.001, 0.002]}})
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    planning = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
    done = checkout.snakemake("-n", "--quiet", "rules")
    assert done.returncode == 0, done.stderr
    assert len(list(checkout.root.glob("*/*/seed*/10_train.yaml"))) == 1000
    assert planning < 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20
