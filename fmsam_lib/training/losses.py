"""What training minimises: image similarity both ways plus a penalty on the transforms.

`objective` is the whole loss; a new measure or penalty is a function beside the others and a line in it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d, uniform_filter1d
from torch import Tensor

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, look_up
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair


class Loss(NamedTuple):
    """Scalars: `total = similarity + lmbda * regulariser`."""

    total: Tensor
    similarity: Tensor
    regulariser: Tensor


class Batch(NamedTuple):
    """All that one evaluation of the loss depends on, so that evaluating it twice gives the same.

    moving, fixed: `(N, 1, *S)`. points: `(1, D, *P)`, where inverses are compared. moving_mask, fixed_mask:
    `(N, 1, *S)`, both or neither; where a target's mask is 0 its similarity does not count.
    """

    moving: Tensor
    fixed: Tensor
    points: Tensor
    moving_mask: Tensor | None = None
    fixed_mask: Tensor | None = None

    def to(self, where: torch.device | torch.dtype) -> "Batch":
        return Batch._make(None if tensor is None else tensor.to(where) for tensor in self)


def with_masks(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Every pair's moving and fixed image, `(2, *S)` with its mask where all images have one, else `(1, *S)`."""
    masks = [(p, p.moving_mask, p.fixed_mask) for p in pairs]
    found = [(torch.cat([p.moving, m]), torch.cat([p.fixed, f])) for p, m, f in masks if not (m is None or f is None)]
    return found if len(found) == len(pairs) else [(p.moving, p.fixed) for p in pairs]


def batch_of(moving: Tensor, fixed: Tensor, points: Tensor) -> Batch:
    """Of images `(N, 1, *S)`, or `(N, 2, *S)` with masks, which count if all of them hold something."""
    masks = [images[:, 1:] > 0.5 for images in (moving, fixed) if images.shape[1] > 1]
    held = all(mask.flatten(1).any(1).all() for mask in masks)
    return Batch(moving[:, :1], fixed[:, :1], points, *(masks if held else []))


def objective(net: GradICON, batch: Batch, *, lmbda: float, sigma: float, similarity="lncc", joint=True) -> Loss:
    """GradICON's loss (Tian et al. 2023, eq. 4): similarity both ways plus `lmbda` times its penalty.

    `sim(A o phi_AB, B) + sim(B o phi_BA, A) + lmbda * gradicon_penalty(phi_AB, phi_BA)`, A moving and B fixed.

    sigma: LNCC's window in samples. similarity: "lncc", "lncc2" or "mind". joint: the network sees both directions as
    one batch, BatchNorm in training mode the statistics of both; False runs one after the other, as icon-registration
    does.

    Raises: ValueError for an unknown similarity, or for one mask without the other.
    """
    measures: dict[str, Callable[..., Tensor]] = {
        "lncc": functools.partial(lncc_loss, sigma=sigma),
        "lncc2": functools.partial(lncc2_loss, sigma=sigma),
        "mind": mind_loss,
    }
    if similarity not in measures:
        raise ValueError(f"expected similarity to be one of {', '.join(measures)}, got {similarity!r}")
    if (batch.moving_mask is None) != (batch.fixed_mask is None):
        raise ValueError("expected a mask for both images or for neither, got one: give the other too")

    moving = torch.cat([batch.moving, batch.fixed])
    fixed = torch.cat([batch.fixed, batch.moving])
    targets = [mask for mask in (batch.fixed_mask, batch.moving_mask) if mask is not None]
    mask = torch.cat(targets) if targets else None
    if joint:
        phi, pairs = net(moving, fixed), len(batch.moving)
        phi_ab, phi_ba, grid = phi[:pairs], phi[pairs:], phi.grid(phi.shape)
    else:
        phi_ab, phi_ba = net(batch.moving, batch.fixed), net(batch.fixed, batch.moving)
        grid = torch.cat([phi.grid(phi.shape) for phi in (phi_ab, phi_ba)])

    parts = 2 if similarity == "mind" else 1  # MIND's variance has bounds of its own in each direction
    masks = [None] * parts if mask is None else mask.chunk(parts)
    directions = zip(look_up(moving, grid, padding="zeros").chunk(parts), fixed.chunk(parts), masks, strict=True)
    terms = [measures[similarity](*images, mask=m) for *images, m in directions]
    dissimilarity = 2 / parts * functools.reduce(torch.add, terms)
    penalty = gradicon_penalty(phi_ab, phi_ba, batch.points)
    return Loss(dissimilarity + lmbda * penalty, dissimilarity, penalty)


