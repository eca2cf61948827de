"""One image file of a pair to register: its voxels, where they lie in the world, and how the network sees it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from fmsam_lib.images import files as data
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.records import data_error

Source = str | os.PathLike | SpatialImage  # an image file's path, or what nibabel made of it
SLAB = 2**20  # voxels handled at a time, so that large files need little more memory than their own


@dataclass(frozen=True)
class Volume:
    """One image file.

    values: `(X, Y, Z)` float32, in the file's own voxel order. affine: `(4, 4)`, index to RAS mm.
    index_of_unit: `(3, D + 1)`, from unit coordinates of the canonical image to index; unit_of_index: `(D, 4)`, back.
    oriented: whether the header says where the axes point. notes: what is doubtful about the header.
    """

    where: str
    file: SpatialImage
    values: np.ndarray
    affine: np.ndarray
    index_of_unit: np.ndarray
    unit_of_index: np.ndarray
    oriented: bool
    notes: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.values.shape

    @property
    def itk_dim(self) -> int:
        """As what ITK reads the file: `(X, Y)` is 2-D, `(X, Y, 1)` is 3-D."""
        return min(len(self.file.shape), 3)

    @property
    def name(self) -> str:
        """What Learn2Reg calls the image: `0001` of `Name_0001_0000.nii.gz`, else the file's name without ending."""
        stem = re.sub(r"(\.nii)?(\.(gz|bz2|zst))?$|\.\w+$", "", Path(self.where).name)
        return re.sub(r"^.*_(\d{4})_\d{4}$", r"\1", stem)

    @property
    def axes(self) -> str:
        """The canonical axes that it extends along."""
        orientation = nibabel.io_orientation(self.affine)[:, 0].astype(int)
        along = sorted(orientation[np.array(self.shape) > 1])
        return " and ".join(("left-right", "back-front", "down-up")[axis] for axis in along)

    @property
    def size(self) -> np.ndarray:
        """`(D,)` mm between the centres of the first and the last sample of each canonical axis."""
        return np.linalg.norm(self.affine[:3, :3] @ self.index_of_unit[:, :-1], axis=0)

    def grid_affine(self, shape: tuple[int, ...]) -> Tensor:
        """Index on a grid of `shape` to RAS mm, `(4, 4)`; of a 2-D grid the third column is the plane's normal."""
        affine = np.eye(4)
        affine[:3, 3] = self.affine[:3] @ [*self.index_of_unit[:, -1], 1]
        affine[:3, : len(shape)] = self.affine[:3, :3] @ self.index_of_unit[:, :-1] / (np.array(shape) - 1)
        if len(shape) == 2:
            affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
        return torch.from_numpy(affine)

    def on_grid(self, shape: tuple[int, ...], modality: str) -> Tensor:
        """The image as the network sees it: canonical, in [0, 1], `(1, *shape)`; see `data.decode`."""
        canonical = nibabel.apply_orientation(self.values, nibabel.io_orientation(self.affine))
        image = data.normalise(self.where, canonical, modality.upper())
        return data.resample(image if len(shape) == 3 else image.squeeze(), shape)

    def labels_on_grid(self, labels: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """The nearest of the image's `labels` `(X, Y, Z)` at each sample of a grid, `(1, *shape)` int32."""
        index = apply(self.index_of_unit, identity_map(tuple(shape))[0].double().numpy())
        return torch.from_numpy(labels[tuple(np.floor(index + 0.5).astype(int))].astype(np.int32))[None]


def read_volume(source: Source, dim: int, what: str = "image") -> Volume:
    """The image of a path, or a nibabel image (`what` it is called where it has no file), for a `dim`-D network.

    Raises DataError for whatever cannot be read or is no image of `dim` dimensions.
    """
    where, file = _open(source, what)
    shape = data.spatial_shape(where, file, dim)
    if dim == 2 and min(shape) > 1:
        todo = "Use a network for volumes, or save one slice."
        raise data_error(where, "a single slice, for this 2-D network", f"a volume of shape {shape}", todo)
    affine, oriented, notes = geometry(where, file)
    orientation = nibabel.io_orientation(affine)
    to_file = nibabel.orientations.inv_ornt_aff(orientation, shape)  # canonical index -> the file's index
    sides = [shape[axis] for axis in np.argsort(orientation[:, 0])]  # of the canonical image
    axes = [axis for axis, n in enumerate(sides) if n > 1]  # all, or the two of a 2-D image
    steps = np.array([sides[axis] - 1 for axis in axes])
    to_canonical = np.eye(4)[:, [*axes, 3]] * [*steps, 1]  # unit coordinates -> canonical index
    back = np.linalg.inv(to_file)[axes] / steps[:, None]
    values = data.values_of(where, file, shape)
    return Volume(where, file, values, affine, (to_file @ to_canonical)[:3], back, oriented, notes)


def read_labels(source: Source, image: Volume) -> np.ndarray:
    """Whole numbers `(X, Y, Z)` in the voxel order of the `image` that they belong to; integer types are kept.

    Raises DataError unless they are whole numbers, not all 0, on that image's grid (stored in any orientation).
    """
    where, file = _open(source, "labels")
    shape = data.spatial_shape(where, file, 2)
    affine = geometry(where, file)[0]
    with data.reading(where):
        values = np.asanyarray(file.dataobj).reshape(shape)
    if values.dtype.kind not in "iu":
        whole = np.rint(values)
        if not np.isfinite(values).all() or np.abs(whole - values).max() > 1e-3:
            raise data_error(where, "whole numbers", "others", "Give a label image, not probabilities.")
        values = whole.astype(np.int32)
    if not values.any():
        raise data_error(where, "labels", "only background", "Leave them out.")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.io_orientation(image.affine))
    values = nibabel.apply_orientation(values, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, shape)
    data.check_same_grid(where, values.shape, affine, image.where, image.shape, image.affine)
    return values


