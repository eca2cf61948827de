"""Where two images lie to each other before the network: a transform in ITK's space, fixed points to moving ones.

And what their headers leave in doubt: people hear of it, though SimpleITK has decided.

overlay  both fields of view laid over each other, edge on edge, as uniGradICON does; headers only give millimetres
headers  where the scanner says: the identity, for two images of one visit
rigid, affine  found by SimpleITK: Mattes' mutual information, from the overlay of the two centres
a file   whatever transform SimpleITK reads, fixed to moving, as its registration and ANTs' write it
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation
from torch import Tensor

from fmsam_lib.images.grid import affine, check_oriented, orientation, oriented
from fmsam_lib.records import data_error, encodable

FOUND = ("rigid", "affine")
NAMED = ("overlay", "headers", *FOUND)  # anything else is a file


def starting(
    start: str, grids: tuple[sitk.Image, sitk.Image], images: tuple[Tensor, Tensor], names: tuple[str, str]
) -> sitk.Transform:
    """The transform `start`, for the fixed and the moving image's own grids and the images on them, `(1, *S)`.

    Raises DataError for images that cannot be laid over each other, and for a file that holds no such transform.
    """
    fixed, moving = grids
    dim = fixed.GetDimension()
    if start == "headers":
        return sitk.Transform(dim, sitk.sitkIdentity)
    if start in ("overlay", *FOUND):
        if start == "overlay":
            _check_alike(grids, names)
            matrix = index_to_lps(moving) @ np.linalg.inv(index_to_lps(fixed))
        else:
            try:
                laid = _found(start, grids, images)
            except RuntimeError:  # no sample is left in the moving image
                laid = np.zeros((4, 4))
            if np.linalg.det(laid) <= 0:
                expected, todo = f"an image that {start} brings onto {names[0]}", "Choose another --start."
                raise data_error(names[1], expected, "that it loses or mirrors it", todo)
            to_lps = [index_to_lps(grid) / [*grid.GetSpacing(), *[1.0] * (4 - dim)] for grid in grids]  # from mm
            matrix = to_lps[1] @ laid @ np.linalg.inv(to_lps[0])
        return sitk.AffineTransform(matrix[:dim, :dim].ravel(), matrix[:dim, 3])
    expected = "overlay, headers, rigid, affine or a file with a transform"
    if not Path(encodable(start)).is_file():  # HDF5 would print pages about it
        raise data_error(start, expected, "no such file", "Check --start.")
    try:
        transform = sitk.ReadTransform(start)
    except RuntimeError as error:
        found = "no transform that SimpleITK reads (.tfm, .txt, .mat, .h5)"
        raise data_error(start, expected, found, "Check --start.") from error
    if transform.GetDimension() != dim:
        found = f"one of {transform.GetDimension()} dimensions"
        raise data_error(start, f"a {dim}-D transform, for {names[0]}", found, "Choose another --start.")
    return transform


def _found(kind: str, grids: tuple[sitk.Image, sitk.Image], images: tuple[Tensor, Tensor]) -> np.ndarray:
    """The rigid or affine map between the grids, in mm along their own axes, `(4, 4)`; one slice stays in its plane."""
    dim = images[0].dim() - 1
    unit = max(grids[0].GetSpacing()[:dim])  # the optimiser's steps and scales are made for numbers near 1
    flat = [sitk.GetImageFromArray(image[0].numpy().transpose()) for image in images]
    for image, grid in zip(flat, grids, strict=True):
        image.SetSpacing(np.array(grid.GetSpacing()[:dim]) / unit)
    rigid = sitk.Euler2DTransform() if dim == 2 else sitk.Euler3DTransform()
    centred = sitk.CenteredTransformInitializer(*flat, rigid, sitk.CenteredTransformInitializerFilter.GEOMETRY)
    transform = _optimised(flat, centred)
    if kind == "affine":
        parts = (transform.GetMatrix(), transform.GetTranslation(), transform.GetCenter())
        transform = _optimised(flat, sitk.AffineTransform(*parts))
    matrix = np.eye(4)
    matrix[:dim, :dim] = np.reshape(transform.GetMatrix(), (dim, dim))
    matrix[:dim, 3] = np.multiply(transform.TransformPoint([0.0] * dim), unit)
    return matrix


def _optimised(images: list[sitk.Image], start: sitk.Transform):
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    steps = {"learningRate": 0.2, "minStep": 5e-4, "numberOfIterations": 200, "relaxationFactor": 0.6}
    method.SetOptimizerAsRegularStepGradientDescent(**steps)  # larger steps turn small images inside out
    method.SetOptimizerScalesFromPhysicalShift()
    levels = [factor for factor in (4, 2, 1) if min(images[0].GetSize()) // factor >= 12] or [1]
    method.SetShrinkFactorsPerLevel(levels)
    method.SetSmoothingSigmasPerLevel([factor / 2 for factor in levels])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(False)
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(*images)
    return start


def index_to_lps(image: sitk.Image) -> np.ndarray:
    """From an index to mm in ITK's space, `(4, 4)`."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine(image)


