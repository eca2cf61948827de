"""The loss around trained weights: along random directions and on planes.

Directions are Gaussian and seeded. Normalised filter by filter (Li et al. 2018, arXiv 1712.09913), a distance of 1
moves every filter by its own norm, whatever the weights' scale. Everything is measured in eval mode on one fixed
batch with one fixed draw of the penalty's points, the same for every network that is compared.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import loss_landscapes
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmsam_lib.flatness.weight_space import TERMS, WeightSpace, vector
from fmsam_lib.images.domains import open_domain, readable_test_pairs
from fmsam_lib.model.network import GradICON
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Landscape, Train
from fmsam_lib.records import read_json
from fmsam_lib.training.losses import Batch, batch_of, jittered_points, objective, with_masks
from fmsam_lib.training.sam import norm

RUN = ["train_domain", "test_domain", "optimizer", "seed"]
COLUMNS = [*RUN, "kind", "direction", "alpha", "beta", "term", "value"]
TRAINING = "training"  # stands for a test domain: the images that the network was trained on

LossOf = Callable[[Any], np.ndarray]  # a network's TERMS, (3,)


def fixed_batch(dataset, *, pairs: int) -> Batch:
    """The first readable test pairs of `dataset` as one batch."""
    return batch_with(readable_test_pairs(dataset, pairs))


def batches_of(trained: Train, test_domains: list[str], *, pairs: int, data: str = "") -> dict[str, Batch]:
    """The batches that a training's network is measured on: of its training images, and of every test domain.

    TRAINING has the first training pairs of its domain (each of a mixture's in turn): the same for every seed and
    optimizer, so that their networks can be compared on it.
    """
    shape, there = tuple(trained.shape), read_json(Path(trained.out) / "config.json", {})
    how = {"seed": there.get("domain_seed", 0), "subjects": trained.subjects, "data": data or trained.data or None}
    dataset = open_domain(trained.train_domain, shape=shape, **how)
    batches = {TRAINING: batch_with([dataset.training_pair(i) for i in range(pairs)])}
    return batches | {n: fixed_batch(open_domain(n, shape=shape, data=data or None), pairs=pairs) for n in test_domains}


def batch_with(pairs: list[Pair]) -> Batch:
    """The pairs as one batch, with the same draw of the penalty's points for every network."""
    points = jittered_points(tuple(pairs[0].fixed.shape[1:]), torch.Generator().manual_seed(0))
    moving, fixed = (torch.stack(part) for part in zip(*with_masks(pairs), strict=True))
    return batch_of(moving, fixed, points)


def loss_of(batch: Batch, **settings: Any) -> LossOf:
    """The function from a network to its loss terms on `batch`; settings: those of `objective`."""

    @torch.no_grad()
    def evaluate(net: GradICON) -> np.ndarray:
        there = batch.to(next(net.parameters()).device)
        return np.array([term.item() for term in objective(net, there, **settings)])

    return evaluate


def random_direction(net: nn.Module, *, seed: int, normalisation: str = "filter") -> list[Tensor]:
    """A Gaussian direction in weight space, a tensor for every parameter.

    "filter": each filter, all weights of one output channel, gets the norm of the network's own; "layer": each tensor
    does; "none": the direction has length 1 in all, so that distances are in the weights' own units. Biases and
    BatchNorm's parameters (1-D) never move, nor does a filter or tensor that is zero (but with "none").
    """
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(m.weight) for m in net.modules() if isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d)}
    direction = []
    for p in net.parameters():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)  # the same on every device
        if p.dim() <= 1:
            d = torch.zeros_like(p)
        elif normalisation != "none":
            output = 1 if id(p) in transposed else 0  # transposed convolutions have their output channels second
            others = [axis for axis in range(p.dim()) if axis != output or normalisation == "layer"]
            weights = p.detach().contiguous()  # the memory layout would decide how sums are rounded
            own, drawn = (torch.linalg.vector_norm(t, dim=others, keepdim=True) for t in (weights, d))
            d = d * own / drawn
        direction.append(d.detach())
    if normalisation == "none":
        length = norm(direction)
        direction = [d / length for d in direction]
    return direction


