"""Where points go: identity map, sampling, composition, Jacobian.

Arrays are `(N, C, *S)` with `S = (X, Y)` or `(X, Y, Z)`. Points and displacements are `(N, D, *S)` in
unit coordinates: 0 is the centre of an axis' first sample and 1 that of its last, channel d along axis d.
A map `phi` sends points of the fixed grid into the moving image, so that `moving(phi(x)) ~ fixed(x)`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache(maxsize=32)
def identity_map(shape: tuple[int, ...], dtype=torch.float32, device="cpu") -> Tensor:
    """Every grid point's own unit coordinates, `(1, D, *shape)`; shared, so do not write into it.

    >>> identity_map((3, 2))[0, 0]
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000],
            [1.0000, 1.0000]])
    """
    with torch.inference_mode(False):  # whoever asks first, later ones may need gradients through it
        axes = [torch.linspace(0, 1, n, dtype=torch.float64) for n in shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].to(dtype=dtype, device=device)


def sample(image: Tensor, points: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Look `image` `(N, C, *S)` up at `points` `(N, D, *P)`: returns `(N, C, *P)`.

    mode: "bilinear" (trilinear in 3-D) or "nearest", the one for labels.
    padding: "border" repeats the edge outside the image, "zeros" fills with 0.

    >>> ramp = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    >>> sample(ramp, torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)).item()
    1.5
    """
    return look_up(image, to_grid(points), mode=mode, padding=padding)


def to_grid(points: Tensor) -> Tensor:
    """Unit coordinates `(N, D, *P)` as torch's grid_sample counts: the last axis first, from -1 to 1."""
    return points.flip(1) * 2 - 1


def look_up(image: Tensor, grid: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """`sample` at coordinates of `to_grid`'s kind, for who has many look-ups to do."""
    return F.grid_sample(image, grid.movedim(1, -1), mode=mode, padding_mode=padding, align_corners=True)


def warp(image: Tensor, phi_map: Tensor) -> Tensor:
    """The moving `image` `(N, C, *S)` seen from the fixed grid through `phi_map` `(N, D, *P)`.

    Outside the moving image there is nothing to see, hence zeros (as in uniGradICON's loss).
    """
    return sample(image, phi_map, padding="zeros")


def warp_label(label: Tensor, phi_map: Tensor) -> Tensor:
    """An integer label image `(N, C, *S)` through `phi_map`, by nearest neighbour; outside it is background, 0.

    Keeps dtype and numbers exactly: those that `phi_map`'s dtype cannot hold are looked up by their rank among all.
    """
    low, high = (int(n) for n in label.long().aminmax())
    if max(-low, high) <= 2 / torch.finfo(phi_map.dtype).eps:
        return sample(label.to(phi_map.dtype), phi_map, mode="nearest", padding="zeros").round().to(label.dtype)
    numbers, ranks = torch.cat([label.new_zeros(1), label.flatten()]).unique(return_inverse=True)
    background, ranks = ranks[0], ranks[1:].view_as(label)
    return numbers[warp_label(ranks - background, phi_map) + background]


def voxels(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unit coordinates or displacements `(N, D, *P)` in samples of a grid of `shape`."""
    scale = torch.tensor([n - 1 for n in shape], dtype=points.dtype, device=points.device)
    return points * scale.view(1, -1, *[1] * (points.dim() - 2))


def jacobian_determinant(phi_map: Tensor) -> Tensor:
    """`det d phi / d x` in every cell, `(N, *S - 1)`: 1 keeps volume, 0 or below is a fold.

    Forward differences between neighbouring samples, so that a cell counts as folded when one of
    its corner's edges turn inside out. Both sides are measured in voxels of the fixed grid.
    """
    shape = tuple(phi_map.shape[2:])
    phi = voxels(phi_map, shape)
    cells = (slice(None), slice(None), *[slice(n - 1) for n in shape])  # along its own axis, all of a difference
    a, b, *c = (torch.diff(phi, dim=axis + 2)[cells] for axis in range(len(shape)))  # edges, (N, D, *S-1)
    return (torch.linalg.cross(a, b, dim=1) * c[0]).sum(1) if c else a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def inverse_error(phi_map: Tensor, psi_map: Tensor) -> Tensor:
    """How far `phi(psi(x))` lands from `x`, `(N, D, *S)` in unit coordinates; outside, phi moves as at the border."""
    identity = identity_map(tuple(psi_map.shape[2:]), psi_map.dtype, psi_map.device)
    return psi_map + sample(phi_map - identity, psi_map) - identity
