import dataclasses
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import surface_distance
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from fmsam_lib import metrics
from fmsam_lib.metrics import (
    dice,
    folding_percent,
    landmark_error,
    learn2reg_field,
    map_error,
    mean_dice,
    measure,
    percent,
    sdlogj,
    sdlogj_learn2reg,
    surface_distances,
)
from fmsam_lib.model.spatial import identity_map, jacobian_determinant
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.phantoms.pairs import make_pair

SHAPE = (24, 20, 22)


def ball(centre, radius, shape=SHAPE):
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    return ((grid - torch.tensor(centre).view(3, 1, 1, 1)) ** 2).sum(0) <= radius**2


def points(shape, *where):
    """A mask of single samples."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in where:
        mask[index] = True
    return mask


def affine_map(shape, matrix, shift=0.0):
    """`matrix` about the grid's centre and a shift, both in samples, as a map `(1, D, *shape)`."""
    matrix = np.asarray(matrix, dtype=float)
    last = np.array(shape, dtype=float).reshape(-1, *[1] * len(shape)) - 1
    moved = np.tensordot(matrix, np.indices(shape) - last / 2, axes=1) + last / 2
    moved += np.broadcast_to(shift, len(shape)).reshape(last.shape)
    return torch.from_numpy(moved / last)[None].float()


def squeezed_map(shape, profile):
    """Along the first axis sample i goes to sample `profile[i]`, the other axes stay."""
    phi = identity_map(shape).clone()
    phi[0, 0] = (torch.as_tensor(profile, dtype=torch.float64) / (shape[0] - 1)).view(-1, *[1] * (len(shape) - 1))
    return phi


def hd95(a, b, spacing):
    return surface_distances(a, b, spacing)[0]


def test_dice_of_known_overlaps():
    a, b = ball((8, 8, 8), 5), ball((15, 8, 8), 5)
    assert dice(a, a) == 1
    assert dice(a, ~a) == 0
    both = (a & b).sum().item()
    assert dice(a, b) == pytest.approx(both / a.sum().item())


# Distances of surfaces


def test_hd95_of_a_shift_is_the_shift_in_mm():
    a, b = (torch.zeros(24, 20, 22, dtype=torch.bool) for _ in range(2))
    a[4:12, 5:15, 5:15], b[7:15, 5:15, 5:15] = True, True
    assert hd95(a, b, (2.0, 1.0, 1.0)) == pytest.approx(6.0)
    assert surface_distances(a, a, (2.0, 1.0, 1.0)) == (0, 0)


