"""Manifests laid out as Learn2Reg's own, and the keypoints and masks that come with them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import map_coordinates

from fmsam_lib.evaluation.comparison import comparison, gaps
from fmsam_lib.evaluation.evaluate import evaluate
from fmsam_lib.images.domains import open_domain, readable_test_pairs
from fmsam_lib.images.manifest import read_manifest
from fmsam_lib.metrics import learn2reg_field, measure
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.records import DataError
from tests.images.test_files import GRID, dataset, image, label, own_cache, save, says  # noqa: F401

NAMES = {"0": "background", "1": "left", "2": "right"}
CANONICAL = np.diag([1.5, 2.0, 3.0, 1.0])


def paths(kind, name, numbers, suffixes=(0,), part="Tr", ending=".nii.gz"):
    return [f"./{kind}{part}/{name}_{n:04}_{s:04}{ending}" for n in numbers for s in suffixes]


def learn2reg(folder, images, validation, *, paired=(), write=("labels", "masks", "keypoints"), **changes):
    """A data set in Learn2Reg's words. images: all listed under `training`; validation, paired: (fixed, moving)."""
    every = dict.fromkeys([*images, *(name for pair in (*validation, *paired) for name in pair)])
    for seed, name in enumerate(every):
        save(folder / name, image(seed) * 4 - 300, CANONICAL)
        for kind, values in (("labels", label()), ("masks", label() > 0)):
            if kind in write:
                save(folder / name.replace("images", kind), values, CANONICAL, np.uint8)
        if "keypoints" in write:
            file = folder / name.replace("images", "keypoints").replace(".nii.gz", ".csv")
            file.parent.mkdir(exist_ok=True)
            np.savetxt(file, np.random.default_rng(seed).uniform(1, 5, (20, 3)), delimiter=",")

    def listed(pairs):
        return [{"fixed": fixed, "moving": moving} for fixed, moving in pairs]

    content = {
        "name": folder.name, "release": "1.1", "description": "", "licence": "", "reference": "",
        "pairings": "paired" if paired else "unpaired", "provided_data": {"0": ["image", *write]},
        "registration_direction": {"fixed": 0, "moving": 0}, "modality": {"0": "MR"},
        "img_shift": {"fixed": "0000", "moving": "0001"}, "labels": {"0": NAMES},
        "tensorImageSize": {"0": "3D"}, "tensorImageShape": {"0": [*GRID]}, "numTraining": len(images), "numTest": 0,
        "training": [{"image": name} for name in images], "test": [], "numPairedTraining": len(paired),
        "training_paired_images": listed(paired), "numRegistration_val": len(validation),
        "registration_val": listed(validation), "numRegistration_test": 0, "registration_test": [],
        **changes,
    }  # fmt: skip
    path = folder / f"{folder.name}_dataset.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def oasis(folder):
    images = paths("images", "OASIS", range(1, 7))
    return learn2reg(folder, images, list(itertools.pairwise(images[3:])), write=("labels", "masks"))


def lung(folder, name="LungCT", modality="CT"):
    every = paths("images", name, range(1, 5), (0, 1))
    pairs = list(zip(every[::2], every[1::2], strict=True))
    options = {"modality": {"0": modality}, "labels": {"0": {}}, "write": ("masks", "keypoints")}
    return learn2reg(folder, every, pairs[:1], paired=pairs, **options)


def nlst(folder):
    """Keypoints and masks are named in the entries."""
    folder = lung(folder, "NLST")
    path = folder / "NLST_dataset.json"
    content = json.loads(path.read_text())
    for entry in content["training"]:
        entry["mask"] = entry["image"].replace("images", "masks")
        entry["keypoints"] = entry["image"].replace("images", "keypoints").replace(".nii.gz", ".csv")
    path.write_text(json.dumps(content | {"labels": None}))
    return folder


def abdomen(folder):
    every = paths("images", "AbdomenMRCT", range(1, 5), (0, 1))
    pairs = list(zip(every[::2], every[1::2], strict=True))
    options = {"modality": {"0": "MR", "1": "CT"}, "labels": {"0": NAMES, "1": NAMES}, "write": ("labels", "masks")}
    options |= {"tensorImageSize": {"0": "3D", "1": "3D"}, "tensorImageShape": {"0": [*GRID], "1": [*GRID]}}
    return learn2reg(folder, every, pairs[2:3], paired=pairs, **options)


