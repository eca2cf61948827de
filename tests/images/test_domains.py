"""Domains, real images, and the fetching of HippocampusMR."""

import json
import sys
import tarfile
import types
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from scipy.spatial.transform import Rotation

from fmsam_lib.checking import ConfigError
from fmsam_lib.images.domains import Mixture, open_domain, opens_again, readable
from fmsam_lib.images.manifest import data_folder, held_out, read_manifest
from fmsam_lib.metrics import measure
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.phantoms import pairs as synthetic
from fmsam_lib.plotting import slices
from fmsam_lib.records import PROJECT, DataError
from tests.conftest import as_module
from tests.images.test_files import GRID, REAL, REAL_SETS, count_reads, dataset, image, label, own_cache, save, says  # noqa: F401

fetch_hippocampus = as_module("studies/fetch_hippocampus.py").fetch_hippocampus

# Domains


def pairs_equal(a, b):
    assert a.name == b.name
    assert torch.equal(a.moving, b.moving)
    assert torch.equal(a.fixed, b.fixed)


def test_pairs_of_files(tmp_path):
    dataset(tmp_path / "Own")
    domain = open_domain("Own", shape=(11, 7, 8), data=tmp_path)
    assert (domain.name, domain.modality, domain.pairing, domain.unit) == ("Own", "MR", "inter-subject", "mm")
    assert (domain.labels, domain.training_count, domain.test_count) == ({1: "left", 2: "right"}, 3, 1)
    pair = domain.test_pair(0)
    assert pair.name == "p8<-p9"
    assert pair.fixed.shape == pair.moving.shape == pair.fixed_label.shape == (1, 11, 7, 8)
    assert pair.spacing == pytest.approx((6 / 11, 2, 3))  # six samples of 1 mm on eleven, edge on edge
    np.testing.assert_allclose(pair.affine[:3, :3], np.diag([6 / 11, 2, 3]))
    np.testing.assert_allclose(pair.affine[:3, 3], (6 / 22 - 0.5, 0, 0), atol=1e-9)
    drawn = [domain.training_pair(i).name for i in range(60)]
    assert len(set(drawn)) == 6  # all ordered pairs of three images, and never p8 or p9
    assert pair.subjects == ("p8", "p9")
    again = open_domain("Own", shape=(11, 7, 8), data=tmp_path)
    assert [again.training_pair(i).name for i in reversed(range(60))] == drawn[::-1]
    other = open_domain("Own", shape=(11, 7, 8), data=tmp_path, seed=1)
    assert [other.training_pair(i).name for i in range(60)] != drawn
    pairs_equal(other.test_pair(0), pair)


def placed(folder, name, affine, *, codes=1, shape=GRID):
    """The image and the label of a data set, stored once more with other headers."""
    structures = label([n for n in shape if n > 1]).reshape(shape)
    for kind, values in (("imagesTr", image(9, shape).astype(np.float32)), ("labelsTr", structures)):
        stored = nibabel.Nifti1Image(values, affine)
        stored.set_qform(affine, codes)
        stored.set_sform(affine, codes)
        nibabel.save(stored, folder / kind / f"{name}.nii.gz")


