"""What a network returns: a map from the fixed grid into the moving image, kept as displacements of several grids."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsam_lib.model.spatial import identity_map, look_up, to_grid

LINEAR = {2: "bilinear", 3: "trilinear"}


class Transform:
    """A map `phi` from the fixed grid into the moving image, kept as the steps' displacement fields.

    `phi(points)` maps any points `(N, D, *P)`, unit coordinates; `phi.map` is phi on the whole fixed
    grid, `(N, D, *S)`. Calling adds the newest step's displacement first, then looks up the older ones.
    """

    def __init__(self, shape: tuple[int, ...], displacements: tuple[Tensor, ...] = ()):
        self.shape = tuple(shape)
        self.fields = tuple(u.flip(1) * 2 for u in displacements)  # as `to_grid` counts, once for all look-ups

    @property
    def displacements(self) -> tuple[Tensor, ...]:
        return tuple(field.flip(1) / 2 for field in self.fields)

    def __call__(self, points: Tensor) -> Tensor:
        return points + self.displacement(points)

    def displacement(self, points: Tensor) -> Tensor:
        """phi(points) - points, `(N, D, *P)`, without the rounding of that subtraction."""
        return self._displace(to_grid(points), self.fields).flip(1) / 2

    def grid(self, shape: tuple[int, ...]) -> Tensor:
        """phi at every sample of a grid of `shape` over the same field of view, as `to_grid` counts, for `look_up`."""
        if not self.fields:
            return to_grid(identity_map(tuple(shape)))
        newest = self.fields[-1]
        if newest.shape[2:] != tuple(shape):  # at the regular points of a grid, looking up is interpolating
            newest = F.interpolate(newest, tuple(shape), mode=LINEAR[newest.dim() - 2], align_corners=True)
        grid = to_grid(identity_map(tuple(shape), newest.dtype, newest.device)) + newest
        return grid + self._displace(grid, self.fields[:-1])

    @staticmethod
    def _displace(grid: Tensor, fields: tuple[Tensor, ...]) -> Tensor:
        if not fields:
            return torch.zeros_like(grid)
        total = look_up(fields[-1], grid)
        for field in reversed(fields[:-1]):
            total = total + look_up(field, grid + total)
        return total

    @cached_property
    def map(self) -> Tensor:
        return (self.grid(self.shape).flip(1) + 1) / 2  # in unit coordinates again

    def then(self, displacement: Tensor) -> "Transform":
        """One step finer: this transform after `displacement`."""
        return self.with_fields((*self.fields, *Transform(self.shape, (displacement,)).fields))

    def __getitem__(self, batch: slice) -> "Transform":
        """The transforms of some of the batch's pairs."""
        return self.with_fields(u[batch] for u in self.fields)

    def expand(self, n: int) -> "Transform":
        """One pair's transform, seen as those of a batch of `n`."""
        return self.with_fields(u.expand(n, *u.shape[1:]) for u in self.fields)

    def __len__(self) -> int:
        """How many pairs there are in the batch."""
        return len(self.fields[0])

    def with_fields(self, fields) -> "Transform":
        changed = Transform(self.shape)
        changed.fields = tuple(fields)
        return changed