@pytest.mark.parametrize(("dim", "axis"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_single_samples_three_apart_have_corners_two_and_three_apart(dim, axis):
    """Half of a sample's corners, all of one weight, are 2 samples from the other one's, the others 3."""
    shape, spacing = (9, 9, 9)[:dim], (2.0, 0.5, 1.25)[:dim]
    here, there = [4] * dim, [4] * dim
    there[axis] += 3
    robust, mean = surface_distances(points(shape, tuple(here)), points(shape, tuple(there)), spacing)
    assert robust == pytest.approx(3 * spacing[axis])
    assert mean == pytest.approx(2.5 * spacing[axis])


def test_the_percentile_is_of_the_surfaces_not_of_the_samples():
    """A far pixel's contour is 4 half diagonals, 2.8; that of a square of n x n is 4 (n - 1) + 2.8."""
    square, spacing = torch.zeros(80, 80, dtype=torch.bool), (1.0, 1.0)
    square[10:12, 10:12] = True  # the pixel has 29 % of the contour, more than the 5 % that are left out
    assert hd95(square | points((80, 80), (40, 11)), square, spacing) == 29
    square[10:50, 10:50] = True  # 1.8 %
    assert hd95(square | points((80, 80), (70, 11)), square, spacing) == 0


def contour(mask, spacing):
    """Positions and lengths of a 2-D mask's contour elements, from the number of samples inside about a corner."""
    padded = np.pad(mask.numpy(), 1)
    square = np.stack([padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]]).astype(int)
    inside, half_diagonal = square.sum(0), math.hypot(*spacing) / 2
    lengths = np.where((inside == 1) | (inside == 3), half_diagonal, 0.0)
    lengths[(inside == 2) & (square[0] == square[3])] = 2 * half_diagonal
    lengths[(inside == 2) & (square[0] == square[1])] = spacing[1]
    lengths[(inside == 2) & (square[0] == square[2])] = spacing[0]
    at = np.argwhere(lengths > 0)
    return at * spacing, lengths[tuple(at.T)]


@pytest.mark.parametrize("seed", range(5))
def test_distances_agree_with_brute_force_in_2d(seed):
    a, b = random_blobs((23, 31), seed)
    spacing = (1.5, 0.8)
    (at_a, length_a), (at_b, length_b) = contour(a, spacing), contour(b, spacing)
    pairwise, robust, means = cdist(at_a, at_b), [], []
    for distance, length in ((pairwise.min(1), length_a), (pairwise.min(0), length_b)):
        means.append((distance * length).sum() / length.sum())
        robust.append(next(d for d in np.sort(distance) if length[distance <= d].sum() >= 0.95 * length.sum()))
    assert surface_distances(a, b, spacing) == pytest.approx((max(robust), sum(means) / 2), rel=1e-6)


def random_blobs(shape, seed):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(gaussian_filter(rng.standard_normal(shape), 2) > 0.03) for _ in range(2)]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5), (1.0, 1.0, 1.0), (3.0, 0.9, 1.4)])
def test_distances_agree_with_deepminds_package(spacing):
    for seed in range(4):  # blobs that fill half of the image and are cut off by its border
        a, b = random_blobs((23, 31, 19)[: len(spacing)], seed)
        found = surface_distance.compute_surface_distances(b.numpy(), a.numpy(), spacing)
        robust, mean = surface_distances(a, b, spacing)
        assert robust == pytest.approx(surface_distance.compute_robust_hausdorff(found, 95), rel=1e-6)
        assert mean == pytest.approx(np.mean(surface_distance.compute_average_surface_distance(found)), rel=1e-5)


@pytest.mark.parametrize("shape", [(9, 12), (9, 12, 7)])
def test_the_border_of_the_image_closes_a_surface(shape):
    a, b = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    b[2:-2, 2:] = True  # touches the border on one side
    wider = [torch.nn.functional.pad(mask, [3] * (2 * len(shape))) for mask in (a, b)]
    spacing = (2.0, 1.0, 1.0)[: len(shape)]
    assert surface_distances(a, b, spacing) == surface_distances(*wider, spacing)
    assert hd95(a, b, spacing) > 2
    corner, opposite = points(shape, (0,) * len(shape)), points(shape, tuple(n - 1 for n in shape))
    whole = math.dist([0] * len(shape), [(n - 1) * s for n, s in zip(shape, spacing, strict=True)])
    assert hd95(corner, opposite, spacing) == pytest.approx(whole)


def test_distances_are_the_same_both_ways_and_scale_with_the_spacing():
    a, b = random_blobs((20, 24, 18), 9)
    assert surface_distances(a, b, (1.0, 2.0, 1.5)) == pytest.approx(surface_distances(b, a, (1.0, 2.0, 1.5)))
    doubled = [2 * value for value in surface_distances(a, b, (1.0, 2.0, 1.5))]
    assert surface_distances(a, b, (2.0, 4.0, 3.0)) == pytest.approx(doubled, rel=1e-6)


