"""Manifests, the reader of image files, the disk cache; the judge of what a file holds is SimpleITK."""

import gzip
import json
import locale
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from fmsam_lib.images import files
from fmsam_lib.images.cache import load
from fmsam_lib.images.domains import open_domain
from fmsam_lib.images.files import ids, name_of, parts, read_labels, read_values, stem
from fmsam_lib.images.grid import affine, oriented
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
    nibabel.save(nibabel.Nifti1Image(np.asarray(values).astype(dtype), affine, dtype=dtype), path)
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
    assert (manifest.folder.name, manifest.dimensions, manifest.modality) == ("Own", 3, "MR")
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
        ({"labels": {"1": "a", "2": "a"}}, ["one name each, of its own", "(1, 'a'), (2, 'a')"]),
        ({"labels": {"1": "a", "2": " "}}, ["one name each, of its own", "(2, ' ')"]),
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
    dataset(tmp_path / "Mine", write=False).rename(tmp_path / "Renamed")
    with pytest.raises(DataError, match=says("Renamed_dataset.json", "found Mine_dataset.json. Rename it.")):
        read_manifest(tmp_path / "Renamed")
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
        ("T1_0001.nii.gz", "T1_0001"),
        ("patient001_ED_0000.nii.gz", "patient001"),
        ("sub-01_ses-1_T1w.nii.gz", "sub-01"),
        ("OASIS_01_ses-2.nii.gz", "OASIS_01"),
        ("pat01_visit1.nii.gz", "pat01"),
        ("pat01_ED_visit2_0000.nii.gz", "pat01"),
        ("pat01_visitor.nii.gz", "pat01_visitor"),
    ],
)
def test_subject_of(name, subject):
    assert subject_of(Path("imagesTr") / name) == subject


def test_a_number_at_the_end_is_a_modality_only_where_there_are_several(tmp_path):
    names = ("T1_0000", "T1_0001"), (("T2_0000", "T2_0001"),)
    for modality, subjects in (("MR", 4), ({"0": "MR", "1": "CT"}, 2)):
        manifest = read_manifest(dataset(tmp_path / "Own", train=names[0], test=names[1], modality=modality))
        assert len({*manifest.subject.values()}) == subjects


def test_a_misspelt_key_and_a_byte_order_mark(tmp_path, recwarn):
    folder = dataset(tmp_path / "Own", training_pairs=[], notices=3, numTraining=3, registration_test=[])
    path = folder / "Own_dataset.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    read_manifest(folder)
    assert [str(w.message) for w in recwarn] == [
        f"{path}: the unknown key 'training_pairs' says nothing (did you mean training_paired_images?)"
    ]


def test_a_misspelt_key_in_an_entry(tmp_path, recwarn):
    entries = [{"image": "imagesTr/p8.nii.gz", "labl": None, "subjekt": "a", "age": 3, "scanner": 1}]
    folder = dataset(tmp_path / "Own", test=[("p8", "p9")])
    path = folder / "Own_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test": entries}))
    read_manifest(folder)
    assert sorted(str(w.message) for w in recwarn) == [
        f"{path}: the unknown key 'labl' in an entry says nothing (did you mean label?)",
        f"{path}: the unknown key 'subjekt' in an entry says nothing (did you mean subject?)",
    ]


def test_a_link_to_a_folder_is_followed(tmp_path):
    folder = dataset(tmp_path / "Own", training=["linked/../imagesTr/p1_ED.nii.gz", "imagesTr/p2_ED.nii.gz"])
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    (folder / "imagesTr").rename(tmp_path / "elsewhere" / "imagesTr")
    (folder / "imagesTr").symlink_to(tmp_path / "elsewhere" / "imagesTr")
    (folder / "linked").symlink_to(tmp_path / "elsewhere" / "sub")
    assert len(read_manifest(folder).training) == 2


def test_a_link_to_a_data_set_is_called_as_the_link(tmp_path):
    dataset(tmp_path / "releases/v3", name="Own")
    (tmp_path / "Own").symlink_to(tmp_path / "releases/v3")
    assert len(read_manifest(tmp_path / "Own").training) == 3  # by the manifest's own name
    (tmp_path / "releases/v3/v3_dataset.json").rename(tmp_path / "releases/v3/Own_dataset.json")
    assert len(read_manifest(tmp_path / "Own").training) == 3
    assert open_domain("Own", shape=(8, 8, 8), data=tmp_path).name == "Own"


def test_a_subject_of_null_is_none_given(tmp_path):
    folder = dataset(tmp_path / "Own")
    path = folder / "Own_dataset.json"
    content = json.loads(path.read_text())
    content["training"] = [entry | {"subject": None} for entry in content["training"]]
    path.write_text(json.dumps(content))
    assert {*read_manifest(folder).subject.values()} == {"p1", "p2", "p3", "p8", "p9"}


def test_a_folder_in_place_of_an_image_is_told(tmp_path):
    folder = dataset(tmp_path / "Own")
    (folder / "imagesTr/p2_ED.nii.gz").unlink()
    (folder / "imagesTr/p2_ED.nii.gz").mkdir()
    with pytest.raises(DataError, match=r"1 missing: .*p2_ED.nii.gz \(a folder: dcm2niix makes a file of it\)"):
        read_manifest(folder)


