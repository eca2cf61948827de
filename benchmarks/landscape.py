"""What a plane costs beside the bare evaluations of its loss: time, and peak memory in copies of the weights.

    python benchmarks/landscape.py

Writes benchmarks/landscape.csv, in 5 minutes on a quiet core, one thread. After every row of a plane as many bare
evaluations of the same loss take their turn, at weights that stay: the plane's time without them over theirs, setting
up included; the median of `REPEATS` planes. Times are the processor's, which other processes
disturb less. loss-landscapes' random plane does the same in one run. Memory is the highest number of bytes alive in
tensors, by torch's own account (its profiler), less that of one bare evaluation.
"""

import statistics
import time

import loss_landscapes
import torch
from recording import record
from sam import bytes_of, peak_bytes

from fmsam_lib.flatness.landscape import LossOf, line, loss_of, plane, random_direction
from fmsam_lib.model.network import GradICON
from fmsam_lib.training.losses import Batch, jittered_points

REPEATS = 3
POINTS = 25  # along each side
RADIUS = 0.5
CASES = {"2-D, 64x64, batch 4": ((64, 64), 4), "3-D, 24x24x24, batch 1": ((24, 24, 24), 1)}


def network(dim: int) -> GradICON:
    """Untrained, but no tensor is zero: loss-landscapes' normalisation would divide 0 by 0."""
    torch.manual_seed(0)
    net = GradICON(dim, down=(16, 32, 64), levels=3, last_step=False).eval()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net


def loss_on(shape: tuple[int, ...], pairs: int) -> LossOf:
    images = torch.rand(2, pairs, 1, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(*images, jittered_points(shape, torch.Generator().manual_seed(0)))
    return loss_of(batch, lmbda=1.5, sigma=5.0)


def ours(net: GradICON, loss: LossOf, points: int = POINTS) -> None:
    directions = [random_direction(net, seed=seed) for seed in range(2)]
    plane(net, loss, *directions, radius=RADIUS, points=points)


def theirs(net: GradICON, loss: LossOf, points: int = POINTS) -> None:
    loss_landscapes.random_plane(net, lambda w: loss(w.modules[0]), 2, points, "filter", deepcopy_model=True)


def beside_bare_ones(call, net: GradICON, loss: LossOf) -> tuple[float, float]:
    """Processor seconds of the call, and of the `POINTS`^2 bare evaluations that take turns with it."""
    bare, seen = [], 0

    def in_turns(there):
        nonlocal seen
        value, seen = loss(there), seen + 1
        if seen % POINTS == 0:
            start = time.process_time()
            for _ in range(POINTS):
                loss(net)
            bare.append(time.process_time() - start)
        return value

    start = time.process_time()
    call(in_turns)
    whole = time.process_time() - start
    assert seen == POINTS**2, f"expected {POINTS**2} evaluations, got {seen}"
    return whole - sum(bare), sum(bare)


def extra_copies(call, net: GradICON, loss: LossOf) -> float:
    """The call's peak less a bare evaluation's, in copies of the weights."""
    return (peak_bytes(call) - peak_bytes(lambda: loss(net))) / bytes_of(net)


def measure(name: str, shape: tuple[int, ...], pairs: int) -> list[tuple]:
    net, loss = network(len(shape)), loss_on(shape, pairs)
    loss(net)  # warms up
    times = [beside_bare_ones(lambda turn: ours(net, turn), net, loss) for _ in range(REPEATS)]
    in_plane = extra_copies(lambda: ours(net, loss, 3), net, loss)
    by_peer, bare = beside_bare_ones(lambda turn: theirs(net, turn), net, loss)
    in_line = extra_copies(lambda: line(net, loss, random_direction(net, seed=0), radius=RADIUS, points=3), net, loss)
    in_theirs = extra_copies(lambda: theirs(net, loss, 3), net, loss)
    where, copies = f"{POINTS}x{POINTS}, {name}", "copies of the weights"
    ratio = statistics.median(taken / bare for taken, bare in times)
    return [
        (f"plane, {where}: ours / bare evaluations", ratio, "<= 1.05", "ratio"),
        (f"plane, {where}: loss-landscapes' / bare evaluations", by_peer / bare, "", "ratio"),
        (f"bare evaluation, {name}", statistics.median(bare for _, bare in times) / POINTS**2, "", "s"),
        (f"peak beyond an evaluation's, {name}: our plane and its directions", in_plane, "", copies),
        (f"peak beyond an evaluation's, {name}: our line and its direction", in_line, "", copies),
        (f"peak beyond an evaluation's, {name}: loss-landscapes' plane", in_theirs, "", copies),
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for name, case in CASES.items() for row in measure(name, *case)]
    record(rows, __file__, threads=1)


if __name__ == "__main__":
    main()
