import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from fmsam_lib.evaluation.corruptions import (
    COLUMNS,
    CORRUPTIONS,
    SHIFT_PER_DEGREE,
    corrupt,
    misalignment,
    robustness,
)
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, sample, warp
from fmsam_lib.pair import Pair
from fmsam_lib.phantoms.pairs import make_pair
from fmsam_lib.records import DataError

KINDS = list(CORRUPTIONS)
RANDOM = ["noise", "bias_field", "slices", "misalignment"]


def of(image, **known):
    """A pair about which nothing matters but its moving image `(1, *S)`."""
    return Pair("pair", image, image, spacing=(1.0,) * (image.dim() - 1), **known)


def grey(value=0.5, shape=(64, 64)):
    return of(torch.full((1, *shape), value))


def random_image(shape=(20, 24)):
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def brain():
    return make_pair("brain-mr", seed=0, index=0, shape=(48, 48))


@pytest.fixture(scope="module")
def volume():
    return make_pair("heart-mr", seed=0, index=0, shape=(20, 24, 28))


@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_is_the_clean_image_to_the_bit(kind, brain):
    moving, place = corrupt(brain, kind, 0)
    assert torch.equal(moving, brain.moving)
    assert place is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_image_and_others_another(kind, brain):
    severity = CORRUPTIONS[kind].severities[1]
    first, again, other = (corrupt(brain, kind, severity, seed=seed)[0] for seed in (3, 3, 4))
    renamed = corrupt(dataclasses.replace(brain, name="someone else"), kind, severity, seed=3)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind not in RANDOM)
    assert torch.equal(first, renamed) == (kind not in RANDOM)


@pytest.mark.parametrize("kind", KINDS)
def test_2d_and_3d_images_stay_plain_images_in_range_and_the_pair_as_it_was(kind, brain, volume):
    for pair in (brain, volume):
        before = pair.moving.clone()
        for severity in CORRUPTIONS[kind].severities:
            moving, place = corrupt(pair, kind, severity)
            assert type(moving) is torch.Tensor
            assert (moving.shape, moving.dtype) == (before.shape, torch.float32)
            assert 0 <= moving.min() <= moving.max() <= 1
            assert (place is None) == (kind != "misalignment")
        assert torch.equal(pair.moving, before)


@pytest.mark.parametrize("domain", ["brain-mr", "heart-mr", "lung-ct"])
@pytest.mark.parametrize("kind", KINDS)
def test_greater_severity_is_further_from_the_clean_image(kind, domain):
    pair = make_pair(domain, seed=0, index=1, shape=(64, 64))
    images = [corrupt(pair, kind, severity)[0] for severity in (0, *CORRUPTIONS[kind].severities)]
    distance = [float((image - pair.moving).abs().mean()) for image in images]
    assert (np.diff(distance) > 0.003).all(), distance


def test_severities_begin_above_0_and_grow():
    for kind, corruption in CORRUPTIONS.items():
        assert corruption.severities[0] > 0
        assert (np.diff(corruption.severities) > 0).all()
        assert corruption.severities[-1] <= corruption.most
        assert corruption.what, kind


def test_noise_has_its_standard_deviation_and_one_pattern():
    pair = grey(shape=(200, 200))
    weak, strong = (corrupt(pair, "noise", std)[0] - 0.5 for std in (0.05, 0.1))
    assert weak.std().item() == pytest.approx(0.05, rel=0.02)  # of 40,000 numbers: four standard errors are 1.4 %
    assert abs(weak.mean().item()) < 0.001
    torch.testing.assert_close(strong, 2 * weak, atol=1e-6, rtol=0)


