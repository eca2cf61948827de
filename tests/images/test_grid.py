"""From files to the grid: where its samples lie, which intensities become 0 and 1, which labels it holds.

The judges: SimpleITK's physical space, torch's `interpolate` with `align_corners=False`, and arithmetic.
"""

import os
import struct
import warnings

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from fmsam_lib.images.cache import load
from fmsam_lib.images.grid import affine, decode, labels_on_grid, nearest, normalise, on_grid, reference, window
from fmsam_lib.records import DataError
from tests.images.test_files import GRID, HUGE, image, itk_image, label, own_cache, patched, save, says  # noqa: F401

EXAMPLES = int(os.environ.get("FMSAM_EXAMPLES", "300"))  # random headers


def between_0_and_1(values):
    """As of MR."""
    low, high = values.min(), np.percentile(values, 99)
    return np.clip((values - low) / (high - low), 0, 1)


def resized(values, shape):
    """Edge on edge, without smoothing, as torch does it."""
    mode = "bilinear" if values.ndim == 2 else "trilinear"
    there = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))[None, None]
    return F.interpolate(there, tuple(shape), mode=mode, align_corners=False)[0, 0].numpy()


def places(samples, count):
    """Where `count` samples of a grid lie among a file's, edge on edge."""
    return (np.arange(count) + 0.5) * samples / count - 0.5