def test_distances_refuse_what_has_none():
    full, empty = ball((8, 8, 8), 5), torch.zeros(SHAPE, dtype=torch.bool)
    with pytest.raises(ValueError, match="got an empty one"):
        hd95(full, empty, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="one shape, 2-D or 3-D, and a spacing for each axis"):
        surface_distances(full, full[1:], (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="one shape, 2-D or 3-D, and a spacing for each axis"):
        surface_distances(full, full, (1.0, 1.0))


# Regularity


@pytest.mark.parametrize("shape", [(20, 24), (16, 18, 20)])
def test_the_identity_is_regular(shape):
    determinant = jacobian_determinant(identity_map(shape))
    assert folding_percent(determinant) == 0
    assert sdlogj(determinant) == pytest.approx(0, abs=1e-4)
    assert sdlogj_learn2reg(identity_map(shape)) == 0


def test_folding_counts_cells():
    determinant = torch.ones(1, 10, 10)
    determinant[0, 0, :3] = torch.tensor([0.0, -1.0, -2.0])
    assert folding_percent(determinant) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0 %"), (100.0, "100 %"), (99.7, "100 %"), (12.6, "13 %"), (3.628, "3.6 %"), (0.0212, "0.021 %")],
)
def test_percentages_are_written_without_powers_of_ten(value, written):
    assert percent(value) == written
    assert percent(100 / 175**3) == "0.000019 %"


def test_sdlogj_of_two_volumes():
    determinant = torch.tensor([[math.e, 1 / math.e]], dtype=torch.float64)
    assert sdlogj(determinant.requires_grad_()) == pytest.approx(1.0)  # also of a map on its way through a loss


@pytest.mark.parametrize("shape", [(16, 12), (16, 9, 11)])
def test_learn2regs_sdlogj_of_a_squeeze(shape):
    """i -> i^2 / (2 (n - 1)): central differences are i / (n - 1)."""
    n = shape[0]
    i = np.arange(n)
    expected = np.std(np.log(i[2:-2] / (n - 1) + 3))
    assert sdlogj_learn2reg(squeezed_map(shape, i**2 / (2 * (n - 1)))) == pytest.approx(expected, rel=1e-4)


def test_learn2regs_sdlogj_clips_folds_beyond_three():
    profile = np.where(np.arange(16) < 8, -5.0 * np.arange(16), np.arange(16.0))
    slopes = (profile[3:-1] - profile[1:-3]) / 2
    assert slopes.min() < -3
    expected = np.std(np.log(np.clip(slopes + 3, 1e-9, 1e9)))
    assert sdlogj_learn2reg(squeezed_map((16, 8, 8), profile)) == pytest.approx(expected, rel=1e-4)


def test_learn2regs_sdlogj_needs_five_samples_a_side():
    with pytest.raises(ValueError, match=r"at least 5 samples a side, got \(8, 4, 8\)"):
        sdlogj_learn2reg(identity_map((8, 4, 8)))
    small, large = (torch.rand(1, *shape) for shape in ((8, 4, 8), (8, 5, 8)))
    for image, there in ((small, False), (large, True)):
        pair = Pair(name="thin", moving=image, fixed=image, spacing=(1.0, 1.0, 1.0))
        rows = measure(pair, identity_map(tuple(image.shape[1:])))
        assert bool(find(rows, "sdlogj_learn2reg")) == there
        assert find(rows, "sdlogj")


def test_the_field_for_learn2reg_is_in_voxels_channels_last():
    field = learn2reg_field(affine_map(SHAPE, np.eye(3), shift=(1.5, -2.0, 0.25)))
    assert field.shape == (*SHAPE, 3)
    assert field.dtype == np.float32
    assert field.reshape(-1, 3).mean(0) == pytest.approx([1.5, -2.0, 0.25], abs=1e-4)
    assert np.ptp(field.reshape(-1, 3), axis=0).max() < 1e-4
    assert not learn2reg_field(identity_map((7, 9))).any()
    with pytest.raises(ValueError, match=r"one map \(1, D, \*S\), got \(2, 2, 7, 9\)"):
        learn2reg_field(identity_map((7, 9)).repeat(2, 1, 1, 1))


# All metrics of a pair


def toy_pair(**changes) -> Pair:
    label = (ball((8, 8, 8), 5).to(torch.uint8) + 2 * ball((16, 12, 14), 4).to(torch.uint8))[None]
    values = {
        "name": "toy", "moving": torch.rand(1, *SHAPE), "fixed": torch.rand(1, *SHAPE), "moving_label": label,
        "fixed_label": label, "labels": {1: "big", 2: "small"}, "spacing": (1.0, 2.0, 3.0),
    }  # fmt: skip
    return Pair(**(values | changes))


