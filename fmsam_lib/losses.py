"""What training minimises: image similarity both ways plus a penalty on inconsistent inverses."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fmsam_lib.network import GradICON, Transform
from fmsam_lib.spatial import identity_map, warp


class Loss(NamedTuple):
    """Scalars: `total = similarity + lmbda * regulariser`."""

    total: Tensor
    similarity: Tensor
    regulariser: Tensor


class Batch(NamedTuple):
    """All that one evaluation of the loss depends on, so that evaluating it twice gives the same.

    moving, fixed: `(N, 1, *S)`. points: `(1, D, *S / 2)`, where the penalty is measured.
    """

    moving: Tensor
    fixed: Tensor
    points: Tensor


def objective(net: GradICON, batch: Batch, *, lmbda: float, sigma: float) -> Loss:
    """GradICON's loss (Tian et al. 2023, eq. 4): `1 - LNCC` both ways plus `lmbda` times the penalty.

    Both directions run as one batch; in training mode BatchNorm therefore sees the statistics of both.
    """
    pairs = len(batch.moving)
    moving = torch.cat([batch.moving, batch.fixed])
    fixed = torch.cat([batch.fixed, batch.moving])
    phi = net(moving, fixed)
    similarity = 2 * (1 - lncc(warp(moving, phi.map), fixed, sigma=sigma))
    regulariser = gradicon_penalty(phi[:pairs], phi[pairs:], batch.points)
    return Loss(similarity + lmbda * regulariser, similarity, regulariser)


def lncc(a: Tensor, b: Tensor, *, sigma: float = 5.0, eps: float = 1e-5) -> Tensor:
    """Mean local normalised cross-correlation of images `(N, C, *S)`, between -1 and 1; a scalar.

    `cov(a, b) / sqrt(var(a) var(b))` in a Gaussian window of `sigma` samples, cut at 2 sigma and
    zero outside the image, as in uniGradICON.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected two images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = gaussian_blur(torch.stack([a, b, a * a, b * b, a * b]), sigma)
    variance_a = torch.relu(mean_aa - mean_a**2) + eps
    variance_b = torch.relu(mean_bb - mean_b**2) + eps
    return ((mean_ab - mean_a * mean_b) / torch.sqrt(variance_a * variance_b)).mean()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian mean over the spatial axes of `(K, N, C, *S)`: a product with a banded matrix along each.

    On images of a few hundred samples a side this is many times faster than convolving.
    """
    for axis in range(3, x.dim()):
        window = gaussian_band(x.shape[axis], float(sigma), x.dtype, x.device)
        x = x @ window if axis == x.dim() - 1 else (window @ x.flatten(axis + 1)).view(x.shape)
    return x


@functools.lru_cache(maxsize=32)
def gaussian_band(n: int, sigma: float, dtype, device) -> Tensor:
    """`(n, n)` symmetric matrix whose product is the Gaussian mean along an axis of n samples."""
    radius = int(2 * sigma)
    distance = torch.arange(n, dtype=torch.float64).view(-1, 1) - torch.arange(n, dtype=torch.float64)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= radius)
    return (weights / torch.exp(-0.5 * (offsets / sigma) ** 2).sum()).to(dtype=dtype, device=device)


def gradicon_penalty(phi_ab: Transform, phi_ba: Transform, points: Tensor, *, delta: float = 1e-3) -> Tensor:
    """GradICON's penalty (Tian et al. 2023, eq. 3): `mean |d(phi_ab o phi_ba - id)/dx|_F^2`; a scalar.

    The derivative is a forward difference of `delta` along each axis, at `points` `(1, D, *P)`. The
    points and their neighbours are looked up together, one beside the other along the first axis.
    """
    dim = points.shape[1]
    neighbours = [points]
    for axis in range(dim):
        shift = torch.zeros(1, dim, *[1] * dim, dtype=points.dtype, device=points.device)
        shift[:, axis] = delta
        neighbours.append(points + shift)
    x = torch.cat(neighbours, 2).expand(len(phi_ab.displacements[0]), *[-1] * (dim + 1))
    error = x - phi_ab(phi_ba(x))
    centre, *shifted = error.split(points.shape[2], 2)
    return sum((((centre - other) / delta) ** 2).mean() for other in shifted)


def jittered_points(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Every second grid point, moved by Gaussian noise of `2 / S[-1]`, `(1, D, *ceil(S / 2))` (as uniGradICON)."""
    dim = len(shape)
    every_second = identity_map(tuple(shape))[(..., *[slice(None, None, 2)] * dim)]
    return every_second + torch.randn(every_second.shape, generator=generator) * 2 / shape[-1]