def turned(spacing=(1.0, 2.0, 3.0), angles=(3, -4, 5), origin=(-5, 7, 11)):
    """RAS but for a few degrees."""
    there = np.eye(4)
    there[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    there[:3, 3] = origin
    return there


# Where samples lie


def test_image_without_resampling_is_the_file_from_0_to_1(tmp_path):
    values = image()
    paths = save(tmp_path / "a.nii.gz", values), save(tmp_path / "l.nii.gz", label(), dtype=np.uint8)
    sample = decode(*paths, modality="MR", shape=GRID, labels=(1, 2))
    np.testing.assert_allclose(sample.image[0], between_0_and_1(values), atol=1e-5)
    assert (sample.label[0].numpy() == label()).all()
    assert (sample.image.dtype, sample.label.dtype) == (torch.float32, torch.uint8)
    assert sample.image.shape == sample.label.shape == (1, *GRID)
    np.testing.assert_array_equal(sample.affine, np.diag([1, 2, 3, 1]))
    assert sample.image.is_contiguous()
    assert sample.label.is_contiguous()


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "SRA", "PIR"])
def test_any_storage_orientation_gives_the_same_sample(tmp_path, codes):
    expected = decode(save(tmp_path / "ras.nii.gz", image(), turned()), modality="MR", shape=(9, 8, 7))

    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    stored, label_stored = (
        nibabel.Nifti1Image(v.astype(np.float32), turned()).as_reoriented(transform) for v in (image(), label())
    )
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    nibabel.save(stored, tmp_path / "stored.nii.gz")
    # The label keeps its own orientation: only where it lies in the world counts.
    save(tmp_path / "label.nii.gz", label(), turned())
    sample = decode(tmp_path / "stored.nii.gz", tmp_path / "label.nii.gz", modality="MR", shape=(9, 8, 7))
    nibabel.save(label_stored, tmp_path / "label2.nii.gz")
    other = decode(tmp_path / "stored.nii.gz", tmp_path / "label2.nii.gz", modality="MR", shape=(9, 8, 7))
    torch.testing.assert_close(sample.image, expected.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample.label, other.label)
    np.testing.assert_allclose(sample.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("shape", [(11, 13, 15), (3, 4, 8)])
def test_the_edges_of_the_grid_are_those_of_the_file(tmp_path, shape):
    stored = turned() @ np.array([[0, 1, 0, 0], [-1, 0, 0, 5], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    file = nibabel.as_closest_canonical(nibabel.load(save(tmp_path / "a.nii.gz", image(), stored)))
    sample = decode(tmp_path / "a.nii.gz", modality="MR", shape=shape)
    for corner in np.ndindex(2, 2, 2):
        new = sample.affine @ [*(np.array(corner) * np.array(shape) - 0.5), 1]
        old = file.affine @ [*(np.array(corner) * np.array(file.shape) - 0.5), 1]
        np.testing.assert_allclose(new, old, atol=1e-4)
    # unit_of_index: from an index of the file as stored to the grid's [0, 1], by way of the world.
    for index in np.random.default_rng(0).uniform(-1, 9, (5, 3)):
        unit = sample.unit_of_index @ [*index, 1]
        np.testing.assert_allclose(
            sample.affine @ [*(unit * (np.array(shape) - 1)), 1], stored @ [*index, 1], atol=1e-4
        )


def on_grid_of(values, shape):
    """CT values on a grid of `shape`, in [0, 1]; they come as they would from a file."""
    made = sitk.GetImageFromArray(np.asarray(values, np.float32).T)
    made.SetDirection(np.diag([-1.0, -1, 1])[: values.ndim, : values.ndim].ravel())  # RAS
    return on_grid(made, reference(made, shape), "CT")[0].numpy()


def ct(seed=0, shape=(40, 31, 9)):
    """Values all over the window."""
    return np.random.default_rng(seed).uniform(-1000, 900, shape)


def test_a_coarser_grid_is_smoothed_by_scikit_images_rule():
    """A Gaussian of sigma `(step - 1) / 2` along the axes that become coarser, then linear interpolation."""
    fine, shape = ct(), (10, 31, 17)
    smooth = gaussian_filter((fine + 1000) / 2000, [1.5, 0.0, 0.0], mode="nearest")
    there = np.meshgrid(*map(places, fine.shape, shape), indexing="ij")
    expected = map_coordinates(smooth, np.stack(there), order=1, mode="nearest")
    np.testing.assert_allclose(on_grid_of(fine, shape), expected, atol=1e-5)
    np.testing.assert_allclose(on_grid_of(fine, shape), resized(smooth, shape), atol=1e-5)


@pytest.mark.parametrize(("size", "shape"), [((6, 7, 8), (9, 7, 13)), ((6, 7), (13, 9)), ((5, 6, 7), (10, 18, 7))])
def test_a_finer_grid_is_torchs_edge_on_edge(size, shape):
    values = ct(shape=size)
    np.testing.assert_allclose(on_grid_of(values, shape), resized((values + 1000) / 2000, shape), atol=1e-5)


def test_resampling_a_linear_ramp_is_exact(tmp_path):
    """A ramp of world coordinates stays that ramp, up to the smoothing at borders and beyond the last centres."""
    x, y, z = np.indices((9, 21, 10)).astype(float)
    path = save(tmp_path / "ramp.nii.gz", 100 * x + 20 * y + 40 * z - 950)
    grid = np.stack(np.meshgrid(*map(places, (9, 21, 10), (17, 11, 10)), indexing="ij"))
    sample = decode(path, modality="CT", shape=(17, 11, 10))
    expected = np.clip((np.tensordot([100, 20, 40], grid, 1) + 50) / 2000, 0, 1)
    inside = (slice(1, -1), slice(2, -2), slice(None))
    np.testing.assert_allclose(sample.image[0].numpy()[inside], expected[inside], atol=1e-6)
    assert sample.image[0, 0, 5, 5] == pytest.approx((20 * grid[1, 0, 5, 5] + 40 * 5 + 50) / 2000, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("count", [6, 24, 30, 60])
def test_one_scan_as_thin_and_as_thick_slices_lies_in_the_same_place(tmp_path, axis, count):
    """60 slices of 1 mm and 6 of 10 mm, headers exact: at each sample of the grid a ramp has the value of its place."""
    thin_affine, thick_affine = np.eye(4), np.eye(4)
    thick_affine[axis, axis], thick_affine[axis, 3] = 10, 4.5
    shape = [8, 8, 8]
    shape[axis] = 60
    mm = np.moveaxis(np.broadcast_to(np.arange(60.0), (8, 8, 60)), 2, axis)  # the centre of each slice
    thin = 25 * mm - 900
    parts = list(thin.shape)
    parts[axis : axis + 1] = [6, 10]
    thick = thin.reshape(parts).mean(axis + 1)
    shape[axis] = count
    one = decode(save(tmp_path / "thin.nii.gz", thin, thin_affine), modality="CT", shape=shape)
    other = decode(save(tmp_path / "thick.nii.gz", thick, thick_affine), modality="CT", shape=shape)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-6)
    at = (one.affine @ [*[3.0] * axis, 0, *[3.0] * (2 - axis), 1])[axis] + np.arange(count) * 60 / count
    np.testing.assert_allclose(at, (np.arange(count) + 0.5) * 60 / count - 0.5, atol=1e-6)
    lines = [each.image[0].moveaxis(axis, 2)[3, 3].numpy() * 2000 - 1000 for each in (one, other)]
    blurred = int(2 * (60 / count - 1) + 1) * count / 60  # SimpleITK's Gaussian ends at 4 sigma
    inside = (at >= max(4.5, blurred * 60 / count)) & (at <= 59 - max(4.5, blurred * 60 / count))
    assert inside.sum() >= 2 or count == 6
    for line in lines:
        np.testing.assert_allclose(line[inside], 25 * at[inside] - 900, atol=1e-2)
        np.testing.assert_allclose(line + line[::-1], 25 * 59 - 1800, atol=1e-2)  # no shift: it is symmetric


def test_thin_and_thick_slices_correlate_as_of_icon_registration():
    """Its `align_corners=False` gives 1.00 where centres on centres give less."""
    thin = gaussian_filter(np.random.default_rng(1).standard_normal((20, 20, 60)), 3)
    thin = 800 * thin / np.abs(thin).max()
    thick = thin.reshape(20, 20, 6, 10).mean(-1)
    one, other = (on_grid_of(values, (20, 20, 24)) for values in (thin, thick))
    expected = [resized(values, (20, 20, 24)) for values in (thin, thick)]
    ours = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert ours > np.corrcoef(*map(np.ravel, expected))[0, 1] - 0.01
    for shift in (-1, 1):
        assert np.corrcoef(one[..., 1:-1].ravel(), np.roll(other, shift, 2)[..., 1:-1].ravel())[0, 1] < ours


def test_shrinking_does_not_alias(tmp_path):
    checkers = np.indices((33, 33, 33)).sum(0) % 2 * 100.0  # the finest pattern there is
    sample = decode(save(tmp_path / "c.nii.gz", checkers), modality="MR", shape=(9, 9, 9))
    assert sample.image[0, 2:-2, 2:-2, 2:-2].std() < 0.02
    assert abs(sample.image[0, 2:-2, 2:-2, 2:-2].mean() - 0.5) < 0.02


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_grid_of_the_files_own_size_changes_nothing(dim, modality):
    values = ct(shape=(7, 9, 8)[:dim]).astype(np.float32)
    made = sitk.GetImageFromArray(values.T)
    made.SetDirection(np.diag([-1.0, -1, 1])[:dim, :dim].ravel())
    made.SetOrigin((13.7, -100.3, 0.1)[:dim])
    made.SetSpacing((0.7, 1.3, 3.1)[:dim])
    expected = normalise("a", values, modality)
    np.testing.assert_allclose(on_grid(made, reference(made, values.shape), modality)[0], expected, atol=1e-6)


def test_outside_of_a_file_is_0(tmp_path):
    """Where a start moves the grid beyond the image's edge, and up to half a voxel past the last centres not."""
    made = itk_image(np.random.default_rng(0).uniform(0, 900, (6, 7, 8)))
    shift = sitk.TranslationTransform(3, [3 * 1.5 * x for x in np.array(made.GetDirection())[1::3]])  # 3 voxels along y
    there = on_grid(made, reference(made, GRID), "CT", start=shift)
    assert 0 < (there == 0).float().mean() < 0.6
    assert there[there > 0].min() > 0.5


# Planes


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 7), (12, 14), (8, 9)])
def test_2d_files_however_their_slice_is_stored(tmp_path, axis, shape):
    plane, marks = image(shape=(6, 7)), label((6, 7))
    where = np.diag([1.0, 1, 1, 1])
    if axis is not None:
        # World axis `axis` is the one that has a single sample: the others keep their order.
        plane, marks = np.expand_dims(plane, axis), np.expand_dims(marks, axis)
        where = np.diag([*np.insert([1.0, 2.0], axis, 5.0), 1.0])
    paths = [save(tmp_path / "a.nii.gz", plane, where), save(tmp_path / "l.nii.gz", marks, where, dtype=np.uint8)]
    sample = decode(*paths, modality="MR", shape=shape)
    np.testing.assert_allclose(sample.image[0], resized(between_0_and_1(image(shape=(6, 7))), shape), atol=1e-5)
    if shape == (12, 14):
        np.testing.assert_array_equal(sample.label[0], label((6, 7)).repeat(2, 0).repeat(2, 1))
    spacing = np.linalg.norm(sample.affine[:3, :2], axis=0)
    np.testing.assert_allclose(spacing, [6 / shape[0], 7 / shape[1] * (1.0 if axis is None else 2.0)])