def thorax(folder):
    """A planning FBCT and two CBCTs of each person."""
    every = paths("images", "ThoraxCBCT", range(1, 4), (0, 1, 2))
    pairs = [(every[i], every[i + k]) for i in (0, 3, 6) for k in (1, 2)]
    options = {"modality": {"0": "FBCT", "1": "CBCT"}, "labels": {}, "write": ("masks", "keypoints")}
    return learn2reg(folder, every, pairs[4:], paired=pairs[:4], **options)


def lumir(folder):
    images, held = paths("images", "LUMIRMRI", range(5)), paths("images", "LUMIRMRI", range(5, 8), part="Val")
    words = {"modality": "MRI", "tensorImageSize": "3D", "tensorImageShape": None, "training_paired_images": None}
    return learn2reg(folder, images, list(itertools.pairwise(held)), write=(), labels=None, **words)


SETS = {  # training images, training pairs, test pairs; labels, masks, keypoints of a test pair; modality
    "OASIS": (oasis, 3, None, 2, (True, True, False), "MR"),
    "LungCT": (lung, 6, 3, 1, (False, True, True), "CT"),
    "NLST": (nlst, 6, 3, 1, (False, True, True), "CT"),
    "AbdomenMRCT": (abdomen, 6, 3, 1, (True, True, False), "MR+CT"),
    "ThoraxCBCT": (thorax, 6, 4, 2, (False, True, True), "CT"),
    "LUMIR": (lumir, 5, None, 2, (False, False, False), "MR"),
}


@pytest.mark.filterwarnings("ignore:.*taken out of training")
@pytest.mark.parametrize("name", SETS)
def test_learn2regs_own_manifests_are_read_as_they_are(tmp_path, name):
    make, training, pairs, tests, has, modality = SETS[name]
    manifest = read_manifest(make(tmp_path / name))
    assert (manifest.folder.name, manifest.dimensions, manifest.modality) == (name, 3, modality)
    assert manifest.pairing == ("unpaired" if pairs is None else "paired")
    assert len(manifest.training) == training
    assert manifest.training_pairs is None if pairs is None else len(manifest.training_pairs) == pairs
    assert len(manifest.test_pairs) == tests
    domain = open_domain(name, shape=GRID, data=tmp_path)
    assert domain.check() == []
    assert domain.training_pair(0).fixed.shape == (1, *GRID)
    pair = domain.test_pair(0)
    for first, second, there in zip(
        (pair.fixed_label, pair.fixed_mask, pair.fixed_landmarks),
        (pair.moving_label, pair.moving_mask, pair.moving_landmarks),
        has,
        strict=True,
    ):
        assert (first is not None) == (second is not None) == there
    if pair.fixed_mask is not None:
        assert (pair.fixed_mask.dtype, pair.fixed_mask.shape) == (torch.bool, (1, *GRID))


def test_validation_cases_under_training_are_taken_out_and_named(tmp_path):
    folder = lung(tmp_path / "LungCT")
    with pytest.warns(UserWarning, match=says("LungCT_dataset.json", "LungCT_0001", "(1 in all)", "out of training")):
        manifest = read_manifest(folder)
    used = {*manifest.training, *(image for pair in manifest.training_pairs for image in pair)}
    assert not used & {image for pair in manifest.test_pairs for image in pair}
    assert {manifest.subject[image] for image in used} == {"LungCT_0002", "LungCT_0003", "LungCT_0004"}


@pytest.mark.filterwarnings("ignore:.*taken out of training")
def test_an_image_under_training_and_test_keeps_what_its_training_entry_says(tmp_path):
    folder = tmp_path / "Set"
    for seed, name in enumerate("abcdf"):
        save(folder / f"scans/{name}.nii.gz", image(seed), CANONICAL)
        save(folder / f"segs/{name}.nii.gz", label(), CANONICAL, np.uint8)
    of = {n: {"image": f"scans/{n}.nii.gz", "label": f"segs/{n}.nii.gz"} for n in "abcdf"}
    content = {"name": "Set", "dimensions": 3, "modality": {"0": "MR"}, "pairing": "inter-subject", "labels": NAMES}
    content["training"] = [of["a"], of["b"], of["c"] | {"subject": "P1"}, of["f"] | {"subject": "P1"}]
    content |= {"test": [of["c"]["image"], of["d"]]}
    content["registration_val"] = [{"fixed": of["c"]["image"], "moving": of["d"]["image"]}]
    (folder / "Set_dataset.json").write_text(json.dumps(content))
    with pytest.warns(match="test subjects P1"):
        manifest = read_manifest(folder)
    assert [path.name for path in manifest.training] == ["a.nii.gz", "b.nii.gz"]  # f is of the same patient as c
    assert all(manifest.beside["label"][path] for path in manifest.test_pairs[0])


