"""Between two trainings from one start: the straight path from one solution to the other, and the plane of all three.

BatchNorm's running statistics belong to the weights that they were gathered with. On the way they are either
interpolated as the weights are, which is exact at the solutions, or gathered anew from training images at every point,
without which a barrier may be one of the statistics alone (Jordan et al. 2023, arXiv 2211.08403).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError
from fmsam_lib.flatness.landscape import TRAINING, LossOf, batches_of, loss_of, surface
from fmsam_lib.flatness.weight_space import TERMS, WeightSpace, vector
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Between, Train
from fmsam_lib.records import read_json
from fmsam_lib.training.averages import gather_statistics
from fmsam_lib.training.checkpoint import identity, trained_with
from fmsam_lib.training.loop import starting
from fmsam_lib.training.losses import Batch

ALIKE = ["train_domain", "seed", "shape", "weights", "down", "up", "levels", "last_step"]  # trainings of one start,
LOSS = ["similarity", "sigma", "lmbda"]
ALIKE += LOSS  # and of one loss
COLUMNS = ["train_domain", "test_domain", "baseline", "treatment", "seed"]
COLUMNS += ["kind", "statistics", "optimizer", "step", "alpha", "beta", "term", "value"]
BEYOND = 0.25  # how far past both solutions the path goes on, of the distance between them


def path(start: nn.Module, end: nn.Module, loss: LossOf, *, points: int, anew: Sequence[Batch] = ()) -> pd.DataFrame:
    """The loss along the straight line through two networks: alpha 0 is `start`, 1 is `end`; `BEYOND` on either side.

    points: from start to end, both included. anew: batches to gather BatchNorm's statistics from, too. Rows statistics
    ("interpolated" or "re-estimated"), alpha, term, value.
    """
    outside = round(BEYOND * (points - 1))
    alphas = np.arange(-outside, points + outside) / (points - 1)
    space, last = WeightSpace(start), vector(end)
    way, rows = last - space.w, []
    for alpha in tqdm(alphas.tolist(), desc="path", unit="point", leave=False):
        # start + (end - start) would be the end but for rounding
        with space.at(origin=last) if alpha == 1 else space.at(way, alpha) as net:
            mix_buffers(net, [start, end], [1 - alpha, alpha])
            rows += [("interpolated", alpha, *row) for row in zip(TERMS, loss(net), strict=True)]
            if anew:
                gather_statistics(net, [(batch.moving, batch.fixed) for batch in anew])
                rows += [("re-estimated", alpha, *row) for row in zip(TERMS, loss(net), strict=True)]
    return pd.DataFrame(rows, columns=["statistics", "alpha", "term", "value"]).assign(kind="path")


def barrier(line: pd.Series) -> tuple[float, float]:
    """The most that the loss rises above the chord between both ends' (Entezari et al. 2022), and at which alpha.

    line: losses by alpha, of one term and kind of statistics. 0: the loss nowhere rises above it; NaN with a NaN
    between.
    """
    line = line[(line.index >= 0) & (line.index <= 1)].sort_index()
    if line.isna().any() or line.empty:
        return np.nan, np.nan
    excess = line - (line.iloc[0] + line.index * (line.iloc[-1] - line.iloc[0]))
    return max(0.0, float(excess.max())), float(excess.idxmax())


def mix_buffers(net: nn.Module, corners: list[nn.Module], shares: list[float]) -> None:
    """Give `net` the mixed buffers of the corners; exact where one share is 1 and the others are 0.

    A running variance does not fall below the smallest of theirs, as it would far outside of the corners. Counters,
    which no mean makes sense of, are those of the corner with the largest share.
    """
    largest = shares.index(max(shares))
    for (name, buffer), *theirs in zip(net.named_buffers(), *(corner.buffers() for corner in corners), strict=True):
        floating = buffer.is_floating_point()
        mixed = sum(share * b for share, b in zip(shares, theirs, strict=True)) if floating else theirs[largest]
        if name.endswith("running_var"):
            mixed = torch.maximum(mixed, torch.stack(theirs).amin(0))
        buffer.copy_(mixed)


class Solutions:
    """The plane through a start and two solutions: alpha from the start towards the baseline, beta at a right angle.

    Distances are the weights' own. Raises ValueError where the three lie on one line.
    """

    def __init__(self, start: nn.Module, baseline: nn.Module, treatment: nn.Module):
        self.corners = [start, baseline, treatment]
        self.origin = vector(start).double()
        to_baseline, to_treatment = (vector(net).double() - self.origin for net in (baseline, treatment))
        lengths = to_baseline.norm(), to_treatment.norm()
        self.along = to_baseline / lengths[0]
        aside = to_treatment - (to_treatment @ self.along) * self.along
        if not (min(lengths) > 0 and aside.norm() > 1e-6 * lengths[1]):
            raise ValueError("expected start and two solutions, got three networks on one line: is a run given twice?")
        self.across = aside / aside.norm()
        self.places = [self.place(net)[:2] for net in self.corners]
        self.space = WeightSpace(start)
        self.steps = [direction.to(self.space.w.dtype) for direction in (self.along, self.across)]

    def place(self, net: nn.Module | Tensor) -> tuple[float, float, float]:
        """alpha and beta of the nearest point of the plane, and the share of the distance from the start beside it."""
        way = (vector(net) if isinstance(net, nn.Module) else net).double() - self.origin
        alpha, beta = float(way @ self.along), float(way @ self.across)
        beside = (way - alpha * self.along - beta * self.across).norm()
        return alpha, beta, float(beside / way.norm()) if way.norm() > 0 else 0.0

    def shares(self, alpha: float, beta: float) -> list[float]:
        """Of start, baseline and treatment in the point: barycentric coordinates."""
        (_, _), (length, _), (forth, aside) = self.places
        of_treatment = beta / aside
        of_baseline = (alpha - of_treatment * forth) / length
        return [1 - of_baseline - of_treatment, of_baseline, of_treatment]

    @contextmanager
    def at(self, alpha: float, beta: float) -> Iterator[nn.Module]:
        """Inside the block a network stands at the point of the plane, its statistics interpolated."""
        along, across = self.steps
        with self.space.at(along, alpha, origin=self.space.w + beta * across) as net:
            mix_buffers(net, self.corners, self.shares(alpha, beta))
            yield net


def trajectories(solutions: Solutions, trainings: Iterable[tuple[str, Path, int]]) -> pd.DataFrame:
    """Where the trainings went on the plane, from their `snapshots/`: rows optimizer, step, alpha, beta, value.

    trainings: optimizer, folder and number of steps of each. value: the share of the distance from the start that lies
    beside the plane. Start and end are always there.
    """
    rows = []
    for (optimizer, folder, steps), end in zip(trainings, solutions.corners[1:], strict=True):
        seen: dict[int, nn.Module | Tensor] = {0: solutions.corners[0], steps: end}
        for file in folder.glob("snapshots/step*.pt"):
            seen[int(file.stem.removeprefix("step"))] = torch.load(file, weights_only=True)
        rows += [(optimizer, step, *solutions.place(seen[step])) for step in sorted(seen)]
    return pd.DataFrame(rows, columns=["optimizer", "step", "alpha", "beta", "value"]).assign(kind="trajectory")


def from_one_start(baseline: str, treatment: str) -> tuple[list[str], list[Train], list[GradICON]]:
    """Two runs by their folders: a name for each, their trainings, and the networks start, baseline and treatment.

    Raises ConfigError where the runs do not start from the same weights or differ in their loss.
    """
    folders = [Path(baseline), Path(treatment)]
    runs = [trained_with(folder) for folder in folders]
    one, other = (run.model_dump() for run in runs)
    differing = [f"{name}: {one[name]!r} and {other[name]!r}" for name in ALIKE if one[name] != other[name]]
    now = identity(runs[0], None, start := starting(runs[0]).eval())["start"]  # `weights` may be another file by now
    there = [read_json(folder / "config.json", {}).get("start") for folder in folders]
    differing += [f"first weights (hash): {began} there, {now} now" for began in there if began != now]
    if differing:
        raise ConfigError("expected two runs from one start with one loss, got\n- " + "\n- ".join(differing))
    names = [folder.parent.name for folder in folders]  # a study's name for each optimizer
    if names[0] == names[1] and folders[0] != folders[1]:
        raise ConfigError(f"expected folders that tell them apart, <name>/seed<seed>, got {folders[0]}, {folders[1]}")
    return names, runs, [start, *(load(folder / "weights.pt") for folder in folders)]


def between(settings: Between) -> pd.DataFrame:
    """The path and the plane of two runs on their training images and on every test domain, and the trajectories.

    Raises ConfigError as `from_one_start`; ValueError as `Solutions`.
    """
    names, runs, nets = from_one_start(settings.baseline, settings.treatment)
    solutions = Solutions(*nets)
    tracks = trajectories(solutions, [(n, Path(run.out), run.updates) for n, run in zip(names, runs, strict=True)])
    low, high = tracks[["alpha", "beta"]].min(), tracks[["alpha", "beta"]].max()
    margin = 0.2 * (high - low)
    axes = np.linspace(low - margin, high + margin, settings.plane_points).T
    batches = batches_of(runs[0], settings.test_domains, pairs=settings.pairs, data=settings.data)
    parts = [tracks.assign(test_domain="")]
    for domain, batch in tqdm(batches.items(), desc="between the solutions", unit="domain"):
        loss = loss_of(batch, **runs[0].loss())
        on_path = path(nets[1], nets[2], loss, points=settings.path_points, anew=[batches[TRAINING]])
        on_plane = surface(solutions.at, loss, *axes).assign(kind="plane")
        parts += [part.assign(test_domain=domain) for part in (on_path, on_plane)]
    about = {"train_domain": runs[0].train_domain, "seed": runs[0].seed, "baseline": names[0], "treatment": names[1]}
    return pd.concat(parts, ignore_index=True).assign(**about)