def find(rows, metric, label=""):
    return [row["value"] for row in rows if row["metric"] == metric and row["label"] == label]


def without(number):
    label = toy_pair().fixed_label.clone()
    label[label == number] = 0
    return label


def everything_at(*centre):
    """The map that shows one point of the moving image everywhere."""
    point = torch.tensor(centre) / (torch.tensor(SHAPE) - 1)
    return point.view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)


@pytest.mark.parametrize("shape", [(32, 32), (24, 24, 24)])
def test_the_table_in_the_module_names_all_metrics_and_units(shape):
    pair = make_pair("heart-mr", seed=0, index=0, shape=shape)
    label = pair.moving_label.clone()
    label[label == 1] = 0
    few = Pair(**(vars(pair) | {"moving_label": label}))
    phi, lost = pair.true_map[None], torch.zeros(1, len(shape), *shape)
    rows = [*measure(pair, phi, phi), *measure(few, phi), *measure(pair, lost)]
    swapped = Pair(**(vars(few) | {"moving_label": pair.fixed_label, "fixed_label": label}))
    rows += measure(swapped, None)
    table = re.findall(r"^    (\w+) +(mm|1|%|count) +(structure)?", metrics.__doc__, flags=re.M)
    assert {(name, unit, bool(label)) for name, unit, label in table} == {
        (row["metric"], row["unit"], bool(row["label"])) for row in rows
    }


def test_equal_labels_at_the_identity_are_perfect():
    rows = measure(toy_pair(), identity_map(SHAPE))
    for name in ("big", "small"):
        assert find(rows, "dice", name) == [1.0]
        assert find(rows, "hd95", name) == [0.0]
        assert find(rows, "surface_distance", name) == [0.0]
    assert find(rows, "folding_percent") == [0.0]
    assert not [row for row in rows if row["metric"].startswith("missing")]


def test_a_translation_has_distances_and_its_map_undoes_it():
    label = torch.roll(toy_pair().fixed_label, 3, dims=2)  # the moving image lies 3 samples of 2 mm further on
    pair = toy_pair(moving_label=label)
    robust, mean = surface_distances(label[0] == 1, pair.fixed_label[0] == 1, pair.spacing)
    assert 0 < mean < robust <= 6
    rows = measure(pair, None)
    assert find(rows, "hd95", "big") == [robust]
    assert find(rows, "surface_distance", "big") == [mean]
    rows = measure(pair, affine_map(SHAPE, np.eye(3), shift=(0, 3, 0)))
    assert find(rows, "dice", "big") == find(rows, "dice", "small") == [1.0]
    assert find(rows, "hd95", "small") == [0.0]


def test_no_registration_has_no_folding():
    rows = measure(toy_pair(unit="voxel"), None)
    assert not {row["metric"] for row in rows} & {"folding_percent", "jacobian_min", "sdlogj", "sdlogj_learn2reg"}
    assert {row["unit"] for row in rows if row["metric"] in ("hd95", "surface_distance")} == {"voxel"}


@pytest.mark.parametrize("absent", [["fixed"], ["moving"], ["fixed", "moving"]])
@pytest.mark.parametrize("phi_map", [None, identity_map(SHAPE)])
def test_a_structure_absent_from_a_label_is_no_fault_of_the_registration(absent, phi_map):
    pair = toy_pair(**{f"{where}_label": without(2) for where in absent})
    rows = [row for row in measure(pair, phi_map) if row["label"] == "small"]
    assert [(row["metric"], row["value"], row["unit"]) for row in rows] == [
        (f"missing_in_{where}", 1.0, "count") for where in absent
    ]
    assert find(measure(pair, phi_map), "dice", "big") == [1.0]
    assert mean_dice(pair, identity_map(SHAPE)) == 1.0


def test_a_structure_that_registration_loses_has_dice_0_and_no_distance():
    phi_map = everything_at(8, 8, 8)
    rows = [(row["metric"], row["value"]) for row in measure(toy_pair(), phi_map) if row["label"] == "small"]
    assert rows == [("dice", 0.0), ("missing_in_warped", 1.0)]
    big = find(measure(toy_pair(), phi_map), "dice", "big")[0]
    assert 0 < big < 1
    assert mean_dice(toy_pair(), phi_map) == pytest.approx(big / 2)