def test_a_file_is_one_however_its_path_is_written(tmp_path):
    listed = [f"{way}p{n}_ED.nii.gz" for n, way in ((1, "imagesTr/"), (2, "./imagesTr/"), (1, "imagesTr/../imagesTr/"))]
    with pytest.raises(DataError, match=says("every training image once", "p1_ED.nii.gz again")):
        read_manifest(dataset(tmp_path / "Own", training=listed))


# The reader


TURNED = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]) @ np.array(
    [[1, 0, 0], [0, 0, 1.0], [0, -1, 0]]
)


def itk_image(values=None, kind=np.float32, spacing=(0.7, 1.5, 3.0)):
    """What SimpleITK writes into files: 8 x 7 x 6 voxels, turned in the world."""
    there = sitk.GetImageFromArray((image() if values is None else np.asarray(values)).astype(kind))
    there.SetSpacing(spacing)
    there.SetOrigin((-30.0, 12.0, 5.5))
    there.SetDirection(TURNED.ravel())
    return there


def same_image(one, other, atol=1e-4):
    """The same values in the same places of the world."""
    assert one.GetSize() == other.GetSize()
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(one), sitk.GetArrayViewFromImage(other))
    np.testing.assert_allclose(affine(one), affine(other), atol=atol)


def cuts(length):
    """Where a copy may have ended: in the header, in the middle, within the last bytes (gzip's checksum are 8)."""
    places = {0, 1, 2, 50, 200, 347, 348, 351, 352, 360, *np.linspace(0, length - 1, 12).astype(int).tolist()}
    return sorted(n for n in places | {length - k for k in (1, 2, 4, 7, 8, 9, 12, 20)} if 0 <= n < length)


def values_file(path):
    """The file with the values: itself, or the one beside a header."""
    return max(path.parent.iterdir(), key=lambda file: file.stat().st_size)


FILES = ["a.nii", "a.nii.gz", "a.hdr", "a.img", "a.hdr.gz", "a.img.gz", "a.mha", "z.mha", "a.mhd", "z.mhd"]
FILES += ["a.nrrd", "z.nrrd", "a.nhdr", "z.nhdr", "a.mnc", "a.h5"]  # z: compressed


@pytest.mark.parametrize("name", FILES)
def test_what_simpleitk_writes_is_read_and_a_part_of_it_is_not(tmp_path, name):
    path, written = tmp_path / name, itk_image()
    sitk.WriteImage(written, str(path), useCompression=name[0] == "z")
    same_image(read_values(path, 3), sitk.ReadImage(str(path)))
    if not name.endswith((".mnc", ".h5")):
        same_image(read_values(path, 3), written)
    data = values_file(path)
    whole = data.read_bytes()
    for length in cuts(len(whole)):
        data.write_bytes(whole[:length])
        with pytest.raises(DataError, match=says(path, "expected a readable image", "copy it again")) as error:
            read_values(path, 3)
        assert str(error.value).count(str(path)) <= 3
        assert not re.search(r"\.\.( |$)|0x|Exception|Reason", str(error.value))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.img.gz", "z.mha", "z.mhd", "z.nrrd", "z.nhdr", "a.mgz", "b.nii.gz"])
def test_a_compressed_file_damaged_anywhere_is_refused(tmp_path, name):
    path = tmp_path / name
    if name in ("a.mgz", "b.nii.gz"):
        kind = nibabel.MGHImage if name == "a.mgz" else nibabel.Nifti2Image
        nibabel.save(kind(image().astype(np.float32), np.eye(4)), path)
    else:
        sitk.WriteImage(itk_image(), str(path), useCompression=True)
    data = values_file(path)
    whole = data.read_bytes()
    for place in (len(whole) // 2, len(whole) - 100, len(whole) - 6):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        data.write_bytes(damaged)
        with pytest.raises(DataError, match=says(path, "expected a readable image", "copy it again")):
            read_values(path, 3)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgh", "a.mgz"])
def test_what_nibabel_reads_lies_where_nibabel_says(tmp_path, name):
    """NIfTI-2 and FreeSurfer's files."""
    path = tmp_path / name
    where = np.diag([-1.0, -1, 1, 1]) @ affine(itk_image())  # anywhere
    kind = nibabel.MGHImage if ".mg" in name else nibabel.Nifti2Image
    nibabel.save(kind(image().astype(np.float32), where), path)
    read = read_values(path, 3)
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(read).T, image().astype(np.float32))
    np.testing.assert_allclose(affine(read), where, atol=1e-4)
    same_image(read_values(nibabel.load(path), 3), read)
    whole = path.read_bytes()
    # nibabel writes a trailer of scan parameters into .mgh, which nobody needs.
    lengths = cuts(len(whole)) if name != "a.mgh" else [n for n in cuts(len(whole)) if n < 284 + 4 * image().size]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=says(path, "expected a readable image", "copy it again")):
            read_values(path, 3)


