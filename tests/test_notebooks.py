"""Every notebook, run by papermill with small parameters, on results rather than on its having run."""

import json
import re

import nbformat
import nibabel
import numpy as np
import pandas as pd
import papermill
import pytest
import SimpleITK
import torch
from conftest import PROJECT

from fmsam_lib.network import GradICON

NOTEBOOKS = PROJECT / "notebooks"
DOMAIN, SHAPE = "brain-mr", [32, 32]
TRAIN = {"train_domain": DOMAIN, "shape": SHAPE, "down": [8, 16], "levels": 2, "steps": 40, "lr": 0.003, "sigma": 3.0}


def execute(name, into, **parameters):
    """The executed notebook `name`, written into the folder `into`."""
    into.mkdir(parents=True, exist_ok=True)
    out = into / f"{name}.ipynb"
    papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", out, parameters, cwd=NOTEBOOKS, progress_bar=False)
    return nbformat.read(out, 4)


def printed(notebook):
    """Everything the notebook shows as text."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def pictures(notebook):
    return sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))


def test_00_registers_a_pair_better_than_nothing(tmp_path):
    notebook = execute("00_start_here", tmp_path)  # as a newcomer runs it
    table = printed(notebook).split("when ")[-1]
    rows = re.findall(r"^(\w[\w ]*?) +(\d\.\d+) +(\d\.\d+)$", table, re.M)
    assert len(rows) >= 4, table
    before, after = (sum(float(row[i]) for row in rows) / len(rows) for i in (1, 2))
    assert after > before + 0.1
    assert pictures(notebook) >= 4  # pair, loss, result, explorer


@pytest.mark.parametrize("shape", [[32, 32], [24, 24, 24]])
def test_01_shows_a_domain_in_2d_and_3d(tmp_path, shape):
    notebook = execute("01_look_at_the_data", tmp_path, domain="abdomen-ct", shape=shape, pairs=2)
    assert "abdomen-ct: CT, inter-subject" in printed(notebook)
    assert "every pair could be read" in printed(notebook)
    assert pictures(notebook) >= 4


def test_01_shows_real_images(tmp_path, real_data):
    notebook = execute(
        "01_look_at_the_data", tmp_path, domain="HippocampusMR", shape=[24, 32, 24], data=str(real_data), pairs=2
    )
    assert "1 anterior, 2 posterior" in printed(notebook)


def test_04_shows_what_the_climb_does(tmp_path):
    notebook = execute("04_sam_explained", tmp_path, shape=[32, 32], steps=20, rho=0.02)
    text = printed(notebook)
    ends = dict(re.findall(r"^\d +(\d\.\d+) +(sharp|flat|neither)$", text, re.M))
    assert (ends["0.000"], ends["0.001"], ends["0.350"]) == ("sharp", "sharp", "flat")
    share = next(line for line in text.splitlines() if line.startswith("last, of |eps|^2"))
    assert share.split()[2:4] == ["|eps|^2", "1"]  # at initialisation
    exact, measured = map(float, re.search(r"rho\* (\S+) \(exact\), (\S+) \(measured\)", text).groups())
    factors = map(float, re.search(r"the radius to judge, 0\.02: (\S+) and (\S+) times these", text).groups())
    assert list(factors) == pytest.approx([0.02 / exact, 0.02 / measured], rel=0.1)
    radii = {
        rho: (float(a), float(b)) for rho, a, b in re.findall(r"rho = (\S+):.*\n +loss (\S+) at w, (\S+) at", text)
    }
    assert radii.keys() == {"0.02", "0.05"}
    assert all(there > here for here, there in radii.values())
    assert pictures(notebook) == 5  # a climb, paths, curves, registrations, the slider's


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a small study: two trained networks, evaluated and measured by the notebooks."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    test = {"test_domains": [DOMAIN, "heart-mr"], "threads": 1}
    execute("20_evaluate", root / "none", run="", out=str(root / "none"), shape=SHAPE, pairs=3, **test)
    for optimizer in ("adam", "sam"):
        out = root / DOMAIN / optimizer / "seed0"
        execute("10_train", out, out=str(out), optimizer=optimizer, **TRAIN)
        execute("20_evaluate", out, run=str(out), out=str(out), shape=SHAPE, pairs=3, **test)
        small = {"pairs": 2, "line_points": 5, "plane_points": 3, "directions": 1, "rhos": [0.01, 0.1]}
        execute("30_loss_landscape", out, run=str(out), out=str(out), **small, **test)
    return root


def test_10_writes_a_run_that_learned(trained):
    for optimizer in ("adam", "sam"):
        run = trained / DOMAIN / optimizer / "seed0"
        assert {"config.json", "history.jsonl", "checkpoint.pt", "weights.pt"} <= {p.name for p in run.iterdir()}
        history = pd.read_json(run / "history.jsonl", lines=True)
        assert history.total.iloc[-1] < history.total.iloc[0]
        config = json.loads((run / "config.json").read_text())
        assert config["parameters"]["optimizer"] == optimizer
        assert {"commit", "cpu", "packages"} <= config["provenance"].keys()


def test_20_writes_all_metrics_of_every_domain(trained):
    results = pd.read_csv(trained / DOMAIN / "sam" / "seed0" / "results.csv")
    assert set(results.test_domain) == {DOMAIN, "heart-mr"}
    assert {"dice", "hd95", "tre", "folding_percent", "sdlogj"} <= set(results.metric)
    assert results.groupby("test_domain").pair.nunique().tolist() == [3, 3]
    assert (results.optimizer == "sam").all()


def test_30_measures_the_same_directions_for_both(trained):
    tables = [pd.read_csv(trained / DOMAIN / o / "seed0" / "landscape.csv") for o in ("adam", "sam")]
    for table in tables:
        assert {"line", "plane", "rise", "weight_norm"} == set(table.kind)
        centre = table[(table.kind == "line") & (table.alpha == 0) & (table.term == "total")].value
        ends = table[(table.kind == "line") & (table.alpha.abs() > 0.4) & (table.term == "total")].value
        assert centre.max() < ends.max()
    assert tables[0].alpha.equals(tables[1].alpha)


STUDY = f"""
description: tiny
train_domains: [{DOMAIN}]
test_domains: [{DOMAIN}, heart-mr]
optimizers: [adam, sam]
seeds: [0, 1]
shape: {SHAPE}
train: {{}}
evaluate: {{}}
landscape: {{}}
"""


def test_40_compares_and_names_what_is_missing(trained):
    (trained / "tiny.yaml").write_text(STUDY)
    notebook = execute("40_compare", trained, study=str(trained / "tiny.yaml"), folder=str(trained))
    results = pd.read_csv(trained / "results.csv")
    assert set(results.optimizer) == {"none", "adam", "sam"}
    summary = pd.read_csv(trained / "summary.csv")
    assert len(summary) == 2
    assert {"before", "adam", "sam", "sam - adam", "sam - adam low"} <= set(summary.columns)
    problems = json.loads((trained / "problems.json").read_text())
    assert [p for p in problems if "adam/seed1: this run was not trained" in p]  # seed 1 was never run
    shown = "".join(
        o.data.get("text/markdown", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o
    )
    assert "seed1" in shown
    for name in (
        "matrix",
        "paired_difference",
        "training",
        "loss_lines",
        "loss_planes",
        "flatness",
        "example_brain-mr",
    ):
        assert (trained / "figures" / f"{name}.png").stat().st_size > 5000
        assert (trained / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_50_makes_and_registers_a_pair_without_files(tmp_path):
    notebook = execute("50_register_your_own", tmp_path, out=str(tmp_path), shape=[24, 24, 24], io=25, lr=0.005)
    assert pictures(notebook) >= 4  # before, loss, overview, explorer
    dice = json.loads((tmp_path / "summary.json").read_text())["dice"].values()
    assert sum(d["after"] - d["before"] for d in dice) / len(dice) > 0.1
    fixed, warped, field = (
        SimpleITK.ReadImage(str(tmp_path / name))
        for name in ("input/fixed.nii.gz", "warped.nii.gz", "displacement.nii.gz")
    )
    assert warped.GetSize() == field.GetSize() == fixed.GetSize()
    assert field.GetNumberOfComponentsPerPixel() == 3


def test_50_registers_files_with_weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        values = torch.rand(40, 36, generator=generator).numpy()
        nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 1, 1])), tmp_path / f"{name}.nii.gz")
    net = GradICON(2, down=(4, 8), levels=2)
    net.save(tmp_path / "weights.pt")
    files = {"fixed": str(tmp_path / "a.nii.gz"), "moving": str(tmp_path / "b.nii.gz")}
    options = {"out": str(tmp_path / "out"), "weights": str(tmp_path / "weights.pt"), "shape": [32, 32], "io": 0}
    execute("50_register_your_own", tmp_path, **files, **options)
    assert nibabel.load(tmp_path / "out" / "disp_a_b.nii.gz").shape == (40, 36, 2)
    with pytest.raises(papermill.PapermillExecutionError, match="expected fixed and moving, or neither"):
        execute("50_register_your_own", tmp_path, fixed=files["fixed"])


WITH_PARAMETERS = "00_start_here 01_look_at_the_data 04_sam_explained 10_train 20_evaluate 30_loss_landscape 40_compare"


@pytest.mark.parametrize("name", [*WITH_PARAMETERS.split(), "50_register_your_own"])
def test_an_unknown_parameter_stops_the_second_cell_and_lists_the_right_ones(tmp_path, name):
    with pytest.raises(papermill.PapermillExecutionError, match=r"stepz: unknown; known are \w+, \w+"):
        execute(name, tmp_path, stepz=3)
    codes = [cell for cell in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    failed = [i for i, c in enumerate(codes) if any(o.output_type == "error" for o in c.outputs)]
    own = [c for c in codes if "injected-parameters" not in c.metadata.get("tags", [])]
    assert [own.index(codes[i]) for i in failed if codes[i] in own] == [1]


def test_a_wrong_value_is_named(tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError,
        match="optimizer: expected one of adam, adam-2x, sam, asam, sam-every, looksam, random, got 'sgd'",
    ):
        execute("10_train", tmp_path, optimizer="sgd")
