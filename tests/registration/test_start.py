"""Where the images start, the transforms that are kept, and applying them later: against SimpleITK and arithmetic."""

import functools
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk  # noqa: N813, as everywhere
import torch
from scipy.ndimage import gaussian_filter

from fmsam_lib.checking import ConfigError
from fmsam_lib.records import DataError
from fmsam_lib.registration.apply import apply
from fmsam_lib.registration.command import main
from fmsam_lib.registration.register import register as registering
from fmsam_lib.registration.result import growth
from tests.conftest import Analytic, xyz

register = functools.partial(registering, keep_worse=True)  # made-up transforms make noise less alike

GRID = (24, 24, 24)


STILL, STILL_2D = Analytic(lambda x: 0 * x), Analytic(lambda x: 0 * x, dim=2)


def scan(size=(40, 44, 36), seed=0, sigma=3.0, spacing=(1.0, 1.2, 1.5), origin=(-20.0, 30.0, 10.0)):
    """A head-like blob with structure inside, as a SimpleITK image in an oblique place."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=size), sigma)
    x = np.indices(size) / np.reshape(size, (-1, *[1] * len(size))) - 0.5
    values = (200 + 100 * noise / noise.std()) * ((x**2).sum(0) < 0.16)
    image = sitk.GetImageFromArray(values.clip(0).astype(np.float32).transpose())
    image.SetSpacing(spacing[: len(size)])
    image.SetOrigin(origin[: len(size)])
    if len(size) == 3:
        image.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.1, 0.2, 0.05).GetMatrix())
    return image


def test_a_crop_of_the_same_scan_does_not_move_under_headers():
    whole = scan()
    crop = whole[6:36, 4:40, 3:30]
    result = register(whole, crop, STILL, shape=GRID, start="headers")
    assert np.abs(xyz(result.displacement)).max() == 0
    np.testing.assert_allclose(xyz(result.warped)[6:36, 4:40, 3:30], xyz(crop), atol=1e-3)
    moved = register(whole, crop, STILL, shape=GRID, start="overlay").displacement
    assert np.abs(xyz(moved)).max() > 5  # the crop is stretched over the whole field of view


def test_images_that_do_not_overlap_under_headers_are_refused():
    with pytest.raises(DataError, match=r"expected an image that overlaps .* from the start headers. Choose another"):
        register(scan(), scan(origin=(500.0, 0.0, 0.0)), STILL, shape=GRID, start="headers")


def rigid(angle, shift, centre):
    euler, transform = sitk.Euler3DTransform(centre, *angle, shift), sitk.AffineTransform(3)
    transform.SetMatrix(euler.GetMatrix())
    transform.SetCenter(euler.GetCenter())
    transform.SetTranslation(euler.GetTranslation())
    return transform


@pytest.mark.parametrize("start", ["rigid", "affine"])
def test_a_known_motion_is_found(start):
    """moving(T(p)) = fixed(p): SimpleITK is to find T, to a tenth of what was moved."""
    fixed = scan()
    centre = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    true = rigid((0.12, -0.08, 0.1), (3.0, -4.0, 2.5), centre)
    if start == "affine":
        true.Scale((1.08, 0.95, 1.0))
    moving = sitk.Resample(fixed, fixed, true.GetInverse(), sitk.sitkLinear, 0.0)
    result = register(fixed, moving, STILL, shape=GRID, start=start)
    inside = np.argwhere(xyz(fixed) > 100)[::97].tolist()
    points = [fixed.TransformIndexToPhysicalPoint(index) for index in inside]

    def error(transform):
        return np.mean(
            [np.linalg.norm(np.subtract(transform.TransformPoint(p), true.TransformPoint(p))) for p in points]
        )

    assert error(sitk.Transform(3, sitk.sitkIdentity)) > 4
    assert error(result.transform) < 0.4
    assert result.summary["start"] == start


@pytest.mark.parametrize("size", [(60, 50), (60, 50, 1)])
def test_a_known_motion_of_one_slice_stays_in_its_plane(size):
    fixed = scan((60, 50), spacing=(1.0, 1.2))
    true = sitk.Euler2DTransform(fixed.TransformContinuousIndexToPhysicalPoint((29.5, 24.5)), 0.15, (4.0, -3.0))
    moving = sitk.Resample(fixed, fixed, true.GetInverse(), sitk.sitkLinear, 0.0)
    images = [sitk.JoinSeries([image]) if len(size) == 3 else image for image in (fixed, moving)]
    result = register(*images, Analytic(lambda x: 0 * x, 2), shape=(48, 40), start="rigid")
    for index in ((20, 20), (30, 12), (35, 33)):
        point = fixed.TransformIndexToPhysicalPoint(index)
        found = result.transform.TransformPoint((*point, 0.0)[: len(size)])
        assert found[:2] == pytest.approx(true.TransformPoint(point), abs=0.5)
        assert found[2:] == pytest.approx((0.0,) * (len(size) - 2))


def test_a_transform_of_a_file_is_composed_with_the_networks(tmp_path):
    fixed, moving = scan(), scan(seed=1)
    given = sitk.AffineTransform(3)
    given.Translate((5.0, -3.0, 2.0))
    given.Rotate(0, 1, 0.1)
    sitk.WriteTransform(given, str(tmp_path / "given.tfm"))
    still = register(fixed, moving, STILL, shape=GRID, start=str(tmp_path / "given.tfm"))
    expected = sitk.Resample(moving, fixed, given, sitk.sitkLinear, 0.0)
    np.testing.assert_allclose(xyz(still.warped), xyz(expected), atol=1e-3)
    shift = register(fixed, moving, Analytic(lambda x: 0 * x + 1 / 23), shape=GRID, start=str(tmp_path / "given.tfm"))
    still.save(tmp_path / "out")
    assert sitk.ReadTransform(str(tmp_path / "out/transform.h5")).GetDimension() == 3
    # One sample of the grid along each canonical axis, then the given transform.
    index = (20, 22, 18)
    edge = np.array(fixed.GetSize()) / 24  # voxels a sample; the axes of `scan` point to the left and to the back
    target = fixed.TransformContinuousIndexToPhysicalPoint((np.array(index) + edge * (-1, -1, 1)).tolist())
    found = shift.transform.TransformPoint(fixed.TransformIndexToPhysicalPoint(index))
    assert found == pytest.approx(given.TransformPoint(target), abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("hello", "no transform that SimpleITK reads"), ("2-D", "expected a 3-D transform")],
)
def test_a_start_that_is_none(tmp_path, capfd, content, message):
    path = tmp_path / "start.tfm"
    if content == "2-D":
        sitk.WriteTransform(sitk.Euler2DTransform(), str(path))
    elif content:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        register(scan(), scan(seed=1), STILL, shape=GRID, start=str(path))
    assert content or capfd.readouterr().err == ""


def test_without_an_inverse_of_the_start_none_is_written(tmp_path):
    fixed = scan()
    field = sitk.DisplacementFieldTransform(sitk.Image(fixed.GetSize(), sitk.sitkVectorFloat64, 3))
    sitk.WriteTransform(field, str(tmp_path / "field.h5"))
    result = register(fixed, scan(seed=1), STILL, shape=GRID, start=str(tmp_path / "field.h5"))
    names = [path.name for path in result.save(tmp_path / "out")]
    assert "transform.h5" in names
    assert not [name for name in names if "inverse_displacement" in name or "inverse_transform" in name]
    assert "has no inverse" in result.summary["notes"][0]
    sitk.WriteImage(result.moving, str(tmp_path / "moving.nrrd"))
    (tmp_path / "p.csv").write_text("x,y,z\n1,60,40\n")
    images = ("--images", tmp_path / "moving.nrrd", "--points", tmp_path / "p.csv")
    assert command(tmp_path / "out", *images, "--out", tmp_path / "moved") == 0
    moved = sitk.ReadImage(str(tmp_path / "moved/moving.nii.gz"))
    np.testing.assert_allclose(xyz(moved), xyz(result.warped), atol=1e-3)
    there = pd.read_csv(tmp_path / "moved/p.csv").to_numpy()[0]
    assert there == pytest.approx(result.transform.TransformPoint((1.0, 60.0, 40.0)), abs=1e-4)
    assert command(tmp_path / "out", *images, "--space", "voxels", "--out", tmp_path / "v") == 1
    assert command(tmp_path / "out", *images, "--inverse", "--out", tmp_path / "v") == 1


def test_the_inverse_goes_back():
    """With a network that is the identity, start and back is where it came from; with psi a known map, so is that."""
    result = register(scan(), scan(seed=1, spacing=(1.2, 1.1, 1.3)), STILL, shape=GRID)
    for index in ((3, 4, 5), (20, 30, 10)):
        point = result.fixed.TransformIndexToPhysicalPoint(index)
        assert result.inverse.TransformPoint(result.transform.TransformPoint(point)) == pytest.approx(point, abs=1e-6)


def test_the_jacobian_is_the_change_of_volume():
    """phi scales by 0.9, the overlay by the ratio of the fields of view."""
    fixed, moving = scan(), scan(seed=1, spacing=(1.2, 1.1, 1.3))
    result = register(fixed, moving, Analytic(lambda x: -0.1 * x), shape=GRID)
    expected = 0.9**3 * (1.2 * 1.1 * 1.3) / (1.0 * 1.2 * 1.5)
    np.testing.assert_allclose(xyz(growth(result.displacement))[3:-3, 3:-3, 3:-3], expected, rtol=1e-3)


@pytest.mark.parametrize("mm", [1e-3, 1.0, 1e3])
def test_an_affine_start_is_found_whatever_the_unit_on_a_coarse_grid(mm):
    fixed, truth = scan((35, 51, 35), spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)), sitk.AffineTransform(3)
    fixed.SetDirection(np.eye(3).ravel())
    truth.SetCenter((17, 25, 17))
    truth.Scale((1.05, 0.95, 1.0))
    truth.SetTranslation((2, -1, 1.5))
    moving = sitk.Resample(fixed, fixed, truth.GetInverse())
    for image in (fixed, moving):
        image.SetSpacing([mm] * 3)
    result = register(fixed, moving, STILL, shape=(16, 16, 16), start="affine")
    for point in ((10, 15, 10), (25, 30, 20), (17, 25, 17)):
        found = np.array(result.transform.TransformPoint((np.array(point) * mm).tolist())) / mm
        assert np.abs(found - truth.TransformPoint(point)).max() < 0.5


@pytest.mark.parametrize("role", ["fixed_mask", "moving_mask"])
def test_a_mask_between_the_samples_of_the_grid_is_named(role):
    fixed, moving = scan(), scan(seed=1)
    mask = sitk.Image(fixed.GetSize(), sitk.sitkUInt8)
    mask.CopyInformation(fixed)
    mask[2, 2, 2] = 1
    with pytest.raises(DataError, match=f"{role}: expected a mask that holds samples of the grid"):
        register(fixed, moving, STILL, shape=(16, 16, 16), **{role: mask})


def test_a_mask_is_wherever_it_is_not_0():
    mask = sitk.GetImageFromArray((sitk.GetArrayFromImage(scan()) > 0).astype(np.int8) * -1)
    mask.CopyInformation(scan())
    result = register(scan(), scan(seed=1), STILL, shape=GRID, fixed_mask=mask)
    assert 0.2 < result.pair.fixed_mask.float().mean() < 0.8


def test_pictures_have_no_sides(tmp_path):
    for name, seed in (("fixed", 0), ("moving", 1)):
        sitk.WriteImage(sitk.Cast(scan((40, 44), seed), sitk.sitkUInt8), str(tmp_path / f"{name}.png"))
    paths = [tmp_path / "fixed.png", tmp_path / "moving.png"]
    with pytest.warns(UserWarning, match="states no orientation"):
        assert register(*paths, Analytic(lambda x: 0 * x, dim=2), shape=GRID[:2]).pair.affine is None


def test_a_picture_beside_a_slice_with_sides_is_refused_however_that_is_stored(tmp_path):
    sitk.WriteImage(sitk.Cast(scan((40, 44)), sitk.sitkUInt8), str(tmp_path / "fixed.png"))
    for name, image in (("plane", scan((40, 44), 1)), ("slice", scan((40, 44, 36), 1)[:, :, 18:19])):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
        with pytest.raises(DataError, match=r"fixed.png: expected a header that states the orientation"):
            register(tmp_path / "fixed.png", tmp_path / f"{name}.nii.gz", STILL_2D, shape=GRID[:2])


def test_a_start_that_mirrors_the_image_is_refused(monkeypatch):
    monkeypatch.setattr("fmsam_lib.registration.start._found", lambda *_: np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(DataError, match="loses or mirrors it"):
        register(scan(), scan(seed=1), STILL, shape=GRID, start="affine")


@pytest.mark.parametrize("kind", ["mirrors", "folds", "neither"])
def test_a_start_of_a_file_that_mirrors_or_folds_is_a_reason(tmp_path, kind):
    image = scan()
    given = sitk.AffineTransform(3)
    given.SetCenter(image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in image.GetSize()]))
    given.Scale((-1.0 if kind == "mirrors" else 1.0, 1.0, 1.0))
    if kind == "folds":
        given = sitk.BSplineTransformInitializer(image, [4, 4, 4])
        given.SetParameters(np.random.default_rng(0).normal(0, 12, len(given.GetParameters())).tolist())
    sitk.WriteTransform(given, str(tmp_path / "given.tfm"))
    found = register(image, scan(seed=1), STILL, shape=GRID, start=str(tmp_path / "given.tfm"))
    assert (xyz(growth(found.displacement)).min() <= 0) == (kind != "neither")
    verdict = found.summary["verdict"]
    assert (verdict["verdict"] == "look at it") == (kind != "neither")
    assert ("given.tfm mirrors or folds " in verdict["reason"]) == (kind != "neither")


@pytest.mark.parametrize("size", [(40, 44, 36), (40, 44)])
def test_the_jacobian_is_right_up_to_the_border(size):
    """A network that moves nothing leaves the overlay alone, which is affine: one value everywhere."""
    moving = scan(size, seed=1, spacing=(1.5, 1.8, 1.5))
    result = register(scan(size), moving, Analytic(lambda x: 0 * x, dim=len(size)), shape=GRID[: len(size)])
    np.testing.assert_allclose(xyz(growth(result.displacement)), 1.5 * 1.5, rtol=1e-4)


def test_a_sheared_image_of_another_format_is_refused(tmp_path):
    image = scan()
    image.SetDirection((1, 0, 0, 0.05, (1 - 0.05**2) ** 0.5, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(DataError, match=r"a.nrrd: expected axes perpendicular to each other"):
        register(tmp_path / "a.nrrd", scan(seed=1), STILL, shape=GRID)


def test_an_oblique_plane_keeps_its_millimetres_and_its_results_one_place(tmp_path):
    image = scan((40, 44))
    oblique = sitk.Image(image)  # what ITK makes of a plane that leaves x and y, as (X, Y) in NIfTI
    oblique.SetDirection((-0.8, 0.1, 0.0, 0.9))
    result = register(oblique, image, Analytic(lambda x: 0 * x, dim=2), shape=GRID[:2])
    result.save(tmp_path)
    warped = sitk.ReadImage(str(tmp_path / "warped.nii.gz"))
    assert warped.GetSpacing() == pytest.approx(image.GetSpacing())
    field = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    again = sitk.Resample(image, warped, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0)
    np.testing.assert_allclose(xyz(again), xyz(warped), atol=0.01)


def test_a_network_that_moves_nothing_loses_no_similarity(tmp_path):
    sitk.WriteTransform(sitk.Euler3DTransform((0, 0, 0), 0.1, 0.05, -0.1, (3, 4, 5)), str(tmp_path / "e.tfm"))
    for seed in range(4):
        result = register(scan(seed=seed), scan(seed=seed + 9), STILL, shape=GRID, start=str(tmp_path / "e.tfm"))
        assert result.summary["verdict"]["signs"]["similarity_lost"] == 0


def test_several_volumes_in_one_file_are_refused_as_such():
    with pytest.raises(DataError, match=r"expected a 2-D or 3-D image .* Save one of its volumes"):
        register(sitk.JoinSeries([scan(), scan()]), scan(), STILL, shape=GRID)


def test_a_nibabel_image_keeps_its_name():
    images = [nibabel.Nifti1Image(xyz(scan(seed=seed)), np.eye(4)) for seed in (0, 1)]
    result = register(*images, STILL, shape=GRID)
    assert [image.get_filename() for image in images] == [None, None]
    assert result.names == ("fixed_image", "moving_image")


@pytest.fixture
def registered(tmp_path):
    """A folder of results, its images' files, and the result."""
    fixed, moving = scan(), scan(seed=1, spacing=(1.2, 1.1, 1.3))
    paths = {"fixed": tmp_path / "fixed.nii.gz", "moving": tmp_path / "moving.nrrd"}
    for name, image in (("fixed", fixed), ("moving", moving)):
        sitk.WriteImage(image, str(paths[name]))
    net = Analytic(lambda x: 0.03 * torch.sin(4 * x.flip(1)))
    result = register(paths["fixed"], paths["moving"], net, shape=GRID)
    result.save(tmp_path / "out")
    return tmp_path / "out", paths, result


