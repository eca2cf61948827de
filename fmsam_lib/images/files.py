"""Image files, read by SimpleITK: whoever opens a file, for the command or for a data set, sees ITK's physical space.

Every problem with a file is a `DataError`: it names the file, what was expected, what was found, what to do. ITK's
space has the axes left, posterior, superior (LPS) and counts in mm; nothing here interprets a header once more.
"""

import gzip
import os
import re
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813, as everywhere
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from fmsam_lib.records import data_error

# ITK's threads do not survive a fork (of a data loader, of a test), and reading gains nothing by them.
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
sitk.ProcessObject.SetGlobalWarningDisplay(False)  # on a terminal; whoever reads a header in doubt gets a note of ours

Source = str | os.PathLike | SpatialImage | sitk.Image  # a path, or an image of nibabel's or SimpleITK's
# What SimpleITK reads and does not take half a file for a whole one (NIfTI: see `_check_whole`).
FORMATS = {"NiftiImageIO", "NrrdImageIO", "MetaImageIO", "GDCMImageIO", "PNGImageIO"}
DAMAGED = "The file may be damaged: copy it again."


def name_of(source: Source, what: str = "image") -> str:
    """What messages call an image: its path, or `what` it is where it has none."""
    if isinstance(source, SpatialImage):
        return source.get_filename() or what.replace(" ", "_")
    return what.replace(" ", "_") if isinstance(source, sitk.Image) else str(source)


def stem(path: str | Path) -> str:
    """A file's name without folder and format.

    >>> [stem(name) for name in ("a/sub-1.2_T1.nii.gz", "b.mha", "series")]
    ['sub-1.2_T1', 'b', 'series']
    """
    return re.sub(r"\.(nii|img)(\.\w+)?$|\.(hdr|nrrd|nhdr|mha|mhd|dcm|png|mg[zh]|gz)$", "", Path(path).name)


def read_values(source: Source, dim: int, what: str = "image") -> sitk.Image:
    """The image of a source, 2-D or 3-D as ITK has it, in its own number type, for a grid of `dim` dimensions.

    Raises DataError for whatever cannot be read, is no image of one real number a voxel with `dim` sides above 1, or
    holds NaN or infinity.
    """
    image, where = _open(source, dim, what), name_of(source, what)
    if wrong := int((~np.isfinite(sitk.GetArrayViewFromImage(image))).sum()):
        raise data_error(where, "finite values", f"{wrong} NaN or infinite", "Replace them.")
    return image


def read_labels(source: Source, dim: int, allowed: Iterable[int] | None = None, what: str = "labels") -> sitk.Image:
    """A label image of whole numbers, not all 0; integer types are kept, so an id of any size is exact.

    allowed: the ids that may occur beside the background, None for any. Raises DataError.
    """
    image, where = _open(source, dim, what), name_of(source, what)
    if "float" in image.GetPixelIDTypeAsString():
        values = sitk.GetArrayViewFromImage(image)
        whole = np.rint(values)
        if not np.isfinite(values).all() or np.abs(whole - values).max() > 1e-3:
            found = f"{values[np.rint(values) != values][0]:g}"
            raise data_error(where, "whole numbers", found, "Give a label image, not probabilities.")
        image = sitk.Cast(sitk.Round(image), sitk.sitkInt64)
    there = set(ids(image)) - {0}
    named = None if allowed is None else set(allowed)
    if not there:
        raise data_error(where, "labels", "only background", "Leave it out.")
    if named is not None and not there <= named:
        more = f"also {sorted(there - named)[:10]}"
        raise data_error(where, f"labels {sorted(named)}", more, "Name them in the manifest or remove them.")
    return image


def ids(labels: sitk.Image) -> list[int]:
    """The label ids that occur, in order, the background too."""
    return np.unique(sitk.GetArrayViewFromImage(labels)).tolist()


def _open(source: Source, dim: int, what: str) -> sitk.Image:
    """The image of a source as it is stored, with one real number a voxel and `dim` sides above 1 or more."""
    where = name_of(source, what)
    image = source if isinstance(source, sitk.Image) else _read(source, where)
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
    kind, size = image.GetPixelIDTypeAsString(), image.GetSize()
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in kind:
        raise data_error(where, "one real number a voxel", f"data type {kind}", "Convert it to a single grey value.")
    if len(size) > 3 or sum(n > 1 for n in size) < dim:
        expected = f"a {dim}-D image with several samples along each axis"
        todo = "Save one of its volumes" if len(size) > 3 else f"Choose a {dim}-D file or another grid"
        raise data_error(where, expected, f"shape {size}", f"{todo}.")
    scale = np.array(image.GetDirection()).reshape(len(size), -1) * image.GetSpacing()
    if not np.isfinite([*scale.flat, *image.GetOrigin()]).all() or np.linalg.cond(scale) > 1e6:
        raise data_error(where, "an invertible affine", f"{scale.tolist()}", "Set its spacing and orientation.")
    return image