def test_the_bias_field_multiplies_smoothly_and_doubles_in_the_logarithm():
    weak, strong = (corrupt(grey(0.05), "bias_field", severity)[0] / 0.05 for severity in (0.2, 0.4))
    dark = corrupt(grey(0.025), "bias_field", 0.2)[0] / 0.025
    torch.testing.assert_close(dark, weak)  # a factor, whatever the image
    torch.testing.assert_close(strong.log(), 2 * weak.log(), atol=1e-5, rtol=0)
    assert weak.max() - weak.min() > 0.05
    # A polynomial of the third order along each axis: its fourth differences vanish.
    assert torch.diff(weak.double().log(), n=4, dim=1).abs().max() < 1e-5
    assert torch.diff(weak.double().log(), n=4, dim=2).abs().max() < 1e-5
    assert torch.diff(weak.double().log(), n=1, dim=1).abs().max() > 1e-3


def test_the_bias_fields_coefficients_fill_the_range_of_the_severity():
    x = np.linspace(-1, 1, 64)
    legendre = np.polynomial.legendre.legvander2d(*(axis.ravel() for axis in np.meshgrid(x, x, indexing="ij")), [3, 3])
    found = []
    for seed in range(20):
        field = corrupt(grey(0.05), "bias_field", 0.2, seed=seed)[0] / 0.05
        coefficients = np.linalg.lstsq(legendre, field.double().log().numpy().ravel(), rcond=None)[0]
        found += [c for c in coefficients if abs(c) > 1e-6]
    assert -0.2 <= min(found) < -0.18
    assert 0.18 < max(found) <= 0.2
    assert np.std(found) == pytest.approx(0.2 / math.sqrt(3), rel=0.1)  # of a uniform distribution


def test_gamma_is_a_power_between_the_images_own_lowest_and_highest_value():
    image = random_image()
    image[0, 0, :2] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(corrupt(of(image), "gamma", 1)[0], image**2, atol=1e-6, rtol=0)
    torch.testing.assert_close(corrupt(of(image), "gamma", 0.5)[0], image ** math.sqrt(2), atol=1e-6, rtol=0)
    narrow = 0.2 + 0.5 * image
    expected = 0.2 + 0.5 * image**4
    torch.testing.assert_close(corrupt(of(narrow), "gamma", 2)[0], expected, atol=1e-6, rtol=0)


def test_inversion_goes_straight_to_the_negative():
    image = random_image()
    torch.testing.assert_close(corrupt(of(image), "inversion", 1)[0], 1 - image)
    torch.testing.assert_close(corrupt(of(image), "inversion", 0.25)[0], 0.25 + 0.5 * image)
    torch.testing.assert_close(corrupt(of(image), "inversion", 0.5)[0], torch.full_like(image, 0.5))


