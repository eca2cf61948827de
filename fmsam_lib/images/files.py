"""Image files, read by SimpleITK: whoever opens a file, for the command or for a data set, sees ITK's physical space.

Every problem with a file is a `DataError`: it names the file, what was expected, what was found, what to do. ITK's
space has the axes left, posterior, superior (LPS) and counts in mm; nothing here interprets a header once more.
"""

import gzip
import math
import os
import re
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813, as everywhere
from nibabel.analyze import AnalyzeImage
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from fmsam_lib.records import data_error, encodable

# ITK's threads do not survive a fork (of a data loader, of a test), and reading gains nothing by them.
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
sitk.ProcessObject.SetGlobalWarningDisplay(False)  # a line on standard error for every file of a data set

Source = str | os.PathLike | SpatialImage | sitk.Image  # a path, or an image of nibabel's or SimpleITK's
# What SimpleITK reads and does not take half a file for a whole one (NIfTI: see `_check_nifti`).
FORMATS = {f"{name}ImageIO" for name in ("Nifti", "Nrrd", "Meta", "GDCM", "PNG", "HDF5", "MINC")}
UNREADABLE = (OSError, EOFError, TypeError, ValueError, zlib.error, ImageFileError, HeaderDataError)
UNSHEAR = "Resample it without shear: nibabel.processing.conform, or 3D Slicer's Resample Image."
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
    return re.sub(r"\.(nii|img|hdr)(\.\w+)?$|\.(nrrd|nhdr|mha|mhd|h5|hdf5|mnc|dcm|png|mg[zh]|gz)$", "", Path(path).name)


def read_values(source: Source, dim: int, what: str = "image") -> sitk.Image:
    """The image of a source, 2-D or 3-D as ITK has it, in its own number type, for a grid of `dim` dimensions.

    Raises DataError for whatever cannot be read, is no image of one real number a voxel with `dim` sides above 1, or
    holds NaN or infinity.
    """
    image, where = _open(source, dim, what), name_of(source, what)
    _check_finite(sitk.GetArrayViewFromImage(image), where)
    return image


def read_labels(source: Source, dim: int, allowed: Collection[int] | None = None, what: str = "labels") -> sitk.Image:
    """A label image of whole numbers, not all 0; integer types are kept, so an id of any size is exact.

    allowed: the ids that may occur beside the background, None for any. Raises DataError.
    """
    image, where = _open(source, dim, what), name_of(source, what)
    if "float" in image.GetPixelIDTypeAsString():
        values = sitk.GetArrayViewFromImage(image)
        _check_finite(values, where)
        apart = np.where(np.abs(values) < 2**62, np.abs(np.rint(values) - values), np.inf)  # further ITK cannot count
        if apart.max() > 1e-3:
            found = f"{values.flat[apart.argmax()]:g}"
            raise data_error(where, "whole numbers", found, "Give a label image, not probabilities.")
        image = sitk.Cast(sitk.Round(sitk.Cast(image, sitk.sitkFloat64)), sitk.sitkInt64)  # float32 ends at 2^30
    there = set(ids(image)) - {0}
    expected = "labels" if allowed is None else f"labels {sorted(allowed)}"
    without = "" if allowed is None else ': write "label": null in its image\'s entry'  # of a manifest
    if not there:
        raise data_error(where, expected, "only background", f"Leave it out{without}.")
    if allowed is not None and (more := sorted(there.difference(allowed))):
        raise data_error(where, expected, f"also {more[:10]}", f"Name them in the manifest, or leave it out{without}.")
    return image


def _check_finite(values: np.ndarray, where: str) -> None:
    if wrong := int((~np.isfinite(values)).sum()):
        raise data_error(where, "finite values", f"{wrong} NaN or infinite", "Replace them.")


def ids(labels: sitk.Image) -> list[int]:
    """The label ids that occur, in order, the background too."""
    return np.unique(sitk.GetArrayViewFromImage(labels)).tolist()


def _open(source: Source, dim: int, what: str) -> sitk.Image:
    """The image of a source as it is stored, with one real number a voxel and `dim` sides above 1 or more."""
    if not isinstance(source, Source):
        expected, todo = "a path, or an image of nibabel's or SimpleITK's", "An array does not say where it lies."
        raise data_error(what.replace(" ", "_"), expected, type(source).__name__, todo)
    where = name_of(source, what)
    image = source if isinstance(source, sitk.Image) else _read(source, where)
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        whole, image = image, image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
        for key in {"qform_code", "sform_code"} & {*whole.GetMetaDataKeys()}:  # a slice has lost whether it is oriented
            image.SetMetaData(key, whole.GetMetaData(key))
    kind, size = image.GetPixelIDTypeAsString(), image.GetSize()
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in kind:
        raise data_error(where, "one real number a voxel", f"data type {kind}", "Convert it to a single grey value.")
    if len(size) > 3 or sum(n > 1 for n in size) < dim:
        expected = f"a {'2-D or 3' if len(size) > 3 else dim}-D image with several samples along each axis"
        todo = "Save one of its volumes" if len(size) > 3 else f"Choose a {dim}-D file, or another network or grid"
        raise data_error(where, expected, f"shape {size}", f"{todo}.")
    direction = np.array(image.GetDirection()).reshape(len(size), -1)
    if np.abs(direction.T @ direction - np.eye(len(size))).max() > 1e-3:
        if len(size) == 3:  # an NRRD or MetaImage: NIfTI, in which we write, cannot say it
            raise data_error(where, "axes perpendicular to each other", "sheared ones", UNSHEAR)
        turn, _, back = np.linalg.svd(direction)  # (X, Y) oblique or upright in space: ITK has but its x and y
        image, direction = sitk.Image(image), turn @ back if abs(np.linalg.det(direction)) > 1e-3 else np.eye(2)
        image.SetDirection(direction.ravel())
    _check_scale(direction * image.GetSpacing(), where)
    return image