def test_each_image_is_read_by_its_own_modality(tmp_path):
    pair_of = {name: open_domain(name, shape=GRID, data=make(tmp_path / name).parent).test_pair(0)
               for name, make in (("AbdomenMRCT", abdomen), ("LungCT", lung))}  # fmt: skip
    both = pair_of["AbdomenMRCT"]
    assert both.name == "AbdomenMRCT_0003_0000<-AbdomenMRCT_0003_0001"
    assert both.subjects == ("AbdomenMRCT_0003", "AbdomenMRCT_0003")
    assert (both.fixed.min(), both.fixed.max()) == (0, 1)  # MR by its own range
    hounsfield = image(5) * 4 - 300
    np.testing.assert_allclose(both.moving[0], (np.clip(hounsfield, -1000, 1000) + 1000) / 2000, atol=1e-6)
    assert pair_of["LungCT"].fixed.min() > 0.1


@pytest.mark.parametrize(
    ("words", "modality"),
    [("MR", "MR"), ("MRI", "MR"), ({"0": "T1"}, "MR"), ({"0": "T1w", "1": "T2w"}, "MR"), ({"0": "FLAIR"}, "MR"),
     ({"0": "MR T1-weighted"}, "MR"), ("CT", "CT"), ({"0": "cbct"}, "CT"), ({"0": "FBCT", "1": "CBCT"}, "CT"),
     ({"0": "PET"}, None), ("US", None), ({"0": ""}, None), ({"0": "MR", "1": "X-ray"}, None)],
)  # fmt: skip
def test_what_modalities_are_called(tmp_path, words, modality):
    images = paths("images", "a", range(1, 5))
    folder = learn2reg(tmp_path / "Own", images[:2], [images[2:]], write=(), labels={}, modality=words)
    if modality is None:
        with pytest.raises(DataError, match=says("modalities to read as CT or MR", "Write MR for images without")):
            read_manifest(folder)
    else:
        assert read_manifest(folder).modality == modality


@pytest.mark.parametrize("words", [{"tensorImageSize": "2D"}, {"tensorImageSize": None, "tensorImageShape": [6, 7, 1]}])
def test_dimensions_in_learn2regs_words(tmp_path, words):
    images = paths("images", "a", range(1, 5))
    words = {"tensorImageShape": None, **words}
    assert read_manifest(learn2reg(tmp_path / "Own", images[:2], [images[2:]], **words)).dimensions == 2


# Keypoints


def keypoint_set(folder, fixed, moving, *, flips=(), moving_affine=CANONICAL, shape=GRID):
    """Two images with these keypoints, stored with some axes turned round; the points stay where they are."""
    affine = CANONICAL.copy()
    images = paths("images", "p", (1, 2))
    folder = learn2reg(folder, [], [images], write=(), labels={})
    for name, points, own in zip(images, (fixed, moving), (affine, moving_affine), strict=True):
        turn = np.eye(4)
        points, values = np.array(points, float), image(1, shape)
        for axis in flips:
            turn[axis, axis], turn[axis, 3] = -1, shape[axis] - 1
            points[:, axis], values = shape[axis] - 1 - points[:, axis], np.flip(values, axis)
        save(folder / name, values, own @ turn)
        (folder / "keypointsTr").mkdir(exist_ok=True)
        np.savetxt(folder / name.replace("images", "keypoints").replace(".nii.gz", ".csv"), points, delimiter=",")
    return folder


def tre(pair, phi_map=None):
    (row,) = [row for row in measure(pair, phi_map) if row["metric"] == "tre"]
    assert row["unit"] == pair.unit
    return row["value"]


POINTS = np.random.default_rng(0).uniform(1, 4, (30, 3))
SHIFT = np.array([1.0, -0.5, 2.0])


@pytest.mark.parametrize("flips", [(), (0,), (0, 1), (2,)])
@pytest.mark.parametrize("shape", [GRID, (12, 5, 9)])
def test_landmarks_of_a_known_shift(tmp_path, flips, shape):
    folder = keypoint_set(tmp_path / "Own", POINTS, POINTS + SHIFT, flips=flips)
    pair = open_domain("Own", shape=shape, data=folder.parent).test_pair(0)
    assert tre(pair) == pytest.approx(np.linalg.norm(SHIFT * [1.5, 2, 3]), rel=1e-5)
    there = identity_map(shape) + (pair.moving_landmarks - pair.fixed_landmarks).mean(0).view(1, 3, 1, 1, 1)
    assert tre(pair, there) == pytest.approx(0, abs=1e-5)