def test_bzip2_png_and_foreign_files(tmp_path):
    nibabel.save(nibabel.Nifti1Image(image().astype(np.float32), np.eye(4)), tmp_path / "a.nii.bz2")
    assert read_values(tmp_path / "a.nii.bz2", 3).GetSize() == GRID
    flat = sitk.GetImageFromArray(np.arange(42, dtype=np.uint8).reshape(6, 7))
    sitk.WriteImage(flat, str(tmp_path / "a.png"))
    same_image(read_values(tmp_path / "a.png", 2), flat)
    whole = (tmp_path / "a.png").read_bytes()
    for length in range(0, len(whole), 5):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(DataError, match=says("a.png", "a readable image", "copy it again")):
            read_values(tmp_path / "a.png", 2)
    for name in ("text.nii.gz", "text.mha", "text.nrrd"):
        (tmp_path / name).write_text("not an image")
        with pytest.raises(DataError, match=says(name, "a readable image", "copy it again")):
            read_values(tmp_path / name, 3)
    for name in ("a.vtk", "a.tif"):  # of these SimpleITK takes a half for a whole
        sitk.WriteImage(itk_image(), str(tmp_path / name))
        with pytest.raises(DataError, match=says(name, "a readable image", "Convert it to NIfTI, NRRD")):
            read_values(tmp_path / name, 3)
    with pytest.raises(DataError, match=says("gone.nii.gz: expected an image file, found no such file")):
        read_values(tmp_path / "gone.nii.gz", 3)


@pytest.mark.parametrize("kind", [nibabel.AnalyzeImage, nibabel.Spm99AnalyzeImage])
def test_files_older_than_nifti(tmp_path, kind):
    """Analyze, read as SimpleITK does, though nobody knows their orientation."""
    nibabel.save(kind(image().astype(np.float32), np.diag([1.0, 2, 3, 1])), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        same_image(read_values(tmp_path / name, 3), sitk.ReadImage(str(tmp_path / name)))
    assert not oriented(read_values(tmp_path / "a.hdr", 3))
    assert not oriented(read_values(kind(image().astype(np.float32), np.diag([1.0, 2, 3, 1])), 3))
    data = tmp_path / "a.img"
    data.write_bytes(data.read_bytes()[:-1])
    for name in ("a.hdr", "a.img"):
        with pytest.raises(DataError, match=says(name, "a readable image", "copy it again")):
            read_values(tmp_path / name, 3)


def test_nifti_2_means_by_its_header_what_nifti_1_means():
    read = []
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        made = kind(image().astype(np.float32), np.diag([1000.0, 2000, 3000, 1]))
        made.header.set_xyzt_units("micron")
        read.append(read_values(made, 3))
        made.set_sform(None, 0)
        made.set_qform(None, 0)
        assert not oriented(read_values(made, 3))
    same_image(*read)
    assert read[1].GetSpacing() == (1.0, 2.0, 3.0)


def test_floats_in_memory_are_read_as_they_are():
    """Whatever number type the header asks to store them in, as after `get_fdata`."""
    header, marks = nibabel.Nifti1Header(), np.zeros((8, 9, 10))
    header.set_data_dtype(np.uint8)
    marks[0], marks[1] = 7, 41
    assert ids(read_labels(nibabel.Nifti1Image(marks, np.eye(4), header), 3)) == [0, 7, 41]


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64, np.uint16])
def test_whole_numbers_in_memory_are_read_as_they_are(kind):
    """Under the header of another image, of bytes."""
    header, marks = nibabel.Nifti1Header(), np.zeros((8, 9, 10), kind)
    header.set_data_dtype(np.uint8)
    marks[0], marks[1], marks[2] = 3, 1001, 2035
    assert ids(read_labels(nibabel.Nifti1Image(marks, np.eye(4), header), 3)) == [0, 3, 1001, 2035]


def test_a_path_that_is_not_in_utf8_is_an_error_and_not_the_end_of_the_program(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/fr\xe9.nii.gz")
    save(Path(path), image())
    with pytest.raises(DataError, match=r"fr\\xe9.nii.gz: expected a path in UTF-8, found other bytes. Rename it"):
        read_values(path, 3)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = save(tmp_path / "a.nii.gz", image())
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"a.nii.gz: expected a readable image, found Permission denied. Allow read"):
        read_values(path, 3)


def test_nrrd_without_a_space_says_nothing_of_the_patient(tmp_path):
    lines = ["type: float", "dimension: 3", "sizes: 4 5 6", "spacings: 1 1 2", "endian: little", "encoding: raw"]
    values = np.random.default_rng(0).random((6, 5, 4), np.float32).tobytes()
    for name, more in (("a.nrrd", []), ("b.nrrd", ["space: left-posterior-superior"])):
        space = [line.replace("spacings: 1 1 2", "space directions: (1,0,0) (0,1,0) (0,0,2)") for line in lines]
        text = "\n".join(["NRRD0004", *more, *(space if more else lines)])
        (tmp_path / name).write_bytes(f"{text}\n\n".encode() + values)
        assert oriented(read_values(tmp_path / name, 3)) == bool(more)
    one = text.replace("space: left-posterior-superior\n", "").split("space directions")[0]
    one = one.replace("dimension: 3", "dimension: 4").replace("4 5 6", "4 5 6 1")
    (tmp_path / "c.nrrd").write_bytes(f"{one}spacings: 1 1 2 1\nendian: little\nencoding: raw\n\n".encode() + values)
    assert not oriented(read_values(tmp_path / "c.nrrd", 3))