def command(*arguments):
    return main(["apply", *map(str, arguments)])


def test_images_and_labels_are_moved_later(tmp_path, registered):
    folder, paths, result = registered
    ids = sitk.GetImageFromArray((sitk.GetArrayFromImage(result.moving) > 200).astype(np.int64) * 614454277)
    ids.CopyInformation(result.moving)
    sitk.WriteImage(ids, str(tmp_path / "ids.nii.gz"))
    assert (
        command(folder, "--out", tmp_path / "a", "--images", paths["moving"], "--labels", tmp_path / "ids.nii.gz") == 0
    )
    again = sitk.ReadImage(str(tmp_path / "a" / "moving.nii.gz"))
    np.testing.assert_allclose(xyz(again), xyz(result.warped), atol=1e-3)
    labels = sitk.ReadImage(str(tmp_path / "a" / "ids.nii.gz"))
    assert set(np.unique(xyz(labels))) == {0, 614454277}
    np.testing.assert_array_equal(xyz(labels), xyz(result.warp_labels(tmp_path / "ids.nii.gz")))
    assert command(folder, "--out", tmp_path / "b", "--images", paths["fixed"], "--inverse") == 0
    back = sitk.ReadImage(str(tmp_path / "b" / "fixed.nii.gz"))
    expected = sitk.Resample(result.fixed, result.moving, result.inverse, sitk.sitkLinear, 0.0)
    np.testing.assert_allclose(xyz(back), xyz(expected), atol=1e-3)
    assert back.GetSize() == result.moving.GetSize()


