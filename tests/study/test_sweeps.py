"""Grids: what the folders of runs are called."""

import pytest
import yaml

from fmsam_lib.checking import ConfigError
from fmsam_lib.study.file import read_study
from fmsam_lib.study.grid import grid
from fmsam_lib.study.notebooks import jobs
from tests.conftest import PROJECT

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
    assert max(len(run.folder) for study in studies for run in grid(study)) < 50


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