def _open(source: Source, what: str) -> tuple[str, SpatialImage]:
    if isinstance(source, SpatialImage):
        source.update_header()  # its affine may have been changed since
        return source.get_filename() or what.replace(" ", "_"), source
    return str(source), data.open_file(Path(source))


def geometry(where: str, file: SpatialImage) -> tuple[np.ndarray, bool, list[str]]:
    """Index to RAS mm as ITK-family tools read it, whether the header states an orientation, and what is doubtful.

    nibabel takes the sform wherever there is one. ITK takes the qform instead where the two disagree and the sform's
    code is not 1 (scanner) or its axes are not perpendicular; without either, the axes point left, to the back and
    up; the spacing is always pixdim's; and it heeds the unit. The transform leaves in millimetres of that space.
    """
    affine, oriented, notes = np.asarray(file.affine, dtype=np.float64), True, []
    dim = min(len(file.shape), 3)
    if isinstance(file.header, nibabel.Nifti1Header):
        with data.reading(where):
            (qform, qcode), (sform, scode) = file.header.get_qform(coded=True), file.header.get_sform(coded=True)
        pixdim = np.abs(file.header["pixdim"][1 : dim + 1].astype(np.float64))
        written = " x ".join(f"{spacing:.3g}" for spacing in pixdim)
        oriented = bool(qcode or scode)
        agree = not (qcode and scode) or np.allclose(qform, sform, atol=1e-3)
        if not oriented:
            affine = np.diag([-pixdim[0], -pixdim[1], *pixdim[2:], *[1.0] * (4 - dim)])
            taken = f"the axes are taken as left, posterior, superior, the spacing as {written}"
            notes.append(f"the header states no orientation (qform and sform codes are 0): {taken}")
        else:
            by_sform = not qcode or (scode and itk_reads(sform) and (agree or scode == 1))
            affine = (sform if by_sform else qform).copy()
            if not agree:
                notes.append(f"qform and sform disagree; the {'sform' if by_sform else 'qform'} counts, as for ITK")
            spacing = np.linalg.norm(affine[:3, :dim], axis=0)
            if itk_reads(affine) and np.abs(spacing - pixdim).max() > 1e-3:
                notes.append(f"sform and pixdim disagree on the spacing; pixdim's {written} counts, as for ITK")
                affine[:3, :dim] *= pixdim / spacing
        unit = {"meter": 1000.0, "micron": 0.001}.get(file.header.get_xyzt_units()[0], 1.0)
        affine = np.diag([unit, unit, unit, 1.0]) @ affine
    data.check_affine(where, affine)
    if not itk_reads(affine, dim):
        why = "the axes are not perpendicular" if dim == 3 else "the plane is oblique"
        notes.append(f"{why}, so ITK-family tools cannot read this file as it is, nor apply a field to it")
    return affine, oriented, [f"{where}: {note}" for note in notes]


def itk_reads(affine: np.ndarray, dim: int = 3) -> bool:
    """Whether the directions of the first `dim` axes are orthonormal to 1e-4, as ITK demands."""
    with np.errstate(divide="ignore", invalid="ignore"):
        direction = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))[:dim, :dim]
    return bool(np.abs(direction @ direction.T - np.eye(dim)).max() <= 1e-4)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The affine map `matrix` `(R, C + 1)` of `points` `(C, *P)`: `(R, *P)`."""
    return np.tensordot(matrix[:, :-1], points, 1) + matrix[:, -1].reshape(-1, *[1] * (points.ndim - 1))


def slabs(shape: tuple[int, int, int]) -> Iterator[tuple[slice, np.ndarray]]:
    """The voxels of a file some planes at a time: which along its first axis, and their index `(3, x, Y, Z)`."""
    planes = max(1, SLAB // (shape[1] * shape[2]))
    for first in range(0, shape[0], planes):
        index = np.indices((min(planes, shape[0] - first), *shape[1:]), dtype=np.float64)
        index[0] += first
        yield slice(first, first + planes), index
