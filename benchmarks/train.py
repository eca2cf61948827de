"""How long a training waits for its batches, which are made while the network computes.

    python benchmarks/train.py

Writes benchmarks/train.csv, in 3 minutes on two quiet cores. Trainings as the studies do them, one thread, from the
first step on, when no pair is made yet: with batches made ahead and with batches made in between, in turn; medians of
three trainings each.
"""

import statistics
import tempfile
import time
from unittest import mock

from recording import record

from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training.loop import fit, starting

REPEATS = 3
MIX = "brain-mr+lung-ct+knee-mr+abdomen-ct"
CASES = {
    "2-D, 64x64, batch 4": {"shape": [64, 64], "batch": 4, "steps": 40},
    "3-D, 40x48x40, batch 1": {"shape": [40, 48, 40], "batch": 1, "steps": 10},
}


def in_between(make, steps):
    """What `loop.ahead` would be without a thread of its own."""
    for step in steps:
        yield make(step)


def measure(case: dict, optimizer: str) -> tuple[float, float]:
    """Seconds a step, and the share of them spent waiting for a batch."""
    with tempfile.TemporaryDirectory() as out:
        run = Train(out=out, train_domain=MIX, optimizer=optimizer, augment=True, validation=0, threads=1, **case)
        net, dataset = starting(run), open_domain(MIX, shape=tuple(run.shape))
        start = time.perf_counter()
        history = fit(net, dataset, run, progress=False)
        seconds = time.perf_counter() - start
    steps = [b["step"] - a for a, b in zip([0, *(line["step"] for line in history)], history, strict=False)]
    waited = sum(n * line["seconds_waiting_for_data"] for n, line in zip(steps, history, strict=True))
    return seconds / run.steps, waited / seconds


def main() -> None:
    rows = []
    for name, case in CASES.items():
        for optimizer in ("adam", "sam"):
            ahead, between = [], []
            for _ in range(REPEATS):
                ahead.append(measure(case, optimizer))
                with mock.patch("fmsam_lib.training.loop.ahead", in_between):
                    between.append(measure(case, optimizer))
            where = f"{name}, {optimizer}"
            (time_ahead, waiting), (time_between, waiting_between) = (
                [statistics.median(values) for values in zip(*runs, strict=True)] for runs in (ahead, between)
            )
            rows.append((f"waiting, of a step, {where}", waiting, "<= 0.05", "ratio"))
            rows.append((f"waiting, of a step, {where}, batches made in between", waiting_between, "", "ratio"))
            rows.append((f"step, {where}: batches made ahead / in between", time_ahead / time_between, "", "ratio"))
            rows.append((f"step, {where}", time_ahead, "", "s"))
    record(rows, __file__, threads=1)


if __name__ == "__main__":
    main()