@pytest.mark.parametrize("number", [257, -255])
def test_a_number_beyond_a_byte_is_no_other_structures(number):
    """Label images of ids to 255 are stored as bytes, in which 257 and -255 are 1."""
    rows = measure(toy_pair(labels={number: "none"}), identity_map(SHAPE))
    assert {row["metric"] for row in rows if row["label"]} == {"missing_in_fixed", "missing_in_moving"}
    assert math.isnan(mean_dice(toy_pair(labels={number: "none"}), identity_map(SHAPE)))


def test_mean_dice_is_the_mean_of_measured_dice():
    pair = toy_pair(
        moving_label=torch.roll(toy_pair().fixed_label, (2, 1), dims=(1, 2)), labels={1: "a", 2: "b", 3: "c"}
    )
    rows = measure(pair, identity_map(SHAPE))
    assert find(rows, "missing_in_fixed", "c") == find(rows, "missing_in_moving", "c") == [1.0]
    expected = np.mean([row["value"] for row in rows if row["metric"] == "dice"])
    assert mean_dice(pair, identity_map(SHAPE)) == pytest.approx(expected)
    assert math.isnan(mean_dice(toy_pair(labels={3: "c"}), identity_map(SHAPE)))
    assert math.isnan(mean_dice(toy_pair(fixed_label=None), identity_map(SHAPE)))


def test_what_lies_outside_the_moving_grid_is_background():
    """Also within half a voxel of it, where the nearest sample would still be the outermost one."""
    label = torch.ones(1, *SHAPE, dtype=torch.uint8)
    pair = toy_pair(moving_label=label, fixed_label=label, labels={1: "all"})
    rows = measure(pair, affine_map(SHAPE, np.eye(3), shift=(0.4, 0, 0)))
    assert find(rows, "dice", "all") == [pytest.approx(2 * 23 / (23 + 24))]
    assert find(measure(pair, identity_map(SHAPE)), "dice", "all") == [1.0]


def test_landmark_error_is_in_mm():
    points = torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.5, 0.5]])
    off = points + torch.tensor([0.0, 1 / 19, 0.0])  # one sample along the second axis: 2 mm
    pair = toy_pair(fixed_landmarks=points, moving_landmarks=off)
    assert landmark_error(pair, None) == pytest.approx(2.0, rel=1e-4)
    assert find(measure(pair, None), "tre") == [pytest.approx(2.0, rel=1e-4)]
    shifted = identity_map(SHAPE) + torch.tensor([0.0, 1 / 19, 0.0]).view(1, 3, 1, 1, 1)
    assert landmark_error(pair, shifted) == pytest.approx(0.0, abs=1e-4)
    exact = toy_pair(fixed_landmarks=points.double(), moving_landmarks=off.double())  # as numpy gives them
    assert landmark_error(exact, shifted) == pytest.approx(0.0, abs=1e-4)
    none = torch.zeros(0, 3)
    assert not find(measure(toy_pair(fixed_landmarks=none, moving_landmarks=none), None), "tre")


def test_map_error_is_the_distance_from_the_true_map_in_mm():
    true = affine_map(SHAPE, np.eye(3), shift=(3, 0, 4 / 3))  # 3 mm and 4 mm
    pair = toy_pair(true_map=true[0])
    assert find(measure(pair, true), "map_error") == [0.0]
    assert find(measure(pair, None), "map_error") == [pytest.approx(5.0, rel=1e-4)]
    assert find(measure(pair, identity_map(SHAPE)), "map_error") == [pytest.approx(5.0, rel=1e-4)]


def test_map_error_looks_at_the_structures_only():
    true, inside = affine_map(SHAPE, np.eye(3), shift=(3, 0, 0))[0], toy_pair().fixed_label[0] > 0
    pair = toy_pair(true_map=torch.where(inside, identity_map(SHAPE)[0], true))
    assert map_error(pair, None) == 0
    everywhere = pytest.approx(3 * (~inside).double().mean().item(), rel=1e-4)
    for label in (None, torch.zeros_like(pair.fixed_label)):
        assert map_error(toy_pair(true_map=pair.true_map, fixed_label=label), None) == everywhere


