"""The grid of a study: train domain x optimizer x seed."""

import itertools
from dataclasses import dataclass

from fmsam_lib.parameters import EQUAL_COMPUTE
from fmsam_lib.study.file import Study

BASELINE = "adam"  # the other optimizers are compared with it


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    train_domain: str
    optimizer: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.train_domain}/{self.optimizer}/seed{self.seed}"


def grid(study: Study) -> list[Run]:
    """All runs of a study."""
    return [Run(*cell) for cell in itertools.product(study.train_domains, study.optimizers, study.seeds)]


def compared(study: Study) -> tuple[str, str]:
    """Baseline and treatment of the report: Adam, and the first optimizer that is another one at the same steps."""
    baseline = BASELINE if BASELINE in study.optimizers else study.optimizers[0]
    others = [o for o in study.optimizers if o != baseline] or [baseline]
    return baseline, next((o for o in others if o != EQUAL_COMPUTE), others[0])


def twins(study: Study) -> list[tuple[Run, Run]]:
    """Runs of baseline and treatment with the same training domain and seed, so the same start."""
    baseline, treatment = compared(study)
    runs = {(run.train_domain, run.optimizer, run.seed): run for run in grid(study)}
    found = [(runs[d, baseline, s], runs[d, treatment, s]) for d in study.train_domains for s in study.seeds]
    return [pair for pair in found if pair[0] != pair[1]]


def between_folder(run: Run) -> str:
    """Where notebook 35 puts what lies between the solutions of this training domain and seed."""
    return f"{run.train_domain}/between/seed{run.seed}"
