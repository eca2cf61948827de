"""From an image file to the grid that a network works on: canonical axes, one field of view, intensities in [0, 1].

A grid is itself a SimpleITK image, of no content: it has a size and a place in the world, so that SimpleITK does the
resampling. Its *edges* are those of the file's field of view, not the centres of the outermost voxels: one scan as thin
and as thick slices comes to lie in the same place (`align_corners=False`, as uniGradICON resizes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from fmsam_lib.images.files import Source, ids, name_of, read_labels, read_values
from fmsam_lib.records import data_error, warn_once

CT_WINDOW = (-1000.0, 1000.0)  # HU, as uniGradICON


@dataclass(frozen=True)
class Sample:
    """One image on the study's grid; shared, so do not write into its tensors.

    image: `(1, *S)` float32 in [0, 1]. label: `(1, *S)`, uint8 where its ids fit, else int64; or None. affine:
    `(4, 4)` float64, index to RAS mm; on a 2-D grid its first two columns belong to the grid's axes. unit_of_index:
    `(D, 4)`, from an index (x, y, z, 1) of the file to unit coordinates of the grid. oriented: as the function says.
    """

    image: Tensor
    label: Tensor | None
    affine: np.ndarray
    unit_of_index: np.ndarray
    oriented: bool


def decode(image_path, label_path=None, *, modality: str, shape: Sequence[int], labels=None) -> Sample:
    """An image file, and its label file if there is one, on the study's grid `shape`.

    Orientation: the closest canonical one (RAS). A 2-D `shape` takes a 2-D file however its single slice
    is stored, and of a 3-D file the middle slice along the last canonical axis.
    Intensity and resampling: see `normalise` and `on_grid`. labels: the numbers allowed beside the background, None
    for any. Raises DataError for whatever cannot be read or would not make a sensible sample.
    """
    dim = len(shape)
    image = read_values(image_path, dim)
    cosines = np.sort(np.abs(np.reshape(image.GetDirection(), (image.GetDimension(), -1))), axis=0)
    if (cosines[-1] - cosines[-2]).min() < 0.1 and oriented(image):  # 41 to 49 degrees
        told = "an axis lies halfway between two of the body's, so beside others the image may be turned by 90"
        warn_once(f"{name_of(image_path)}: {told} degrees. Resample it along the body's axes.")
    grid, label = reference(image, shape), None
    if label_path is not None:
        values = read_labels(label_path, dim, labels)
        label = labels_on_grid(check_same_grid(label_path, values, image_path, image), grid)
    to_grid = np.linalg.inv(affine(grid)) @ affine(image) / np.array([[*(n - 1 for n in shape), *[1] * (4 - dim)]]).T
    return Sample(on_grid(image, grid, modality, image_path), label, affine(grid), to_grid[:dim], oriented(image))


def affine(image: sitk.Image) -> np.ndarray:
    """Index to RAS mm, `(4, 4)`, whatever the image's dimension; a 2-D one lies in the plane z = 0."""
    dim, matrix = image.GetDimension(), np.eye(4)
    matrix[:dim, :dim] = np.array(image.GetDirection()).reshape(dim, dim) * image.GetSpacing()
    matrix[:dim, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def orientation(of: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
    """Nibabel's orientation of an affine's axes along the body's or, `beside` another affine, along that one's."""
    frame, turn = np.eye(3) if beside is None else beside[:3, :3], of.copy()
    turn[:3, :3] = (frame / np.linalg.norm(frame, axis=0)).T @ turn[:3, :3]
    return nibabel.io_orientation(turn)


def oriented(image: sitk.Image) -> bool:
    """Whether the file says where the axes point: of NIfTI, unless the codes of qform and sform are 0; a PNG never."""
    codes = {*image.GetMetaDataKeys()} & {"qform_code", "sform_code"}
    return not codes or any(image.GetMetaData(key) != "0" for key in codes)


def check_oriented(names: Sequence[str], said: Sequence[bool]) -> None:
    """Raises DataError where only one of two images states an orientation."""
    if said[0] != said[1]:
        silent, other = names if said[1] else names[::-1]
        expected = f"a header that states the orientation, as {other}'s does"
        todo = "Set it (nibabel: image.set_sform(affine, 1); convert a PNG): guessed, it could mirror the result."
        raise data_error(silent, expected, "none", todo)


def turned(fixed: np.ndarray, moving: np.ndarray, dim: int) -> bool:
    """Whether two grids' axes lie over 45 degrees apart, so that side by side one is turned, or another plane."""
    return not np.array_equal(orientation(moving, fixed)[:dim], [[axis, 1] for axis in range(dim)])


def reference(image: sitk.Image, shape: Sequence[int], beside: sitk.Image | None = None) -> sitk.Image:
    """The grid of `shape` over the image's field of view, its axes in canonical order; x of a picture as it is stored.

    Of a volume and a 2-D `shape`: over the one slice that the file has, else the middle one; that axis comes last.
    beside: another image's grid, whose axes these follow as closely as they can: for two images on either side of 45
    degrees canonical axes are others.
    """
    size = (*image.GetSize(), 1)[:3]
    dim, steps = image.GetDimension(), np.ones(3)
    along = orientation(affine(image), affine(beside) if beside else None)
    along[0, 1] = 1 if dim == 2 and not oriented(image) else along[0, 1]  # a picture is not mirrored
    axes = [int(axis) for axis in np.argsort(along[:, 0])]  # the file's, in canonical order
    across = ([axis for axis in axes if size[axis] == 1] or axes[-1:])[-1] if len(shape) == 2 else None
    axes.sort(key=lambda axis: axis == across)
    first = np.zeros(3)
    for axis, n in zip(axes, (*shape, 1)[:3], strict=True):
        flipped = along[axis, 1] < 0
        steps[axis] = (1.0 if axis == across else size[axis] / n) * (-1 if flipped else 1)
        middle = size[axis] // 2 if axis == across else abs(steps[axis]) / 2 - 0.5
        first[axis] = size[axis] - 1 - middle if flipped else middle
    grid, axes = sitk.Image([*shape, 1][:dim], sitk.sitkUInt8), axes[:dim]
    grid.SetDirection((np.array(image.GetDirection()).reshape(dim, dim)[:, axes] * np.sign(steps[axes])).ravel())
    grid.SetSpacing(np.array(image.GetSpacing())[axes] * np.abs(steps[axes]))
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(first[:dim]))
    return grid


def on_grid(
    image: sitk.Image, grid: sitk.Image, modality: str, where: Source = "image", start: sitk.Transform | None = None
) -> Tensor:
    """The image in [0, 1] on a grid, `(1, *S)`: linearly, after a Gaussian of sigma `(step - 1) / 2` voxels along axes
    with a step over 1 from sample to sample (scikit-image's rule); outside its field of view 0.

    start: from the grid's points to the image's, in ITK's space; None for the image's own place.
    """
    start = start or sitk.Transform(grid.GetDimension(), sitk.sitkIdentity)
    values = normalise(where, sitk.GetArrayViewFromImage(image), modality)
    for axis, step in enumerate(reversed(_steps(image, grid, start))):  # arrays have the last axis first
        if step > 1 + 1e-9:
            values = gaussian_filter1d(values, (step - 1) / 2, axis=axis, mode="nearest")
    return _tensor(sitk.Resample(placed(values, image), grid, start, sitk.sitkLinear, 0.0), grid).clamp_(0, 1)


def labels_on_grid(labels: sitk.Image, grid: sitk.Image, start: sitk.Transform | None = None) -> Tensor:
    """The nearest of an image's labels at each sample of a grid, `(1, *S)`: uint8 where they fit, else int64."""
    there = sitk.Image(grid)  # a hair aside: what lies between two voxels is the same however the file is stored
    there.SetOrigin(grid.TransformContinuousIndexToPhysicalPoint([1e-4] * grid.GetDimension()))
    values = _tensor(nearest(labels, there, start or sitk.Transform(grid.GetDimension(), sitk.sitkIdentity)), grid)
    low, high = values.aminmax()
    return values.to(torch.uint8 if low >= 0 and high < 256 else torch.int64)


def nearest(labels: sitk.Image, onto: sitk.Image, transform: sitk.Transform) -> sitk.Image:
    """`labels` through a transform from the points of `onto` to theirs, 0 outside; every id as it is.

    SimpleITK computes in float64: where ids do not fit, it gets their numbers in order instead.
    """
    found = ids(labels)
    if max(-found[0], found[-1]) < 2**53:
        return sitk.Resample(labels, onto, transform, sitk.sitkNearestNeighbor, 0.0)
    values = np.array([0, *found], dtype=sitk.GetArrayViewFromImage(labels).dtype)
    numbers = np.searchsorted(values[1:], sitk.GetArrayViewFromImage(labels)) + 1
    there = nearest(placed(numbers.astype(np.int32), labels), onto, transform)
    return placed(values[sitk.GetArrayViewFromImage(there)], onto)


def placed(values: np.ndarray, where: sitk.Image) -> sitk.Image:
    """Values `([Z,] Y, X)`, or vectors `([Z,] Y, X, D)`, as an image that lies where another one lies."""
    image = sitk.GetImageFromArray(values, isVector=values.ndim > where.GetDimension())
    image.CopyInformation(where)
    return image


def _steps(image: sitk.Image, grid: sitk.Image, start: sitk.Transform) -> np.ndarray:
    """How far apart neighbouring samples of the grid lie in the image, in voxels along each of its axes."""
    middle = (np.array(grid.GetSize()) - 1) / 2

    def index(shift: np.ndarray) -> np.ndarray:
        point = start.TransformPoint(grid.TransformContinuousIndexToPhysicalPoint(middle + shift))
        return np.array(image.TransformPhysicalPointToContinuousIndex(point))

    return np.linalg.norm([index(shift) - index(-shift) for shift in np.eye(len(middle)) / 2], axis=0)


def _tensor(image: sitk.Image, grid: sitk.Image) -> Tensor:
    """`(1, *S)` in the grid's order of axes, without the single slice's axis; int64 for integers."""
    values = sitk.GetArrayFromImage(image)
    values = values if values.dtype.kind == "f" else values.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values.T.reshape([n for n in grid.GetSize() if n > 1])))[None]