@pytest.mark.parametrize("shape", [(40, 40), (24, 20, 16)])
def test_blur_leaves_constants_and_spreads_a_point_by_sigma(shape):
    constant = grey(0.7, shape)
    torch.testing.assert_close(corrupt(constant, "blur", 3.0)[0], constant.moving, atol=1e-6, rtol=0)
    point = torch.zeros(1, *shape)
    centre = [n // 2 for n in shape]
    point[(0, *centre)] = 1
    blurred = corrupt(of(point), "blur", 1.5)[0][0].double()
    for axis, n in enumerate(shape):
        along = (torch.arange(n) - centre[axis]).double() ** 2
        weights = blurred.sum([a for a in range(len(shape)) if a != axis])
        variance = (along * weights).sum() / weights.sum()
        # A sample is one wide, so that its own variance, 1/12, is added to the Gaussian's.
        assert variance.item() == pytest.approx(1.5**2 + 1 / 12, rel=0.01)


@pytest.mark.parametrize("shape", [(16, 40), (10, 12, 24)])
def test_slices_are_missing_whole_the_exact_share_and_the_same_ones_again(shape):
    pair, missing = grey(0.5, shape), []
    for share in CORRUPTIONS["slices"].severities:
        planes = corrupt(pair, "slices", share)[0][0].reshape(-1, shape[-1])
        assert set(planes.unique().tolist()) == {0.0, 0.5}
        assert ((planes == 0).all(0) | (planes == 0.5).all(0)).all()
        missing.append(set(torch.where(planes[0] == 0)[0].tolist()))
        assert len(missing[-1]) == share * shape[-1]
    assert all(few < more for few, more in itertools.pairwise(missing))
    assert (corrupt(pair, "slices", 1.0)[0] == 0).all()


def in_mm(points, shape, spacing):
    """Unit coordinates `(1, D, *P)` as rows of mm from the centre."""
    side = torch.tensor([(n - 1) * mm for n, mm in zip(shape, spacing, strict=True)]).double()
    return (points[0].flatten(1).double().T - 0.5) * side, side


def misaligned(pair, degrees):
    """Where every sample of the misaligned image lies in the clean one, `(1, D, *S)`."""
    return corrupt(pair, "misalignment", degrees)[1](identity_map(tuple(pair.moving.shape[1:])))


@pytest.mark.parametrize(
    ("shape", "spacing"), [((20, 30), (3.0, 1.0)), ((20, 24, 28), (1.0, 2.0, 0.7)), ((16, 16, 16), (1.0, 1.0, 1.0))]
)
@pytest.mark.parametrize("degrees", [5.0, 40.0])
def test_misalignment_is_rigid_in_mm_by_the_stated_angle_and_shift(shape, spacing, degrees):
    pair = Pair("pair", torch.rand(1, *shape), torch.zeros(1, *shape), spacing=spacing)
    place = misaligned(pair, degrees)
    assert place.shape == (1, len(shape), *shape)
    before, side = in_mm(identity_map(shape), shape, spacing)
    after, _ = in_mm(place, shape, spacing)
    affine = torch.linalg.lstsq(torch.cat([before, torch.ones(len(before), 1)], 1), after).solution.T  # (D, D + 1)
    rotation, shift = affine[:, :-1], affine[:, -1]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(shape)).double(), atol=1e-5, rtol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    cosine = (rotation.trace() - (len(shape) - 2)) / 2  # trace: 2 cos, and 1 for the axis in 3-D
    assert math.degrees(math.acos(cosine.item())) == pytest.approx(degrees, abs=0.02)
    assert shift.norm().item() == pytest.approx(SHIFT_PER_DEGREE * degrees * side.min().item(), rel=1e-3)
    torch.testing.assert_close(
        affine @ torch.cat([before, torch.ones(len(before), 1)], 1).T, after.T, atol=1e-4, rtol=0
    )


def test_misalignment_is_rigid_in_the_moving_images_own_mm():
    shape, own = (20, 30), (3.0, 1.0)
    pair = Pair("pair", torch.rand(1, *shape), torch.zeros(1, *shape), spacing=(1.0, 1.0), moving_spacing=own)
    turned, _ = in_mm(misaligned(pair, 40.0), shape, own)
    before, _ = in_mm(identity_map(shape), shape, own)
    for points in (before, turned):
        points -= points[0].clone()
    torch.testing.assert_close(turned.norm(dim=1), before.norm(dim=1), atol=1e-4, rtol=0)


def test_a_point_turns_to_its_known_place():
    class Drawn:
        """Instead of random numbers these: counter-clockwise in the plane, shifted along the first axis."""

        def standard_normal(self, size):
            return np.array([[0.0, -1.0], [1.0, 0.0]]) if size == (2, 2) else np.array([1.0, 0.0])

    place = misalignment((11, 21), (2.0, 1.0), 90.0, Drawn())(identity_map((11, 21)))  # 20 mm by 20 mm
    shift = 90 * SHIFT_PER_DEGREE  # of the shortest side
    torch.testing.assert_close(place[0, :, 5, 10], torch.tensor([0.5 + shift, 0.5]))  # the centre
    torch.testing.assert_close(place[0, :, 10, 10], torch.tensor([0.5 + shift, 1.0]))  # from the end of x to that of y
    torch.testing.assert_close(place[0, :, 5, 20], torch.tensor([0.0 + shift, 0.5]))


