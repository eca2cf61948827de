import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from fmsam_lib.metrics import dice, folding_percent, hd95, landmark_error, measure, sdlogj
from fmsam_lib.spatial import identity_map, jacobian_determinant
from fmsam_lib.synthetic import Pair


def ball(centre, radius, shape=(24, 20, 22)):
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    return ((grid - torch.tensor(centre).view(3, 1, 1, 1)) ** 2).sum(0) <= radius**2


def test_dice_of_known_overlaps():
    a, b = ball((8, 8, 8), 5), ball((15, 8, 8), 5)
    assert dice(a, a) == 1
    assert dice(a, ~a) == 0
    both = (a & b).sum().item()
    assert dice(a, b) == pytest.approx(both / a.sum().item())


def test_hd95_of_a_shift_is_the_shift_in_mm():
    a, b = (torch.zeros(24, 20, 22, dtype=torch.bool) for _ in range(2))
    a[4:12, 5:15, 5:15], b[7:15, 5:15, 5:15] = True, True
    assert hd95(a, b, (2.0, 1.0, 1.0)) == pytest.approx(6.0)
    assert hd95(a, a, (2.0, 1.0, 1.0)) == 0


def test_hd95_agrees_with_distances_between_surfaces():
    a, b, spacing = ball((9, 9, 10), 6), ball((12, 10, 10), 5), (1.0, 1.5, 0.7)
    surfaces = [m.numpy() & ~binary_erosion(m.numpy()) for m in (a, b)]
    distances = [distance_transform_edt(~s, sampling=spacing) for s in surfaces]
    directed = [np.percentile(distances[1][surfaces[0]], 95), np.percentile(distances[0][surfaces[1]], 95)]
    assert hd95(a, b, spacing) == pytest.approx(max(directed), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 24), (16, 18, 20)])
def test_the_identity_is_regular(shape):
    determinant = jacobian_determinant(identity_map(shape))
    assert folding_percent(determinant) == 0
    assert sdlogj(determinant) == pytest.approx(0, abs=1e-4)


def test_folding_counts_cells():
    determinant = torch.ones(1, 10, 10)
    determinant[0, 0, :3] = torch.tensor([0.0, -1.0, -2.0])
    assert folding_percent(determinant) == pytest.approx(3.0)


def test_sdlogj_of_two_volumes():
    determinant = torch.tensor([[math.e, 1 / math.e]], dtype=torch.float64)
    assert sdlogj(determinant) == pytest.approx(1.0)


def toy_pair(**changes) -> Pair:
    label = (ball((8, 8, 8), 5).to(torch.uint8) + 2 * ball((16, 12, 14), 4).to(torch.uint8))[None]
    values = {
        "name": "toy", "moving": torch.rand(1, 24, 20, 22), "fixed": torch.rand(1, 24, 20, 22), "moving_label": label,
        "fixed_label": label, "labels": {1: "big", 2: "small"}, "spacing": (1.0, 2.0, 3.0),
    }  # fmt: skip
    return Pair(**(values | changes))


def find(rows, metric, label=""):
    return [row["value"] for row in rows if row["metric"] == metric and row["label"] == label]


def test_equal_labels_at_the_identity_are_perfect():
    rows = measure(toy_pair(), identity_map((24, 20, 22)))
    for name in ("big", "small"):
        assert find(rows, "dice", name) == [1.0]
        assert find(rows, "hd95", name) == [0.0]
    assert find(rows, "folding_percent") == [0.0]
    assert not find(rows, "missing", "big")


def test_no_registration_has_no_folding():
    rows = measure(toy_pair(unit="voxel"), None)
    assert not find(rows, "folding_percent")
    assert {row["unit"] for row in rows if row["metric"] == "hd95"} == {"voxel"}


def test_a_missing_structure_is_reported_apart():
    label = toy_pair().fixed_label.clone()
    label[label == 2] = 0
    rows = measure(toy_pair(fixed_label=label), identity_map((24, 20, 22)))
    assert find(rows, "dice", "small") == [0.0]
    assert find(rows, "missing", "small") == [1.0]
    assert not find(rows, "hd95", "small")
    assert find(measure(toy_pair(fixed_label=label, moving_label=label), None), "missing", "small") == [1.0]


def test_landmark_error_is_in_mm():
    points = torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.5, 0.5]])
    off = points + torch.tensor([0.0, 1 / 19, 0.0])  # one sample along the second axis: 2 mm
    pair = toy_pair(fixed_landmarks=points, moving_landmarks=off)
    assert landmark_error(pair, None) == pytest.approx(2.0, rel=1e-4)
    shifted = identity_map((24, 20, 22)) + torch.tensor([0.0, 1 / 19, 0.0]).view(1, 3, 1, 1, 1)
    assert landmark_error(pair, shifted) == pytest.approx(0.0, abs=1e-4)


def test_images_without_labels_still_have_a_regularity():
    rows = measure(toy_pair(moving_label=None, fixed_label=None), identity_map((24, 20, 22)))
    assert {row["metric"] for row in rows} == {"folding_percent", "sdlogj"}
