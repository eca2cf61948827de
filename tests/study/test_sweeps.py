"""Grids: study files anywhere, what the folders of runs are called, parameters that are lists of values."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from fmsam_lib.checking import ConfigError
from fmsam_lib.study.file import placed, read_study
from fmsam_lib.study.grid import compared, grid
from fmsam_lib.study.notebooks import jobs
from fmsam_lib.study.run import COPY_OF, refuse_another
from tests.conftest import PROJECT
from tests.study import report

STUDY = {
    "description": "a grid",
    "train_domains": ["brain-mr"],
    "test_domains": ["heart-mr"],
    "optimizers": ["adam", "sam"],
    "seeds": [0],
    "shape": [32, 32],
    "train": {"steps": 10},
    "evaluate": {"pairs": 2},
    "landscape": None,
}


@pytest.fixture
def study_of(tmp_path):
    """`STUDY` with changes, written and read; None removes a key but `landscape`."""

    def written(**changes):
        kept = {k: v for k, v in (STUDY | changes).items() if v is not None or k == "landscape"}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(kept))
        return read_study(tmp_path / "s.yaml")

    return written


def trainings(study):
    """What each training takes, by its folder."""
    return {job.folder: job.values for job in jobs(study, "R", "", "s.yaml") if job.notebook == "10_train"}


# --- study files


def test_a_study_file_lies_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.study #1.yaml").touch()
    given = ("sub/../my.study #1.yaml", str(tmp_path / "my.study #1.yaml"))
    for name in given:
        assert placed(name, Path("out")) == (tmp_path / "my.study #1.yaml", tmp_path / "out/my.study #1")
    for name in ("quick", "2025.10"):
        assert placed(name, Path("out")) == (PROJECT / f"studies/{name}.yaml", tmp_path / "out" / name)
    with pytest.raises(ConfigError, match=r"a path that ends in .yaml, or a name in studies/, got .*quick"):
        placed(str(PROJECT / "studies/quick"), Path("out"))


@pytest.mark.parametrize("change", [{"seeds": [1]}, {"evaluate": {"pairs": 3}}, {"optimizers": ["adam"]}])
def test_two_files_of_one_name_do_not_mix(study_of, tmp_path, change):
    study, here, there = study_of(), tmp_path / "s.yaml", tmp_path / "other/s.yaml"
    there.parent.mkdir()
    there.write_text(yaml.safe_dump(STUDY | change))
    root = tmp_path / "runs/s"
    copy = root / "study.yaml"
    refuse_another(jobs(study, root, "", copy), root, here)  # nothing is there yet
    root.mkdir(parents=True)
    copy.write_text(f"{here.read_text()}\n{COPY_OF}{here}\n")
    refuse_another(jobs(study, root, "", copy), root, here)  # the same again
    again = jobs(read_study(there), root, "", copy)
    with pytest.raises(ConfigError, match=rf"{root} has the results of another study, {here}, not of {there}: give"):
        refuse_another(again, root, there)
    there.write_bytes(here.read_bytes())  # a copy, as of a checkout
    refuse_another(jobs(study, root, "", copy), root, there)
    there.write_text(yaml.safe_dump(STUDY | change))
    here.unlink()  # moved
    refuse_another(again, root, there)


def test_weights_that_are_not_there_are_refused_before_the_first_training(study_of, tmp_path):
    work = jobs(study_of(train={"weights": "runs/no.pt"}), tmp_path, "", tmp_path / "c")
    told = r"brain-mr/adam/seed0: expected weights of a file or one of .*2d-sam.*, got 'runs/no.pt'; relative paths"
    with pytest.raises(ConfigError, match=told):
        refuse_another(work, tmp_path, tmp_path / "s.yaml")
    refuse_another(jobs(study_of(train={"weights": "2d"}), tmp_path, "", tmp_path / "c"), tmp_path, tmp_path / "s.yaml")


# --- folders


def test_many_training_domains_have_a_short_folder_and_their_list_in_the_tables(study_of):
    groups = {"heart": ["h1", "h2"], "knee": ["k"]}
    trains = ["a", "a+b", "a+b+c+d", "a+b+d+c"]
    study = study_of(groups=groups, leave_one_out=["heart", "knee"], always=["b"], train_domains=trains)
    folders = {run.train_domain: run.folder.split("/")[0] for run in grid(study)}
    assert folders == {
        **{"a": "a", "a+b": "a+b", "a+b+c+d": "a-and-3-more-c5531b", "a+b+d+c": "a-and-3-more-498cdd"},
        **{"k+b": "all-but-heart", "h1+h2+b": "all-but-knee"},
    }
    of = trainings(study)
    assert of["all-but-knee/sam/seed0"]["train_domain"] == "h1+h2+b"
    assert of["all-but-knee/sam/seed0"]["out"] == "R/all-but-knee/sam/seed0"


def test_the_longest_folder_of_the_projects_studies_is_short():
    studies = map(read_study, (PROJECT / "studies").glob("*.yaml"))
    assert max(len(run.folder) for study in studies for run in grid(study)) < 60


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_domains": ["none"]}, "'none' cannot be a folder of the study"),
        ({"train_domains": ["figures"]}, "'figures' cannot be a folder"),
        ({"train_domains": ["results.csv"]}, "'results.csv' cannot be a folder"),
        ({"train_domains": ["../x"]}, "'../x' cannot be a folder"),
        ({"leave_one_out": ["a/b", "c", "d"], "train_domains": None}, "'all-but-a/b' cannot be a folder"),
        (
            {"leave_one_out": ["a", "b", "c"], "train_domains": ["c+b"]},
            r"c\+b and b\+c would both have the folder all-but-a: leave one out",
        ),
        (
            {"leave_one_out": ["a", "b", "c"], "train_domains": ["all-but-a"]},
            r"all-but-a and b\+c would both have the folder all-but-a",
        ),
        ({"train_domains": ["Brain", "brain"]}, "Brain and brain would both have the folder brain"),  # on some disks
    ],
)
def test_two_trainings_never_share_a_folder(study_of, change, said):
    with pytest.raises(ConfigError, match=said):
        study_of(**change)


# --- sweeps


def swept_values(study, *names):
    """What every training takes of these parameters, by its optimizer's name."""
    return {folder.split("/")[1]: tuple(of.get(name) for name in names) for folder, of in trainings(study).items()}


