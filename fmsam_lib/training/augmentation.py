"""Training pairs in other poses than they were taken, uniGradICON's augmentation, and as other scanners show them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsam_lib.model.spatial import identity_map

NOISE = 0.05


def augment(moving: Tensor, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pair `(1, *S)` each, turned alike at random and then each bent a little on its own.

    Both images take the same random permutation of their axes and the same random flips; to that matrix each
    adds its own affine noise, a normal number of standard deviation 0.05 in every entry, translation
    included. In coordinates from -1 to 1, the border repeated, as uniGradICON's training does (Tian et al. 2024, arXiv
    2403.05780); on a grid of unequal sides a permutation therefore stretches the image, as there.
    """
    turned = turn(moving.dim() - 1, generator)
    first, second = (turned + NOISE * torch.randn(turned.shape, generator=generator) for _ in range(2))
    return transformed(moving, first), transformed(fixed, second)


def turn(dim: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the axes with random signs, as an affine matrix `(D, D + 1)` without translation."""
    axes = torch.randperm(dim, generator=generator)
    signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
    return torch.cat([torch.eye(dim)[axes] * signs, torch.zeros(dim, 1)], 1)


def transformed(image: Tensor, affine: Tensor) -> Tensor:
    """`image` `(1, *S)` looked up at `affine` `(D, D + 1)` of each sample's place, the last axis first as in torch."""
    grid = F.affine_grid(affine[None], [1, 1, *image.shape[1:]], align_corners=True)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=True)[0]


def other_scanner(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """An image in [0, 1], `(1, *S)` or `(2, *S)` with its mask, with another brightness curve and a bias field.

    `I^exp(u) exp(r . x)` with u uniform in `[-strength, strength]`, every entry of r normal with that standard
    deviation and x from 0 to 1 along each axis; its highest value stays. LNCC hardly changes, what a network sees does.
    """
    power = math.exp(strength * (2 * torch.rand((), generator=generator).item() - 1))
    slopes = strength * torch.randn(image.dim() - 1, generator=generator)
    changed = image[:1].clamp_min(0) ** power * torch.tensordot(slopes, identity_map(image.shape[1:])[0], 1).exp()
    return torch.cat([changed * (image[:1].max() / changed.max().clamp_min(1e-12)), image[1:]])