def check_same_grid(label_path: Source, label: sitk.Image, image_path: Source, image: sitk.Image) -> sitk.Image:
    """A label belongs to its image: grids of one size, less than 0.1 voxels apart, stored in whatever order of axes.

    Returns it with as many axes as the image: a slice may be stored as (X, Y) or as (X, Y, 1).
    """
    sides = (*label.GetSize(), *image.GetSize())
    if len(sides) == 5 and sides[-1 if image.GetDimension() == 3 else 2] == 1:
        if label.GetDimension() == 3:
            return check_same_grid(label_path, label[:, :, 0], image_path, image)
        volume = sitk.JoinSeries([check_same_grid(label_path, label, image_path, image[:, :, 0])])
        volume.CopyInformation(image)
        return volume
    todo = "Correct the wrong header or resample the label onto the image."
    where = [name_of(label_path, "labels"), name_of(image_path)]
    sizes = [(*each.GetSize(), 1)[:3] for each in (label, image)]
    there = np.linalg.inv(affine(image)) @ affine(label)  # from the label's index to the image's
    turn = nibabel.io_orientation(there)
    size = tuple(sizes[0][axis] for axis in np.argsort(turn[:, 0]))
    if size != sizes[1]:
        raise data_error(where[0], f"the shape {sizes[1]} of {where[1]}", f"{size}", todo)
    # How far the label's grid strays from the image's, in voxels, at worst; at a single slice, nowhere.
    apart = np.abs(there @ nibabel.orientations.inv_ornt_aff(turn, sizes[0]) - np.eye(4)) @ [*(n - 1 for n in size), 1]
    if apart.max() > 0.1:
        raise data_error(where[0], f"the affine of {where[1]}", f"grids {apart.max():.3g} voxels apart", todo)
    return label