def about_z(degrees, spacing=(1.0, 2.0, 3.0)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() * spacing
    return affine


def test_a_pair_of_which_one_header_states_no_orientation_is_refused(tmp_path):
    """Taken as LPS, one of two alike images would be turned by 180 degrees. `register` refuses it, too."""
    own = dataset(tmp_path / "Own")
    placed(own, "p9", np.diag([1.0, 2.0, 3.0, 1.0]), codes=0)
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    with pytest.raises(DataError, match=r"p9.nii.gz: expected a header .*, as .*p8.nii.gz's does, found none"):
        domain.test_pair(0)
    assert len(domain.check()) == 1
    assert not domain.check(test=False)
    placed(own, "p2_ED", np.diag([1.0, 2.0, 3.0, 1.0]), codes=0)
    assert "p2_ED.nii.gz: expected a header" in open_domain("Own", shape=GRID, data=tmp_path).check(test=False)[0]


def test_a_pair_whose_axes_are_turned_to_each_other_is_told(tmp_path, recwarn):
    """38 and 51 degrees are 13 apart, and yet each image takes other axes of the body for its own."""
    own = dataset(tmp_path / "Own", test=[("p8", "p9"), ("p8", "p7")])
    for name, angle in (("p7", 35), ("p8", 38), ("p9", 51)):
        placed(own, name, about_z(angle))
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    for index in (0, 1):
        domain.test_pair(index)
    (told,) = [str(w.message) for w in recwarn if "over 45 degrees apart" in str(w.message)]
    assert "p8.nii.gz and " in told
    assert "p9.nii.gz: their axes" in told


def test_a_data_set_with_a_plus_in_its_name_is_no_mixture(tmp_path):
    dataset(tmp_path / "MR+CT")
    with pytest.raises(DataError, match=r"MR\+CT: expected a data set of another name, found .* a \+\. Rename it"):
        open_domain("MR+CT", shape=GRID, data=tmp_path)


def test_slices_of_two_planes_are_told(tmp_path):
    own = dataset(tmp_path / "Own", dimensions=2)
    sagittal = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    for name, affine in (("p8", np.eye(4)), ("p9", sagittal)):
        placed(own, name, affine, shape=(7, 8, 1))
    with pytest.warns(UserWarning, match=r"over 45 degrees apart, so one may be turned .* or show another plane"):
        open_domain("Own", shape=(7, 8), data=tmp_path).test_pair(0)


def test_a_pair_knows_the_subjects_that_the_manifest_names(tmp_path):
    """Fixed first, as in its name; nobody could guess them from these files."""
    named = [{"image": f"imagesTr/p{n}.nii.gz", "subject": who} for n, who in ((8, "Ann"), (9, "Bob"))]
    dataset(tmp_path / "Own", test=[("p8", "p9"), ("p9", "p8")])
    path = tmp_path / "Own" / "Own_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test": named}))
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    assert [domain.test_pair(i).subjects for i in range(2)] == [("Ann", "Bob"), ("Bob", "Ann")]
    assert domain.training_pair(0).subjects[0] in ("p1", "p2", "p3")
    assert open_domain("brain-mr", shape=(16, 16)).test_pair(0).subjects == ()
    with pytest.raises(DataError, match="test pair -1, counted from 0"):
        domain.test_pair(-1)


def test_a_data_set_is_called_as_its_folder_whatever_its_manifest_says(tmp_path):
    dataset(tmp_path / "MyACDC", name="ACDC")
    domain = open_domain("MyACDC", shape=GRID, data=tmp_path)
    assert domain.name == "MyACDC"
    assert opens_again(domain)


def test_what_another_process_opens_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "sets" / "Own")
    dataset(tmp_path / "others" / "Own")
    for name, data in (("brain-mr", None), ("Own", "sets"), ("brain-mr+Own", tmp_path / "sets")):
        domain = open_domain(name, shape=(16, 18), data=data)
        assert opens_again(domain)
        assert (domain.name, domain.shape, domain.seed) == (name, (16, 18), 0)
        assert domain.data == ("" if data is None else str(tmp_path / "sets"))
        assert not opens_again(open_domain(name, shape=(16, 18), data=data, seed=1))
    brain, own = open_domain("brain-mr", shape=(16, 18)), open_domain("Own", shape=(16, 18), data="sets")
    assert not opens_again(Mixture("brain-mr+lung-ct", [brain, brain]))
    assert not opens_again(Mixture("Own+Own", [own, open_domain("Own", shape=(16, 18), data="others")]))
    assert not opens_again(types.SimpleNamespace(name="brain-mr", shape=(16, 18)))
    assert not opens_again(types.SimpleNamespace(name="mine", shape=(16, 18), data="", seed=0))


def test_files_are_decoded_once_a_session(tmp_path, monkeypatch):
    dataset(tmp_path / "Own")
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    reads = count_reads(monkeypatch)
    for i in range(30):
        domain.training_pair(i)
    assert len(reads) == 6


NUMBERS = (-3, 300, 614454277, 2**53 + 1)


