import json
import os
import re
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from fmsam_lib.images.cache import load
from fmsam_lib.images.domains import open_domain
from fmsam_lib.images.files import decode, resample
from fmsam_lib.images.manifest import read_manifest, subject_of
from fmsam_lib.records import DataError

REAL = Path(os.environ.get("FMSAM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
REAL_SETS = {"HippocampusMR": 3, "CardiacACDC": 3, "BrainPTBP2D": 2, "CardiacSunnybrook2D": 2}
GRID = (6, 7, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FMSAM_DATA", raising=False)


def save(path, values, affine=None, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.asarray(values).astype(dtype), affine), path)
    return path


def image(seed=0, shape=GRID):
    return np.random.default_rng(seed).uniform(10, 200, shape)


def label(shape=GRID):
    values = np.zeros(shape, np.uint8)
    values[tuple(slice(1, n // 2 + 1) for n in shape)] = 1
    values[tuple(slice(n // 2 + 1, n - 1) for n in shape)] = 2
    return values


def dataset(folder, *, train=("p1_ED", "p2_ED", "p3_ED"), test=(("p8", "p9"),), write=True, shape=GRID, **changes):
    """A small data set; `changes` replace keys of its manifest (None removes one)."""
    names = dict.fromkeys([*train, *(name for pair in test for name in pair)])
    for number, name in enumerate(names if write else ()):
        save(folder / "imagesTr" / f"{name}.nii.gz", image(number, shape))
        save(folder / "labelsTr" / f"{name}.nii.gz", label(shape), dtype=np.uint8)
    content = {
        "name": folder.name,
        "dimensions": 3,
        "modality": {"0": "MR"},
        "labels": {"0": "background", "1": "left", "2": "right"},
        "pairing": "inter-subject",
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in train],
        "registration_val": [{"fixed": f"./imagesTr/{f}.nii.gz", "moving": f"./imagesTr/{m}.nii.gz"} for f, m in test],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in content.items() if value is not None}
    (folder / f"{folder.name}_dataset.json").write_text(json.dumps(content))
    return folder


def says(*parts):
    """A pattern for all `parts` in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


# Manifests


def test_manifest_says_what_the_data_set_holds(tmp_path):
    manifest = read_manifest(dataset(tmp_path / "Own"))
    assert (manifest.name, manifest.dimensions, manifest.modality) == ("Own", 3, "MR")
    assert manifest.labels == {1: "left", 2: "right"}
    assert [path.name for path in manifest.training] == ["p1_ED.nii.gz", "p2_ED.nii.gz", "p3_ED.nii.gz"]
    assert manifest.training_pairs is None
    assert [tuple(path.name for path in pair) for pair in manifest.test_pairs] == [("p8.nii.gz", "p9.nii.gz")]
    assert manifest.beside["label"][tmp_path / "Own/imagesTr/p8.nii.gz"] == tmp_path / "Own/labelsTr/p8.nii.gz"
    assert manifest.spacing_known


def test_manifest_with_training_pairs_nested_labels_and_no_label_files(tmp_path):
    folder = dataset(
        tmp_path / "Own",
        training_paired_images=[{"fixed": "imagesTr/p1_ED.nii.gz", "moving": "imagesTr/p2_ED.nii.gz"}],
        training=[{"image": "./imagesTr/p1_ED.nii.gz", "label": None}, {"image": "imagesTr/p2_ED.nii.gz"}],
        labels={"0": {"0": "background", "1": "left", "2": "right"}},
    )
    manifest = read_manifest(folder)
    assert manifest.labels == {1: "left", 2: "right"}
    assert manifest.training_pairs == [(manifest.training[0], manifest.training[1])]
    assert manifest.beside["label"][manifest.training[0]] is None
    assert manifest.beside["label"][manifest.training[1]].name == "p2_ED.nii.gz"
    pair = open_domain("Own", shape=GRID, data=tmp_path).training_pair(5)
    assert pair.name == "p1_ED<-p2_ED"
    assert pair.fixed_label is None
    assert pair.moving_label is not None


def test_labels_beside_their_images_are_found_from_a_relative_folder_too(tmp_path, monkeypatch):
    """Test images are listed without their labels."""
    dataset(tmp_path / "sets" / "Own")
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(Path("sets/Own"))
    assert all(label is not None and label.is_file() for label in manifest.beside["label"].values())
    pair = open_domain("Own", shape=GRID, data="sets").test_pair(0)
    assert pair.fixed_label.unique().tolist() == pair.moving_label.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairing": None}, ["the keys name, dimensions", "found no pairing"]),
        ({"modality": None, "training": None}, ["found no modality, training"]),
        ({"dimensions": 4}, ["dimensions 2 or 3", "found 4"]),
        ({"spacing_known": "no"}, ["spacing_known true or false", "found 'no'"]),
        ({"modality": {"0": "US"}}, ["CT or MR", "found ['US']"]),
        ({"modality": "PET/CT"}, ["CT or MR", "found ['PET/CT']", "Write MR for images without Hounsfield units"]),
        ({"modality": {"0": "MR", "1": "CT"}}, ["modality's number at the end", "p1_ED.nii.gz", "split the manifest"]),
        ({"labels": {"1": "a", str(2**63): "b"}}, ["labels of at most 64 bits", str(2**63)]),
        ({"labels": {"0": {"1": "a"}, "1": {"1": "b"}}}, ["one name each", "(1, 'a'), (1, 'b')"]),
        ({"dimensions": None, "tensorImageSize": {"0": "3D", "1": "2D"}}, ["dimensions 2 or 3", "found 2, 3"]),
        ({"labels": {"one": "a"}}, ["Learn2Reg's structure", "ValueError", "one"]),
        ({"training": [{"picture": "x"}]}, ["Learn2Reg's structure", "KeyError: 'image'"]),
        ({"training": [{"image": "imagesTr/gone.nii.gz"}]}, ["on disk", "1 missing", "gone.nii.gz"]),
        ({"training": [{"image": "imagesTr/p1_ED.nii.gz"}] * 2}, ["every training image once", "p1_ED.nii.gz"]),
        ({"training": [{"image": "imagesTr/p8.nii.gz"}]}, ["both training and test", "p8"]),
        (
            {"registration_val": [{"fixed": "imagesTr/p8.nii.gz", "moving": "./imagesTr/p8.nii.gz"}]},
            ["two different images", "p8.nii.gz with itself"],
        ),
        (
            {"training_paired_images": [{"fixed": "imagesTr/p1_ED.nii.gz", "moving": "imagesTr/p9.nii.gz"}]},
            ["both training and test", "p9"],
        ),
    ],
)
def test_manifest_errors_say_what_was_expected(tmp_path, changes, message):
    folder = dataset(tmp_path / "Own", **changes)
    with pytest.raises(DataError, match=says("Own_dataset.json", *message)):
        read_manifest(folder)


def test_manifest_not_there_or_not_json(tmp_path):
    with pytest.raises(DataError, match=says("Gone_dataset.json", "no such folder", "FMSAM_DATA")):
        read_manifest(tmp_path / "Gone")
    (tmp_path / "Empty").mkdir()
    with pytest.raises(DataError, match=says("Empty_dataset.json", "no such file")):
        read_manifest(tmp_path / "Empty")
    for text, found in (("{broken", "JSONDecodeError"), ("[]", "AttributeError"), ("3", "AttributeError")):
        (tmp_path / "Empty" / "Empty_dataset.json").write_text(text)
        with pytest.raises(DataError, match=says("Empty_dataset.json", found)):
            read_manifest(tmp_path / "Empty")


def test_phases_and_slices_are_one_subject_and_a_key_overrides_the_name(tmp_path):
    with pytest.raises(DataError, match=says("both training and test", "p1")):
        read_manifest(dataset(tmp_path / "Own", test=[("p1_ES", "p9")]))
    own = [{"image": "imagesTr/p1_ED.nii.gz", "subject": "someone else"}]
    assert read_manifest(dataset(tmp_path / "Own", test=[("p1_ES", "p9")], training=own)).training
    folder = dataset(tmp_path / "Own")
    path = folder / "Own_dataset.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "test": [{"image": "imagesTr/p9.nii.gz", "subject": "p2"}]})
    )
    with pytest.raises(DataError, match=says("both training and test", "p2")):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("patient001_ED.nii.gz", "patient001"),
        ("SC-HF-I-01_slice02_ES.nii.gz", "SC-HF-I-01"),
        ("hippocampus_001.nii.gz", "hippocampus_001"),
        ("s01.nii", "s01"),
        ("OASIS_0001_0000.nii.gz", "OASIS_0001"),
        ("LungCT_0012_0001.nii.gz", "LungCT_0012"),
        ("case_0001.nii.gz", "case_0001"),
        ("patient001_ED_0000.nii.gz", "patient001"),
    ],
)
def test_subject_of(name, subject):
    assert subject_of(Path("imagesTr") / name) == subject


# Files


def test_image_without_resampling_is_the_file_from_0_to_1(tmp_path):
    values = image()
    sample = decode(
        save(tmp_path / "a.nii.gz", values),
        save(tmp_path / "l.nii.gz", label(), dtype=np.uint8),
        modality="MR",
        shape=GRID,
        labels=(1, 2),
    )
    low, high = values.min(), np.percentile(values, 99)
    np.testing.assert_allclose(sample.image[0], np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    assert (sample.label[0].numpy() == label()).all()
    assert (sample.image.dtype, sample.label.dtype) == (torch.float32, torch.uint8)
    assert sample.image.shape == sample.label.shape == (1, *GRID)
    np.testing.assert_array_equal(sample.affine, np.diag([1, 2, 3, 1]))


def test_ct_window_is_fixed_in_hounsfield_units(tmp_path):
    hu = np.full(GRID, -3024.0)  # what scanners write outside their field of view
    hu[1:5, 1:6, 1:7] = -1000
    hu[2:4, 2:5, 2:6] = 0
    hu[3, 3, 3], hu[3, 3, 4] = 500, 3000
    sample = decode(save(tmp_path / "ct.nii.gz", hu, dtype=np.int16), modality="CT", shape=GRID)
    assert [round(sample.image[0][i].item(), 4) for i in [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4)]] == [
        0,
        0,
        0.5,
        0.75,
        1,
    ]


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "SRA", "PIR"])
def test_any_storage_orientation_gives_the_same_sample(tmp_path, codes):
    affine = np.array([[1.0, 0.1, 0, -5], [-0.1, 2, 0.2, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    expected = decode(save(tmp_path / "ras.nii.gz", image(), affine), modality="MR", shape=(9, 8, 7))

    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    stored, label_stored = (
        nibabel.Nifti1Image(v.astype(np.float32), affine).as_reoriented(transform) for v in (image(), label())
    )
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    nibabel.save(stored, tmp_path / "stored.nii.gz")
    # The label keeps its own orientation: only where it lies in the world counts.
    save(tmp_path / "label.nii.gz", label(), affine)
    sample = decode(tmp_path / "stored.nii.gz", tmp_path / "label.nii.gz", modality="MR", shape=(9, 8, 7))
    nibabel.save(label_stored, tmp_path / "label2.nii.gz")
    other = decode(tmp_path / "stored.nii.gz", tmp_path / "label2.nii.gz", modality="MR", shape=(9, 8, 7))
    torch.testing.assert_close(sample.image, expected.image)
    torch.testing.assert_close(sample.label, other.label)
    np.testing.assert_allclose(sample.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("shape", [(11, 13, 15), (3, 4, 8)])
def test_affine_of_the_new_grid_keeps_world_coordinates(tmp_path, shape):
    affine = np.array([[0, 2.0, 0, -5], [-1.5, 0, 0.2, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    file = nibabel.as_closest_canonical(nibabel.load(save(tmp_path / "a.nii.gz", image(), affine)))
    sample = decode(tmp_path / "a.nii.gz", modality="MR", shape=shape)
    for corner in np.ndindex(2, 2, 2):
        new = sample.affine @ [*(np.array(corner) * (np.array(shape) - 1)), 1]
        old = file.affine @ [*(np.array(corner) * (np.array(file.shape) - 1)), 1]
        np.testing.assert_allclose(new, old, atol=1e-5)


def test_a_coarser_grid_is_smoothed_by_scikit_images_rule():
    """A Gaussian of sigma `(step - 1) / 2` along the axes that become coarser, then linear interpolation."""
    fine = np.random.default_rng(0).random((40, 31, 9), np.float32)
    shape, steps = (14, 11, 17), (39 / 13, 30 / 10, 8 / 16)
    smooth = gaussian_filter(fine, [1.0, 1.0, 0.0], mode="nearest")
    places = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, steps, strict=True)], indexing="ij"))
    expected = map_coordinates(smooth, places, order=1)
    assert np.allclose(resample(fine, shape)[0], expected, atol=1e-5)


def test_resampling_a_linear_ramp_is_exact(tmp_path):
    """A ramp of world coordinates stays that ramp; where it shrinks, up to the smoothing at the borders."""
    x, y, z = np.indices((9, 21, 10)).astype(float)
    path = save(tmp_path / "ramp.nii.gz", 100 * x + 20 * y + 40 * z)
    grid = np.stack(
        np.meshgrid(*(np.linspace(0, n - 1, m) for n, m in zip((9, 21, 10), (17, 11, 10), strict=True)), indexing="ij")
    )
    sample = decode(path, modality="CT", shape=(17, 11, 10))
    expected = np.clip((np.tensordot([100, 20, 40], grid, 1) + 1000) / 2000, 0, 1)
    inside = (slice(0, 5), slice(2, -2), slice(0, 4))  # below 1000 "HU", away from the smoothed axis' ends
    np.testing.assert_allclose(sample.image[0].numpy()[inside], expected[inside], atol=1e-6)
    enlarged = decode(save(tmp_path / "r.nii.gz", 30 * x + 10 * y + 40 * z), modality="CT", shape=(17, 41, 28))
    np.testing.assert_allclose(enlarged.image[0, ::2, ::2, ::3], (30 * x + 10 * y + 40 * z + 1000) / 2000, atol=1e-6)


def test_shrinking_does_not_alias(tmp_path):
    checkers = np.indices((33, 33, 33)).sum(0) % 2 * 100.0  # the finest pattern there is
    sample = decode(save(tmp_path / "c.nii.gz", checkers), modality="MR", shape=(9, 9, 9))
    assert sample.image[0, 2:-2, 2:-2, 2:-2].std() < 0.02
    assert abs(sample.image[0, 2:-2, 2:-2, 2:-2].mean() - 0.5) < 0.02


def test_labels_are_the_nearest_samples(tmp_path):
    values = np.random.default_rng(1).integers(0, 3, GRID)
    path = save(tmp_path / "a.nii.gz", image())
    sample = decode(path, save(tmp_path / "l.nii.gz", values, dtype=np.uint8), modality="MR", shape=(11, 7, 3))
    np.testing.assert_array_equal(sample.label[0, ::2], values[:, :, [0, 4, 7]])


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_2d_files_however_their_slice_is_stored(tmp_path, axis):
    plane, marks = image(shape=(6, 7)), label((6, 7))
    affine = np.diag([1.0, 1, 1, 1])
    if axis is not None:
        # World axis `axis` is the one that has a single sample: the others keep their order.
        plane, marks = np.expand_dims(plane, axis), np.expand_dims(marks, axis)
        affine = np.diag([*np.insert([1.0, 2.0], axis, 5.0), 1.0])
    sample = decode(
        save(tmp_path / "a.nii.gz", plane, affine),
        save(tmp_path / "l.nii.gz", marks, affine, dtype=np.uint8),
        modality="MR",
        shape=(11, 13),
    )
    flat = image(shape=(6, 7))
    low, high = flat.min(), np.percentile(flat, 99)
    np.testing.assert_allclose(sample.image[0, ::2, ::2], np.clip((flat - low) / (high - low), 0, 1), atol=1e-5)
    np.testing.assert_array_equal(sample.label[0, ::2, ::2], label((6, 7)))
    spacing = np.linalg.norm(sample.affine[:3, :2], axis=0)
    np.testing.assert_allclose(spacing, [0.5, 0.5 if axis is None else 1.0])


def test_image_and_label_may_store_their_single_slice_differently(tmp_path):
    path = save(tmp_path / "a.nii.gz", image(shape=(6, 7)), np.eye(4))
    marks = save(tmp_path / "l.nii.gz", label((6, 7))[..., None], np.diag([1.0, 1, 8, 1]))  # another thickness
    assert decode(path, marks, modality="MR", shape=(6, 7)).label.shape == (1, 6, 7)


def test_2d_grid_of_a_volume_is_its_middle_axial_slice(tmp_path):
    values = image(shape=(6, 7, 9))
    affine = np.array([[-1.0, 0, 0, 3], [0, 2, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])  # stored LAS
    sample = decode(save(tmp_path / "a.nii.gz", values, affine), modality="CT", shape=(6, 7))
    np.testing.assert_allclose(sample.image[0], (values[::-1, :, 4] + 1000) / 2000, atol=1e-6)
    np.testing.assert_allclose(sample.affine @ [0, 0, 0, 1], affine @ [5, 0, 4, 1])


def test_a_time_axis_of_one_frame_is_no_obstacle(tmp_path):
    path = save(tmp_path / "a.nii.gz", image()[..., None])
    assert decode(path, modality="MR", shape=GRID).image.shape == (1, *GRID)


def broken(values, where, what):
    values = values.copy()
    values[where] = what
    return values


RGB = np.zeros(GRID, [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (broken(image(), (1, 2, 3), np.nan), np.float32, ["finite values", "1 NaN or infinite"]),
        (broken(image(), (slice(2), 0, 0), np.inf), np.float32, ["finite values", "2 NaN or infinite"]),
        (np.full(GRID, 7), np.uint8, ["varies", "7 throughout"]),
        (broken(np.zeros(GRID), (0, 0, 0), 9), np.uint8, ["varies", "0 throughout"]),
        (image(shape=(6, 7, 8, 2)), np.float32, ["a 3-D image", "(6, 7, 8, 2)"]),
        (image(shape=(6, 7)), np.float32, ["a 3-D image", "(6, 7)"]),
        (image(shape=(6, 7, 1)), np.float32, ["a 3-D image", "(6, 7, 1)"]),
        (RGB, RGB.dtype, ["one real number", "data type", "R"]),
        (image(), np.complex64, ["one real number", "complex64"]),
    ],
)
def test_images_that_make_no_sense(tmp_path, values, dtype, message):
    path = save(tmp_path / "a.nii.gz", values, dtype=dtype)
    with pytest.raises(DataError, match=says("a.nii.gz: expected", *message)):
        decode(path, modality="MR", shape=GRID)


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (label()[:-1], None, ["the shape (6, 7, 8) of", "a.nii.gz", "(5, 7, 8)"]),
        (label(), np.diag([1.0, 2.0, 3.1, 1.0]), ["the affine of", "a.nii.gz", "0.233 voxels apart"]),
        (np.zeros(GRID), None, ["labels [1, 2]", "only background"]),
        (label() * 2, None, ["labels [1, 2]", "also [4]"]),
        (-1.0 * label(), None, ["labels [1, 2]", "also [-2, -1]"]),
        (label() / 2, None, ["whole numbers", "0.5"]),
    ],
)
def test_labels_that_make_no_sense(tmp_path, values, affine, message):
    path = save(tmp_path / "a.nii.gz", image())
    with pytest.raises(DataError, match=says("l.nii.gz: expected", *message)):
        decode(path, save(tmp_path / "l.nii.gz", values, affine), modality="MR", shape=GRID, labels={1: "", 2: ""})


def test_singular_and_infinite_affines(tmp_path):
    for change in (0.0, np.nan):
        header = nibabel.Nifti1Header()
        affine = np.diag([1.0, 2.0, change, 1.0])
        header["sform_code"], header["srow_x"], header["srow_y"], header["srow_z"] = 1, *affine[:3]
        nibabel.save(nibabel.Nifti1Image(image().astype(np.float32), None, header), tmp_path / "a.nii.gz")
        with pytest.raises(DataError, match=says("a.nii.gz: expected an invertible affine", str(change))):
            decode(tmp_path / "a.nii.gz", modality="MR", shape=GRID)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(DataError, match=says("gone.nii.gz: expected an image file, found no such file")):
        load(tmp_path / "gone.nii.gz", modality="MR", shape=GRID)
    for name in ("a.nii.gz", "a.nii"):
        path = save(tmp_path / name, image())
        whole = path.read_bytes()
        for length in (0, 50, len(whole) // 2, len(whole) - 20, len(whole) - 4):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=says(name, "a readable image", "copy it again")):
                load(path, modality="MR", shape=GRID)
    path = save(tmp_path / "b.nii.gz", image())
    whole = bytearray(path.read_bytes())
    whole[400:420] = bytes(20)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=says("b.nii.gz", "a readable image")):
        load(path, modality="MR", shape=GRID)
    (tmp_path / "text.nii.gz").write_text("not an image")
    with pytest.raises(DataError, match=says("text.nii.gz", "a readable image")):
        load(tmp_path / "text.nii.gz", modality="MR", shape=GRID)


def test_grid_and_modality_are_checked(tmp_path):
    path = save(tmp_path / "a.nii.gz", image())
    for shape, modality in (((8,), "MR"), ((8, 8, 1), "MR"), (GRID, "US")):
        with pytest.raises(DataError, match=says("a 2-D or 3-D grid and CT or MR", modality)):
            decode(path, modality=modality, shape=shape)


# The disk cache


def files(tmp_path):
    return save(tmp_path / "a.nii.gz", image()), save(tmp_path / "l.nii.gz", label(), dtype=np.uint8)


def count_reads(monkeypatch):
    reads, original = [], nibabel.load
    monkeypatch.setattr(nibabel, "load", lambda path: reads.append(Path(path).name) or original(path))
    return reads


def same(a, b):
    assert torch.equal(a.image, b.image)
    assert (a.label is None and b.label is None) or torch.equal(a.label, b.label)
    assert np.array_equal(a.affine, b.affine)


@pytest.mark.parametrize("shape", [(9, 5, 7), (5, 5)])
@pytest.mark.parametrize("with_label", [True, False])
def test_second_read_opens_no_image_file(tmp_path, monkeypatch, shape, with_label):
    paths = files(tmp_path)[: 1 + with_label]
    first = load(*paths, modality="MR", shape=shape)
    reads = count_reads(monkeypatch)
    same(load(*paths, modality="MR", shape=list(shape)), first)
    assert reads == []
    for changed in ({"modality": "CT"}, {"shape": (6, *shape[1:])}, {"labels": [1, 2]}):
        load(*paths, **{"modality": "MR", "shape": shape, **changed})
    assert reads == [path.name for path in paths] * 3


def test_a_changed_file_is_read_again(tmp_path, monkeypatch):
    paths = files(tmp_path)
    first = load(*paths, modality="MR", shape=GRID)
    save(paths[0], image(5))
    os.utime(paths[0], ns=(1, 1))
    assert not torch.equal(load(*paths, modality="MR", shape=GRID).image, first.image)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "zeros", "longer"])
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, damage):
    paths = files(tmp_path)
    first = load(*paths, modality="MR", shape=GRID)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "flipped": bytes(flipped),
        "zeros": bytes(len(whole)),
        "longer": whole + bytes(8),
    }
    entry.write_bytes(damaged[damage])
    reads = count_reads(monkeypatch)
    same(load(*paths, modality="MR", shape=GRID), first)
    assert len(reads) == 2
    assert entry.read_bytes() == whole
    assert list((tmp_path / "cache").iterdir()) == [entry]  # no leftovers


def test_unwritable_cache_warns_once_and_works(tmp_path):
    paths = files(tmp_path)
    (tmp_path / "file").write_text("")  # a folder cannot be made inside a file, not even by root
    with pytest.warns(UserWarning, match=says("keeps no cache", "FMSAM_CACHE")):
        first = load(*paths, modality="MR", shape=GRID, cache=tmp_path / "file" / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(load(*paths, modality="MR", shape=GRID, cache=tmp_path / "file" / "cache"), first)