@pytest.mark.parametrize("given", [np.zeros(GRID), None, b"a.nii"])
def test_what_has_no_place_is_refused(given):
    expected = "fixed_image: expected a path, or an image of nibabel's or SimpleITK's, found"
    for read in (read_values, read_labels):
        with pytest.raises(DataError, match=says(expected, type(given).__name__)):
            read(given, 3, what="fixed image")


def test_gzip_in_several_pieces_and_with_zeros_behind(tmp_path):
    """As bgzip writes them, and as tapes and disks pad them: gunzip and ITK take both."""
    plain = save(tmp_path / "a.nii", image()).read_bytes()
    pieces = gzip.compress(plain[:1000]) + gzip.compress(plain[1000:])
    for number, content in enumerate((pieces, pieces + bytes(512))):
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(content)
        same_image(read_values(path, 3), read_values(tmp_path / "a.nii", 3))
    wide = save(tmp_path / "wide.nii", np.random.default_rng(0).random((80, 80, 80))).read_bytes()
    for shift in (-1, 0, 1):  # a piece that begins where a block of the reader ends
        first = gzip.compress(wide[: 1 << 20], compresslevel=0)
        first = gzip.compress(wide[: (1 << 20) + (1 << 20) - len(first) + shift], compresslevel=0)
        assert len(first) == (1 << 20) + shift
        path = tmp_path / "wide.nii.gz"
        path.write_bytes(first + gzip.compress(wide[len(gzip.decompress(first)) :]))
        same_image(read_values(path, 3), read_values(tmp_path / "wide.nii", 3))
    path.write_bytes(pieces[:-30])
    with pytest.raises(DataError, match=says(path, "copy it again")):
        read_values(path, 3)


def patched(path, values, *changes):
    """A NIfTI file with raw changes (offset, format, values) of its header."""
    content = bytearray(save(path, values, np.eye(4)).read_bytes())
    for offset, form, numbers in changes:
        struct.pack_into(form, content, offset, *numbers)
    path.write_bytes(content)
    return path


TURN = [
    (252, "<hh", (1, 1)),
    (256, "<fff", (0.0, 0.70710701, 0.70710701)),  # a quaternion a rounding error too long
    (280, "<12f", (-1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)),
]


@pytest.mark.parametrize(
    ("changes", "spacing"),
    [
        (TURN, (1, 1, 1)),
        ([(123, "B", (7,))], (1, 1, 1)),  # a unit that NIfTI does not define
        ([(123, "B", (56 + 2,))], (1, 1, 1)),  # and one of time
        ([(123, "B", (0,))], (1, 1, 1)),
        ([(252, "<hh", (0, 0)), (80, "<3f", (0.5, 2, 3))], (0.5, 2, 3)),  # neither qform nor sform
        ([(252, "<hh", (1, 0)), (80, "<3f", (0.5, 2, 3))], (0.5, 2, 3)),
        ([(252, "<hh", (0, 2)), (280, "<f", (2.0,)), (80, "<3f", (2, 1, 1))], (2, 1, 1)),
        ([(123, "B", (1,))], (1000, 1000, 1000)),  # metres
        ([(123, "B", (3,))], (0.001, 0.001, 0.001)),  # microns
    ],
)
def test_harmless_headers_are_read_as_simpleitk_does(tmp_path, changes, spacing):
    path = patched(tmp_path / "a.nii", image(), *changes)
    read = read_values(path, 3)
    same_image(read, sitk.ReadImage(str(path)))
    np.testing.assert_allclose(read.GetSpacing(), spacing, rtol=1e-5)
    path.rename(tmp_path / "uncompressed.nii.gz")
    same_image(read_values(tmp_path / "uncompressed.nii.gz", 3), read)


def test_set_zooms_and_the_qform_count_as_for_simpleitk(tmp_path):
    """set_zooms changes the qform's spacing only, and ITK takes the sform of code 2 only where they agree."""
    loaded = nibabel.Nifti1Image(image().astype(np.float32), np.diag([1.0, 1, 1, 1]))
    loaded.header.set_zooms((2.0, 2.0, 4.0))
    nibabel.save(loaded, tmp_path / "zooms.nii.gz")
    turned = np.eye(4)
    turned[:3, :3] = TURNED
    both = nibabel.Nifti1Image(image().astype(np.float32), np.eye(4))
    both.header.set_qform(turned, 1)
    both.header.set_sform(np.eye(4), 2)
    nibabel.save(both, tmp_path / "both.nii.gz")
    for name in ("zooms", "both"):
        path = tmp_path / f"{name}.nii.gz"
        read = read_values(path, 3)
        same_image(read, sitk.ReadImage(str(path)))
        same_image(read_values(nibabel.load(path), 3), read)
        same_image(read_values(read, 3), read)