@pytest.mark.parametrize("angles", [(20, 0, 0), (0, -30, 10), (90, 15, 0), (10, 20, 170)])
def test_an_oblique_plane_lies_where_simpleitk_says(tmp_path, angles):
    """A ramp of the physical point, in a single slice that is turned in space."""
    path = save(tmp_path / "a.nii.gz", np.zeros((9, 8, 1)), turned((1.5, 2, 4), angles))
    values, slope = ramp(sitk.ReadImage(str(path)))
    save(path, values, turned((1.5, 2, 4), angles))
    sample = decode(path, modality="CT", shape=(9, 8) if angles[0] != 90 else (8, 9))
    mm = np.einsum(
        "ij,jxy->ixy",
        sample.affine[:3, [0, 1, 3]],
        np.stack([*np.indices(sample.image.shape[1:]), 1 + 0 * sample.image[0].numpy()]),
    )
    expected = np.tensordot(slope[:3] * [-1, -1, 1], mm, 1) + slope[3]
    sizes = sorted(sample.image.shape[1:])
    assert sizes == [8, 9]
    inner = (slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(sample.image[0].numpy()[inner] * 2000 - 1000, expected[inner], atol=2.0)
    flat = save(
        tmp_path / "flat.nii.gz", np.zeros((9, 8)), turned((1.5, 2, 4), angles)
    )  # (X, Y), turned out of its plane
    made = nibabel.load(flat)
    save(flat, image(shape=(9, 8)), made.affine)
    assert decode(flat, modality="MR", shape=(9, 8)).image.shape == (1, 9, 8)


@pytest.mark.parametrize("height", [0.0, 37.0])
@pytest.mark.parametrize("deep", ["image", "label", "both"])
def test_image_and_label_may_store_their_single_slice_differently(tmp_path, deep, height):
    """(X, Y), which ITK has in a plane without a height, or (X, Y, 1) of any height and thickness."""
    where = np.diag([1.0, 1, 8, 1])
    where[2, 3] = height
    plane, marks = image(shape=(6, 7)), label((6, 7))
    path = save(tmp_path / "a.nii.gz", plane[..., None] if deep != "label" else plane, where)
    where[2, 2] = 3
    found = save(tmp_path / "l.nii.gz", marks[..., None] if deep != "image" else marks, where)
    sample = decode(path, found, modality="MR", shape=(6, 7))
    np.testing.assert_array_equal(sample.label[0], marks)
    np.testing.assert_allclose(sample.image[0], between_0_and_1(plane), atol=1e-5)
    other = save(tmp_path / "m.nii.gz", marks[..., None] if deep != "image" else marks, np.diag([1.5, 1, 8, 1]))
    with pytest.raises(DataError, match=says("m.nii.gz: expected the affine of", "a.nii.gz", "voxels apart")):
        decode(path, other, modality="MR", shape=(6, 7))


def test_2d_grid_of_a_volume_is_its_middle_axial_slice(tmp_path):
    values = image(shape=(6, 7, 9))
    where = np.array([[-1.0, 0, 0, 3], [0, 2, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])  # stored LAS
    sample = decode(save(tmp_path / "a.nii.gz", values, where), modality="CT", shape=(6, 7))
    np.testing.assert_allclose(sample.image[0], (values[::-1, :, 4] + 1000) / 2000, atol=1e-6)
    np.testing.assert_allclose(sample.affine @ [0, 0, 0, 1], where @ [5, 0, 4, 1])


def test_a_time_axis_of_one_frame_is_no_obstacle(tmp_path):
    path = save(tmp_path / "a.nii.gz", image()[..., None])
    np.testing.assert_allclose(decode(path, modality="MR", shape=GRID).image[0], between_0_and_1(image()), atol=1e-5)


def test_a_picture_is_not_mirrored(tmp_path):
    """A PNG says nothing of sides: its first column is the first sample, its first row the top."""
    plane = np.random.default_rng(0).integers(0, 255, (7, 6)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(plane), str(tmp_path / "a.png"))
    sample = decode(tmp_path / "a.png", modality="MR", shape=(6, 7))
    np.testing.assert_allclose(sample.image[0], between_0_and_1(plane.astype(float)).T[:, ::-1], atol=1e-5)
    assert not sample.oriented


def test_axes_halfway_between_two_of_the_patients_are_the_labels_too(tmp_path):
    """At 45 degrees, where a rounding error decides which axis is nearest."""
    where, rng = turned((2, 2, 2), (0, 0, 45)), np.random.default_rng(0)
    path = save(tmp_path / "a.nii.gz", image(), where)
    for _ in range(12):
        near = where + np.pad(rng.normal(0, 1e-7, (3, 3)), ((0, 1), (0, 1)))
        marks = save(tmp_path / "l.nii.gz", label(), near, dtype=np.uint8)
        assert decode(path, marks, modality="MR", shape=GRID).label.any()


# Random headers


def ramp(where):
    """Values (X, Y, Z), a linear function of the physical point from -900 to 900, and its (slope, constant) in LPS."""
    there = np.diag([-1.0, -1, 1, 1]) @ affine(where)
    index = np.stack([*np.indices((*where.GetSize(), 1)[:3]), np.ones((*where.GetSize(), 1)[:3])])
    points = np.einsum("ij,jxyz->ixyz", there, index)[:3]
    direction = np.array([0.3, -0.5, 0.8]) / np.maximum(np.ptp(points, axis=(1, 2, 3)), 1e-9)
    values = np.tensordot(direction, points, 1)
    low, high = values.min(), values.max()
    scale = 1800 / (high - low)
    return (values - low) * scale - 900, np.array([*direction * scale, -low * scale - 900])


@st.composite
def headers(draw):
    """A file's size, and how its header says where it lies: qform, sform, both that agree or not, units, mirrors."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = tuple(draw(st.integers(6, 10)) for _ in range(3))
    spacing = 10.0 ** rng.uniform(-0.6, 0.7, 3)
    turn = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
    if draw(st.booleans()):  # along the axes of the world
        turn = np.round(Rotation.create_group("O").as_matrix()[rng.integers(24)])
    flips = rng.choice([-1, 1], 3)
    one, other = np.eye(4), np.eye(4)
    one[:3, :3], one[:3, 3] = turn * spacing * flips, rng.uniform(-200, 200, 3)
    other[:] = one
    change = draw(st.sampled_from(["same", "same", "mirrored", "turned", "spacing", "moved"]))
    if change == "mirrored":
        other[:3, rng.integers(3)] *= -1
    elif change == "turned":
        other[:3, :3] = (
            Rotation.from_rotvec(rng.uniform(-1, 1, 3) * draw(st.sampled_from([1e-3, 1.0]))).as_matrix()
            @ turn
            * spacing
        )
    elif change == "spacing":
        other[:3, :3] *= rng.uniform(0.5, 2, 3)
    elif change == "moved":
        other[:3, 3] += 30
    codes = draw(st.sampled_from([(1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (0, 2), (4, 4), (3, 1), (1, 4), (0, 0)]))
    units = draw(st.sampled_from([2, 2, 2, 0, 1, 3, 7, 10, 58]))
    finer = tuple(int(np.ceil(n * draw(st.sampled_from([0.7, 1.0, 1.6])))) for n in size)
    return size, one, other, codes, units, finer


@settings(max_examples=EXAMPLES, deadline=None)
@given(header=headers())
def test_every_header_counts_as_for_simpleitk(tmp_path_factory, header):
    """The grid's sample at a place is the value there: of a ramp in SimpleITK's own physical space."""
    size, qform, sform, codes, units, shape = header
    path = tmp_path_factory.getbasetemp() / "random.nii"

    def write(values):
        made = nibabel.Nifti1Image(values.astype(np.float32), None)
        made.header.set_qform(qform, codes[0])
        made.header.set_sform(sform, codes[1])
        content = bytearray(made.to_bytes())
        struct.pack_into("B", content, 123, units)
        path.write_bytes(content)

    write(np.zeros(size))
    there = sitk.ReadImage(str(path))
    values, slope = ramp(there)
    write(values)
    sample = decode(path, modality="CT", shape=shape)

    # The same edges, in canonical order.
    assert nibabel.aff2axcodes(sample.affine) == ("R", "A", "S")
    extent = max(np.array(there.GetSpacing()) * size)
    edges = [
        sorted(
            there.TransformContinuousIndexToPhysicalPoint(list(np.array(c) * np.array(size) - 0.5))
            for c in np.ndindex(2, 2, 2)
        ),
        sorted(
            tuple(np.array([-1, -1, 1]) * (sample.affine @ [*(np.array(c) * np.array(shape) - 0.5), 1])[:3])
            for c in np.ndindex(2, 2, 2)
        ),
    ]
    distance = np.linalg.norm(np.array(edges[0])[:, None] - np.array(edges[1])[None], axis=-1)
    assert distance.min(1).max() < 1e-4 * extent
    assert distance.min(0).max() < 1e-4 * extent

    # The values, inside of the outermost centres, and away from edges that smoothing has touched.
    index = np.indices(shape).reshape(3, -1)
    points = np.diag([-1.0, -1, 1, 1]) @ sample.affine @ np.vstack([index, np.ones(index.shape[1])])
    file_index = np.array([there.TransformPhysicalPointToContinuousIndex(point) for point in points[:3].T.tolist()])
    margin = 2.0 * (max(size) > min(shape))
    inside = ((file_index >= margin - 1e-6) & (file_index <= np.array(size) - 1 - margin + 1e-6)).all(1)
    expected = slope[:3] @ points[:3] + slope[3]
    found = sample.image.numpy().ravel() * 2000 - 1000
    assert inside.any()
    np.testing.assert_allclose(found[inside], expected[inside], atol=1.0)

    # From the file's index to the grid's, by way of the world.
    for corner in np.random.default_rng(0).uniform(0, 5, (3, 3)):
        unit = sample.unit_of_index @ [*corner, 1]
        world = (np.diag([-1.0, -1, 1, 1]) @ sample.affine @ [*(unit * (np.array(shape) - 1)), 1])[:3]
        np.testing.assert_allclose(world, there.TransformContinuousIndexToPhysicalPoint(corner), atol=1e-4 * extent)


# Intensities


def head(fill=None, planes=2, dtype=np.float32, seed=0):
    """An MR head of 40^3: background 5, tissue 150, something bright 330, noise; `planes` of it may be filled."""
    x = np.indices((40, 40, 40)) - 20.0
    values = np.where((x**2).sum(0) < 256, 150.0, 5.0)
    values[(((x - 2) / 7) ** 2).sum(0) < 1] = 330
    values = (values + np.random.default_rng(seed).normal(0, 8, values.shape)).clip(0).astype(dtype)
    for number, each in enumerate([] if fill is None else fill):
        values[..., planes * number : planes * (number + 1)] = each
    return values


FILLS = [[-32768], [-1024], [-3024], [-1000], [-2000], [-32768, -1024], [-3024, -1024], [-32768, -32767, -1024]]


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("scale", [1, 5])
def test_fill_values_of_mr_take_no_contrast(tmp_path, fill, dtype, scale):
    """The head gets the contrast that it has without them, and what is filled becomes 0."""
    values, untouched = head(fill, dtype=dtype), head(dtype=dtype)[..., 2 * len(fill) :]
    filled = slice(0, 2 * len(fill))
    values[..., 2 * len(fill) :] *= scale
    assert window("a", values, "MR") == window("a", untouched * scale, "MR")
    sample = decode(save(tmp_path / "a.nii.gz", values, np.eye(4), dtype), modality="MR", shape=(40, 40, 40))
    np.testing.assert_allclose(
        sample.image[0, ..., 2 * len(fill) :], between_0_and_1(untouched * float(scale)), atol=1e-5
    )
    assert not sample.image[0, ..., filled].any()


@pytest.mark.parametrize("fill", [-1e10, float(np.finfo(np.float32).min), -(2.0**31)])
def test_fill_values_of_other_number_types(fill):
    values = head([fill])
    assert window("a", values, "MR") == window("a", values[..., 2:], "MR")


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_a_large_offset_costs_no_detail(kind):
    values = np.random.default_rng(0).integers(0, 1000, GRID)
    apart = normalise("a", (values + 10**9).astype(kind), "MR") - normalise("a", values.astype(np.float32), "MR")
    assert np.abs(apart).max() < 1e-6


def test_one_value_far_below_all_others_is_told():
    values = 500 + head().astype(np.float32)
    with warnings.catch_warnings(action="error"):
        window("alike", values, "MR")
    values[3, 4, 5] = 0
    with pytest.warns(UserWarning, match="^dead: a few values lie far below all others, which are bright now"):
        window("dead", values, "MR")


def test_without_a_fill_value_mr_is_as_it_was():
    """From the minimum to the 99th percentile, as uniGradICON; to the bit."""
    stripped = head()
    stripped[stripped < 60] = 0
    scores = (head() - head().mean()) / head().std()
    brain = (stripped - stripped.mean()) / stripped.std()  # its background is one value, below 0
    centred = np.where(stripped > 0, (stripped - 150) / 60, 0)
    to_one = stripped / stripped.max() * 2 - 1
    dead = head()
    dead[3, 4, 5] = -32768  # one voxel: a fill value has many
    few = head()[:8, :8, :4]
    few[0, 0, 0] = -1024
    hounsfield = ct(shape=(20, 20, 20)).round()
    cropped = stripped[12:28, 12:28, 12:28]
    for values in (head(), stripped, scores, brain, centred, to_one, dead, few, hounsfield, cropped, cropped - 700):
        values = values.astype(np.float32)
        low, high = float(values.min()), float(np.percentile(values, 99))
        assert window("a", values, "MR") == (low, high)
        expected = ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)
        np.testing.assert_array_equal(normalise("a", values, "MR"), expected)


def body(kind, seed=0):
    """CT in HU as scanners give it, 48^3 int16: air, fat, muscle, bone, noise."""
    rng = np.random.default_rng(seed)
    x = (np.indices((48, 48, 48)) - 23.5) / 24
    r = np.sqrt((x[:2] ** 2).sum(0))
    values = np.full((48, 48, 48), -1000.0)
    size = 0.35 if kind == "small head" else 0.75
    values[r < size] = -90
    values[r < 0.93 * size] = 45
    if "head" in kind:
        values[(r < 0.9 * size) & (r > 0.82 * size)] = rng.normal(1000, 250, values.shape)[
            (r < 0.9 * size) & (r > 0.82 * size)
        ]
        values[r < 0.82 * size] = 35
    if kind == "chest":
        for side in (-0.33, 0.33):
            values[((x[0] - side) / 0.22) ** 2 + (x[1] / 0.45) ** 2 < 1] = -850
        values[(x[0] / 0.08) ** 2 + ((x[1] - 0.45) / 0.08) ** 2 < 1] = 500
    values += rng.normal(0, 15, values.shape)
    if kind == "filled":
        values[r > 0.95] = -3024
    if kind == "metal":
        values[20:23, 20:23] = 12_000
    if kind == "soft tissue":
        values = rng.normal(45, 15, values.shape)
        values[:, :10] = rng.normal(-95, 12, (48, 10, 48))
    if kind == "muscle":
        values = rng.normal(55, 12, values.shape)
    if kind == "lung":
        values = rng.normal(-850, 40, values.shape)
        values[20:24] = 40
    if kind == "bone":
        values = rng.normal(300, 250, values.shape)
    return values.round().clip(-32768, 32767).astype(np.int16)


HEADS = ["head", "small head", "chest", "filled", "metal"]


@pytest.mark.parametrize("kind", [*HEADS, "soft tissue", "muscle", "lung", "bone"])
def test_ct_in_hounsfield_units_is_accepted(kind):
    for values in (body(kind), body(kind).clip(-1024)):
        np.testing.assert_allclose(normalise("a", values, "CT"), np.clip((values + 1000.0) / 2000, 0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        (lambda hu: (hu.clip(-1024, 3071) + 1024).astype(np.uint16), "subtract 1024"),
        (lambda hu: hu.clip(-1024).astype(np.float32) + 1000, "subtract 1024"),
        (lambda hu: ((hu.clip(-1000, 1000) + 1000.0) / 2000 * 255).astype(np.uint8), "bring them back to HU"),
        (lambda hu: ((hu.clip(-1000, 1000) + 1000.0) / 2000).astype(np.float32), "bring them back to HU"),
        (lambda hu: (hu.clip(-1000, 1000) / 1000.0).astype(np.float32), "bring them back to HU"),
        (lambda hu: ((hu.clip(-1000, 1000) + 1000.0) / 2000 * 65535).astype(np.uint16), "bring them back to HU"),
        (lambda hu: (hu.clip(-2000) - 1024).astype(np.int16), "add 1024"),
        (lambda hu: (hu.clip(-1000) - 1024).astype(np.int16), "add 1024"),
    ],
)
def test_ct_in_other_units_is_refused_with_the_remedy(tmp_path, kind, how, remedy):
    path = save(tmp_path / "ct.nii.gz", how(body(kind)), np.eye(4))
    told = says("ct.nii.gz: expected CT in HU", "1st, 50th, 99th percentile", remedy, "modality mr")
    with pytest.raises(DataError, match=told):
        decode(path, modality="CT", shape=(24, 24, 24))
    assert decode(path, modality="MR", shape=(24, 24, 24)).image.std() > 0.01  # as the message says


def test_ct_all_outside_of_the_window():
    """What it may be, where there is something; else that it is constant."""
    for values, told in (
        (body("muscle").clip(30) + 1024, "subtract 1024"),
        (body("muscle") * 100.0, "bring them back to HU"),
        (np.full(GRID, 1500), "1500 throughout"),
        (np.where(label(), -1000, -3024), "-3024 throughout"),
    ):
        with pytest.raises(DataError, match=says("a: expected", told)):
            window("a", values, "CT")


def test_ct_window_is_fixed_in_hounsfield_units(tmp_path):
    hu = np.full(GRID, -3024.0)  # what scanners write outside their field of view
    hu[1:5, 1:6, 1:7] = -1000
    hu[2:4, 2:5, 2:6] = 0
    hu[3, 3, 3], hu[3, 3, 4] = 500, 3000
    sample = decode(save(tmp_path / "ct.nii.gz", hu, dtype=np.int16), modality="CT", shape=GRID)
    there = [round(sample.image[0][i].item(), 4) for i in [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4)]]
    assert there == [0, 0, 0.5, 0.75, 1]


# Labels


def test_labels_are_the_nearest_samples(tmp_path):
    values = np.random.default_rng(1).integers(0, 3, GRID)
    path = save(tmp_path / "a.nii.gz", image())
    sample = decode(path, save(tmp_path / "l.nii.gz", values, dtype=np.uint8), modality="MR", shape=(18, 7, 3))
    x, z = (np.rint(places(n, m)).astype(int) for n, m in ((6, 18), (8, 3)))
    np.testing.assert_array_equal(sample.label[0], values[np.ix_(x, np.arange(7), z)])


@pytest.mark.parametrize("number", [1, 255, 256, 70_000, 2**53 - 1, *HUGE, -(2**62)])
def test_any_label_is_exact_on_the_grid(tmp_path, number):
    """uint8 where all ids fit, else int64; never by way of a float that rounds it."""
    marks = np.zeros(GRID, np.int64)
    marks[2:4, 2:5, 3:6], marks[0, 0, 0] = number, 3
    paths = save(tmp_path / "a.nii.gz", image()), save(tmp_path / "l.nii.gz", marks, dtype=np.int64)
    sample = decode(*paths, modality="MR", shape=GRID, labels=[3, number])
    np.testing.assert_array_equal(sample.label[0].numpy().astype(np.int64), marks)
    assert sample.label.dtype == (torch.uint8 if 0 <= number < 256 else torch.int64)
    finer = decode(*paths, modality="MR", shape=(12, 14, 16)).label[0].numpy().astype(np.int64)
    np.testing.assert_array_equal(finer, marks.repeat(2, 0).repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("kind", [np.uint64, np.int64])
def test_nearest_keeps_ids_that_no_float_holds(kind):
    """Beyond 2^53, where neighbours differ by less than a float can say; outside 0."""
    numbers = np.array([0, 2**60, 2**60 + 1, 2**63 - 1], kind)
    marks = sitk.GetImageFromArray(numbers[np.random.default_rng(0).integers(0, 4, (6, 7, 8))])
    same = sitk.Transform(3, sitk.sitkIdentity)
    np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, [nearest(marks, marks, same), marks]))
    moved = sitk.GetArrayFromImage(nearest(marks, marks, sitk.TranslationTransform(3, (2.0, 0, 0))))
    assert moved.dtype == kind
    np.testing.assert_array_equal(moved[..., :-2], sitk.GetArrayViewFromImage(marks)[..., 2:])
    assert not moved[..., -2:].any()
    on = labels_on_grid(marks, reference(marks, (8, 7, 6)))[0].numpy()
    assert set(np.unique(on).tolist()) == set(numbers.tolist())


# What is refused


def broken(values, where, what):
    values = values.copy()
    values[where] = what
    return values


@pytest.mark.parametrize("fill", [-2000, -2048, -3024])
def test_a_thin_arm_in_a_scanners_padding_is_ct_in_hu(fill):
    """The corners outside the scanner's circle hold one value below air; the arm is a few percent of the image."""
    x, y = np.indices((64, 64)) - 31.5
    values = np.random.default_rng(0).normal(-1000, 15, (64, 64, 12))
    values[x**2 + y**2 < 64] = np.random.default_rng(1).normal(50, 20, values[x**2 + y**2 < 64].shape)
    values[x**2 + y**2 > 27**2] = fill
    assert window("arm", values.astype(np.float32), "CT") == (-1000, 1000)


RGB = np.zeros(GRID, [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (broken(image(), (1, 2, 3), np.nan), np.float32, ["finite values", "1 NaN or infinite"]),
        (broken(image(), (slice(2), 0, 0), np.inf), np.float32, ["finite values", "2 NaN or infinite"]),
        (np.full(GRID, 7), np.uint8, ["varies", "7 throughout"]),
        (
            broken(np.zeros(GRID), (0, 0, 0), 9),
            np.uint8,
            ["varies", "0 throughout, but for 1 % of it. Leave it out, or crop it"],
        ),
        (image(shape=(6, 7, 8, 2)), np.float32, ["a 2-D or 3-D image", "(6, 7, 8, 2)"]),
        (image(shape=(6, 7)), np.float32, ["a 3-D image", "(6, 7)"]),
        (image(shape=(6, 7, 1)), np.float32, ["a 3-D image", "(6, 7, 1)"]),
        (RGB, RGB.dtype, ["one real number", "data type", "vector"]),
        (image(), np.complex64, ["one real number", "complex"]),
    ],
)
def test_images_that_make_no_sense(tmp_path, values, dtype, message):
    path = save(tmp_path / "a.nii.gz", values, dtype=dtype)
    with pytest.raises(DataError, match=says("a.nii.gz: expected", *message)):
        decode(path, modality="MR", shape=GRID)


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        (label()[:-1], None, ["the shape (6, 7, 8) of", "a.nii.gz", "(5, 7, 8)"]),
        (label(), np.diag([1.0, 2.0, 3.1, 1.0]), ["the affine of", "a.nii.gz", "0.233 voxels apart"]),
        (label(), np.diag([-1.0, 2.0, 3.0, 1.0]), ["the affine of", "a.nii.gz", "5 voxels apart"]),
        (np.zeros(GRID), None, ["labels [1, 2]", "only background"]),
        (label() * 2, None, ["labels [1, 2]", "also [4]"]),
        (-1.0 * label(), None, ["labels [1, 2]", "also [-2, -1]"]),
        (label() / 2, None, ["whole numbers", "0.5"]),
    ],
)
def test_labels_that_make_no_sense(tmp_path, values, where, message):
    path = save(tmp_path / "a.nii.gz", image())
    with pytest.raises(DataError, match=says("l.nii.gz: expected", *message)):
        decode(path, save(tmp_path / "l.nii.gz", values, where), modality="MR", shape=GRID, labels={1: "", 2: ""})