def test_misalignment_keeps_its_direction_and_goes_further(volume):
    shape = tuple(volume.moving.shape[1:])
    few, many = (misaligned(volume, degrees) for degrees in (0.1, 0.2))
    torch.testing.assert_close(many - identity_map(shape), 2 * (few - identity_map(shape)), atol=2e-5, rtol=0)


def test_the_misaligned_image_is_the_clean_one_seen_through_place(brain):
    moving, _ = corrupt(brain, "misalignment", 20.0)
    torch.testing.assert_close(moving, warp(brain.moving[None], misaligned(brain, 20.0))[0])
    assert float((moving - brain.moving).abs().mean()) > 0.02


def inverse_of(place):
    """The inverse of an affine map on its own grid, by least squares and a matrix inverse."""
    dim, shape = place.shape[1], tuple(place.shape[2:])
    x = torch.cat([identity_map(shape)[0].flatten(1), torch.ones(1, math.prod(shape))]).double()
    matrix = torch.linalg.lstsq(x.T, place[0].flatten(1).double().T).solution.T
    square = torch.cat([matrix, torch.eye(dim + 1)[-1:].double()])
    return (torch.linalg.inv(square) @ x)[:dim].view(1, dim, *shape).float()


@pytest.mark.parametrize("name", ["brain", "volume"])
def test_the_ideal_registration_of_a_misaligned_image_has_the_clean_pairs_dice(name, request):
    pair = request.getfixturevalue(name)
    identity = identity_map(tuple(pair.fixed.shape[1:]))
    place = misaligned(pair, 30.0)
    whole = corrupt(pair, "misalignment", 30.0)[1](inverse_of(place))  # also where the inverse leaves the grid
    torch.testing.assert_close(whole, identity.expand_as(whole), atol=1e-5, rtol=0)
    assert mean_dice(pair, whole) == pytest.approx(mean_dice(pair, identity), abs=0.01)
    itself = dataclasses.replace(pair, fixed_label=pair.moving_label)
    assert mean_dice(itself, whole) > 0.99
    assert mean_dice(itself, place) < 0.7


def test_points_between_the_samples_go_where_their_neighbours_do(volume):
    _, place = corrupt(volume, "misalignment", 40.0)
    identity = identity_map(tuple(volume.moving.shape[1:]))
    inside = 0.5 + 0.8 * (identity - 0.5) + 0.02 * torch.sin(9 * identity)
    among = inside + sample(place(identity) - identity, inside)
    torch.testing.assert_close(place(inside), among, atol=1e-5, rtol=0)


def states():
    return torch.get_rng_state(), np.random.get_state()[1], np.random.get_state()[2], random.getstate()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_global_is_drawn_from_or_matters(kind, brain):
    severity = CORRUPTIONS[kind].severities[0]
    first = corrupt(brain, kind, severity)[0]
    before = states()
    corrupt(brain, kind, severity)
    after = states()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert torch.equal(corrupt(brain, kind, severity)[0], first)


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [
        ("blurr", 1, r"noise, bias_field, .*misalignment; got 'blurr' \(did you mean blur\?\)"),
        ("noise", -0.1, "noise: expected a severity from 0 to anything finite, got -0.1"),
        ("blur", math.nan, "got nan"),
        ("misalignment", math.inf, "got inf"),
        ("slices", 1.5, "slices: expected a severity from 0 to 1, got 1.5"),
        ("inversion", 1.01, "expected a severity from 0 to 1, got 1.01"),
    ],
)
def test_wrong_kinds_and_severities_are_named(kind, severity, message, brain):
    with pytest.raises(ValueError, match=message):
        corrupt(brain, kind, severity)


def test_misalignment_asks_for_the_spacing(brain):
    with pytest.raises(ValueError, match=r"expected the spacing along 2 axes, got \(\)"):
        corrupt(dataclasses.replace(brain, spacing=()), "misalignment", 10.0)


# robustness