def window(where: Source, image: np.ndarray, modality: str) -> tuple[float, float]:
    """The intensities that become 0 and 1: of CT -1000 and 1000 HU, of MR its minimum and its 99th percentile.

    An MR image's fill values are left out. Raises DataError for an image that would be constant, and for CT that is
    not in HU.
    """
    low, high = CT_WINDOW
    if modality != "CT":
        inside = without_fill(image)
        low, high = float(inside.min()), float(np.percentile(inside, 99))
        if (inside < low + 0.3 * (high - low)).mean() < 0.001 and high > low:
            warn_once(f"{name_of(where)}: a few values lie far below all others, which are bright now: clip those")
    elif image.min() < image.max() and image.max() > low:
        _check_hounsfield(where, image)
    if min(image.max(), high) <= max(image.min(), low):
        what = "in [-1000, 1000] HU" if modality == "CT" else "up to the 99th percentile"
        rest = ", but for 1 % of it" if modality != "CT" and image.max() > low else ""
        todo = "Leave it out, or crop it." if rest else "Leave it out."
        raise data_error(name_of(where), f"an image that varies {what}", f"{image.min():g} throughout{rest}", todo)
    return low, high


def without_fill(image: np.ndarray) -> np.ndarray:
    """An MR image's values without what fills its outside: -32768, -1024 and the like; where nothing does, all of it.

    Whole numbers below 0 (z-scores are not), at most three, each of many voxels, the last further from all other values
    than these from each other; where these are not negative, a fifth of that is far enough.
    """
    inside = rest = image
    for _ in range(3):
        low = float(rest.min())
        if low >= 0 or low % 1 or (rest == low).sum() < max(8, image.size / 1000) or low == rest.max():
            break
        rest = rest[rest > low]
        start, end = float(rest.min()), float(np.percentile(rest, 99))
        if 0 < (end - start) * (1.0 if start < 0 else 0.2) < start - low:
            inside = rest
    return inside