@pytest.mark.parametrize("space", ["lps", "ras", "voxels"])
def test_points_are_moved_and_their_error_measured(tmp_path, capsys, registered, space):
    folder, _, result = registered
    index = np.random.default_rng(0).uniform(5, 30, (7, 3))
    lps = [result.fixed.TransformContinuousIndexToPhysicalPoint(point) for point in index.tolist()]
    there = np.array([result.transform.TransformPoint(point) for point in lps])
    off = there + np.array([3.0, 0.0, 4.0])  # 5 mm away

    def said(points, image):
        if space == "voxels":
            return [image.TransformPhysicalPointToContinuousIndex(point) for point in np.array(points).tolist()]
        return np.array(points) * ((-1, -1, 1) if space == "ras" else 1)

    header = space != "voxels"  # Learn2Reg's keypoints have none
    for name, points, image in (("fixed", lps, result.fixed), ("moving", off, result.moving)):
        pd.DataFrame(said(points, image), columns=["x", "y", "z"]).to_csv(
            tmp_path / f"{name}.csv", index=False, header=header
        )
    options = ("--points", tmp_path / "fixed.csv", "--paired-points", tmp_path / "moving.csv", "--space", space)
    assert command(folder, "--out", tmp_path / "p", *options) == 0
    table = pd.read_csv(tmp_path / "p" / "fixed.csv")
    np.testing.assert_allclose(table[["x", "y", "z"]], said(there, result.moving), atol=1e-4)
    np.testing.assert_allclose(table["error_mm"], 5.0, atol=1e-4)
    assert " by the headers -> 5.000 mm" in capsys.readouterr().out


