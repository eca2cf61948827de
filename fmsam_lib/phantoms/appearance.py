"""What an anatomy looks like to a scanner: shapes painted, textures, bias field and noise.

`q` is `(3, *grid)`: the canonical coordinates of every sample.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from fmsam_lib.phantoms.anatomies import INF, Domain, Part


class Look(NamedTuple):
    """What differs between two people of the same shape: each part's brightness, and the texture inside."""

    brightness: np.ndarray  # (parts,)
    waves: Tensor  # (4, 3), radians per unit
    phases: Tensor  # (4, 1)


def new_look(rng: np.random.Generator) -> Look:
    waves, phases = rng.choice([-1, 1], (4, 3)) * rng.uniform(4, 9, (4, 3)), rng.uniform(0, 2 * np.pi, (4, 1))
    return Look(rng.standard_normal(99), *(torch.tensor(m, dtype=torch.float32) for m in (waves, phases)))


def paint(d: Domain, q: Tensor, look: Look, second: bool) -> tuple[Tensor, Tensor]:
    """The anatomy at `q`: intensities before acquisition and labels, each `(*grid)`."""
    grid = q.shape[1:]
    image, label = torch.full(grid, float(d.air)), torch.zeros(grid, dtype=torch.uint8)
    # A blotchy pattern carried along by the anatomy: two waves, each with its phase modulated by another.
    one, by_one, two, by_two = look.waves @ q.flatten(1) + look.phases
    texture = ((one + 1.5 * by_one.sin()).sin() * (two + 1.5 * by_two.sin()).sin()).mul_(2).view(grid)
    edge = 2 / (max(grid) - 1)  # a sample's width: boundaries are as soft as partial volume makes them
    numbers = {name: number for number, name in d.labels.items()}
    # Painting a part only where it can be: the range of q[axis] in each slice across each axis.
    ranges = [(f.amin(o).numpy(), f.amax(o).numpy()) for f, o in zip(q, ((1, 2), (0, 2), (0, 1)), strict=True)]
    for part, brightness, box in zip(d.parts, look.brightness, _boxes(d.parts, ranges, edge), strict=False):
        if box is None:
            continue
        here = q[:, *box]
        depth = _outside(part, here)
        value = torch.tensor(float(part.value + d.noise * brightness + part.change * second))
        if part.texture:
            value = value + part.texture * texture[box]
        if part.vessels:  # along a network of curves, where two gyroids vanish together
            apart = _gyroid(8 * here).square() + _gyroid(7 * here.flip(0) + 1).square()
            value = value + part.vessels * torch.exp(-8 * apart)
        image[box].lerp_(value, (0.5 - depth / edge).clamp_(0, 1))
        if not part.keep:
            label[box].masked_fill_(depth < 0, numbers.get(part.name, 0))
    return image, label


def _boxes(parts: tuple[Part, ...], ranges: list, edge: float) -> list[tuple[slice, ...] | None]:
    """For every part the slices of the grid that it can touch; None if there are none."""
    centres, reach = np.array([part.centre for part in parts]), np.array([part.radii for part in parts])
    for r, part in zip(reach, parts, strict=True):
        if part.wave:
            r *= 1 + 1.5 * part.wave[0]
        if part.tilt[1]:
            r[np.arange(3) != part.tilt[0]] = max(np.delete(r, part.tilt[0]))
    bounds, empty = [], np.zeros(len(parts), dtype=bool)
    for (low, high), centre, r in zip(ranges, centres.T[..., None], reach.T[..., None] + edge, strict=True):
        touched = (high > centre - r) & (low < centre + r)  # (parts, n)
        bounds.append((touched.argmax(axis=1).tolist(), (len(low) - touched[:, ::-1].argmax(axis=1)).tolist()))
        empty |= ~touched.any(axis=1)
    boxes = [tuple(slice(first[k], last[k]) for first, last in bounds) for k in range(len(parts))]
    return [None if nothing else box for nothing, box in zip(empty, boxes, strict=True)]


def _outside(part: Part, q: Tensor) -> Tensor:
    """About how far `q` is outside a part, negative inside; exact to first order across the thinnest axis."""
    p = [q[axis] - part.centre[axis] for axis in range(3)]
    axis, degrees = part.tilt
    if degrees:
        i, j = (axis + 1) % 3, (axis + 2) % 3
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        p[i], p[j] = c * p[i] + s * p[j], c * p[j] - s * p[i]
    terms = [(x / r).square_() ** (part.power // 2) for x, r in zip(p, part.radii, strict=True) if r < INF]
    level = functools.reduce(torch.add, terms)
    level = (level.sqrt_() if part.power == 2 else level.sqrt_().sqrt_()) - 1
    if part.wave:
        amplitude, frequency = part.wave
        level = level + amplitude * _gyroid(frequency * q)
    depth = level * min(part.radii)
    if part.cut:
        axis, low, high = part.cut
        depth = torch.maximum(depth, torch.maximum(low - q[axis], q[axis] - high))
    return depth


def _gyroid(p: Tensor) -> Tensor:
    """A wavy field that folds in every direction, like a cortex: values in [-1.5, 1.5], period 2 pi."""
    s, c = p.sin(), p.cos()
    return s[0] * c[1] + s[1] * c[2] + s[2] * c[0]


def acquire(image: Tensor, d: Domain, rng: np.random.Generator) -> Tensor:
    """What a scanner makes of the anatomy: noise, and for MR a bias field and a magnitude (Rician noise)."""
    noise = d.noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    if d.modality == "CT":
        return image + noise
    coarse = rng.standard_normal((1, *[4 if n > 1 else 1 for n in image.shape]), dtype=np.float32)
    bias = torch.exp(0.1 * refine(torch.from_numpy(coarse), list(image.shape))[0])
    # The imaginary channel's noise is the real one's from the far side: unrelated, and no second draw.
    return torch.hypot(image * bias + noise, noise.flip(0, 1, 2))


def normalise(image: Tensor, modality: str) -> Tensor:
    """To [0, 1]: CT from [-1000, 1000] HU, MR from its minimum to its 99th percentile."""
    low, high = (-1000, 1000) if modality == "CT" else (float(image.min()), float(np.percentile(image, 99)))
    return ((image - low) / (high - low)).clamp(0, 1)


def refine(lattice: Tensor, grid: list[int]) -> Tensor:
    """Values `(C, *lattice)` on a finer grid, `(C, *grid)`, by cubic splines."""
    for n in grid:  # always the first axis of those left: what is done goes last
        lattice = torch.tensordot(lattice, _spline(lattice.shape[1], n), dims=([1], [1]))
    return lattice


@functools.lru_cache(maxsize=64)
def _spline(coarse: int, fine: int) -> Tensor:
    """The matrix `(fine, coarse)` that interpolates samples of [0, 1] by a cubic spline."""
    if coarse == 1:
        return torch.ones(1, 1)
    weights = CubicSpline(np.linspace(0, 1, coarse), np.eye(coarse))(np.linspace(0, 1, fine))
    return torch.tensor(weights, dtype=torch.float32)