def test_labels_of_any_integer_are_exact_from_file_to_picture(tmp_path):
    names = {str(number): f"structure {number}" for number in NUMBERS}
    folder, pieces = dataset(tmp_path / "Own", labels=names), np.zeros(GRID, np.int64)
    pieces[1:5, 1:6, 1:7] = np.resize(NUMBERS, 6)  # planes across the last axis
    for file in (folder / "labelsTr").iterdir():
        nibabel.save(nibabel.Nifti1Image(pieces, np.diag([1.0, 2, 3, 1]), dtype=np.int64), file)
    for _ in range(2):  # from the file, then from the cache
        pair = open_domain("Own", shape=GRID, data=tmp_path).test_pair(0)
        assert pair.fixed_label.dtype == torch.int64
        np.testing.assert_array_equal(pair.fixed_label[0].numpy(), pieces)
    phi = identity_map(GRID) + torch.tensor([1 / (n - 1) for n in GRID]).view(1, 3, 1, 1, 1)
    moved = np.zeros_like(pieces)
    moved[:-1, :-1, :-1] = pieces[1:, 1:, 1:]
    rows = {row["label"]: row["value"] for row in measure(pair, phi) if row["metric"] == "dice"}
    for number in NUMBERS:
        a, b = moved == number, pieces == number
        assert rows[f"structure {number}"] == 2 * (a & b).sum() / (a.sum() + b.sum())
    plane = slices.cut(pair, phi)
    assert set(np.unique(plane.warped_label)) == set(np.unique(moved[..., GRID[2] // 2]))
    tilted = slices.cut(pair, phi, axis=0)
    lines = slices.outline(slices.Picture().subplots(), tilted, tilted.warped_label, slices.WARPED_LINE)
    assert len(lines) == len(NUMBERS)
    assert all(len(line.get_paths()[0].vertices) for line in lines)  # a shared border is drawn once, none twice


def test_labels_within_a_byte_stay_bytes(tmp_path):
    folder = dataset(tmp_path / "Own", labels={"1": "left", "2": "right", "300": "not there"})
    for _ in range(2):
        pair = open_domain("Own", shape=GRID, data=folder.parent).test_pair(0)
        assert pair.fixed_label.dtype == torch.uint8


def test_lost_spacing_makes_voxels_the_unit(tmp_path):
    for changes, unit in (
        ({"description": "voxel spacing was lost upstream"}, "mm"),  # prose does not count
        ({"spacing_known": True}, "mm"),
        ({"spacing_known": False}, "voxel"),
    ):
        dataset(tmp_path / "Own", **changes)
        domain = open_domain("Own", shape=GRID, data=tmp_path)
        assert domain.unit == domain.test_pair(0).unit == unit
    for shape, spacing in ((GRID, (1, 1, 1)), ((12, 7, 4), (0.5, 1, 2)), ((6, 14), (1, 0.5))):
        pair = open_domain("Own", shape=shape, data=tmp_path).test_pair(0)
        assert pair.spacing == pair.moving_spacing == pytest.approx(spacing)  # the file's voxels from sample to sample


def test_a_side_of_the_patient_that_no_header_states_is_not_named(tmp_path):
    folder = dataset(tmp_path / "Own")
    for path in (folder / "imagesTr").iterdir():
        silent = nibabel.Nifti1Image(image().astype(np.float32), None)
        silent.header.set_zooms((1.0, 2.0, 3.0))
        nibabel.save(silent, path)
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    dataset(tmp_path / "Own", training=[], write=False)
    for _ in range(2):  # from the file, then from the cache
        pair = open_domain("Own", shape=GRID, data=tmp_path).test_pair(0)
        assert pair.affine is None
        assert slices.cut(pair).ends.strip() == ""
        assert pair.spacing == pytest.approx((1, 2, 3))


def test_unknown_names_list_the_known_ones(tmp_path, monkeypatch):
    dataset(tmp_path / "Own")
    monkeypatch.setenv("FMSAM_DATA", str(tmp_path))
    for name in ("Other", "Own+Other", "Own+"):
        with pytest.raises(DataError, match=says("one of", next(iter(synthetic.DOMAINS)), "Own", "FMSAM_DATA")):
            open_domain(name, shape=GRID)
    assert open_domain("Own", shape=GRID).name == "Own"


def test_2d_data_has_no_3d_grid_and_test_sets_no_training(tmp_path):
    dataset(tmp_path / "Flat", dimensions=2, shape=(6, 7))
    with pytest.raises(DataError, match=says("Flat", "a 2-D grid", "(6, 7, 8)")):
        open_domain("Flat", shape=GRID, data=tmp_path)
    assert open_domain("Flat", shape=(6, 7), data=tmp_path).test_pair(0).fixed.shape == (1, 6, 7)
    dataset(tmp_path / "TestOnly", training=[])
    with pytest.raises(DataError, match=says("TestOnly", "training pairs", "testing only")):
        open_domain("TestOnly", shape=GRID, data=tmp_path).training_pair(0)


def test_check_lists_all_problems(tmp_path):
    folder = dataset(tmp_path / "Own")
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    assert domain.check() == []
    (folder / "imagesTr/p1_ED.nii.gz").write_bytes(b"")
    save(folder / "labelsTr/p3_ED.nii.gz", np.zeros(GRID))
    save(folder / "imagesTr/p9.nii.gz", np.ones(GRID))
    for options, bad in (
        ({}, ["imagesTr/p1_ED", "labelsTr/p3_ED", "imagesTr/p9"]),
        ({"test": False}, ["imagesTr/p1_ED"]),
    ):
        with warnings.catch_warnings(record=True) as warned:
            problems = open_domain("Own", shape=GRID, data=tmp_path).check(**options)
        assert ["p3_ED.nii.gz is left out" in str(w.message) for w in warned] == [True] * ("test" in options)
        assert len(problems) == len(bad)
        assert all(name in problem for name, problem in zip(bad, problems, strict=True))


@pytest.mark.parametrize("values", [0, 7])
def test_a_label_file_that_cannot_be_used_stops_no_training(tmp_path, values):
    """A healthy patient without structures; an id that the manifest does not name."""
    folder = dataset(tmp_path / "Own")
    for name in ("p1_ED", "p8"):
        save(folder / f"labelsTr/{name}.nii.gz", np.full(GRID, values))
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    with pytest.warns(UserWarning, match=says("p1_ED.nii.gz: expected labels", '"label": null', "left out")):
        pairs = [domain.training_pair(i) for i in range(20)]
    assert {pair.fixed_label is None for pair in pairs if pair.name.startswith("p1")} == {True}
    assert {pair.fixed_label is None for pair in pairs if not pair.name.startswith("p1")} == {False}
    with pytest.raises(DataError, match=says("p8.nii.gz: expected labels", '"label": null')):
        domain.test_pair(0)


def test_a_pictures_millimetres_mean_nothing(tmp_path):
    files = {"training": [], "registration_val": [{"fixed": "a.png", "moving": "b.png"}]}
    for said, unit in (({}, "voxel"), ({"spacing_known": True}, "mm")):
        folder = dataset(tmp_path / "Own", write=False, dimensions=2, **files, **said)
        for seed, name in enumerate("ab"):
            sitk.WriteImage(sitk.GetImageFromArray(image(seed, (16, 18)).astype(np.uint8)), str(folder / f"{name}.png"))
        assert open_domain("Own", shape=(16, 18), data=tmp_path).test_pair(0).unit == unit


@pytest.fixture
def fake_synthetic(monkeypatch):
    domain = types.SimpleNamespace(labels={1: "blob"}, pairing="intra-subject", modality="CT")
    monkeypatch.setitem(synthetic.DOMAINS, "fake-ct", domain)

    def make_pair(name, *, seed, index, shape):
        return synthetic.Pair(
            f"{name} {seed} {index}", torch.zeros(1, *shape), torch.zeros(1, *shape), labels=domain.labels
        )

    monkeypatch.setattr(synthetic, "make_pair", make_pair)


@pytest.mark.usefixtures("fake_synthetic")
def test_synthetic_test_pairs_are_never_training_pairs(tmp_path):
    domain = open_domain("fake-ct", shape=(16, 16), data=tmp_path, seed=3)
    assert (domain.labels, domain.modality, domain.unit) == ({1: "blob"}, "CT", "mm")
    drawn = [domain.training_pair(i).name for i in range(3 * domain.training_count)]
    assert {name.rsplit(" ", 1)[0] for name in drawn} == {"fake-ct 3"}
    assert max(int(name.rsplit(" ", 1)[1]) for name in drawn) < domain.training_count
    assert len(set(drawn)) > 0.9 * domain.training_count
    assert domain.training_pair(7) is domain.training_pair(7)  # made once
    tested = {domain.test_pair(i).name for i in range(domain.test_count)}
    assert len(tested) == domain.test_count > 0
    assert not tested & set(drawn)
    assert domain.check() == []


def manifest_of(subjects, pairs=None):
    """A manifest of two images a subject."""
    images = [Path(f"s{subject:02}_{part}") for subject in range(subjects) for part in "ab"]
    return types.SimpleNamespace(
        training=images, training_pairs=pairs, subject={image: image.name[:3] for image in images}
    )


@pytest.mark.parametrize(("subjects", "apart"), [(9, 0), (10, 2), (14, 2), (15, 3), (100, 20)])
def test_a_fifth_of_the_subjects_is_held_out(subjects, apart):
    manifest = manifest_of(subjects)
    training, listed, validation = held_out(manifest)
    assert listed is None
    kept = {manifest.subject[image] for image in training}
    outside = {manifest.subject[image] for pair in validation for image in pair}
    assert (len(kept), len(outside)) == (subjects - apart, apart)
    assert not kept & outside
    assert all(manifest.subject[fixed] != manifest.subject[moving] for fixed, moving in validation)
    assert len({fixed for fixed, _ in validation}) == len(validation) == 2 * apart


def test_listed_pairs_are_held_out_whole():
    images = manifest_of(12).training
    within = list(zip(images[::2], images[1::2], strict=True))
    across = (images[0], images[-1])  # a training and a held-out subject: nobody's
    training, listed, validation = held_out(manifest_of(12, [*within, across]))
    assert listed == within[:10]
    assert validation == within[10:]
    assert len(training) == 20
    star = [(images[-1], image) for image in images[:10]]
    assert held_out(manifest_of(12, star)) == (images, star, [])


@pytest.mark.usefixtures("fake_synthetic")
def test_validation_pairs_are_in_neither_training_nor_test():
    domain = open_domain("brain-mr", shape=(16, 16))
    seen = {domain.training_pair(i).name for i in range(500)} | {domain.test_pair(i).name for i in range(50)}
    names = [domain.validation_pair(i).name for i in range(domain.validation_count)]
    assert len(set(names)) == domain.validation_count == 10
    assert not seen & set(names)
    assert open_domain("brain-mr", shape=(16, 16), seed=3).validation_pair(0).name == names[0]


@pytest.mark.usefixtures("fake_synthetic")
def test_a_mixture_validates_on_its_domains_in_turn(tmp_path):
    dataset(tmp_path / "Own")  # too few subjects to hold any out
    mixture = open_domain("brain-mr+Own+heart-mr", shape=(16, 16), data=tmp_path)
    assert mixture.validation_count == 20
    brain, heart = (open_domain(name, shape=(16, 16)) for name in ("brain-mr", "heart-mr"))
    expected = [brain.validation_pair(0), heart.validation_pair(0), brain.validation_pair(1)]
    for i, pair in enumerate(expected):
        pairs_equal(mixture.validation_pair(i), pair)


@pytest.mark.usefixtures("fake_synthetic")
def test_a_mixture_takes_its_domains_in_turn(tmp_path):
    dataset(tmp_path / "Own")
    mixture = open_domain("fake-ct+Own", shape=(16, 16, 16), data=tmp_path)
    own = open_domain("Own", shape=(16, 16, 16), data=tmp_path)
    pairs_equal(mixture.training_pair(8), open_domain("fake-ct", shape=(16, 16, 16)).training_pair(4))
    pairs_equal(mixture.training_pair(9), own.training_pair(4))
    assert mixture.training_pair(8).labels != mixture.training_pair(9).labels
    assert (mixture.modality, mixture.pairing) == ("CT+MR", "intra-subject+inter-subject")
    assert mixture.check() == []
    assert mixture.test_count == 0
    with pytest.raises(DataError, match=says("fake-ct+Own", "one by one")):
        mixture.test_pair(0)


def test_real_synthetic_pairs_come_through():
    if not hasattr(synthetic, "make_pair") or not synthetic.DOMAINS:
        pytest.skip("no synthetic domains yet")
    name, shape = next(iter(synthetic.DOMAINS)), (20, 24)
    domain = open_domain(name, shape=shape)
    pair = domain.training_pair(2)
    assert pair.fixed.shape == (1, *shape)
    assert pair.labels == domain.labels
    pairs_equal(pair, open_domain(name, shape=shape).training_pair(2))
    assert not torch.equal(pair.fixed, domain.test_pair(2).fixed)
    assert open_domain(name, shape=(16, 17, 18)).training_pair(0).fixed.shape == (1, 16, 17, 18)


# Real data, where they are


@pytest.mark.parametrize(("name", "dim"), REAL_SETS.items())
def test_real_data_sets_open(name, dim):
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} in {REAL}: set FMSAM_DATA")
    shape = (48, 64, 48)[:dim]
    domain = open_domain(name, shape=shape, data=REAL)
    assert domain.unit == ("mm" if domain.manifest.spacing_known else "voxel")
    for pair in (domain.test_pair(0), domain.training_pair(0)):
        for values in (pair.moving, pair.fixed):
            assert values.shape == (1, *shape)
            assert 0 <= values.min() < 0.2 < values.max() <= 1
        assert set(pair.fixed_label.unique().tolist()) <= {0, *domain.labels}
        assert (pair.subjects[0] == pair.subjects[1]) == (domain.pairing == "intra-subject")


def test_real_hippocampus_overlap_before_registration():
    if not (REAL / "HippocampusMR").is_dir():
        pytest.skip(f"no HippocampusMR in {REAL}: set FMSAM_DATA")
    domain = open_domain("HippocampusMR", shape=(48, 64, 48), data=REAL)
    dice = []
    for pair in map(domain.test_pair, range(domain.test_count)):
        for value in domain.labels:
            a, b = pair.moving_label.numpy() == value, pair.fixed_label.numpy() == value
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert len(dice) == 120
    assert np.mean(dice) == pytest.approx(0.627, abs=0.005)  # whole fields of view laid over each other


# HippocampusMR


@pytest.fixture
def decathlon(monkeypatch, tmp_path):
    """A stand-in for MONAI's downloader: it writes the Decathlon's folder with tiny files."""
    state = types.SimpleNamespace(images=260, fail=None, calls=[])
    tiny = save(tmp_path / "tiny.nii", image(shape=(2, 2, 2))).read_bytes()
    state.write = lambda folder: _decathlon_folder(folder, state.images, tiny)

    def download_url(url, filepath, hash_val, hash_type):
        state.calls.append((url, Path(filepath).is_file()))
        if Path(filepath).is_file():
            return
        if state.fail:
            Path(filepath).write_bytes(b"what was there when the connection broke")
            raise state.fail
        state.write(tmp_path / "published")
        with tarfile.open(filepath, "w") as tar:
            tar.add(tmp_path / "published/Task04_Hippocampus", "Task04_Hippocampus")

    def extractall(filepath, output_dir):
        with tarfile.open(filepath) as tar:
            tar.extractall(output_dir, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))

    table = types.SimpleNamespace(resource={"Task04_Hippocampus": "url"}, md5={"Task04_Hippocampus": "md5"})
    apps = types.SimpleNamespace(DecathlonDataset=table, download_url=download_url, extractall=extractall)
    monkeypatch.setitem(sys.modules, "monai", types.ModuleType("monai"))
    monkeypatch.setitem(sys.modules, "monai.apps", apps)
    return state


def _decathlon_folder(folder, number, tiny):
    for part in ("imagesTr", "labelsTr"):
        (folder / "Task04_Hippocampus" / part).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            (folder / "Task04_Hippocampus" / part / f"hippocampus_{i:03d}.nii.gz").write_bytes(tiny)
            (folder / "Task04_Hippocampus" / part / f"._hippocampus_{i:03d}.nii.gz").write_bytes(b"")


def check_hippocampus(folder):
    manifest = read_manifest(folder / "HippocampusMR")
    assert (len(manifest.training), len(manifest.test_pairs)) == (200, 60)
    names = [tuple(path.name[12:15] for path in pair) for pair in manifest.test_pairs]
    assert names == [(f"{200 + i}", f"{259 - i}") for i in range(60)]
    assert not list((folder / "HippocampusMR" / "imagesTr").glob("._*"))
    assert not list(folder.glob(".fetch-*"))


def test_fetch_downloads_once(tmp_path, decathlon):
    target = fetch_hippocampus(tmp_path / "data")
    assert target == tmp_path / "data" / "HippocampusMR"
    check_hippocampus(tmp_path / "data")
    assert fetch_hippocampus(tmp_path / "data") == target
    assert len(decathlon.calls) == 1


def test_fetch_uses_what_was_put_there_by_hand(tmp_path, decathlon):
    decathlon.write(tmp_path / "folder")
    fetch_hippocampus(tmp_path / "folder")
    check_hippocampus(tmp_path / "folder")

    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "Task04_Hippocampus.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "Task04_Hippocampus", "Task04_Hippocampus")
    fetch_hippocampus(tmp_path / "tar")
    check_hippocampus(tmp_path / "tar")
    assert decathlon.calls == [("url", True)]

    (tmp_path / "parts").mkdir()
    (tmp_path / "folder" / "Task04_Hippocampus").rename(tmp_path / "parts" / "HippocampusMR")
    for junk in (tmp_path / "parts").rglob("._*"):
        junk.unlink()
    fetch_hippocampus(tmp_path / "parts")
    check_hippocampus(tmp_path / "parts")


@pytest.mark.parametrize(
    "error", [OSError("no route"), RuntimeError("denied"), Exception("no network: MONAI raises this")]
)
def test_fetch_without_network_says_where_to_put_the_files(tmp_path, decathlon, error):
    decathlon.fail = error
    with pytest.raises(
        DataError, match=says("task 4", "Medical Segmentation Decathlon", error, "imagesTr", "labelsTr")
    ):
        fetch_hippocampus(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_fetch_takes_no_half_finished_set(tmp_path, decathlon):
    decathlon.images = 259
    with pytest.raises(DataError, match=says("260", "259 images and 259 labels")):
        fetch_hippocampus(tmp_path / "download")
    assert list((tmp_path / "download").iterdir()) == []
    (tmp_path / "hand" / "HippocampusMR" / "imagesTr").mkdir(parents=True)
    with pytest.raises(DataError, match=says("HippocampusMR", "260", "0 images and 0 labels", "Complete or remove")):
        fetch_hippocampus(tmp_path / "hand")


def test_fetch_makes_the_published_split(tmp_path, monkeypatch):
    if not (REAL / "HippocampusMR").is_dir():
        pytest.skip(f"no HippocampusMR in {REAL}: set FMSAM_DATA")
    target = tmp_path / "HippocampusMR"
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True)
        for file in (REAL / "HippocampusMR" / part).iterdir():
            (target / part / file.name).touch()
    fetch_hippocampus(tmp_path)
    made, original = (folder / "HippocampusMR_dataset.json" for folder in (target, REAL / "HippocampusMR"))
    assert json.loads(made.read_text()) == json.loads(original.read_text())


def test_data_folder(monkeypatch):
    assert data_folder() == PROJECT / "data"
    monkeypatch.setenv("FMSAM_DATA", "/somewhere")
    assert data_folder() == Path("/somewhere")
    assert data_folder("here") == Path("here")
    assert data_folder("~/x") == Path.home() / "x"


@pytest.mark.parametrize("shape", [64, (64,), (8, 8, 8, 8), (8, 8), (64.0, 64.0), np.array([64])])
def test_an_impossible_shape_is_refused_at_once(shape):
    with pytest.raises(ConfigError, match=r"expected a shape of 2 or 3 sides, whole and from 16 on, got \(?[\d., ]+\)"):
        open_domain("brain-mr", shape=shape)


@pytest.mark.parametrize(
    "given",
    [{"name": Path("Own")}, {"name": None}, {"seed": -1}, {"subjects": -1}, {"subjects": 1.5}, {"subjects": "2"}],
)
def test_an_impossible_name_seed_or_number_of_subjects_is_refused_at_once(given, tmp_path):
    dataset(tmp_path / "Own")
    for name in ("brain-mr", "Own", "brain-mr+Own"):
        with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
            open_domain(**{"name": name, "shape": (16, 16), "data": tmp_path} | given)


def test_numpys_shape_is_as_good_as_a_tuple():
    assert open_domain("brain-mr", shape=np.array([16, 18])).shape == (16, 18)


def test_a_misspelt_domain_is_answered_with_the_right_one(tmp_path):
    with pytest.raises(DataError, match=r"did you mean brain-mr\?"):
        open_domain("brain-mri", shape=(16, 16), data=tmp_path)


def test_one_training_image_makes_no_pair(tmp_path):
    folder = dataset(tmp_path / "Mine", train=("p1_ED",))
    with pytest.raises(DataError, match=r"two training images or more .* found 1 images"):
        open_domain("Mine", shape=GRID, data=folder.parent).training_pair(0)


def test_fewer_subjects_are_the_first_ones(tmp_path, monkeypatch):
    dataset(tmp_path / "Own")
    few = open_domain("Own", shape=GRID, data=tmp_path, subjects=2)
    drawn = {few.training_pair(i).subjects for i in range(20)}
    assert drawn == {("p1", "p2"), ("p2", "p1")}
    assert (few.training_count, few.test_count, few.subjects) == (2, 1, 2)
    both = open_domain("brain-mr+Own", shape=(16, 16, 16), data=tmp_path, subjects=2)
    assert {both.training_pair(i).name for i in range(1, 40, 2)} == {few.training_pair(i).name for i in range(20)}
    assert len({both.training_pair(i).name for i in range(0, 40, 2)}) == 2
    assert opens_again(both)
    assert open_domain("Own", shape=GRID, data=tmp_path, subjects=99).training_count == 3
    path = tmp_path / "Own" / "Own_dataset.json"
    files = [entry["image"] for entry in json.loads(path.read_text())["training"]]
    listed = [{"fixed": files[a], "moving": files[b]} for a, b in ((0, 1), (1, 2), (2, 0))]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training_paired_images": listed}))
    few = open_domain("Own", shape=GRID, data=tmp_path, subjects=2)
    assert len({few.training_pair(i).name for i in range(20)}) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training_paired_images": listed[1:]}))
    with pytest.raises(DataError, match=says("found 2 images, 0 pairs. Add some, take more subjects")):
        open_domain("Own", shape=GRID, data=tmp_path, subjects=2).training_pair(0)  # no pair that nobody listed


def test_brainptbp2d_is_already_aligned(real_data):
    """Why it is no endpoint of the study on unseen anatomies: the brains overlap before any registration."""
    domain = open_domain("BrainPTBP2D", shape=(208, 176), data=real_data)
    pairs = [domain.test_pair(i) for i in range(domain.test_count)]
    both = [(pair.fixed_label > 0, pair.moving_label > 0) for pair in pairs]
    overlaps = [2 * (a & b).sum().item() / (a.sum() + b.sum()).item() for a, b in both]
    print(f"Dice of whole brains before registration: {np.mean(overlaps):.3f}")
    assert np.mean(overlaps) > 0.98


def test_synthetic_pairs_have_titles_for_people():
    domain = open_domain("heart-mr", shape=(16, 16))
    assert domain.test_pair(0).title == "heart-mr, test pair 1"
    assert domain.validation_pair(2).title == "heart-mr, validation pair 3"
    for index in (-1, 50):
        with pytest.raises(DataError, match=f"heart-mr: expected a test pair from 0 to 49, found {index}. Choose"):
            domain.test_pair(index)
    pair = domain.training_pair(0)
    assert pair.title == pair.name


def test_files_of_one_name_in_a_folder_each_make_pairs_of_other_names(tmp_path):
    names = [f"case{i}/mr.nii.gz" for i in range(4)]
    for number, name in enumerate(names):
        save(tmp_path / "Cases" / name, image(number, GRID))
    listed = [{"fixed": names[i], "moving": names[i + 1]} for i in (0, 2)]
    entries = [{"image": name, "subject": name[:5]} for name in names]
    dataset(tmp_path / "Cases", train=(), test=(), write=False, test_entries=None, registration_val=listed)
    path = tmp_path / "Cases" / "Cases_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": {}, "test": entries}))
    domain = open_domain("Cases", shape=(8, 8, 8), data=tmp_path)
    assert [domain.test_pair(i).name for i in range(2)] == ["case0_mr<-case1_mr", "case2_mr<-case3_mr"]