def test_points_without_a_header_need_a_space(tmp_path, capsys, registered):
    (tmp_path / "keypoints.csv").write_text("10,62,39\n11,62,39\n")
    options = ("--points", tmp_path / "keypoints.csv", "--out", tmp_path / "o")
    assert command(registered[0], *options) == 1
    assert "keypoints.csv: expected a header x,y,z, or a space, found neither. Say" in capsys.readouterr().err
    assert command(registered[0], *options, "--space", "lps") == 0
    with pytest.raises(ConfigError, match="expected space to be one of lps, ras, voxels, got 'LPS'"):
        apply(registered[0], tmp_path / "o", points=str(tmp_path / "keypoints.csv"), space="LPS")


@pytest.mark.parametrize("header", ["X,Y,Z", "x, y, z"])
def test_the_header_of_points_as_people_write_it(tmp_path, registered, header):
    (tmp_path / "p.csv").write_text(f"{header}\n1, 60, 40\n")
    assert command(registered[0], "--points", tmp_path / "p.csv", "--out", tmp_path / "o") == 0
    found = pd.read_csv(tmp_path / "o" / "p.csv").to_numpy()[0]
    assert found == pytest.approx(registered[2].transform.TransformPoint((1.0, 60.0, 40.0)), abs=1e-4)


