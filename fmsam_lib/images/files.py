"""One image file brought onto the study's grid, with its label file.

Whatever the files look like, the rest of the library sees canonical (RAS) images in [0, 1] on one grid. Every problem
with a file is a `DataError`: it names the file, what was expected, what was found, what to do.
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from fmsam_lib.records import data_error

MODALITIES = ("CT", "MR")


@dataclass(frozen=True)
class Sample:
    """One image on the study's grid; shared, so do not write into its tensors.

    image: `(1, *S)` float32 in [0, 1]. label: `(1, *S)` or None, uint8 where all its numbers fit,
    else int64. affine: `(4, 4)` float64, index to RAS mm; on a 2-D grid its first two columns belong to the grid's
    axes. unit_of_index: `(D, 4)` float64, the file's index `(x, y, z, 1)` to the grid's unit coordinates.
    """

    image: Tensor
    label: Tensor | None
    affine: np.ndarray
    unit_of_index: np.ndarray


def decode(image_path, label_path=None, *, modality: str, shape: Sequence[int], labels=None) -> Sample:
    """An image file, and its label file if there is one, on the study's grid `shape`.

    Orientation: the closest canonical one (RAS). A 2-D `shape` takes a 2-D file however its single slice
    is stored, and of a 3-D file the middle slice along the last canonical axis.
    Intensity: CT from [-1000, 1000] HU, MR from its minimum to its 99th percentile, to [0, 1].
    Grid: sample j of n sits at `j (m - 1) / (n - 1)` of the m samples of an axis; images linearly, after
    a Gaussian of sigma `(step - 1) / 2` samples along axes with a step over 1 (scikit-image's rule); labels
    by nearest neighbour. labels: the numbers allowed beside the background, None for any.
    Raises DataError for whatever cannot be read or would not make a sensible sample.
    """
    dim = len(shape)
    if dim not in (2, 3) or min(shape) < 2 or modality not in MODALITIES:
        expected = f"a 2-D or 3-D grid and {' or '.join(MODALITIES)}"
        raise data_error(image_path, expected, f"{tuple(shape)} and {modality!r}", "Correct the study.")
    volume, volume_affine, canonical = _read(Path(image_path), dim)
    axes = [a for a in range(3) if dim == 3 or a != (volume.shape.index(1) if 1 in volume.shape else 2)]
    unit_of_index = canonical[axes] / (np.array(volume.shape)[axes, None] - 1)
    image, affine = _slice(volume, volume_affine, dim)
    image, label = normalise(image_path, image.astype(np.float32), modality), None
    steps = _steps(image.shape, shape)
    if label_path is not None:
        values, label_affine, _ = _read(Path(label_path), dim)
        label_values = _check_label(label_path, values, labels)
        check_same_grid(label_path, values.shape, label_affine, image_path, volume.shape, volume_affine)
        nearest = [np.floor(np.arange(n) * step + 0.5).astype(int) for n, step in zip(shape, steps, strict=True)]
        values = _slice(label_values, label_affine, dim)[0][np.ix_(*nearest)]
        small = label_values.min() >= 0 and label_values.max() <= 255
        label = torch.from_numpy(values.astype(np.uint8 if small else np.int64))[None]
    return Sample(resample(image, shape), label, affine @ np.diag([*steps, *[1.0] * (4 - dim)]), unit_of_index)


def resample(image: np.ndarray, shape: Sequence[int]) -> Tensor:
    """An image `(*M)` in [0, 1] on the grid `shape` over the same field of view, `(1, *shape)`; see `decode`."""
    for axis, step in enumerate(_steps(image.shape, shape)):
        if step > 1:
            image = gaussian_filter1d(image, (step - 1) / 2, axis=axis, mode="nearest")
    values = torch.from_numpy(np.ascontiguousarray(image))[None, None]
    mode = "bilinear" if image.ndim == 2 else "trilinear"
    return F.interpolate(values, tuple(shape), mode=mode, align_corners=True)[0].clamp_(0, 1)


def _steps(samples: Sequence[int], shape: Sequence[int]) -> list[float]:
    return [(m - 1) / (n - 1) for m, n in zip(samples, shape, strict=True)]


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what nibabel, gzip and zlib say about a broken file into a DataError."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        todo = "Convert it to NIfTI: SimpleITK reads most formats and writes .nii.gz; dcm2niix converts DICOM."
        if ".nii" in Path(path).name.lower():
            todo = "The file may be damaged: copy it again."
        raise data_error(path, "a readable image", f"{type(error).__name__}: {error}", todo) from error


def open_file(path: Path) -> Any:
    """The nibabel image of a file that is there and whole; its values are not read yet."""
    if path.is_dir():
        raise data_error(path, "an image file", "a folder", "Convert a folder of DICOM files with dcm2niix.")
    if not path.is_file():
        raise data_error(path, "an image file", "no such file", "Check the path.")
    with reading(path):
        if path.suffix == ".gz":  # nibabel stops before the checksum at the end, so let gzip check it
            with gzip.open(path) as stream:
                while stream.read(1 << 20):
                    pass
        return nibabel.load(path)


def spatial_shape(path, file, dim: int) -> tuple[int, int, int]:
    """`(X, Y, Z)` of an image with one real number a voxel and `dim` or more sides above 1."""
    kind, shape = file.get_data_dtype(), tuple(file.shape)
    if kind.kind not in "biuf":
        raise data_error(path, "one real number a voxel", f"data type {kind}", "Convert it to a single grey value.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3 or sum(n > 1 for n in shape) < dim:
        expected = f"a {dim}-D image with several samples along each axis"
        todo = "Save one of its volumes" if len(shape) > 3 else f"Choose a {dim}-D file or another grid"
        raise data_error(path, expected, f"shape {file.shape}", f"{todo}.")
    return (*shape, 1)[:3]


def check_affine(path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.linalg.cond(affine[:3, :3]) > 1e6:
        raise data_error(path, "an invertible affine", f"{affine.tolist()}", "Set its spacing and orientation.")


def values_of(path, file, shape: tuple[int, int, int]) -> np.ndarray:
    """All values of an opened file, `shape`, float32, finite, in the file's own order."""
    with reading(path):
        values = np.asanyarray(file.dataobj).reshape(shape)
        values = values if values.dtype.kind in "iu" and values.dtype.itemsize > 2 else values.astype(np.float32)
    if not np.isfinite(values).all():
        raise data_error(path, "finite values", f"{(~np.isfinite(values)).sum()} NaN or infinite", "Replace them.")
    return values


def _read(path: Path, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A file's values `(X, Y, Z)` float32 and affine in canonical orientation; 2-D ones have one side of 1."""
    file = open_file(path)
    shape, affine = spatial_shape(path, file, dim), np.asarray(file.affine, dtype=np.float64)
    check_affine(path, affine)
    orientation = nibabel.io_orientation(affine)
    values = nibabel.apply_orientation(values_of(path, file, shape), orientation)
    file_of_canonical = nibabel.orientations.inv_ornt_aff(orientation, shape)
    return values, affine @ file_of_canonical, np.linalg.inv(file_of_canonical)


def check_same_grid(label_path, label_shape, label_affine, image_path, shape, affine) -> None:
    """A label belongs to its image: the same canonical shape, and grids less than 0.1 voxels apart."""
    todo = "Correct the wrong header or resample the label onto the image."
    if label_shape != shape:
        raise data_error(label_path, f"the shape {shape} of {image_path}", f"{label_shape}", todo)
    # How far the label's grid strays from the image's, in voxels, at worst; at a single slice, nowhere.
    apart = np.abs(np.linalg.inv(affine) @ label_affine - np.eye(4)) @ [*(n - 1 for n in shape), 1]
    if apart.max() > 0.1:
        raise data_error(label_path, f"the affine of {image_path}", f"grids {apart.max():.3g} voxels apart", todo)


def _slice(volume: np.ndarray, affine: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """For a 2-D grid the one slice of a 2-D file or the middle slice of a volume; its affine's columns reordered."""
    if dim == 3:
        return volume, affine
    axis = volume.shape.index(1) if 1 in volume.shape else 2
    middle = volume.shape[axis] // 2
    moved = affine.copy()
    moved[:, 3] += affine[:, axis] * middle
    order = [*(a for a in range(3) if a != axis), axis, 3]
    return volume.take(middle, axis), moved[:, order]


def normalise(path, image: np.ndarray, modality: str) -> np.ndarray:
    """Intensities to [0, 1], float32: CT from [-1000, 1000] HU, MR from its minimum to its 99th percentile."""
    low, high = (-1000.0, 1000.0) if modality == "CT" else (image.min(), np.percentile(image, 99))
    image = np.clip(image, low, high)
    if image.max() <= image.min():
        where = "in [-1000, 1000] HU" if modality == "CT" else "up to the 99th percentile"
        raise data_error(path, f"an image that varies {where}", f"{image.min():g} throughout", "Leave the image out.")
    return ((image - low) / (high - low)).astype(np.float32)


def _check_label(path, label: np.ndarray, labels) -> np.ndarray:
    values = np.unique(label)
    if values.dtype.kind == "f" and np.abs(values - np.rint(values)).max() > 1e-3:
        raise data_error(path, "whole numbers", f"{values[np.rint(values) != values][0]:g}", "Save labels as integers.")
    label = label if label.dtype.kind in "iu" else np.rint(label).astype(np.int64)
    found = {int(value) for value in np.unique(label)} - {0}
    named = found if labels is None else set(labels)
    expected = "labels" if labels is None else f"labels {sorted(named)}"
    if not found <= named:
        more = f"also {sorted(found - named)[:10]}"
        raise data_error(path, expected, more, "Name them in the manifest or remove them.")
    if not found:
        raise data_error(path, expected, "only background", "Leave the image out.")
    return label.astype(np.int64)