def lncc_loss(warped: Tensor, fixed: Tensor, *, sigma: float = 5.0, mask: Tensor | None = None) -> Tensor:
    """`1 - mean LNCC`, uniGradICON's own similarity: 0 for alike images, 2 for opposite ones; a scalar."""
    return 1 - lncc(warped, fixed, sigma=sigma, mask=mask)


def lncc2_loss(warped: Tensor, fixed: Tensor, *, sigma: float = 5.0, mask: Tensor | None = None) -> Tensor:
    """`1 - mean LNCC^2`, for contrasts that may be inverted (MONAI's LNCC is a squared one too); a scalar."""
    return 1 - masked_mean(lncc_map(warped, fixed, sigma=sigma) ** 2, mask)


def mind_loss(warped: Tensor, fixed: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of the images' MIND-SSC descriptors, for images of two modalities; a scalar."""
    _check_shapes(warped, fixed)
    return masked_mean(((mind_ssc(warped) - mind_ssc(fixed)) ** 2).mean(0), mask)


def lncc(a: Tensor, b: Tensor, *, sigma: float = 5.0, mask: Tensor | None = None) -> Tensor:
    """Mean local normalised cross-correlation of images `(N, C, *S)`, between -1 and 1; a scalar."""
    return masked_mean(lncc_map(a, b, sigma=sigma), mask)


def lncc_map(a: Tensor, b: Tensor, *, sigma: float = 5.0, eps: float = 1e-5) -> Tensor:
    """The local correlation of two images at every sample, all `(N, C, *S)`.

    `cov(a, b) / sqrt(var(a) var(b))` in a Gaussian window of `sigma` samples, cut at 2 sigma and
    zero outside the image, as in uniGradICON.
    """
    _check_shapes(a, b)
    mean_a, mean_aa, mean_ab = gaussian_blur(torch.stack([a, a * a, a * b]), sigma)
    mean_b, mean_bb = gaussian_blur(torch.stack([b, b * b]), sigma)  # apart: the fixed image needs no gradient
    variance_a = torch.relu(mean_aa - mean_a**2) + eps
    variance_b = torch.relu(mean_bb - mean_b**2) + eps
    return (mean_ab - mean_a * mean_b) / torch.sqrt(variance_a * variance_b)


def mind_ssc(image: Tensor, *, radius: int = 2, dilation: int = 2) -> Tensor:
    """Self-similarity context of an image `(N, C, *S)` (Heinrich et al. 2013, MICCAI): `(K, N, C, *S)`.

    `exp(-(SSD - min SSD) / V)`. Each SSD compares the patches, `2 radius + 1` wide, around two neighbours of a sample,
    `dilation` away along different axes: K = 12 pairs in 3-D, 4 in 2-D. V is the mean of `SSD - min SSD` over them,
    kept between 0.001 and 1000 times its mean over the batch, as in icon-registration. The border repeats.
    """

    def neighbour(axis: int, offset: int) -> Tensor:
        n = image.shape[axis]
        return image.index_select(axis, (torch.arange(n, device=image.device) + offset).clamp(0, n - 1))

    neighbours = [(neighbour(axis, -dilation), neighbour(axis, dilation)) for axis in range(2, image.dim())]
    pairs = [pair for axes in itertools.combinations(neighbours, 2) for pair in itertools.product(*axes)]
    ssd = separable(torch.stack([p - q for p, q in pairs]) ** 2, functools.partial(box_band, radius=radius))
    distance = ssd - ssd.min(0, keepdim=True).values
    variance = distance.mean(0, keepdim=True)
    typical = variance.detach().mean().clamp_min(torch.finfo(image.dtype).eps ** 2)  # constant images have none
    return torch.exp(-distance / variance.clamp(0.001 * typical, 1000 * typical))


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` `(N, C, *S)` where `mask` `(N, 1, *S)` is not 0: over each sample's own, then over samples.

    Raises: ValueError for a mask of another shape or one that is empty in a sample (on a GPU, not to wait: NaN).
    """
    if mask is None:
        return values.mean()
    if mask.shape != (len(values), 1, *values.shape[2:]):
        raise ValueError(f"expected a mask {(len(values), 1, *values.shape[2:])}, got {tuple(mask.shape)}")
    included = (mask != 0).expand_as(values).flatten(1)
    counts = included.sum(1)
    if counts.device.type == "cpu" and not counts.all():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"expected masks that hold something, got empty ones for samples {empty} of the batch")
    return (torch.where(included, values.flatten(1), 0).sum(1) / counts).mean()


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected two images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian mean over the spatial axes of `(K, N, C, *S)`."""
    return separable(x, functools.partial(gaussian_band, sigma=float(sigma)))


def separable(x: Tensor, band) -> Tensor:
    """A window over the spatial axes of `(K, N, C, *S)`: a product with a banded matrix along each.

    On images of a few hundred samples a side this is many times faster than convolving.
    """
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # half precision would lose variances
        for axis in range(3, x.dim()):
            window = band(x.shape[axis], dtype=x.dtype, device=x.device)
            x = x @ window.mT if axis == x.dim() - 1 else (window @ x.flatten(axis + 1)).view(x.shape)
    return x


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # a band made under inference mode could not take part in training later
def gaussian_band(n: int, *, sigma: float, dtype, device) -> Tensor:
    """`(n, n)` symmetric matrix whose product is the Gaussian mean along an axis of n samples, zero outside."""
    weights = gaussian_filter1d(np.eye(n), sigma, mode="constant", radius=int(2 * sigma))
    return torch.from_numpy(weights).to(dtype=dtype, device=device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def box_band(n: int, *, radius: int, dtype, device) -> Tensor:
    """`(n, n)` matrix whose product is the mean over `2 radius + 1` samples along an axis of n, the border repeated."""
    weights = uniform_filter1d(np.eye(n), 2 * radius + 1, axis=0, mode="nearest")
    return torch.from_numpy(weights).to(dtype=dtype, device=device)


def gradicon_penalty(phi_ab: Transform, phi_ba: Transform, points: Tensor, *, delta: float = 1e-3) -> Tensor:
    """GradICON's penalty (Tian et al. 2023, eq. 3): `mean |d(phi_ab o phi_ba - id)/dx|_F^2 / D`; a scalar.

    The derivative is a forward difference of `delta` along each axis, at `points` `(1, D, *P)`. They are looked up
    with their neighbours, at once: along the first axis or, of a single pair, as a batch, which the cores share.
    """
    dim = points.shape[1]
    steps = delta * torch.eye(dim, dtype=points.dtype, device=points.device).view(dim, 1, dim, *[1] * dim)
    neighbours = [points, *(points + steps)]
    alone = len(phi_ab) == 1
    if alone:
        x, phi_ab, phi_ba = torch.cat(neighbours), phi_ab.expand(dim + 1), phi_ba.expand(dim + 1)
    else:
        x = torch.cat(neighbours, 2).expand(len(phi_ab), *[-1] * (dim + 1))
    # phi_ab(phi_ba(x)) - x, without the rounding of that subtraction, which dividing by delta would magnify
    error = phi_ba.displacement(x)
    error = error + phi_ab.displacement(x + error)
    centre, *shifted = error.split(1) if alone else error.split(points.shape[2], 2)
    return sum((((centre - other) / delta) ** 2).mean() for other in shifted)


def jittered_points(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Every second grid point, moved by Gaussian noise of `2 / S[-1]`, `(1, D, *ceil(S / 2))` (as uniGradICON)."""
    every_second = identity_map(tuple(shape))[:, :, *[slice(None, None, 2)] * len(shape)]
    return every_second + torch.randn(every_second.shape, generator=generator) * 2 / shape[-1]