def test_points_elsewhere_are_refused_or_named_and_other_columns_kept(tmp_path, capsys, registered):
    folder, _, result = registered
    lps = np.array([result.fixed.TransformContinuousIndexToPhysicalPoint([10.0, i, 12.0]) for i in (9, 20, 30, 500)])
    there = pd.DataFrame([result.transform.TransformPoint(point) for point in lps.tolist()], columns=["x", "y", "z"])
    there.to_csv(tmp_path / "moving.csv", index=False)
    table = pd.DataFrame(lps, columns=["x", "y", "z"])
    table.insert(0, "Label", ["001", "NA", "", "b, c"])
    table.to_csv(tmp_path / "fixed.csv", index=False)
    (table[["x", "y", "z"]] * [-1, -1, 1]).to_csv(tmp_path / "ras.csv", index=False)
    options = ("--points", tmp_path / "fixed.csv", "--out", tmp_path / "o", "--paired-points")
    assert command(folder, *options, tmp_path / "moving.csv") == 0
    assert f"note: {options[1]}: 1 of 4 points lie outside their image\n" in capsys.readouterr().err
    moved = pd.read_csv(tmp_path / "o" / "fixed.csv", dtype=str, keep_default_na=False)
    assert list(moved) == ["Label", "x", "y", "z", "error_mm"]
    assert list(moved["Label"]) == ["001", "NA", "", "b, c"]
    np.testing.assert_allclose(moved[["x", "y", "z"]].astype(float), there, atol=1e-4)
    assert command(folder, "--points", tmp_path / "o" / "fixed.csv", "--out", tmp_path / "o2") == 0  # again, not paired
    assert list(pd.read_csv(tmp_path / "o2" / "fixed.csv")) == ["Label", "x", "y", "z"]
    for arguments in ((*options, tmp_path / "ras.csv"), ("--points", tmp_path / "ras.csv", "--out", tmp_path / "o")):
        assert command(folder, *arguments) == 1
        error = capsys.readouterr().err
        assert "ras.csv: expected points that lie in their image, found none of 4 there. Check --space" in error