def test_a_list_multiplies_the_optimizers_that_use_the_parameter(study_of):
    study = study_of(optimizers=["adam", "adam-2x", "sam"], train={"steps": 10, "rho": [0.01, 0.03]})
    expected = {"adam": None, "adam-2x": None, "sam-rho=0.01": 0.01, "sam-rho=0.03": 0.03}
    assert swept_values(study, "rho", "steps") == {name: (rho, 10) for name, rho in expected.items()}
    assert study.optimizers == list(expected)
    assert {of["optimizer"] for of in trainings(study).values()} == {"adam", "adam-2x", "sam"}


def test_lists_multiply_each_other_and_those_of_a_variant(study_of):
    variants = {"wide": {"optimizer": "sam", "rho": [0.1, 0.2], "lr": 0.5}}
    study = study_of(optimizers=["adam", "wide"], variants=variants, train={"lr": [0.001, 0.002], "clip": [0, 1.0]})
    assert swept_values(study, "lr", "rho", "clip") == {
        **{f"adam-clip={clip}-lr={lr}": (lr, None, clip) for lr in (0.001, 0.002) for clip in (0, 1.0)},
        **{f"wide-clip={clip}-rho={rho}": (0.5, rho, clip) for clip in (0, 1.0) for rho in (0.1, 0.2)},
    }


def test_a_parameter_that_is_a_list_takes_a_list_of_lists(study_of):
    train = {"down": [[4, 8], [4, 8, 8]], "precision": ["float32", "bf16"], "augment": [True]}
    study = study_of(optimizers=["sam"], train=train)
    assert swept_values(study, "down", "augment") == {
        f"sam-augment=True-down={word}-precision={precision}": (down, True)
        for word, down in (("4_8", [4, 8]), ("4_8_8", [4, 8, 8]))
        for precision in ("float32", "bf16")
    }
    assert swept_values(study_of(optimizers=["sam"], train={"down": [4, 8]}), "down") == {"sam": ([4, 8],)}