def net(cls=GradICON):
    torch.manual_seed(0)
    return cls(2, down=(4, 4), levels=2, last_step=False).eval()


def values(rows, metric):
    return rows[rows.metric == metric].set_index(["pair", "corruption", "severity"]).value


def test_without_registration_only_misalignment_lowers_dice():
    dataset = open_domain("brain-mr", shape=(32, 32))
    rows, problems = robustness(None, dataset, KINDS, pairs=2, progress=False)
    assert problems == []
    assert list(rows.columns) == COLUMNS
    assert set(rows.metric) == {"dice"}
    assert len(rows) == 2 * sum(1 + len(c.severities) for c in CORRUPTIONS.values())
    assert not rows.duplicated(["pair", "corruption", "severity"]).any()
    for i in range(2):
        pair = dataset.test_pair(i)
        of_pair = values(rows, "dice").sort_index()[pair.name]
        clean = mean_dice(pair, identity_map((32, 32)))
        assert (of_pair.drop("misalignment") == clean).all()
        assert of_pair["misalignment", 0.0] == clean
        turned = mean_dice(pair, misaligned(pair, 40.0))
        assert of_pair["misalignment", 40.0] == pytest.approx(turned, abs=0.01)
        assert turned < clean - 0.1


def test_an_untrained_network_changes_nothing_and_folds_nothing():
    dataset = open_domain("heart-mr", shape=(32, 32))
    kinds = ["noise", "misalignment"]
    none, _ = robustness(None, dataset, kinds, pairs=2, progress=False)
    identity, problems = robustness(net(), dataset, kinds, pairs=2, progress=False)
    assert problems == []
    a, b = values(none, "dice"), values(identity, "dice")
    assert a.index.equals(b.index)
    np.testing.assert_allclose(a, b, atol=0.01)
    assert (values(identity, "folding_percent") == 0).all()
    assert len(values(identity, "folding_percent")) == len(a)
    assert dict(zip(identity.metric, identity.unit, strict=True)) == {"dice": "1", "folding_percent": "%"}


class Folds(GradICON):
    """Turns the image inside out, further left of the darker of moving images, and counts its runs."""

    runs = 0

    def forward(self, moving, fixed):
        assert not self.training
        assert not torch.is_grad_enabled()
        Folds.runs += 1
        x = identity_map(tuple(fixed.shape[2:]))
        mirrored = torch.cat([1 - 2 * x[:, :1], 0 * x[:, 1:]], 1)  # displacement of x -> 1 - x
        return super().forward(moving, fixed).then(mirrored if moving.mean() < 0.5 else 0 * mirrored)


def test_each_corruption_is_registered_once_and_measured_by_its_own_map():
    dataset = open_domain("brain-mr", shape=(32, 32))
    folds = net(Folds).train()
    Folds.runs = 0
    rows, problems = robustness(folds, dataset, ["inversion", "noise"], pairs=1, progress=False)
    assert folds.training  # as it was given
    assert (Folds.runs, problems) == (1 + 4 + 4, [])
    pair = dataset.test_pair(0)
    for kind, severity, value in rows[rows.metric == "folding_percent"][["corruption", "severity", "value"]].values:
        dark = corrupt(pair, kind, severity)[0].mean() < 0.5
        assert value == (100.0 if dark else 0.0)
    assert {0.0, 100.0} <= set(values(rows, "folding_percent"))
    mirrored = pair.moving_label.flip(1)
    one, other = (
        mean_dice(dataclasses.replace(pair, moving_label=label), identity_map((32, 32)))
        for label in (mirrored, pair.moving_label)
    )
    dice = values(rows, "dice")[pair.name, "inversion"]
    assert dice[0.0] == pytest.approx(one, abs=0.02)
    assert dice[1.0] == pytest.approx(other, abs=0.02)
    assert abs(one - other) > 0.05