def test_what_is_moved_in_a_plane(tmp_path, capsys):
    plane = scan((40, 44))
    register(plane, plane, Analytic(lambda x: 0 * x, dim=2), shape=GRID[:2]).save(tmp_path / "out")
    sitk.WriteImage(sitk.JoinSeries([plane]), str(tmp_path / "slice.nii.gz"))
    sitk.WriteImage(scan(), str(tmp_path / "volume.nii.gz"))
    assert command(tmp_path / "out", "--images", tmp_path / "slice.nii.gz", "--out", tmp_path / "a") == 0
    np.testing.assert_allclose(xyz(sitk.ReadImage(str(tmp_path / "a/slice.nii.gz"))), xyz(plane), atol=1e-3)
    assert command(tmp_path / "out", "--images", tmp_path / "volume.nii.gz", "--out", tmp_path / "b") == 1
    assert "volume.nii.gz: expected a 2-D image" in capsys.readouterr().err


def test_a_plane_at_any_height_takes_a_file_without_one(tmp_path):
    """(X, Y) lies where the moving image (X, Y, 1) does, as for `register`."""
    plane = sitk.JoinSeries([scan((40, 44))], 50.0, 2.0)
    marks = scan((40, 44)) > 200
    sitk.WriteImage(marks, str(tmp_path / "marks.nii.gz"))
    result = register(plane, plane, Analytic(lambda x: 0 * x, dim=2), shape=GRID[:2])
    result.save(tmp_path / "out")
    assert command(tmp_path / "out", "--labels", tmp_path / "marks.nii.gz", "--out", tmp_path / "a") == 0
    moved = xyz(sitk.ReadImage(str(tmp_path / "a" / "marks.nii.gz")))
    assert moved.any()
    np.testing.assert_array_equal(moved, xyz(result.warp_labels(tmp_path / "marks.nii.gz")))


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_any_image_is_moved_whatever_its_intensities(tmp_path, modality):
    """A sparse probability map, and what PET counts, beside CT as beside MR: outside of them 0."""
    image = scan() * 4 - 1000 if modality == "ct" else scan()
    register(image, image, Analytic(lambda x: 0 * x + 0.3), shape=GRID, modality=modality).save(tmp_path / "out")
    few = np.zeros(image.GetSize()[::-1], np.float32)
    few[20:22, 20:22, 20:22] = 0.7
    for name, values in (("few", few), ("pet", np.random.default_rng(0).gamma(2, 1, few.shape))):
        there = sitk.GetImageFromArray(values)
        there.CopyInformation(image)
        sitk.WriteImage(there, str(tmp_path / f"{name}.nii.gz"))
        assert command(tmp_path / "out", "--images", tmp_path / f"{name}.nii.gz", "--out", tmp_path / "a") == 0
        moved = xyz(sitk.ReadImage(str(tmp_path / "a" / f"{name}.nii.gz")))
        assert moved.max() > 0.1
        assert moved.min() == 0