def test_landmark_error_is_learn2regs(tmp_path):
    """As its evaluator has it: `|(fixed + disp(fixed) - moving) * spacing of the moving image|`."""
    moving = POINTS + np.random.default_rng(1).normal(0, 1, POINTS.shape).clip(-1, 1)
    wide = np.diag([1.0, 2.5, 4.0, 1.0])
    folder = keypoint_set(tmp_path / "Own", POINTS, moving, moving_affine=wide)
    pair = open_domain("Own", shape=GRID, data=folder.parent).test_pair(0)
    phi = identity_map(GRID) + 0.2 * torch.rand(1, 3, *GRID, generator=torch.Generator().manual_seed(0)) - 0.1
    displacement = learn2reg_field(phi)
    moved = np.stack([map_coordinates(displacement[..., axis], POINTS.T, order=1) for axis in range(3)], 1)
    expected = np.linalg.norm((POINTS + moved - moving) * np.diag(wide)[:3], axis=1).mean()
    assert tre(pair, phi) == pytest.approx(expected, rel=1e-5)


def test_a_landmark_in_the_outermost_half_sample_moves_as_its_neighbour(tmp_path):
    folder = keypoint_set(tmp_path / "Own", [[-0.4, 3, 3]], [[0.6, 3, 3]])
    pair = open_domain("Own", shape=GRID, data=folder.parent).test_pair(0)
    shift = torch.tensor([1 / (GRID[0] - 1), 0, 0]).view(1, 3, 1, 1, 1)
    assert tre(pair, identity_map(GRID) + shift) == pytest.approx(0, abs=1e-5)


def test_planes_of_volumes_have_no_landmarks_and_2d_files_have(tmp_path):
    folder = keypoint_set(tmp_path / "Own", POINTS, POINTS + SHIFT)
    assert open_domain("Own", shape=GRID[:2], data=folder.parent).test_pair(0).fixed_landmarks is None
    flat = keypoint_set(tmp_path / "Flat", POINTS * [1, 1, 0], (POINTS + SHIFT) * [1, 1, 0], shape=(*GRID[:2], 1))
    path = flat / "Flat_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dimensions": 2}))
    expected = pytest.approx(np.linalg.norm(SHIFT[:2] * [1.5, 2]), rel=1e-5)
    assert tre(open_domain("Flat", shape=GRID[:2], data=tmp_path).test_pair(0)) == expected
    for file, points in zip(sorted((flat / "keypointsTr").iterdir()), (POINTS, POINTS + SHIFT), strict=True):
        np.savetxt(file, points[:, :2], delimiter=",")
    assert tre(open_domain("Flat", shape=GRID[:2], data=tmp_path).test_pair(0)) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x,y,z\n1,2,3\n", "'x'"),
        ("1,2\n3,4\n", "2 numbers in a line"),
        ("1,2,3\n1,2\n", "columns"),
        ("1,2,nan\n", "[1.0, 2.0, nan], which is not in the image"),
        ("-120.5,30,40\n", "[-120.5, 30.0, 40.0], which is not in the image"),  # millimetres
    ],
)
def test_keypoints_that_cannot_be(tmp_path, text, found):
    folder = keypoint_set(tmp_path / "Own", POINTS, POINTS)
    file = folder / "keypointsTr/p_0001_0000.csv"
    file.write_text(text)
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    with pytest.raises(DataError, match=says("p_0001_0000.csv", "x,y,z in each line and no header", found)):
        domain.test_pair(0)
    (problem,) = domain.check()
    assert found in problem


def test_keypoints_of_a_pair_correspond(tmp_path):
    domain = open_domain("Own", shape=GRID, data=keypoint_set(tmp_path / "Own", POINTS, POINTS[1:]).parent)
    (problem,) = domain.check()
    assert "as many points as in" in problem
    assert "found 30 and 29" in problem
    (tmp_path / "Own/keypointsTr/p_0002_0000.csv").unlink()
    assert open_domain("Own", shape=GRID, data=tmp_path).test_pair(0).fixed_landmarks is None