def line(net: nn.Module, loss: LossOf, direction: Sequence[Tensor], *, radius: float, points: int) -> pd.DataFrame:
    """The loss from `-radius` to `radius` along one direction; rows `alpha, term, value`.

    points: an odd number. Two interpolations of loss-landscapes, from the weights outwards: it leaves out where it
    starts from and adds up the rounding of its steps, so that only thus the middle is the weights, to the bit.
    """
    alphas, half = places(radius, points), points // 2
    space, along = WeightSpace(net), vector(direction)

    def outwards(end: float) -> np.ndarray:
        with space.at(along, end) as net:
            there = copy.deepcopy(net)
        found = loss_landscapes.linear_interpolation(  # hands a wrapper round the network to its metric
            space.net, there, lambda wrapped: loss(wrapped.modules[0]), half, deepcopy_model=True
        )
        return found.reshape(half, -1)

    values = np.concatenate([outwards(-radius)[::-1], [loss(space.net)], outwards(radius)])
    about = {"alpha": np.repeat(alphas, len(TERMS)), "term": [*TERMS] * points}
    return pd.DataFrame(about | {"value": values.ravel()})


def places(radius: float, points: int) -> np.ndarray:
    """An odd number of points, evenly from `-radius` to `radius`, the middle exactly 0 (np.linspace may miss it)."""
    half = points // 2
    return radius * (np.arange(-half, half + 1) / half)


def plane(
    net: nn.Module, loss: LossOf, along: Sequence[Tensor], across: Sequence[Tensor], *, radius: float, points: int
) -> pd.DataFrame:
    """The loss on a square of side `2 radius`, `points` (odd) along a side; rows `alpha, beta, term, value`.

    (loss-landscapes' planes shift every second row by a step and leave out the start.)
    """
    space, first, second, grid = WeightSpace(net), vector(along), vector(across), places(radius, points)
    return surface(lambda alpha, beta: space.at(first, alpha, origin=space.w + beta * second), loss, grid, grid)


def surface(at: Callable[[float, float], Any], loss: LossOf, alphas: np.ndarray, betas: np.ndarray) -> pd.DataFrame:
    """The loss at every (alpha, beta), where `at` puts a network for the time of a block; rows as `plane`."""
    rows = []
    for beta in tqdm(betas.tolist(), desc="plane", unit="row", leave=False):
        for alpha in alphas.tolist():
            with at(alpha, beta) as net:
                rows += [(alpha, beta, *term) for term in zip(TERMS, loss(net), strict=True)]
    return pd.DataFrame(rows, columns=["alpha", "beta", "term", "value"])


def landscape(net: GradICON, batch: Batch, where: str, trained: Train, settings: Landscape) -> pd.DataFrame:
    """Lines along several directions, the plane of the first two, and the directions' cosines, on one batch.

    where: what the batch is of, `test_domain` in the rows. trained: the parameters of the training, whose loss this is.
    Rows of kind "line", "plane" and "cosine" (of the directions `direction` and `alpha`).
    """
    loss, radius = loss_of(batch, **trained.loss()), settings.radius
    seeds = range(settings.direction_seed, settings.direction_seed + max(2, settings.directions))
    drawn = [random_direction(net, seed=seed, normalisation=settings.normalisation) for seed in seeds]
    parts = []
    for i, direction in enumerate(tqdm(drawn[: settings.directions], desc=f"{where} lines", unit="line")):
        rows = line(net, loss, direction, radius=radius, points=settings.line_points)
        parts.append(rows.assign(kind="line", direction=i))
    parts.append(plane(net, loss, *drawn[:2], radius=radius, points=settings.plane_points).assign(kind="plane"))
    pairs = itertools.combinations([*enumerate(map(vector, drawn))], 2)  # cosines, of all parameters as one vector
    angles = [(i, j, float(torch.cosine_similarity(a, b, dim=0))) for (i, a), (j, b) in pairs]
    parts.append(pd.DataFrame(angles, columns=["direction", "alpha", "value"]).assign(kind="cosine"))
    return pd.concat(parts, ignore_index=True).assign(test_domain=where)