def test_files_are_named_safely_whatever_the_value(study_of):
    names = study_of(optimizers=["sam"], train={"weights": ["2d", "a b/{c}:*.pt", ""], "lr": [1e-5, 1e16]}).optimizers
    assert names == [f"sam-lr={lr}-weights={of}" for lr in ("1e-05", "1e_16") for of in ("2d", "a_b_c_.pt", "")]


def test_a_sweep_is_compared_with_adam_of_the_same_values(study_of):
    study = study_of(optimizers=["adam-2x", "adam", "sam"], train={"lr": [0.001, 0.002], "rho": [0.01, 0.03]})
    assert compared(study) == ("adam-lr=0.001", "sam-lr=0.001-rho=0.01")
    spent = {"adam-2x": (2, 2), "adam": (1, 1), "sam": (1, 2)}
    history = [(name, *spent[name.partition("-lr=")[0]]) for name in study.optimizers]
    history = pd.DataFrame(history, columns=["optimizer", "step", "gradient_evaluations"])
    results = made_up(study.optimizers)
    of = report.run("comparison", real=["compare_what"], study=study, results=results, history=history)
    told = {(b, t): equal for b, t, equal in of.differences[["baseline", "treatment", "equal"]].values}
    assert told == {
        (f"{base}-lr={lr}", f"sam-lr={lr}-rho={rho}"): equal
        for lr in (0.001, 0.002)
        for rho in (0.01, 0.03)
        for base, equal in (("adam", "steps"), ("adam-2x", "compute"))
    }


@pytest.mark.parametrize("optimizers", [["sam", "adam-2x", "late"], ["adam-2x", "sam", "late"]])
def test_without_adam_its_twice_the_steps_is_the_baseline_in_any_order(study_of, optimizers):
    study = study_of(optimizers=optimizers, variants={"late": {"optimizer": "sam", "late": 0.75}})
    assert compared(study) == ("adam-2x", "sam")


def made_up(optimizers):
    """Results of them all on one pair."""
    about = {"train_domain": "brain-mr", "test_domain": "heart-mr", "seed": 0, "pair": "p", "label": "x"}
    rows = [about | {"optimizer": name, "metric": "dice", "value": 0.5, "unit": "1"} for name in optimizers]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"rho": []}}, r"sam: expected one value or more of each parameter, .*, got \{'rho': \[\]\}"),
        ({"train": {"lr": [0.1, 0.1]}}, r"adam: expected one value or more of each parameter, and names that differ"),
        ({"train": {"weights": ["A.pt", "a.pt"]}}, r"adam: expected .* names that differ in more than capitals"),
        ({"train": {"every": [1, 2], "lr": [0.1, 0.2]}}, "train: expected optimizers that use every, got adam, sam"),
        (
            {"train": {"lr": [0.1, 0.2]}, "optimizers": ["v"], "variants": {"v": {"optimizer": "sam", "lr": 0.3}}},
            "train: expected optimizers that use lr, got v",
        ),
        ({"variants": {"v": {"optimizer": "sam", "roh": [1, 2]}}}, r"(?s)run brain-mr/v/seed0.*roh: unknown"),
        ({"train": {"roh": [0.1, 0.2]}}, r"(?s)section train.*roh: unknown; .*did you mean rho"),
        ({"train": {"lr": [0.1, "1e-3"]}}, r"(?s)run brain-mr/adam-lr=1e-3/seed0.*write 1.0e-3"),
        (
            {"optimizers": ["adam", "v"], "variants": {"v": {"optimizer": "adam", "rho": [0.1, 0.2]}}},
            "v: expected lists that adam uses, got rho",
        ),
        ({"train": {"seed": [0, 1]}}, "section train: the study itself sets seed"),
        ({"train": {"down": [[4, 8], 8]}}, r"(?s)run brain-mr/adam-down=8/seed0.*down: expected a list, got 8"),
    ],
)
def test_a_wrong_sweep_says_what_is_right(study_of, change, said):
    with pytest.raises(ConfigError, match=said):
        study_of(**change)