def test_a_sheared_sform_is_refused_with_the_remedy(tmp_path):
    sheared = np.array([[1.0, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for kind, name in ((nibabel.Nifti1Image, "a.nii.gz"), (nibabel.Nifti2Image, "b.nii.gz")):
        made = kind(image().astype(np.float32), None)
        made.header.set_sform(sheared, 1)
        nibabel.save(made, tmp_path / name)
        with pytest.raises(DataError, match=says(name, "perpendicular", "sheared sform", "Resample it")) as error:
            read_values(tmp_path / name, 3)
        assert "image.nii" not in str(error.value)
    with pytest.raises(DataError, match=says("image: expected axes perpendicular")):
        read_values(nibabel.Nifti1Image(image().astype(np.float32), sheared), 3)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda b: b[:96] + 4 * b"\xdd" + b[96:], "ImageFileError: Cannot work out file type"),
        (
            lambda b: b[:108] + struct.pack("<f", 217) + b[112:280] + struct.pack("<2f", 1, 0.5) + b[288:],
            "vox offset 217",
        ),
    ],
)
def test_damaged_headers_that_simpleitk_reads_in_part_and_nibabel_does_not(tmp_path, damage, found):
    """Found at random (`tests/test_fuzz.py`): nibabel was asked for more of them, outside of what is caught."""
    path = save(tmp_path / "x.nii", image())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=says("x.nii: expected a readable image, found ", found, "copy it again")):
        read_values(path, 3)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a.hdr", "a.mha", "a.nrrd", "a.mgz"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8"])
def test_values_that_are_no_numbers_are_counted(tmp_path, name, kind):
    """ITK makes them 0 in NIfTI files, which is water to a CT."""
    values = image().round().astype(kind)
    values[0, 0, :2], values[3, 3, 3] = np.nan, -np.inf
    header = nibabel.Nifti1Header(endianness=kind[0])
    path = tmp_path / name
    if name == "a.mgz":
        nibabel.save(nibabel.MGHImage(values.astype(np.float32), np.eye(4)), path)
    elif name in ("a.img", "a.hdr"):
        nibabel.save(nibabel.Nifti1Pair(values, np.eye(4), header), path)
    elif ".nii" in name:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4), header, dtype=kind), path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values.astype(kind[1:])), str(path))
    with pytest.raises(DataError, match=says(name, "finite values, found 3 NaN or infinite", "Replace them")):
        read_values(path, 3)


def test_axes_of_length_one_behind_the_third_are_no_obstacle(tmp_path):
    for more in ((1,), (1, 1)):
        read = read_values(save(tmp_path / "a.nii.gz", image().reshape(*GRID, *more)), 3)
        assert read.GetSize() == GRID
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(read).T, image().astype(np.float32))


@pytest.mark.parametrize("dim", [2, 3])
def test_colours_vectors_series_and_complex_numbers_are_refused(tmp_path, dim):
    vector = sitk.GetImageFromArray(np.zeros((6, 7, 8, 3), np.float32), isVector=True)
    colour = sitk.GetImageFromArray(np.zeros((6, 7, 8, 3), np.uint8), isVector=True)
    phases = sitk.Cast(itk_image(), sitk.sitkComplexFloat32)
    for made, names in (
        (vector, ("v.mha", "v.nrrd", "v.nii.gz")),
        (colour, ("c.mha", "c.nrrd")),
        (phases, ("p.nrrd",)),
    ):
        for name in names:
            try:
                sitk.WriteImage(made, str(tmp_path / name))
            except RuntimeError:
                continue  # SimpleITK does not write these
            with pytest.raises(DataError, match=says(name, "one real number a voxel", "data type")):
                read_values(tmp_path / name, dim)
        with pytest.raises(DataError, match=says("image: expected one real number a voxel", "data type")):
            read_values(made, dim)
    path = save(tmp_path / "series.nii.gz", image(shape=(6, 7, 8, 2)))
    with pytest.raises(DataError, match=says(path, "a 2-D or 3-D image", "(6, 7, 8, 2)", "Save one of its volumes")):
        read_values(path, dim)


# DICOM