def test_a_trained_maps_dice_is_that_of_place_after_phi():
    class Shifts(GradICON):
        def forward(self, moving, fixed):
            return super().forward(moving, fixed).then(torch.full((1, 2, *fixed.shape[2:]), 0.1))

    dataset = open_domain("brain-mr", shape=(32, 32))
    rows, _ = robustness(net(Shifts), dataset, ["misalignment"], pairs=1, progress=False)
    pair = dataset.test_pair(0)
    place = misaligned(pair, 20.0)
    corner, matrix = place[0, :, 0, 0], torch.stack([place[0, :, -1, 0], place[0, :, 0, -1]], 1)
    matrix = matrix - corner[:, None]
    whole = torch.einsum("ij,njxy->nixy", matrix, identity_map((32, 32)) + 0.1) + corner.view(1, 2, 1, 1)
    assert values(rows, "dice")[pair.name, "misalignment", 20.0] == pytest.approx(mean_dice(pair, whole), abs=0.01)


class Some:
    """Two given pairs; a DataError in a pair's place is raised."""

    name = "some"

    def __init__(self, *pairs):
        self.pairs, self.test_count = pairs, len(pairs)

    def test_pair(self, index):
        if isinstance(self.pairs[index], Exception):
            raise self.pairs[index]
        return self.pairs[index]


def test_one_bad_file_does_not_lose_the_others(brain):
    error = DataError("a.nii.gz: expected a NIfTI file, found 3 bytes. Copy it anew.")
    rows, problems = robustness(None, Some(error, brain), ["blur"], pairs=9, progress=False)
    assert problems == [str(error)]
    assert set(rows.pair) == {brain.name}
    assert len(rows) == 5


def test_pairs_of_files_without_labels_or_known_spacing_have_folding_only(brain):
    bare = Pair("bare", brain.moving, brain.fixed, spacing=(1.0, 2.0), unit="voxel")
    rows, problems = robustness(net(), Some(bare, brain), ["misalignment"], pairs=2, progress=False)
    assert problems == []
    assert set(rows[rows.pair == "bare"].metric) == {"folding_percent"}
    assert set(rows[rows.pair == brain.name].metric) == {"dice", "folding_percent"}
    none, _ = robustness(None, Some(bare), ["misalignment"], pairs=1, progress=False)
    assert none.empty
    assert list(none.columns) == COLUMNS


def test_volumes_are_measured_like_planes(volume):
    torch.manual_seed(0)
    deep = GradICON(3, down=(4, 4), levels=1, last_step=False)
    rows, problems = robustness(deep, Some(volume), KINDS, pairs=1, progress=False)
    assert problems == []
    clean = mean_dice(volume, identity_map(tuple(volume.fixed.shape[1:])))
    dice = values(rows, "dice")[volume.name]
    assert dice["noise", 0.4] == pytest.approx(clean, abs=0.01)
    assert dice["misalignment", 40.0] < clean - 0.1


class NanInTheDark(GradICON):
    """A network that dark images make fail."""

    def forward(self, moving, fixed):
        phi = super().forward(moving, fixed)
        return phi.then(torch.full_like(phi.displacements[-1], float("nan") if moving.mean() < 0.1 else 0.0))


def test_maps_that_are_not_finite_are_a_problem_and_the_others_go_on():
    image = grey(0.2, (24, 24))
    pair = dataclasses.replace(image, name="grey", moving_label=None)
    rows, problems = robustness(net(NanInTheDark), Some(pair), ["slices"], pairs=1, progress=False)
    assert problems == ["some, grey: a map is not finite (slices 0.75); left out"]
    assert rows.severity.tolist() == [0.0, 0.125, 0.25, 0.5]
    dark = dataclasses.replace(pair, moving=pair.moving / 4)
    rows, problems = robustness(net(NanInTheDark), Some(dark), ["inversion"], pairs=1, progress=False)
    assert problems == ["some, grey: a map is not finite (clean); left out"]
    assert rows.severity.tolist() == [0.25, 0.5, 0.75, 1.0]