def test_the_true_map_of_a_synthetic_pair_is_best():
    pair = make_pair("lung-ct", seed=0, index=0, shape=(32, 32, 32))
    true, none = measure(pair, pair.true_map[None]), measure(pair, None)
    assert find(true, "map_error") == [0.0]
    assert find(true, "tre")[0] < 0.1 * find(none, "tre")[0]
    for name in ("left lung", "right lung", "heart", "liver"):  # the spine hardly moves
        assert find(true, "dice", name) > find(none, "dice", name)
        assert find(true, "surface_distance", name) < find(none, "surface_distance", name)


@pytest.mark.parametrize(
    "matrix",
    [np.diag([0.9, 1.1, 1.0]), [[1.0, 0.2, 0.0], [-0.1, 1.1, 0.05], [0.0, 0.1, 0.8]], np.diag([1.0, -1.0, 1.0])],
    ids=["stretch", "general", "mirror"],
)
def test_jacobian_min_of_an_affine_map_is_its_determinant(matrix):
    rows = measure(toy_pair(), affine_map(SHAPE, matrix))
    assert find(rows, "jacobian_min") == [pytest.approx(np.linalg.det(matrix), rel=1e-3)]


def test_jacobian_min_is_of_the_smallest_cell():
    i = np.arange(24)
    rows = measure(toy_pair(), squeezed_map(SHAPE, i**2 / 46))  # forward differences (2 i + 1) / 46
    assert find(rows, "jacobian_min") == [pytest.approx(1 / 46, rel=1e-3)]


def test_inverse_error_of_affine_maps_in_mm():
    matrix, shift = np.diag([1.25, 1.1, 1.05]), np.array([0.5, -0.3, 0.2])
    phi, exact = affine_map(SHAPE, matrix), affine_map(SHAPE, np.linalg.inv(matrix))
    assert find(measure(toy_pair(), phi, exact), "inverse_error") == [pytest.approx(0, abs=1e-4)]
    off = affine_map(SHAPE, np.linalg.inv(matrix), shift)  # phi takes the shift to matrix @ shift
    expected = np.linalg.norm(matrix @ shift * toy_pair().spacing)
    assert find(measure(toy_pair(), phi, off), "inverse_error") == [pytest.approx(expected, rel=1e-4)]
    assert not find(measure(toy_pair(), phi), "inverse_error")


def test_images_without_labels_still_have_a_regularity():
    rows = measure(toy_pair(moving_label=None, fixed_label=None), identity_map(SHAPE))
    assert {row["metric"] for row in rows} == {"folding_percent", "jacobian_min", "sdlogj", "sdlogj_learn2reg"}


def test_a_map_may_come_straight_from_a_network_in_training():
    phi_map = affine_map(SHAPE, np.diag([0.9, 1.1, 1.0]))
    plain = measure(toy_pair(), phi_map, identity_map(SHAPE))
    assert measure(toy_pair(), phi_map.clone().requires_grad_(), identity_map(SHAPE)) == plain


def test_bad_maps_are_refused():
    identity = identity_map(SHAPE)
    with pytest.raises(
        ValueError, match=r"toy: expected phi_map of shape \(1, 3, 24, 20, 22\).*got \(2, 3, 24, 20, 22\)"
    ):
        measure(toy_pair(), identity.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"expected phi_map of shape .* got \(24, 20, 22\); give .* phi.map"):
        measure(toy_pair(), Transform(SHAPE))
    with pytest.raises(ValueError, match=r"expected inverse of shape .* got \(1, 3, 24, 20, 20\)"):
        measure(toy_pair(), identity, identity[..., :20])
    with pytest.raises(ValueError, match="an inverse, but no map"):
        measure(toy_pair(), None, identity)
    with pytest.raises(ValueError, match="expected a finite inverse"):
        measure(toy_pair(), identity, identity * math.nan)
    with pytest.raises(ValueError, match=r"expected a spacing above 0 for each of 3 axes, got \(1.0, 2.0\)"):
        measure(toy_pair(spacing=(1.0, 2.0)), None)
    with pytest.raises(ValueError, match=r"expected a spacing above 0 for each of 3 axes, got \(1.0, 0.0, 2.0\)"):
        measure(toy_pair(spacing=(1.0, 0.0, 2.0)), None)
    flat = toy_pair().moving_label[0]  # it would be compared by broadcasting
    with pytest.raises(ValueError, match=r"expected moving_label of the shape of fixed, \(1, 24, 20, 22\), got"):
        measure(dataclasses.replace(toy_pair(), moving_label=flat), None)