def _check_scale(scale: np.ndarray, where: str) -> None:
    if not np.isfinite(scale).all() or np.linalg.cond(scale) > 1e6:
        raise data_error(where, "an invertible affine", f"{scale.tolist()}", "Set its spacing and orientation.")


def _read(source: str | os.PathLike | SpatialImage, where: str) -> sitk.Image:
    if isinstance(source, SpatialImage):
        return _from_nibabel(source, where)
    path = Path(encodable(source))
    if os.path.isdir(path):  # False of a name too long, where Path raises
        return _read_series(path)
    if not os.path.isfile(path):
        raise data_error(where, "an image file", "no such file", "Check the path.")
    content = _unzipped(path, where)
    kind = sitk.ImageFileReader.GetImageIOFromFileName(str(path))
    if kind not in FORMATS:
        return _from_nibabel(_loaded(path, where), where)  # NIfTI-2, FreeSurfer's .mgz, .nii.bz2
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if kind == "NiftiImageIO":
            qfac = _check_nifti(path, where, reader, content)  # before ITK makes room for what a damaged one promises
        image = reader.Execute()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            _check_scale(_loaded(path, where).affine[:3, :3], where)
            raise data_error(where, "axes perpendicular to each other", "a sheared sform", UNSHEAR) from error
        raise data_error(where, "a readable image", _said(error), DAMAGED) from error
    if kind == "NiftiImageIO":
        image.SetMetaData("qfac", str(qfac))
    else:
        for key in {"qform_code", "sform_code"} & {*image.GetMetaDataKeys()}:  # of a NIfTI file that it was made from
            image.EraseMetaData(key)
    if kind == "PNGImageIO" or (kind == "NrrdImageIO" and not image.HasMetaDataKey("NRRD_space")):
        image.SetMetaData("sform_code", "0")  # says of its place as little as a NIfTI file of code 0
    return image


def _loaded(path: Path, where: str) -> Any:
    """A file's image as nibabel reads it."""
    try:
        return nibabel.load(path)
    except (*UNREADABLE, ImportError) as error:
        todo = DAMAGED if stem(path) != path.name else "Convert it to NIfTI, NRRD, MetaImage or PNG; SimpleITK can."
        raise data_error(where, "a readable image", f"{type(error).__name__}: {error}", todo) from error


def _check_nifti(path: Path, where: str, reader: sitk.ImageFileReader, content: bytes) -> float:
    """Refuse what SimpleITK would read as 0 without a word: the missing end of a file, NaN and infinity.

    Returns the header's qfac, which SimpleITK reads as 0, too.
    """
    bits, offset, kind = (int(float(reader.GetMetaData(key))) for key in ("bitpix", "vox_offset", "datatype"))
    pixels = math.prod(reader.GetSize())
    needed = offset + pixels * bits // 8
    if offset < 0 or len(content) < needed:
        raise data_error(where, f"a readable image of {needed} bytes", f"{len(content)}", DAMAGED)
    apart = [part for part in parts(path) if re.search(r"\.hdr(\.gz)?$", part.name)]  # beside an .img
    stored = apart[0].read_bytes() if apart else content
    stored = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    header: Any = nibabel.Nifti1Header(stored[:348], check=False)
    if kind in (16, 64):  # float32, float64
        if offset < 348 and not apart:
            _loaded(path, where)  # refuses a damaged header
        _check_finite(np.frombuffer(content, f"{header.endianness}f{bits // 8}", pixels, offset), where)
    return header["pixdim"][0]


def _said(error: RuntimeError) -> str:
    """What ITK says of an error, without where in its sources."""
    return re.sub(r"(?s)^.*?ERROR: (\w+\(0x\w+\): )?|\s*Reason: .*", "", str(error)).strip(" .\n").split("\n")[-1]