@pytest.mark.parametrize("change", [0.0, np.nan, np.inf])
def test_singular_and_infinite_affines(tmp_path, change):
    srow = np.diag([1.0, 2.0, change, 1.0])[:3]
    srow[:, 3] = 0
    path = patched(tmp_path / "a.nii", image(), (252, "<hh", (0, 1)), (280, "<12f", srow.ravel()))
    told = says("a.nii: expected an invertible affine", str(change), "Set its spacing and orientation")
    with pytest.raises(DataError, match=told):
        decode(path, modality="MR", shape=GRID)


def test_missing_and_truncated_files_never_reach_the_cache(tmp_path):
    with pytest.raises(DataError, match=says("gone.nii.gz: expected an image file, found no such file")):
        load(tmp_path / "gone.nii.gz", modality="MR", shape=GRID)
    for name in ("a.nii.gz", "a.nii"):
        path = save(tmp_path / name, image())
        whole = path.read_bytes()
        for length in (0, 50, len(whole) // 2, len(whole) - 20, len(whole) - 4):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=says(name, "a readable image", "copy it again")):
                load(path, modality="MR", shape=GRID)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_the_grid_beside_another_one_follows_its_axes(axis, flips):
    """On either side of 45 degrees, where the closest canonical axes are others."""
    grids = []
    for angle in (43, 47):
        there = itk_image(image())
        turn = Rotation.from_euler(axis, angle, degrees=True).as_matrix() * flips
        there.SetDirection(turn.ravel())
        grids.append(reference(there, (8, 8, 8), *grids))
    along = np.array(grids[0].GetDirection()).reshape(3, 3).T @ np.array(grids[1].GetDirection()).reshape(3, 3)
    assert np.allclose(np.diag(along), [np.cos(np.radians(4)) if a != axis else 1 for a in "xyz"])


def test_an_axis_halfway_between_two_is_told_in_a_data_set(tmp_path, recwarn):
    for angle in (30, 44):
        decode(save(tmp_path / f"{angle}.nii", image(), turned(angles=(0, 0, angle))), modality="MR", shape=GRID)
    told = [str(w.message) for w in recwarn if "halfway" in str(w.message)]
    assert len(told) == 1
    assert "44.nii: an axis lies halfway between two of the body's" in told[0]
