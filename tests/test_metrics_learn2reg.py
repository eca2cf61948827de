"""Our numbers and those of Learn2Reg's evaluation, which sees nothing but files: a displacement field, two labels.

The reference below is written after the published conventions: labels by nearest neighbour with background outside,
Dice and HD95 (surface-distance, in voxels) where both labels have the structure, SDlogJ with det + 3.
"""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import surface_distance
import torch
from scipy.ndimage import correlate, gaussian_filter, map_coordinates

from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import learn2reg_field, measure
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.phantoms.pairs import make_pair


def submit(folder, pair, phi_map):
    """What a challenge's participant hands in, and the labels that only the organisers have."""
    affine = np.diag([*pair.spacing, 1.0])
    files = {"disp_0001_0002": learn2reg_field(phi_map)}
    files |= {"label_0001": pair.fixed_label[0].numpy(), "label_0002": pair.moving_label[0].numpy()}
    for name, array in files.items():
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")


def judge(folder, labels):
    """Dice and HD95 by structure (NaN where a label lacks it), and SDlogJ, of a submission."""
    u, fixed, moving = (
        nibabel.load(folder / f"{name}.nii.gz").get_fdata() for name in ("disp_0001_0002", "label_0001", "label_0002")
    )
    assert u.shape == (*fixed.shape, 3)
    u = np.moveaxis(u, -1, 0)
    warped = map_coordinates(moving, np.indices(fixed.shape) + u, order=0)
    overlap, robust = {}, {}
    for number, name in labels.items():
        there, back = fixed == number, warped == number
        if not there.any() or not (moving == number).any():
            overlap[name] = robust[name] = np.nan
            continue
        overlap[name] = 2 * np.count_nonzero(there & back) / (np.count_nonzero(there) + np.count_nonzero(back))
        if back.any():
            found = surface_distance.compute_surface_distances(there, back, (1, 1, 1))
            robust[name] = surface_distance.compute_robust_hausdorff(found, 95)
        else:
            robust[name] = np.inf
    return overlap, robust, spread_of_log_determinant(u)


def spread_of_log_determinant(u):
    jacobian = np.empty((3, 3, *u.shape[1:]))
    for axis in range(3):
        kernel = np.array([-0.5, 0, 0.5]).reshape([-1 if a == axis else 1 for a in range(3)])
        for component in range(3):
            derivative = correlate(u[component], kernel, mode="constant", cval=0.0)
            jacobian[component, axis] = derivative + (component == axis)
    (a, b, c), (d, e, f), (g, h, i) = jacobian[:, :, 2:-2, 2:-2, 2:-2]
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return np.log(np.clip(determinant + 3, 1e-9, 1e9)).std()


def agree(folder, pair, phi_map):
    """Compare everything of one pair; returns the reference's Dice by structure."""
    pair = replace(pair, spacing=(1.0, 1.0, 1.0), unit="voxel")
    submit(folder, pair, phi_map)
    overlap, robust, spread = judge(folder, pair.labels)
    rows = {(row["metric"], row["label"]): row["value"] for row in measure(pair, phi_map)}
    assert rows["sdlogj_learn2reg", ""] == pytest.approx(spread, abs=1e-3, rel=1e-3)
    for name in pair.labels.values():
        if np.isnan(overlap[name]):
            assert ("dice", name) not in rows
            assert ("hd95", name) not in rows
            assert rows.keys() & {("missing_in_fixed", name), ("missing_in_moving", name)}
            continue
        assert rows["dice", name] == pytest.approx(overlap[name], abs=1e-3)
        if np.isinf(robust[name]):
            assert ("hd95", name) not in rows
            assert rows["missing_in_warped", name] == 1
        else:
            assert rows["hd95", name] == pytest.approx(robust[name], abs=1e-3)
    return overlap


def random_map(shape, *, voxels, sigma, seed=0):
    """A smooth random displacement of this root mean square length along each axis."""
    rng = np.random.default_rng(seed)
    u = np.stack([gaussian_filter(rng.standard_normal(shape), sigma) for _ in shape])
    u *= voxels / u.std()
    last = torch.tensor(shape).view(1, -1, 1, 1, 1) - 1
    return identity_map(shape) + torch.from_numpy(u)[None].float() / last


@pytest.mark.parametrize("domain", ["brain-mr", "lung-ct", "knee-mr", "abdomen-ct", "heart-mr"])
def test_synthetic_pairs_with_their_true_maps(tmp_path, domain):
    pair = make_pair(domain, seed=0, index=0, shape=(48, 48, 48))
    overlap = agree(tmp_path, pair, pair.true_map[None])
    assert min(overlap.values()) > 0.5


@pytest.mark.parametrize(("voxels", "sigma"), [(0.0, 4), (2.0, 6), (4.0, 3)], ids=["none", "smooth", "folding"])
def test_real_images_with_random_maps(tmp_path, real_data, voxels, sigma):
    shape = (40, 48, 40)
    pair = open_domain("HippocampusMR", shape=shape, data=real_data).test_pair(0)
    phi_map = random_map(shape, voxels=voxels, sigma=sigma)
    overlap = agree(tmp_path, pair, phi_map)
    assert all(0 < value < 1 for value in overlap.values())
    folds = {row["metric"]: row["value"] for row in measure(pair, phi_map)}["folding_percent"]
    assert (folds > 1) == (sigma == 3)


@pytest.mark.parametrize("where", ["fixed", "moving"])
def test_a_structure_that_a_label_lacks_is_left_out(tmp_path, where):
    pair = make_pair("abdomen-ct", seed=0, index=1, shape=(48, 48, 48))
    label = getattr(pair, f"{where}_label").clone()
    label[label == 2] = 0
    overlap = agree(tmp_path, replace(pair, **{f"{where}_label": label}), pair.true_map[None])
    assert [name for name, value in overlap.items() if np.isnan(value)] == ["spleen"]


def test_a_structure_that_registration_loses_has_dice_0(tmp_path):
    pair = make_pair("heart-mr", seed=0, index=0, shape=(48, 48, 48))
    phi_map = random_map((48, 48, 48), voxels=1.0, sigma=4)
    phi_map[:, 0] *= 0.3  # shows one side of the moving image only
    overlap = agree(tmp_path, pair, phi_map)
    assert 0 in overlap.values()


def test_labels_that_the_image_cuts_off(tmp_path):
    """The half voxel around the grid, where nearest neighbour alone would still find a label."""
    shape = (48, 48, 48)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[:, :6], label[:, 6:, 40:], label[:, 20:40, 10:30, :3] = 1, 2, 3
    image = torch.rand(1, *shape)
    pair = make_pair("brain-mr", seed=0, index=0, shape=shape)
    pair = replace(pair, moving=image, fixed=image, moving_label=label, fixed_label=label)
    pair = replace(pair, labels={1: "slab", 2: "side", 3: "plate"})
    agree(tmp_path, pair, identity_map(shape))
    overlap = agree(tmp_path, pair, random_map(shape, voxels=0.5, sigma=5))
    assert overlap["plate"] < 0.95
