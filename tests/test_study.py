"""The workflow: study files, and a whole tiny study by the command that `make study` calls."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import PROJECT

from fmsam_lib.config import ConfigError
from fmsam_lib.study import grid, main, parameters, plan, read_study

TINY = {
    "description": "tiny",
    "train_domains": ["brain-mr"],
    "test_domains": ["brain-mr", "Real"],
    "optimizers": ["adam", "sam"],
    "seeds": [0],
    "shape": [32, 32],
    "train": {"down": [4, 8], "levels": 2, "steps": 10, "batch": 1},
    "evaluate": {"pairs": 2},
    "landscape": {"pairs": 1, "line_points": 3, "plane_points": 3, "directions": 1, "rhos": [0.01]},
}


@pytest.mark.parametrize("path", sorted((PROJECT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_valid(path):
    assert grid(read_study(path))


def test_the_grid_is_every_combination(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | {"seeds": [0, 1], "train_domains": ["a", "b"]}))
    runs = grid(read_study(tmp_path / "s.yaml"))
    assert len({run.folder for run in runs}) == 2 * 2 * 2


def test_a_variant_is_an_optimizer_with_parameters_of_its_own(tmp_path):
    variants = {"sam-1": {"optimizer": "sam", "rho": 1.0}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | {"optimizers": ["adam", "sam-1"], "variants": variants}))
    study = read_study(tmp_path / "s.yaml")
    adam, variant = grid(study)
    assert variant.folder == "brain-mr/sam-1/seed0"
    values = [parameters(study, run, tmp_path, "", tmp_path)[f"{run.folder}/10_train"] for run in (adam, variant)]
    assert [(v["optimizer"], v.get("rho")) for v in values] == [("adam", None), ("sam", 1.0)]


@pytest.mark.parametrize(
    ("optimizers", "treatment"),
    [
        (["adam", "sam"], "sam"),
        (["adam", "adam-2x", "asam"], "asam"),
        (["adam", "adam-2x"], "adam-2x"),
        (["adam"], "adam"),
    ],
)
def test_what_the_baseline_is_compared_with(tmp_path, optimizers, treatment):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | {"optimizers": optimizers}))
    study = read_study(tmp_path / "s.yaml")
    assert parameters(study, None, tmp_path, "", tmp_path)["40_compare"]["treatment"] == treatment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seedz": [0]}, r"seedz: unknown; known are .*did you mean seeds\?"),
        ({"train": {"step": 3}}, r"(?s)section train.*step: unknown; known are .*did you mean steps\?"),
        ({"train": {"steps": 0}}, r"(?s)section train.*steps: expected at least 1, got 0"),
        ({"train": {"seed": 0}}, r"(?s)section train.*seed: unknown"),
        ({"optimizers": ["samm"]}, r"(?s)optimizers: expected some of adam, .*samm: unknown \(did you mean sam\?\)"),
        ({"variants": {"sam-1": {"rho": 1.0}}}, "variant sam-1: expected a mapping with an optimizer"),
        ({"variants": {"sam-1": {"optimizer": "sam", "roh": 1.0}}}, r"variant sam-1.*\n.*did you mean rho\?"),
        ({"variants": {"adam": {"optimizer": "sam"}}}, "variant 'adam': expected a name .* that is no optimizer's"),
        ({"variants": {"a/b": {"optimizer": "sam"}}}, "variant 'a/b': expected a name of letters"),
        ({"variants": {0.03: {"optimizer": "sam"}}}, "variant 0.03: expected a name"),
        ({"variants": {"sam-1": {"optimizer": "sam-1"}}}, r"variant sam-1.*\n.*expected one of adam"),
        ({"seeds": [0, 0]}, "seeds: expected each once"),
        ({"seeds": []}, "seeds: expected at least one"),
    ],
)
def test_a_wrong_study_says_what_is_right(tmp_path, change, message):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(ConfigError, match=message):
        read_study(tmp_path / "s.yaml")


def test_an_unknown_study_lists_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "quikc"])
    assert main() == 2
    assert "known studies: hippocampus, quick, radius, smoke" in capsys.readouterr().err


def test_parameter_files_are_rewritten_only_when_they_change(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY))
    study = read_study(tmp_path / "s.yaml")
    plan(study, tmp_path, "", tmp_path / "s.yaml")
    path = tmp_path / "brain-mr/sam/seed0/10_train.yaml"
    assert yaml.safe_load(path.read_text())["optimizer"] == "sam"
    before = path.stat().st_mtime_ns
    plan(study, tmp_path, "", tmp_path / "s.yaml")
    assert path.stat().st_mtime_ns == before
    assert len(parameters(study, None, tmp_path, "", tmp_path)) == 2


def real_images(folder, *, damaged):
    """A data set of five 2-D images with two test pairs, a file of the first one cut short."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for i in range(5):
        label = np.zeros((40, 36, 1), np.uint8)
        label[10 + i : 28, 8 : 24 + i] = 1
        image = (label * 100 + rng.integers(0, 30, label.shape)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f"imagesTr/p{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / f"labelsTr/p{i}.nii.gz")
    if damaged:
        path = folder / "imagesTr/p4.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
    entry = "./imagesTr/p{}.nii.gz".format
    manifest = {
        "name": folder.name, "dimensions": 2, "modality": {"0": "MR"}, "labels": {"0": "background", "1": "box"},
        "pairing": "inter-subject",
        "training": [{"image": entry(i), "label": f"./labelsTr/p{i}.nii.gz"} for i in (0, 1)],
        "registration_val": [{"fixed": entry(3), "moving": entry(4)}, {"fixed": entry(2), "moving": entry(3)}],
    }  # fmt: skip
    (folder / f"{folder.name}_dataset.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with a tiny study, beside a data set one of whose files is damaged."""
    copy = tmp_path_factory.mktemp("study") / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".snakemake", "data", "__pycache__")
    shutil.copytree(PROJECT, copy, ignore=ignored)
    (copy / "studies/tiny.yaml").write_text(yaml.safe_dump(TINY))
    real_images(copy / "data/Real", damaged=True)
    return copy


def compute(project, *arguments, study="tiny"):
    """`python -m fmsam_lib.study` of the copy."""
    command = [sys.executable, "-m", "fmsam_lib.study", study, *arguments]
    own = {"PYTHONPATH": str(project), "FMSAM_CACHE": str(project / "cache"), "FMSAM_DATA": ""}
    return subprocess.run(command, cwd=project, env=os.environ | own, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def computed(project):
    return compute(project)


def test_a_study_with_a_damaged_file_computes_all_the_rest(project, computed):
    root = project / "runs/tiny"
    assert computed.returncode == 1
    assert "problem: " in computed.stderr
    assert "p4.nii.gz" in computed.stderr
    results = pd.read_csv(root / "results.csv")
    assert set(results.optimizer) == {"none", "adam", "sam"}
    assert results[results.test_domain == "Real"].pair.nunique() == 1
    assert results[results.test_domain == "brain-mr"].pair.nunique() == 2
    assert "sam - adam" in computed.stdout
    assert f"report: {root / 'report.html'}" in computed.stdout
    report = (root / "report.html").read_text()
    assert "p4.nii.gz" in report
    assert report.count("data:image/png") >= 6


def test_the_same_study_again_computes_nothing_and_elsewhere_the_same(project, computed):
    trained = project / "runs/tiny/brain-mr/sam/seed0/weights.pt"
    before = trained.stat().st_mtime_ns
    assert compute(project).returncode == 1  # the damaged file is still named
    assert trained.stat().st_mtime_ns == before
    assert compute(project, "--runs", str(project / "elsewhere")).returncode == 1
    assert (project / "elsewhere/tiny/results.csv").read_bytes() == (project / "runs/tiny/results.csv").read_bytes()


def test_a_failed_training_keeps_what_the_others_did(project, computed):
    """Another training already lies in the folder of one run: it is refused, named, and the rest is compared."""
    root = project / "other" / "tiny"
    shutil.copytree(project / "runs/tiny", root)
    config = root / "brain-mr/sam/seed0/config.json"
    content = json.loads(config.read_text())
    content["parameters"]["lr"] = 0.5
    config.write_text(json.dumps(content))
    (root / "brain-mr/sam/seed0/weights.pt").unlink()
    process = compute(project, "--runs", str(project / "other"))
    assert process.returncode == 1
    assert "lr: 0.5 there, 0.001 now" in process.stderr
    assert "brain-mr/sam/seed0: this run was not trained to its end" in process.stderr
    assert set(pd.read_csv(root / "results.csv").optimizer) == {"none", "adam"}


def test_two_processes_do_not_compute_the_same_study(project, computed):
    with open(project / "runs/tiny/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = compute(project)
    assert process.returncode == 2
    assert "another process is computing this study" in process.stderr


def test_a_missing_training_domain_is_an_error_before_anything_is_computed(project):
    study = TINY | {"train_domains": ["NoSuchSet"]}
    (project / "studies/tiny2.yaml").write_text(yaml.safe_dump(study))
    process = compute(project, study="tiny2")
    assert process.returncode == 2
    assert "NoSuchSet" in process.stderr
    assert "brain-mr" in process.stderr  # what there is
    assert not (project / "runs/tiny2").exists()
