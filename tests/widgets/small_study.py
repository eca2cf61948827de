"""A small study, computed by what its notebooks call: two seeds, two optimizers, a domain seen and an unseen one."""

import yaml

from fmsam_lib.checking import read
from fmsam_lib.evaluation.evaluate import evaluate_all
from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Evaluate, Train
from fmsam_lib.records import write_csv
from fmsam_lib.study.file import read_study
from fmsam_lib.study.notebooks import jobs
from fmsam_lib.training.loop import fit, starting

STUDY = {
    "description": "small",
    "train_domains": ["brain-mr"],
    "test_domains": ["brain-mr", "heart-mr"],
    "optimizers": ["adam", "sam"],
    "seeds": [0, 1],
    "shape": [32, 32],
    "train": {"down": [8, 16], "levels": 2, "steps": 60, "lr": 0.003, "rho": 0.02, "sigma": 3.0, "validation": 0},
    "evaluate": {"pairs": 6, "corruptions": []},
    "landscape": None,
}


def compute(root):
    """The study's folder, all but its report."""
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    for job in jobs(read_study(root / "study.yaml"), root, "", root / "study.yaml"):
        if job.notebook == "10_train":
            run = read(Train, job.values)
            fit(starting(run), open_domain(run.train_domain, shape=run.shape), run, progress=False)
        elif job.notebook == "20_evaluate":
            run = read(Evaluate, job.values)
            for name, table in evaluate_all(run, progress=False)[0].items():
                write_csv(table, f"{run.out}/{name}.csv")