def _check_alike(grids: tuple[sitk.Image, sitk.Image], names: tuple[str, str]) -> None:
    """Raises DataError unless the two fields of view could show the same thing."""
    dim = sum(n > 1 for n in grids[0].GetSize())
    fixed_axes, moving_axes = map(affine, grids)
    if orientation(moving_axes, fixed_axes)[:dim, 0].max() >= dim:
        along = [sorted(orientation(axes)[:dim, 0].astype(int)) for axes in (fixed_axes, moving_axes)]
        fixed, moving = (" and ".join(("left-right", "back-front", "down-up")[axis] for axis in axes) for axes in along)
        expected, todo = f"a slice along {fixed}, as {names[0]}", "Take slices of one orientation."
        raise data_error(names[1], expected, f"one along {moving}, over 45 degrees off", todo)
    sizes = np.array([np.array(grid.GetSize()[:dim]) * grid.GetSpacing()[:dim] for grid in grids])
    ratio = sizes[1] / sizes[0]
    if ratio.max() > 3 or ratio.min() < 1 / 3:
        here, there = (" x ".join(f"{mm:.3g}" for mm in size) + " mm" for size in sizes)
        expected = f"a field of view like the {here} of {names[0]}, at most 3 times as large or small"
        todo = "Crop or pad one of them, so that they show the same, or choose another --start than overlay."
        if ratio.max() < 2 * ratio.min():
            todo = f"All axes differ by about {ratio.mean():.2g} times: is a spacing lost or in another unit? {todo}"
        raise data_error(names[1], expected, f"{there} (right, front, up)", todo)


def doubts(where: tuple[str, str], images: tuple[sitk.Image, sitk.Image]) -> list[str]:
    """What is doubtful about the headers. Raises DataError where only one of them states an orientation."""
    check_oriented(where, [*map(oriented, images)])
    said = "the header states no orientation (of NIfTI: qform and sform codes 0): the axes are taken as for ITK, LPS"
    notes = [] if oriented(images[0]) else [f"{name}: {said}" for name in where]
    for name, image in zip(where, images, strict=True):
        if _forms_disagree(image):
            spacing = " x ".join(f"{mm:.3g}" for mm in image.GetSpacing())
            notes.append(f"{name}: qform, sform and pixdim disagree; as for ITK, the spacing is {spacing} mm")
    return notes


def _forms_disagree(image: sitk.Image) -> bool:
    """Whether a NIfTI header says of a volume's place also something else than what SimpleITK made of it."""
    if image.GetDimension() < 3 or not image.HasMetaDataKey("qfac"):  # no file that we read
        return False

    def numbers(*keys: str) -> list[float]:
        return [float(word) for key in keys for word in image.GetMetaData(key).split()]

    unit, places = {1: 1000.0, 3: 0.001}.get(int(image.GetMetaData("xyzt_units")) & 7, 1.0), []  # the rest is time's
    if image.GetMetaData("sform_code") != "0":
        places.append(np.reshape(numbers("srow_x", "srow_y", "srow_z"), (3, 4)))
    if image.GetMetaData("qform_code") != "0":
        vector, last = numbers("quatern_b", "quatern_c", "quatern_d"), -1 if numbers("qfac")[0] < 0 else 1
        rotation = Rotation.from_quat([*vector, np.sqrt(max(0, 1 - np.square(vector).sum()))]).as_matrix()
        steps = np.multiply(numbers("pixdim[1]", "pixdim[2]", "pixdim[3]"), [1, 1, last])
        places.append(np.column_stack([rotation * steps, numbers("qoffset_x", "qoffset_y", "qoffset_z")]))
    atol = 1e-3 * min(image.GetSpacing())
    return any(not np.allclose(unit * place, affine(image)[:3], rtol=1e-5, atol=atol) for place in places)