def normalise(where: Source, image: np.ndarray, modality: str) -> np.ndarray:
    """Intensities to [0, 1], float32: clipped to their `window`."""
    low, high = window(where, image, modality)
    exact = np.result_type(image, np.float32)  # float32 or, where that would round, float64
    scaled = np.clip(image.astype(exact, copy=False), low, high)
    scaled -= low
    scaled /= high - low
    return scaled.astype(np.float32, copy=False)


def _check_hounsfield(where: Source, image: np.ndarray) -> None:
    """Refuse CT of which the window would make most of the body constant: stored with an offset, scaled, or no CT."""
    low, high = CT_WINDOW
    image = image.ravel()[:: max(1, image.size // 1_000_000)]
    body, deep, dense = image[image > low], image[image < low - 200], image[image > high / 2]
    dark, middle, bright = np.percentile(body if body.size else image, (1, 50, 99))
    below, around = (np.percentile(deep, (25, 50, 75)) if deep.size > 0.01 * image.size else np.zeros(3)), 0.0
    if dense.size > 0.03 * image.size:  # soft tissue stored as about 1064, in much air
        around = ((dense > high - 150) & (dense < high + 200)).mean() * (dark > -50)
    # Air that scatters around -2024; all of one value, it is a scanner's padding.
    air = abs(below[1] - (low - 1024)) < 300 and 0 < below[2] - below[0] < 300
    in_bytes = image.min() >= 0 and image.max() <= 255 and (image.max() >= 200 or (image <= 5).mean() > 0.02)
    if air or (image > low + 100).mean() < 0.01:
        remedy = "They look like HU - 1024: add 1024"
    elif bright - dark < 10 or in_bytes or bright > 5000:
        remedy = "They look scaled: bring them back to HU"
    elif dark > low / 2 and ((body >= high).mean() > 0.15 or around > 0.6):
        remedy = "They look like HU + 1024: subtract 1024"
    else:
        return
    found = f"values with 1st, 50th, 99th percentile {dark:.4g}, {middle:.4g}, {bright:.4g}"
    todo = f"{remedy}, or pass the modality mr, which takes intensities as they come."
    raise data_error(name_of(where), f"CT in HU, air near {low:g}, most of the body below {high:g}", found, todo)