def _read(source: str | os.PathLike | SpatialImage, where: str) -> sitk.Image:
    if isinstance(source, SpatialImage):
        return _from_nibabel(source, where)
    path = Path(source)
    if path.is_dir():
        return _read_series(path)
    if not path.is_file():
        raise data_error(path, "an image file", "no such file", "Check the path.")
    kind = sitk.ImageFileReader.GetImageIOFromFileName(str(path))
    if kind not in FORMATS:
        try:  # NIfTI-2, FreeSurfer's .mgz, .nii.bz2
            return _from_nibabel(nibabel.load(path), where)
        except (OSError, ValueError, ImageFileError) as error:
            todo = "Convert it to NIfTI, NRRD or MetaImage; SimpleITK and 3D Slicer do."
            raise data_error(path, "a readable image", f"{type(error).__name__}: {error}", todo) from error
    content = _unzipped(path) if kind == "NiftiImageIO" else b""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        found = str(error).strip().split("\n")[-1].removeprefix("ITK ERROR: ")
        if "orthonormal" in found:
            todo = "Resample it without shear: nibabel.processing.conform, or 3D Slicer's Resample Image."
            raise data_error(path, "axes perpendicular to each other", "a sheared sform", todo) from error
        raise data_error(path, "a readable image", found, DAMAGED) from error
    if kind == "NiftiImageIO":
        _check_nifti(path, image, content)
    return image


def _unzipped(path: Path) -> bytes:
    """What a NIfTI file holds; of `.hdr`, its `.img`. A gzip stream is read to the checksum at its end."""
    if path.suffix == ".hdr":
        path = next((file for file in map(path.with_suffix, (".img", ".img.gz")) if file.exists()), path)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise data_error(path, "a readable image", f"{type(error).__name__}: {error}", DAMAGED) from error


def _check_nifti(path: Path, image: sitk.Image, content: bytes) -> None:
    """Refuse what SimpleITK would read as 0 without a word: the missing end of a file, NaN and infinity."""
    bits, offset, kind = (int(float(image.GetMetaData(key))) for key in ("bitpix", "vox_offset", "datatype"))
    needed = offset + image.GetNumberOfPixels() * bits // 8
    if len(content) < needed:
        raise data_error(path, f"a readable image of {needed} bytes", f"{len(content)}", DAMAGED)
    if kind in (16, 64):  # float32, float64
        head = path.read_bytes()[:4] if path.suffix == ".hdr" else content[:4]
        order = "<" if head == (348).to_bytes(4, "little") else ">"
        values = np.frombuffer(content, f"{order}f{bits // 8}", image.GetNumberOfPixels(), offset)
        if wrong := int((~np.isfinite(values)).sum()):
            raise data_error(path, "finite values", f"{wrong} NaN or infinite", "Replace them.")


def _from_nibabel(image: Any, where: str) -> sitk.Image:
    """What SimpleITK reads of a file that nibabel writes: one geometry for both."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.nii"
        try:
            if not isinstance(image, nibabel.Nifti1Image) or isinstance(image, nibabel.Nifti2Image):
                image = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine, dtype=image.get_data_dtype())
            nibabel.save(image, path)
        except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
            raise data_error(where, "a readable image", f"{type(error).__name__}: {error}", DAMAGED) from error
        return _read(path, where)


def _read_series(folder: Path) -> sitk.Image:
    """A folder with one DICOM series. Raises DataError for none, for several, for slices that are not evenly spaced."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        todo = "Give an image file, or a folder of the one series."
        raise data_error(folder, "a folder with one DICOM series", f"{len(series)}", todo)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    reader, positions = sitk.ImageFileReader(), []
    try:
        for name in names:
            reader.SetFileName(name)
            reader.ReadImageInformation()
            positions.append(reader.GetOrigin())
        steps = np.linalg.norm(np.diff(np.array(positions), axis=0), axis=1)
        if len(steps) and np.ptp(steps) > 0.01 * steps.mean():
            found = f"steps of {steps.min():.3g} to {steps.max():.3g} mm"
            raise data_error(folder, "evenly spaced slices", found, "Is a slice missing? dcm2niix resamples them.")
        return sitk.ReadImage(names)
    except RuntimeError as error:
        raise data_error(folder, "a readable DICOM series", str(error).strip().split("\n")[-1], DAMAGED) from error
