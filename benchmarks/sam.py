"""What SAM costs beside the optimizer it stands next to: time of a step, and peak memory in copies of the weights.

    python benchmarks/sam.py

Writes benchmarks/sam.csv, in 4 minutes on two quiet cores. A step is `step.train_step`, without the making of the
batch. The optimizers take turns, step by step, in one run; times are medians. SAM every 5th step and LookSAM are
averaged: a fifth of the median step with a climb, four fifths of the median step without. Memory is the highest number
of bytes alive in tensors, by torch's own account (its profiler): of the first six steps of a training, SAM's less
Adam's, and of the climb alone, from entering the block to leaving it with nothing in it.
"""

import itertools
import statistics
import time

import torch
from recording import record

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import UNIGRADICON
from fmsam_lib.parameters import Train
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.losses import Batch, jittered_points
from fmsam_lib.training.sam import SAM
from fmsam_lib.training.step import perturbation, train_step

THREADS = 2
EVERY = 5
ROUNDS = 5
STUDY = {"shape": [64, 64], "down": [16, 32, 64], "levels": 3, "last_step": False}  # of the quick study
CUBE = {"shape": [32, 32, 32], "down": [16, 32, 64], "levels": 3, "last_step": True}
BASES = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}


def settings(optimizer: str, case: dict) -> Train:
    return Train(optimizer=optimizer, every=EVERY, steps=1, lr=1e-5, threads=THREADS, **case)


def stepping(optimizer: str, case: dict, base: str):
    """A network, and a call that does one training step of it."""
    run = settings(optimizer, case)
    torch.manual_seed(0)
    net = GradICON(len(run.shape), down=tuple(run.down), levels=run.levels, last_step=run.last_step).train()
    adam, sam = BASES[base](net.parameters(), lr=run.lr), perturbation(net, run)
    state = State()
    batch = Batch(*torch.rand(2, run.batch, 1, *run.shape), jittered_points(tuple(run.shape), torch.Generator()))
    return net, lambda: train_step(net, [batch], run, adam, sam, state)


def seconds(case: dict, base: str) -> dict[str, float]:
    """Of a step, on average over `EVERY` of them; the optimizers take turns."""
    calls = {name: stepping(name, case, base)[1] for name in ("adam", "sam", "asam", "sam-every", "looksam")}
    times = {name: [[] for _ in range(EVERY)] for name in calls}
    for i in range(EVERY * (ROUNDS + 1)):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name][i % EVERY].append(time.perf_counter() - start)
    # the first round warms up; the first step of each climbs
    first = {name: statistics.median(steps[0][1:]) for name, steps in times.items()}
    others = {name: statistics.median(t for step in steps[1:] for t in step[1:]) for name, steps in times.items()}
    return {name: (first[name] + (EVERY - 1) * others[name]) / EVERY for name in calls}


def peak_bytes(call) -> int:
    """The most bytes that were alive in tensors made during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def copies_in_training(optimizer: str, case: dict) -> float:
    """The peak of the first six steps less that of Adam's, in copies of the weights."""
    peaks = []
    for name in ("adam", optimizer):
        net, call = stepping(name, case, "Adam")
        peaks.append(peak_bytes(lambda call=call: [call() for _ in range(EVERY + 1)]))
    return (peaks[1] - peaks[0]) / bytes_of(net)


def copies_in_the_climb(**options) -> float:
    """The peak of entering the block and leaving it, in copies of the full network's weights."""
    net = GradICON(3, **UNIGRADICON, last_step=True)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    sam = SAM(net.parameters(), 0.01, net=net, **options)

    def climb():
        with sam.perturbed():
            pass

    return peak_bytes(climb) / bytes_of(net)


def bytes_of(net) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    names = {"sam": "SAM", "asam": "ASAM", "sam-every": f"SAM every {EVERY}th step", "looksam": f"LookSAM({EVERY})"}
    for (place, case), base in itertools.product({"2-D": STUDY, "3-D": CUBE}.items(), BASES):
        times = seconds(case, base)
        where = f"{place}, {'x'.join(map(str, case['shape']))}, beside {base}"
        for optimizer, name in names.items():
            reach = "<= 2.0" if optimizer in ("sam", "asam") else "<= 1.3"
            rows.append((f"step, {where}: {name} / {base}", times[optimizer] / times["adam"], reach, "ratio"))
        rows.append((f"step, {where}: {base}", times["adam"], "", "s"))
    for place, case in (("2-D", STUDY), ("3-D", CUBE)):
        for optimizer in names:
            extra = copies_in_training(optimizer, case)
            reach = "<= 1.02" if optimizer in ("sam", "asam") else ""
            rows.append(
                (f"peak of training, {place}: {names[optimizer]} - Adam", extra, reach, "copies of the weights")
            )
    for name, options in {"SAM": {}, "ASAM": {"adaptive": True}, "random direction": {"random_seed": 0}}.items():
        extra = copies_in_the_climb(**options)
        reach = "" if options.get("random_seed") == 0 else "<= 1.02"
        rows.append((f"climb alone, full network: {name}", extra, reach, "copies of the weights"))
    looking = copies_in_the_climb(every=EVERY, alpha=0.7)
    rows.append((f"climb alone, full network: LookSAM({EVERY}), its direction included", looking, "", rows[-1][3]))
    record(rows, __file__, threads=THREADS)


if __name__ == "__main__":
    main()
