"""Random NIfTI headers: SimpleITK, given our displacement and our transforms, gets our warped image."""

import functools
import os
import warnings

import hypothesis
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, as everywhere
import torch
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from fmsam_lib.records import DataError
from fmsam_lib.registration import result as result_module
from fmsam_lib.registration.register import register as registering
from tests.conftest import Analytic

register = functools.partial(registering, keep_worse=True)  # made-up transforms make noise less alike

EXAMPLES = int(os.environ.get("FMSAM_EXAMPLES", "150"))  # 5,000 take five minutes
GRID = (16, 16, 16)
SHAPES = {"fixed": (9, 11, 8), "moving": (10, 8, 9)}
NOISE = {
    name: gaussian_filter(np.random.default_rng(i).normal(size=s), 1) for i, (name, s) in enumerate(SHAPES.items())
}


NET = Analytic(lambda x: 0.08 * torch.sin(3 * x.flip(1) + 1)).eval()
SPACING = st.tuples(*[st.floats(0.6, 1.5)] * 3)
ANGLES = st.one_of(
    st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-180, 180)] * 3), st.tuples(*[st.floats(-0.2, 0.2)] * 3)
)


@st.composite
def places(draw):
    """An affine of orthogonal axes, left- or right-handed."""
    matrix = np.eye(4)
    turned = Rotation.from_euler("xyz", draw(ANGLES), degrees=True).as_matrix()
    turned = turned[:, list(draw(st.permutations(range(3))))]
    matrix[:3, :3] = turned * draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)) * draw(SPACING)
    far = draw(st.sampled_from([3.0, 300.0]))
    matrix[:3, 3] = draw(st.tuples(*[st.floats(-far, far)] * 3))
    return matrix


@st.composite
def headers(draw):
    """qform and sform that agree, differ a little, in a mirrored axis, in the spacing, or altogether."""
    qform = draw(places())
    sform = {
        "the same": lambda: qform.copy(),
        "mirrored": lambda: qform @ np.diag([*draw(st.permutations([-1, 1, 1])), 1]),
        "turned a little": lambda: _turned(qform, draw(st.floats(-0.1, 0.1))),
        "stretched": lambda: qform @ np.diag([*draw(st.tuples(*[st.floats(0.99, 1.01)] * 3)), 1]),
        "moved a little": lambda: qform + np.pad(np.full((3, 1), draw(st.floats(-0.01, 0.01))), ((0, 1), (3, 0))),
        "another": lambda: draw(places()),
    }[draw(st.sampled_from(["the same", "mirrored", "turned a little", "stretched", "moved a little", "another"]))]()
    codes = draw(st.sampled_from([(1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (1, 4), (0, 2), (2, 2)]))
    return qform, sform, codes, draw(st.sampled_from([2, 2, 2, 0, 3, 58])), draw(st.booleans())


def _turned(matrix, degrees):
    turned = matrix.copy()
    turned[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ matrix[:3, :3]
    return turned


def write(path, name, header):
    qform, sform, (qcode, scode), unit, zooms = header
    image = nibabel.Nifti1Image((1000 + 900 * NOISE[name]).astype(np.float32), sform)
    image.header.set_qform(qform, qcode)
    image.header.set_sform(sform, scode)
    image.header["xyzt_units"] = unit
    if zooms and not scode:
        image.header.set_zooms([1.5 * zoom for zoom in image.header.get_zooms()])
    with open(path, "wb") as file:  # nibabel's own saving would correct the header
        image.header["magic"], image.header["vox_offset"] = b"n+1", 352
        image.header.write_to(file)
        file.write(bytes(4))
        file.write(np.asanyarray(image.dataobj).tobytes(order="F"))
    return path


@hypothesis.settings(
    max_examples=EXAMPLES, phases=[hypothesis.Phase.generate], deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
@hypothesis.given(fixed=headers(), moving=headers(), start=st.sampled_from(["overlay", "overlay", "headers"]))
def test_simpleitk_gets_our_warped_image_from_our_displacement(tmp_path_factory, fixed, moving, start):
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    paths = {name: write(folder / f"{name}.nii", name, {"fixed": fixed, "moving": moving}[name]) for name in SHAPES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = register(paths["fixed"], paths["moving"], NET, shape=GRID, start=start)
        except DataError as error:
            hypothesis.event(str(error).split("expected ")[1][:24])
            return
    hypothesis.event("registered")
    for name, what in result._files():
        if name in ("displacement.nii.gz", "warped.nii.gz", "transform.h5", "inverse_transform.h5"):
            result_module.write(what, folder / name)
    field = sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    images = [sitk.ReadImage(str(paths[name]), sitk.sitkFloat32) for name in ("moving", "fixed")]
    theirs = sitk.Resample(*images, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0)
    ours = sitk.ReadImage(str(folder / "warped.nii.gz"))
    a, b = (sitk.GetArrayFromImage(image) for image in (theirs, ours))
    wrong = np.abs(a - b) > 1e-3 * np.ptp(b)
    assert not wrong.any(), f"{wrong.sum()} voxels"
    np.testing.assert_allclose(ours.GetOrigin(), images[1].GetOrigin(), rtol=1e-5, atol=1e-4)
    # The transforms in their own files say the same of a point, and the way back comes back.
    there, back = (sitk.ReadTransform(str(folder / f"{name}transform.h5")) for name in ("", "inverse_"))
    middle = images[1].TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in SHAPES["fixed"]])
    point = there.TransformPoint(middle)
    assert point == pytest.approx(result.transform.TransformPoint(middle), abs=1e-6)
    assert back.TransformPoint(point) == pytest.approx(result.inverse.TransformPoint(point), abs=1e-6)