def test_pairs_with_landmarks_alone_are_evaluated_and_compared(tmp_path):
    folder = keypoint_set(tmp_path / "Own", POINTS, POINTS + SHIFT)
    domain = open_domain("Own", shape=GRID, data=folder.parent)

    def shifted(pair):
        shift = (pair.moving_landmarks - pair.fixed_landmarks).mean(0).view(1, 3, 1, 1, 1)
        return identity_map(GRID) + 0.5 * shift, None

    none, half = evaluate(None, domain), evaluate(shifted, domain)
    assert none.metric.tolist() == ["tre"]
    whole = np.linalg.norm(SHIFT * [1.5, 2, 3])
    assert half[half.metric == "tre"].value.tolist() == pytest.approx([whole / 2], rel=1e-5)
    results = [table.assign(train_domain="a", seed=seed, optimizer=name)
               for seed in (0, 1) for name, table in (("adam", none), ("sam", half))]  # fmt: skip
    results = pd.concat(results, ignore_index=True)
    (line,) = comparison(results, [("adam", "sam")], metrics=("dice", "tre")).itertuples()
    assert (line.metric, line.unit, line.mean) == ("tre", "mm", pytest.approx(-whole / 2, rel=1e-5))
    assert "Own has no labels: no Dice, no distances" in gaps(results)


@pytest.mark.filterwarnings("ignore:.*taken out of training")
def test_files_named_beside_an_image_must_be_there(tmp_path):
    folder = nlst(tmp_path / "NLST")
    (folder / "masksTr/NLST_0003_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=says("every listed file on disk", "masksTr", "NLST_0003_0001.nii.gz")):
        read_manifest(folder)


def test_what_lies_beside_images_by_chance_is_not_theirs(tmp_path):
    """Only folders named images… have such neighbours."""
    for name in "abcd":
        save(tmp_path / "Own" / f"{name}.nii.gz", image())
        (tmp_path / "Own" / f"{name}.csv").write_text("age,sex\n")
    files = [f"{name}.nii.gz" for name in "abcd"]
    content = {"name": "Own", "dimensions": 3, "modality": "MR", "pairing": "paired", "training": files[:2]}
    content |= {"registration_val": [{"fixed": files[2], "moving": files[3]}]}
    Path(tmp_path / "Own/Own_dataset.json").write_text(json.dumps(content))
    assert open_domain("Own", shape=GRID, data=tmp_path).check() == []


@pytest.mark.parametrize("empty", [[], None])
def test_a_data_set_without_test_pairs_says_so_and_can_be_trained_on(tmp_path, empty):
    folder = dataset(tmp_path / "Own")
    path = folder / "Own_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"registration_val": empty}))
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    assert domain.test_count == 0
    assert domain.check() == []
    assert domain.training_pair(0).subjects[0] in ("p1", "p2", "p3")
    none = r"Own: expected test pair 0, counted from 0, found 0 under registration_val\. Add some; without any"
    for ask in (lambda: domain.test_pair(0), lambda: evaluate(None, domain), lambda: readable_test_pairs(domain, 2)):
        with pytest.raises(DataError, match=none):
            ask()


def test_a_test_pair_beyond_the_last_one_is_named(tmp_path):
    domain = open_domain("Own", shape=GRID, data=dataset(tmp_path / "Own").parent)
    with pytest.raises(DataError, match="expected test pair 7, counted from 0, found 1 under registration_val"):
        domain.test_pair(7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": []}, None),
        ({"test": None}, None),
        ({"training_paired_images": None}, None),
        ({"modality": {}}, "expected modalities to read as CT or MR, found []"),
        ({"dimensions": {}}, "expected dimensions 2 or 3"),
        ({"name": ""}, "expected text as name, found ''"),
        ({"name": 3}, "expected text as name, found 3"),
        ({"pairing": None}, "expected a pairing of inter-subject, intra-subject, unpaired, paired, found None"),
        ({"pairing": "intra"}, "expected a pairing of inter-subject, intra-subject, unpaired, paired, found 'intra'"),
        ({"labels": {"1": None}}, "one name each, of its own, found [(1, None)]"),
    ],
)
def test_empty_parts_of_a_manifest(tmp_path, change, said):
    """Only testing needs no training images; what must be said is asked for."""
    folder = dataset(tmp_path / "Own")
    path = folder / "Own_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if said:
        with pytest.raises(DataError, match=says("Own_dataset.json: ", said)):
            read_manifest(folder)
        return
    domain = open_domain("Own", shape=GRID, data=tmp_path)
    assert domain.test_pair(0).subjects == ("p8", "p9")
