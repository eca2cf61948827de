"""The loss around trained weights: slices, planes, and its rise at SAM's step.

Directions are Gaussian, seeded, and normalised filter by filter (Li et al. 2018, arXiv 1712.09913), so
that a distance of 1 moves every filter by its own norm, whatever the weights' scale. Everything is
measured in eval mode on one fixed batch, the same for every network that is compared, and on a copy of
the network: the one that was given stays as it is.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import loss_landscapes
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmsam_lib.config import Landscape, Train, written_whole
from fmsam_lib.domains import readable_test_pairs
from fmsam_lib.losses import Batch, jittered_points, objective
from fmsam_lib.network import GradICON
from fmsam_lib.sam import SAM

TERMS = ("total", "similarity", "regulariser")
COLUMNS = [
    "train_domain",
    "test_domain",
    "optimizer",
    "seed",
    "kind",
    "direction",
    "alpha",
    "beta",
    "rho",
    "term",
    "value",
]

LossOf = Callable[[nn.Module], np.ndarray]  # a network's TERMS, (3,)


def fixed_batch(dataset, *, pairs: int, seed: int = 0) -> Batch:
    """The first readable test pairs of `dataset` as one batch, with the penalty's points drawn from `seed`."""
    chosen = readable_test_pairs(dataset, pairs)
    points = jittered_points(tuple(chosen[0].fixed.shape[1:]), torch.Generator().manual_seed(seed))
    return Batch(torch.stack([p.moving for p in chosen]), torch.stack([p.fixed for p in chosen]), points)


def loss_of(batch: Batch, **settings) -> LossOf:
    """The function from a network to its loss terms on `batch`; settings: those of `objective`."""

    @torch.no_grad()
    def evaluate(net: nn.Module) -> np.ndarray:
        return np.array([term.item() for term in objective(net, batch, **settings)])

    return evaluate


def filter_normalised_direction(net: nn.Module, *, seed: int) -> list[Tensor]:
    """A random direction in weight space, a tensor for every parameter.

    Each filter, all weights of one output channel, has the norm of the network's own; biases and
    BatchNorm's parameters (1-D) don't move, nor does a filter that is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(m.weight) for m in net.modules() if isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d)}
    direction = []
    for p in net.parameters():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.dim() <= 1:
            direction.append(torch.zeros_like(p))
        else:
            output = 1 if id(p) in transposed else 0  # transposed convolutions have their output channels second
            others = [axis for axis in range(p.dim()) if axis != output]
            own, drawn = (torch.linalg.vector_norm(t.detach(), dim=others, keepdim=True) for t in (p, d))
            direction.append(d * own / drawn)
    return direction


def moved(net: nn.Module, *steps: tuple[float, list[Tensor]]) -> nn.Module:
    """A copy of `net` at `w + sum of distance * direction`."""
    there = copy.deepcopy(net)
    with torch.no_grad():
        for distance, direction in steps:
            for p, d in zip(there.parameters(), direction, strict=True):
                p.add_(d, alpha=distance)
    return there


def segment(start: nn.Module, end: nn.Module, loss: LossOf, points: int) -> np.ndarray:
    """The loss at `points` weights evenly spaced from `start` to `end`, both included, `(points, 3)`.

    `loss_landscapes.linear_interpolation` leaves out the start, so it is measured beside it.
    """

    def metric(wrapper) -> np.ndarray:  # loss-landscapes hands a wrapper round the network
        return loss(wrapper.modules[0])

    rest = loss_landscapes.linear_interpolation(start, end, metric, steps=points - 1, deepcopy_model=True)
    return np.concatenate([[loss(start)], rest])


def line(net: nn.Module, loss: LossOf, direction: list[Tensor], *, radius: float, points: int) -> pd.DataFrame:
    """The loss from `-radius` to `radius` along one direction; rows `alpha, term, value`."""
    alphas = np.linspace(-radius, radius, points)
    values = segment(moved(net, (-radius, direction)), moved(net, (radius, direction)), loss, points)
    return _rows(alpha=np.repeat(alphas, len(TERMS)), values=values)


def plane(net: nn.Module, loss: LossOf, along: list[Tensor], across: list[Tensor], *, radius: float, points: int):
    """The loss on a square of side `2 radius`, row by row; rows `alpha, beta, term, value`.

    loss-landscapes' own planes shift every second row, hence a line for each row.
    """
    alphas = np.linspace(-radius, radius, points)
    rows = []
    for beta in tqdm(alphas, desc="plane", unit="row", leave=False):
        ends = [moved(net, (alpha, along), (beta, across)) for alpha in (-radius, radius)]
        rows.append(_rows(alpha=np.repeat(alphas, len(TERMS)), values=segment(*ends, loss, points)).assign(beta=beta))
    return pd.concat(rows, ignore_index=True)


def rise(net: nn.Module, batch: Batch, rhos: list[float], **settings) -> pd.DataFrame:
    """`L(w + rho g / |g|) - L(w)`, SAM's own measure of sharpness (Foret et al. 2021); rows `rho, term, value`."""
    net = copy.deepcopy(net).requires_grad_(True)
    loss = loss_of(batch, **settings)
    at_w = loss(net)
    net.zero_grad()
    objective(net, batch, **settings).total.backward()
    values = []
    for rho in rhos:
        with SAM(net.parameters(), rho).perturbed():
            values.append(loss(net) - at_w)
    return _rows(rho=np.repeat(rhos, len(TERMS)), values=np.array(values))


def _rows(*, values: np.ndarray, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns | {"term": TERMS * len(values), "value": values.ravel()})


def landscape(net: GradICON, dataset, trained: Train, settings: Landscape) -> pd.DataFrame:
    """Lines along several directions, the plane of the first two, the rise, and |w|, on one dataset.

    trained: the parameters of the training, whose loss this is.
    """
    if net.training:
        raise ValueError("expected a network in eval mode, got one in training mode: call net.eval()")
    batch = fixed_batch(dataset, pairs=settings.pairs)
    loss = loss_of(batch, **trained.loss())
    seeds = range(settings.direction_seed, settings.direction_seed + max(2, settings.directions))
    drawn = [filter_normalised_direction(net, seed=seed) for seed in seeds]
    extent = {"radius": settings.radius, "points": settings.line_points}
    parts = [
        line(net, loss, direction, **extent).assign(kind="line", direction=i)
        for i, direction in enumerate(tqdm(drawn[: settings.directions], desc=f"{dataset.name} lines", unit="line"))
    ]
    extent["points"] = settings.plane_points
    parts.append(plane(net, loss, *drawn[:2], **extent).assign(kind="plane"))
    parts.append(rise(net, batch, settings.rhos, **trained.loss()).assign(kind="rise"))
    norm = torch.linalg.vector_norm(nn.utils.parameters_to_vector(net.parameters())).item()
    parts.append(pd.DataFrame([{"kind": "weight_norm", "value": norm}]))
    return pd.concat(parts, ignore_index=True).assign(test_domain=dataset.name)


def write_landscape(table: pd.DataFrame, path: Path | str) -> None:
    """`landscape.csv`, the columns in order."""
    with written_whole(path) as partial:
        table.reindex(columns=COLUMNS).to_csv(partial, index=False, lineterminator="\n")