def test_files_of_one_name_listed_by_whole_paths_make_pairs_of_other_names(tmp_path):
    """However deep the manifest lies, and whatever their endings."""
    images = [save(tmp_path / f"images/p{i}/T1.nii", image(i)) for i in range(3)]
    itk = tmp_path / "images/p2/T1.mha"
    sitk.WriteImage(sitk.ReadImage(images[2]), itk)
    listed = [{"fixed": str(f), "moving": str(m)} for f, m in zip(images, [*images[1:], itk], strict=True)]
    entries = [{"image": str(i), "subject": str(i)} for i in (*images, itk)]
    data = tmp_path / "deep/er/and/deeper/data"
    dataset(data / "Own", train=(), write=False, test_entries=None, labels={}, registration_val=listed, test=entries)
    domain = open_domain("Own", shape=(8, 8, 8), data=data)
    names = [domain.test_pair(i).name for i in range(3)]
    assert len({*names}) == 3
    assert names[0].endswith("images_p0_T1<-" + "_".join([*images[1].parts[1:-1], "T1"]))
    fixed, moving = names[2].split("<-")
    assert "_T1~" in fixed
    assert "_T1~" in moving
    assert fixed != moving


def test_a_data_set_called_as_a_synthetic_domain_is_refused(tmp_path):
    dataset(tmp_path / "heart-mr")
    with pytest.raises(DataError, match="heart-mr: expected a data set of another name, found a synthetic domain's"):
        open_domain("heart-mr", shape=(16, 16, 16), data=tmp_path)


def test_a_test_pair_that_may_not_be_read_does_not_stop_the_others(tmp_path, monkeypatch):
    def read(path, of=Path.read_bytes):
        if path.name == "p9.nii.gz":
            raise PermissionError(13, "Permission denied", str(path))
        return of(path)

    dataset(tmp_path / "Own", test=(("p8", "p9"), ("p8", "p7")))
    monkeypatch.setattr(Path, "read_bytes", read)
    problems = []
    domain = open_domain("Own", shape=(8, 8, 8), data=tmp_path)
    assert [pair.name for pair in readable(domain, range(2), problems)] == ["p8<-p7"]
    assert "Permission denied" in problems[0]