def test_regularity_is_that_of_the_fixed_mask():
    """Folds outside the mask are not counted; Learn2Reg's own SDlogJ masks likewise (its `np.ma`)."""
    profile = np.arange(24.0)
    profile[15:18] = 17, 15, 18  # one cell of 23 folds
    phi = squeezed_map(SHAPE, profile) + 0.01 * torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    mask = ball((6, 9, 9), 6)[None]
    plain = Pair("", torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), spacing=(1.0, 1.0, 1.0))
    rows = {row["metric"]: row["value"] for row in measure(plain, phi)}
    inside = {row["metric"]: row["value"] for row in measure(replace(plain, fixed_mask=mask), phi)}
    determinant = jacobian_determinant(phi)[0].double().numpy()[mask[0, :-1, :-1, :-1].numpy()]
    assert rows["folding_percent"] > 100 / 24
    assert inside["folding_percent"] == 100 * (determinant <= 0).mean() == 0
    assert inside["jacobian_min"] == pytest.approx(determinant.min())
    assert inside["sdlogj"] == pytest.approx(np.log(determinant).std(), rel=1e-6)
    u = learn2reg_field(phi)
    gradient = np.stack([np.stack(np.gradient(u[..., d]), -1) for d in range(3)], -2)[2:-2, 2:-2, 2:-2]
    logarithm = np.log((np.linalg.det(gradient.astype(float) + np.eye(3)) + 3).clip(1e-9, 1e9))
    expected = np.ma.MaskedArray(logarithm, 1 - mask[0].numpy().astype(int)[2:-2, 2:-2, 2:-2]).std()
    assert inside["sdlogj_learn2reg"] == pytest.approx(expected, rel=1e-4)
    assert rows["sdlogj_learn2reg"] > 2 * expected
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.float32):  # 0 and 1 are no indices
        rows_of = measure(replace(plain, fixed_mask=mask.to(dtype)), phi)
        assert {row["metric"]: row["value"] for row in rows_of} == inside
    nowhere = measure(replace(plain, fixed_mask=torch.zeros_like(mask)), phi)
    assert {row["metric"]: row["value"] for row in nowhere} == rows


def test_landmark_errors_are_in_the_moving_images_millimetres():
    """As Learn2Reg has it: both ends of such an error lie in the moving image."""
    points = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    pair = Pair("", torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), spacing=(1.0, 1.0, 1.0), fixed_landmarks=points)
    pair = replace(pair, moving_landmarks=points + torch.tensor([1 / 23, 0, 0]), moving_spacing=(2.5, 1.0, 1.0))
    assert landmark_error(pair, None) == pytest.approx(2.5, rel=1e-5)


def test_surfaces_are_measured_in_boxes_of_few_sizes(monkeypatch):
    """torch keeps what it needs for every size: a box is padded to the next of few."""
    import monai.metrics.utils as monai

    sizes, edges = set(), monai.get_mask_edges
    monkeypatch.setattr(monai, "get_mask_edges", lambda a, *rest, **how: sizes.add(a.shape) or edges(a, *rest, **how))
    for height in range(1, 25):
        for width in range(1, 25, 5):
            a = torch.zeros(40, 40, dtype=torch.bool)
            a[3 : 3 + height, 5 : 5 + width] = True
            surface_distances(a, a.roll(4, 0), (1.0, 2.0))
    assert 1 < len(sizes) <= 16  # of 120