def series(folder, values, *, uid="1.2.826.0.1.3680043.2.1125.1", spacing=(0.8, 1.2, 2.5), tilt=0.0, left_out=()):
    """A DICOM series of `values` `(Z, Y, X)` in HU, stored with an intercept, in files that are not in order."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, before = sitk.ImageFileWriter(), locale.setlocale(locale.LC_ALL)
    writer.KeepOriginalImageUIDOn()
    turn = TURNED * np.linalg.det(TURNED)
    for number, plane in enumerate(values):
        if number in left_out:
            continue
        made = sitk.GetImageFromArray(plane.astype(np.int16)[None])
        made.SetSpacing((*spacing[:2], spacing[2] or 1.0))
        place = np.array([-30.0, 12.0, 5.5]) + number * (turn[:, 2] * spacing[2] + tilt * turn[:, 1])
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{number + 1}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": uid,
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{x:.6f}" for x in place),
            "0020|0037": "\\".join(f"{x:.6f}" for x in turn[:, :2].T.ravel()),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            made.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid[-1]}_{len(values) - number:03d}.dcm"))
        writer.Execute(made)
    locale.setlocale(locale.LC_ALL, before)  # GDCM's writer leaves that of C, in which Python reads text as ASCII
    return folder


def hounsfield(shape=(6, 7, 8)):
    return np.random.default_rng(3).integers(-1000, 1500, shape)


def test_a_folder_of_dicom_is_the_volume_that_was_written(tmp_path):
    folder = series(tmp_path / "scan", hounsfield())
    (folder / "notes.txt").write_text("not an image")
    (folder / "DICOMDIR").write_bytes(b"neither")
    (folder / "empty.dcm").write_bytes(b"")
    read = read_values(folder, 3)
    expected = sitk.GetImageFromArray(hounsfield().astype(np.float32))
    expected.SetSpacing((0.8, 1.2, 2.5))
    expected.SetOrigin((-30.0, 12.0, 5.5))
    expected.SetDirection((TURNED * np.linalg.det(TURNED)).ravel())
    same_image(read, expected, atol=1e-3)
    assert read_values(folder / "1_001.dcm", 2).GetSize() == (8, 7, 1)  # a slice alone


def test_every_slice_of_a_dicom_series_has_its_own_slope(tmp_path):
    """As PET has them: a slice of whole numbers does not truncate the others."""
    tag = b"\x28\x00\x53\x10DS\x02\x00"
    for number, file in enumerate(sorted(series(tmp_path / "pet", hounsfield()).iterdir())):
        content = file.read_bytes()
        tag = tag if tag in content else tag.replace(b"DS\x02\x00", b"\x02\x00\x00\x00")
        assert tag + b"1 " in content
        file.write_bytes(content.replace(tag + b"1 ", tag + (b"1 ", b".5", b".3")[number % 3]))
    slices = [sitk.ReadImage(str(file), sitk.sitkFloat64) for file in sorted((tmp_path / "pet").iterdir())[::-1]]
    expected = np.concatenate([sitk.GetArrayFromImage(image) for image in slices])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_values(tmp_path / "pet", 3)), expected)


def test_a_folder_that_is_not_one_whole_series_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says("empty", "a folder with one DICOM series, found 0")):
        read_values(tmp_path / "empty", 3)
    folder = series(tmp_path / "gap", hounsfield(), left_out=[3])
    with pytest.raises(DataError, match=says("gap", "evenly spaced slices", "steps of 2.5 to 5 mm", "missing")):
        read_values(folder, 3)
    folder = series(tmp_path / "cine", hounsfield(), spacing=(0.8, 1.2, 0.0))
    with pytest.raises(DataError, match=says("cine", "one in each place", "steps of 0 to 0 mm", "Save one frame")):
        read_values(folder, 3)
    folder = series(tmp_path / "tilted", hounsfield(), tilt=0.5)
    with pytest.raises(DataError, match=says("tilted", "at right angles", "gantry", "dcm2niix")):
        read_values(folder, 3)
    folder = series(series(tmp_path / "two", hounsfield()), hounsfield(), uid="1.2.826.0.1.3680043.2.1125.2")
    with pytest.raises(DataError, match=says("two", "one DICOM series, found 2")):
        read_values(folder, 3)
    folder = series(tmp_path / "cut", hounsfield())
    for name in ("1_003.dcm", "1_006.dcm"):  # the first slice too, whose loss leaves no gap
        whole = (folder / name).read_bytes()
        for length in (len(whole) - 1, len(whole) - 40, 400):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(
                DataError, match=says("cut", "slices of one series", f"{name} besides", "Copy it again")
            ):
                read_values(folder, 3)
        (folder / name).write_bytes(whole)
    assert read_values(folder, 3).GetSize() == (8, 7, 6)


# Labels


HUGE = [614454277, 3_000_000_000, 2**60 + 1, -5]


@pytest.mark.parametrize("number", [1, 200, 70_000, *HUGE])
def test_any_whole_number_is_a_label(tmp_path, number):
    marks = np.zeros(GRID, np.int64)
    marks[2:4, 2:5, 3:6] = number
    paths = [save(tmp_path / "a.nii.gz", marks, dtype=np.int64), tmp_path / "b.nrrd", tmp_path / "c.nii.gz"]
    sitk.WriteImage(sitk.GetImageFromArray(marks.T), str(paths[1]))
    nibabel.save(nibabel.Nifti2Image(marks, np.eye(4), dtype=np.int64), paths[2])
    for path in paths:
        read = read_labels(path, 3, allowed=[number])
        assert ids(read) == sorted([0, number])
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(read).T, marks)
        with pytest.raises(DataError, match=says(path, "labels [7]", f"also [{number}]", "Name them")):
            read_labels(path, 3, allowed=[7])


def test_labels_in_other_types(tmp_path):
    """Floats that are whole, unsigned 64 bits, scaled integers: all are numbers."""
    marks = label()
    expected = marks.astype(np.int64)
    scaled = nibabel.Nifti1Image(marks.astype(np.int16), np.eye(4))
    scaled.header.set_slope_inter(2.0, 0.0)
    nibabel.save(scaled, tmp_path / "scaled.nii.gz")
    for path, factor in (
        (save(tmp_path / "float.nii.gz", marks + 1e-5), 1),
        (save(tmp_path / "double.nii.gz", marks * 3e9, dtype=np.float64), 3_000_000_000),
        (save(tmp_path / "large.nii.gz", marks * 1.5e9), 1_500_000_000),  # float32
        (save(tmp_path / "unsigned.nii.gz", marks, dtype=np.uint64), 1),
        (save(tmp_path / "signed.nii.gz", -1 * expected, dtype=np.int8), -1),
        (tmp_path / "scaled.nii.gz", 2 if nibabel.load(tmp_path / "scaled.nii.gz").dataobj.slope == 2 else 1),
    ):
        read = read_labels(path, 3)
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(read).T, expected * factor)
    for values, found in ((marks / 2, "0.5"), (marks + 0.25, "0.25"), (marks * 1e30, "1e+30")):
        with pytest.raises(DataError, match=says("p.nii.gz", "whole numbers", found, "not probabilities")):
            read_labels(save(tmp_path / "p.nii.gz", values), 3)
    for name in ("p.nii.gz", "p.nii"):
        with pytest.raises(DataError, match=says(name, "finite values", "Replace them")):
            read_labels(save(tmp_path / name, np.where(marks, np.nan, 0)), 3)


def test_names_of_images(tmp_path):
    assert name_of(tmp_path / "a.nii") == str(tmp_path / "a.nii")
    assert name_of(itk_image(), "moving image") == "moving_image"
    made = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    assert name_of(made, "fixed image") == "fixed_image"
    nibabel.save(made, tmp_path / "b.nii")
    assert name_of(made) == str(tmp_path / "b.nii")
    names = ["a.nii", "a.nii.gz", "a.hdr", "a.hdr.gz", "a.img.gz", "a.mha", "a.nhdr", "a.mgz", "a.nii.bz2", "a"]
    assert {stem(Path("folder.nii") / name) for name in names} == {"a"}


def test_reading_many_files_says_nothing(tmp_path):
    """Neither on standard output nor on standard error, whatever ITK thinks of a header."""
    patched(tmp_path / "turn.nii", image(), *TURN)
    patched(tmp_path / "unit.nii", image(), (123, "B", (7,)))
    patched(tmp_path / "none.nii", image(), (252, "<hh", (0, 0)))
    apart = nibabel.Nifti1Image(image().astype(np.float32), np.diag([1.0, 2, 3, 1]))
    apart.header.set_zooms((3.0, 2.0, 1.0))
    nibabel.save(apart, tmp_path / "zooms.nii")
    series(tmp_path / "scan", hounsfield())
    (tmp_path / "scan" / "notes.txt").write_text("not an image")
    code = "import sys; from fmsam_lib.images.files import read_values; [read_values(name, 3) for name in sys.argv[1:]]"
    names = [str(path) for path in tmp_path.iterdir() if path.name != "cache"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# The disk cache


def two_files(tmp_path):
    return save(tmp_path / "a.nii.gz", image()), save(tmp_path / "l.nii.gz", label(), dtype=np.uint8)


def count_reads(monkeypatch):
    reads, original = [], files._read
    monkeypatch.setattr(files, "_read", lambda path, where: reads.append(Path(path).name) or original(path, where))
    return reads


def same(a, b):
    assert torch.equal(a.image, b.image)
    assert (a.label is None and b.label is None) or torch.equal(a.label, b.label)
    assert np.array_equal(a.affine, b.affine)


@pytest.mark.parametrize("shape", [(9, 5, 7), (5, 5)])
@pytest.mark.parametrize("with_label", [True, False])
def test_second_read_opens_no_image_file(tmp_path, monkeypatch, shape, with_label):
    paths = two_files(tmp_path)[: 1 + with_label]
    first = load(*paths, modality="MR", shape=shape)
    reads = count_reads(monkeypatch)
    same(load(*paths, modality="MR", shape=list(shape)), first)
    assert reads == []
    for changed in ({"modality": "CT"}, {"shape": (6, *shape[1:])}, {"labels": [1, 2]}):
        load(*paths, **{"modality": "MR", "shape": shape, **changed})
    assert reads == [path.name for path in paths] * 3


def test_a_changed_file_is_read_again(tmp_path, monkeypatch):
    paths = two_files(tmp_path)
    first = load(*paths, modality="MR", shape=GRID)
    save(paths[0], image(5))
    os.utime(paths[0], ns=(1, 1))
    assert not torch.equal(load(*paths, modality="MR", shape=GRID).image, first.image)


@pytest.mark.parametrize("name", ["a.mhd", "a.hdr", "a.img", "a.nhdr", "named.mhd"])
def test_values_beside_a_header_are_read_again_when_they_change(tmp_path, name):
    path, other = tmp_path / "here" / name, tmp_path / "other" / name
    for seed, file in enumerate((path, other)):
        file.parent.mkdir()
        sitk.WriteImage(itk_image(image(seed)), str(file))
    if name == "named.mhd":  # its data file has another name
        for file in (path, other):
            file.with_suffix(".raw").rename(file.with_name("values"))
            file.write_text(file.read_text().replace("named.raw", "values"))
    first = load(path, modality="MR", shape=GRID)
    same(load(path, modality="MR", shape=GRID), first)
    for file in other.parent.iterdir():
        if file.suffix in (".raw", ".img", "") and file != other:
            (path.parent / file.name).write_bytes(file.read_bytes())
    if name == "a.img":
        path.write_bytes(other.read_bytes())
    os.utime(values_file(path), ns=(1, 1))
    assert not torch.equal(load(path, modality="MR", shape=GRID).image, first.image)


@pytest.mark.parametrize(
    ("name", "header", "named"),
    [
        ("a.mhd", "NDims = 3\nElementDataFile = LIST\ns1.raw\n s2.raw\n", ["s1.raw", "s2.raw"]),
        ("a.mha", "NDims = 3\nElementDataFile = my values.raw\n", ["my values.raw"]),
        ("a.mha", "NDims = 3\nElementDataFile = LOCAL\n\1\2\3", []),
        ("a.nrrd", "NRRD0004\ndimension: 3\ndata file: ./b.raw\n\n", ["b.raw"]),
        ("a.nhdr", "NRRD0004\r\ndatafile: LIST 2\r\ns1.raw\r\ns2.raw", ["s1.raw", "s2.raw"]),
        ("a.nrrd", "NRRD0004\nencoding: raw\n\n\1\2\3", []),
        ("a.png", "ElementDataFile = b.raw", []),
    ],
)
def test_the_files_that_a_header_names_belong_to_it(tmp_path, name, header, named):
    (tmp_path / name).write_bytes(header.encode())
    assert parts(tmp_path / name) == [tmp_path / file for file in (name, *named)]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "zeros", "longer"])
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, damage):
    paths = two_files(tmp_path)
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


def test_unwritable_cache_warns_once_and_works(tmp_path, monkeypatch):
    paths = two_files(tmp_path)
    (tmp_path / "file").write_text("")  # a folder cannot be made inside a file, not even by root
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=says("keeps no cache", "FMSAM_CACHE")):
        first = load(*paths, modality="MR", shape=GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(load(*paths, modality="MR", shape=GRID), first)


@pytest.mark.parametrize("end", [".nii", ".nii.gz"])
def test_a_header_that_promises_more_than_its_file_holds_takes_no_memory(tmp_path, monkeypatch, end):
    content = bytearray(save(tmp_path / "whole.nii", image()).read_bytes())
    content[40:48] = struct.pack("<4h", 3, 32767, 32767, 32767)  # 128 TiB of float32
    path = tmp_path / f"image{end}"
    path.write_bytes(gzip.compress(content) if end == ".nii.gz" else content)
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda reader: pytest.fail("ITK makes room for it"))
    with pytest.raises(DataError, match=f"a readable image of {352 + 4 * 32767**3} bytes, found {len(content)}"):
        read_values(path, 3)


def test_values_that_would_begin_before_their_file_are_a_damaged_header(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(image().astype(np.float32), np.eye(4)), tmp_path / "image.hdr")
    header = bytearray((tmp_path / "image.hdr").read_bytes())
    header[108:112] = struct.pack("<f", -8)  # vox_offset
    (tmp_path / "image.hdr").write_bytes(header)
    with pytest.raises(DataError, match=r"image.hdr: expected a readable image .*copy it again"):
        read_values(tmp_path / "image.hdr", 3)


def test_a_name_that_no_file_can_have_is_no_such_file(tmp_path):
    name = "x" * 300 + ".nii.gz"
    with pytest.raises(DataError, match=r"x\.nii\.gz: expected an image file, found no such file"):
        read_values(tmp_path / name, 3)
    folder = dataset(tmp_path / "Own", training=[{"image": f"./imagesTr/{name}"}])
    with pytest.raises(DataError, match="expected every listed file on disk, found 1 missing"):
        read_manifest(folder)


@pytest.mark.parametrize("end", [".nii", ".nii.gz", ".img", ".img.gz"])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_qfac_is_read_from_the_header(tmp_path, end, kind):
    """SimpleITK gives pixdim[0] as 0, whatever the file has."""
    stored = (nibabel.Nifti1Pair if "img" in end else nibabel.Nifti1Image)(image().astype(kind), np.eye(4))
    stored.set_qform(np.diag([1.0, 1.0, -1.0, 1.0]), 1)
    nibabel.save(stored, tmp_path / f"a{end}")
    assert float(read_values(tmp_path / f"a{end}", 3).GetMetaData("qfac")) == -1


@pytest.mark.parametrize("end", [".mha", ".nrrd"])
def test_another_format_keeps_no_codes_of_the_nifti_that_it_was_made_from(tmp_path, end):
    silent = save(tmp_path / "a.nii", image())
    raw = bytearray(silent.read_bytes())
    raw[252:256] = bytes(4)  # qform_code and sform_code
    silent.write_bytes(raw)
    assert not oriented(read_values(silent, 3))
    read = sitk.ReadImage(str(silent))
    read.SetDirection(np.diag([-1.0, -1.0, 1.0]).ravel())
    sitk.WriteImage(read, str(tmp_path / f"b{end}"))
    assert oriented(read_values(tmp_path / f"b{end}", 3))