def test_points_in_a_plane_may_have_a_third_number(tmp_path):
    """As Learn2Reg's keypoints of 2-D images, for data sets too."""
    plane = scan((40, 44))
    register(plane, plane, Analytic(lambda x: 0 * x, dim=2), shape=GRID[:2]).save(tmp_path / "out")
    for name, line in (("two", "10,12"), ("three", "10,12,0")):
        (tmp_path / f"{name}.csv").write_text(f"{line}\n")
        options = ("--points", tmp_path / f"{name}.csv", "--space", "voxels", "--out", tmp_path / "a")
        assert command(tmp_path / "out", *options) == 0
        np.testing.assert_allclose(pd.read_csv(tmp_path / "a" / f"{name}.csv"), [[10, 12]], atol=1e-3)


def test_what_cannot_be_applied_is_said(tmp_path, capsys, registered):
    folder, paths, _ = registered
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other").mkdir()
    sitk.WriteImage(scan(), str(tmp_path / "other" / "warped.nii.gz"))
    assert command(folder, "--out", folder, "--images", tmp_path / "other" / "warped.nii.gz") == 1
    assert "warped.nii.gz there would be replaced" in capsys.readouterr().err
    (tmp_path / "commas.csv").write_text("x,y,z\n1,5,2,3\n")
    cases = [
        ((folder, "--points", tmp_path / "commas.csv"), "more cells than the first line has: decimal commas?"),
        (
            (tmp_path / "other", "--images", paths["moving"]),
            "expected a folder of fmsam-register with its transform, found no such file",
        ),
        ((folder.parent, "--images", paths["moving"]), f"in folders of their own. Give one of them: {folder.name}"),
        ((folder, "--points", tmp_path / "bad.csv"), "expected a CSV of points, columns x, y, z"),
        ((folder, "--images", tmp_path / "none.nii.gz"), "no such file"),
        ((folder, "--images", paths["moving"], paths["moving"]), "files with names of their own"),
        ((folder, "--images", paths["moving"], "--paired-points", tmp_path / "bad.csv"), "points of the other image"),
        ((folder, "--images", tmp_path / "far.nii.gz"), "far.nii.gz: expected an image that overlaps the images of"),
        ((folder, "--labels", tmp_path / "far.nii.gz"), "found nothing of it there"),
    ]
    far = sitk.Cast(scan(origin=(5000.0, 0.0, 0.0)), sitk.sitkUInt16)
    sitk.WriteImage(far, str(tmp_path / "far.nii.gz"))
    for arguments, message in cases:
        assert command(*arguments, "--out", tmp_path / "o") == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        command(folder, "--out", tmp_path / "o")
    for place in (tmp_path / "a", tmp_path / "b"):
        place.mkdir()
        (place / "p.csv").write_text("x,y,z\n1,60,40\n")
    options = ("--points", tmp_path / "a" / "p.csv", "--paired-points", tmp_path / "b" / "p.csv")
    assert command(folder, *options, "--out", tmp_path / "b") == 1
    assert "p.csv: expected another folder for the results" in capsys.readouterr().err
    json.dumps(registered[2].summary)


def test_a_registration_that_makes_the_images_less_alike_is_not_used():
    image = scan()
    shift = Analytic(lambda x: 0 * x + 0.2)
    with pytest.warns(UserWarning, match=r"less alike \(LNCC 1.000 to .*left as they were"):
        result = registering(image, image, shift, shape=GRID)
    assert np.abs(sitk.GetArrayViewFromImage(result.displacement)).max() < 1e-10
    similarity = result.summary["similarity"]
    assert similarity["before"] == similarity["after"]
    assert "less alike" in result.summary["notes"][-1]
    verdict = result.summary["verdict"]
    assert verdict["verdict"] == "look at it"
    assert verdict["reason"].startswith(result.summary["notes"][-1])
    assert sitk.GetArrayViewFromImage(register(image, image, shift, shape=GRID).displacement).any()
    other = registering(image, image, shift, shape=GRID, similarity="mind")  # LNCC is no judge there
    assert sitk.GetArrayViewFromImage(other.displacement).any()