def parts(path: Path) -> list[Path]:
    """A file, and those that belong to it, the one with the values last: of a header its data file, as it names it."""
    if re.search(r"\.(hdr|img)(\.gz)?$", path.name):
        pair = (path.with_name(stem(path) + end) for end in (".hdr", ".hdr.gz", ".img.gz", ".img"))
        return [path, *filter(Path.exists, pair)]
    if path.suffix not in (".mhd", ".mha", ".nhdr", ".nrrd") or not path.is_file():
        return [path]
    with open(path, "rb") as file:
        named = re.search(rb"(?im)^(?:ElementDataFile *=|data ?file:) *(.+?)\s*$(?s:(.*))", file.read(1 << 20))
    name, below = named.groups() if named else (b"LOCAL", b"")
    names = below.split(b"\n") if name.upper().startswith(b"LIST") else [name] * (name != b"LOCAL")
    return [path, *(path.parent / os.fsdecode(name.strip()) for name in names if name.strip())]


def _unzipped(path: Path, where: str) -> bytes:
    """What the file with the values holds, unzipped; read to the checksum at its end, which ITK does not compare."""
    try:
        path = next(file for file in (parts(path)[-1], path) if file.is_file())
        content = path.read_bytes()
        header = re.match(rb"(?s)NRRD.*?\n\r?\n|.*?\nElementDataFile *= *LOCAL *\r?\n", content[: 1 << 16])
        text, start = (header.group(), header.end()) if header else (b"", 0)
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if path.suffix == ".zraw" or re.search(rb"(?i)\n(encoding: *gz|CompressedData *= *True)", text):
            stream = zlib.decompressobj(47)  # zlib or gzip
            stream.decompress(content[start:])
            if not stream.eof:
                raise EOFError("the end of its compressed stream is missing")
    except UNREADABLE as error:
        denied = isinstance(error, PermissionError)
        raise data_error(where, "a readable image", error, "Allow reading." if denied else DAMAGED) from error
    return content


def _from_nibabel(image: Any, where: str) -> sitk.Image:
    """What SimpleITK reads of a file that nibabel writes: one geometry for both."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.nii"
        try:
            given, values, kind = image, np.asanyarray(image.dataobj), image.get_data_dtype()
            if held := values.dtype.kind in "iuf" and not nibabel.is_proxy(image.dataobj):
                # an array in memory: its own numbers, whatever its header says
                kind = np.result_type(kind, values) if values.dtype.kind == "f" else values.dtype
            placed = not isinstance(image, AnalyzeImage) or isinstance(image, nibabel.Nifti1Pair)  # Analyze is not
            if held or type(image) is not nibabel.Nifti1Image:
                image = nibabel.Nifti1Image(values, image.affine if placed else None, dtype=kind)
            if image is not given and isinstance(given, AnalyzeImage):  # NIfTI too: its place as its header has it
                for name in filter(re.compile("pixdim|xyzt|[qs]form_c|quatern|qoffset|srow").match, image.header):
                    image.header[name] = given.header.get(name, 0)
            files, taken = image.file_map, image.to_bytes()  # nibabel would call the image by the file it writes
            image.file_map = files
            path.write_bytes(taken)
        except UNREADABLE as error:
            raise data_error(where, "a readable image", f"{type(error).__name__}: {error}", DAMAGED) from error
        return _read(path, where)


def _read_series(folder: Path) -> sitk.Image:
    """A folder with one DICOM series. Raises DataError for none, for several, for slices that are not evenly spaced."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        todo = "Give an image file, or a folder of the one series."
        raise data_error(folder, "a folder with one DICOM series", f"{len(series)}", todo)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    used = {"DICOMDIR", *(Path(name).name for name in names)}  # ITK passes over files that are damaged
    others = sorted(path for path in folder.iterdir() if path.name not in used and path.is_file())
    if left_out := [path.name for path in others if path.read_bytes()[128:132] == b"DICM"]:
        todo = "Copy it again, or move it elsewhere if it belongs to something else."
        raise data_error(folder, "readable slices of one series", f"{left_out[0]} besides", todo)
    reader, positions, kinds = sitk.ImageFileReader(), [], set[int]()
    try:
        for name in names:
            reader.SetFileName(name)
            reader.ReadImageInformation()
            positions.append(reader.GetOrigin())
            kinds.add(reader.GetPixelID())  # with its own slope and intercept each
        moves = np.diff(np.array(positions), axis=0)
        steps, normal = np.linalg.norm(moves, axis=1), np.array(reader.GetDirection())[2::3]
        if len(steps) and (not steps.all() or np.ptp(steps) > 0.01 * steps.mean()):
            found = f"steps of {steps.min():.3g} to {steps.max():.3g} mm"
            todo = "Is a slice missing? dcm2niix resamples them." if steps.all() else "Save one frame, as dcm2niix can."
            raise data_error(folder, "evenly spaced slices, one in each place", found, todo)
        if len(steps) and np.abs(moves @ normal).sum() < 0.9999 * steps.sum():  # ITK would stack them upright
            todo = "dcm2niix corrects the tilt."
            raise data_error(folder, "slices stacked at right angles", "a tilted gantry", todo)
        return sitk.ReadImage(names, sitk.sitkFloat64 if len(kinds) > 1 else sitk.sitkUnknown)
    except RuntimeError as error:
        raise data_error(folder, "a readable DICOM series", _said(error), DAMAGED) from error
