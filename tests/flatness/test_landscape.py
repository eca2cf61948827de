"""Lines and planes on bowls, whose every value is known, beside loss-landscapes, and on networks that must stay."""

import copy
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import loss_landscapes
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fmsam_lib.flatness import landscape as module
from fmsam_lib.flatness.landscape import (
    COLUMNS,
    TRAINING,
    batches_of,
    fixed_batch,
    landscape,
    line,
    loss_of,
    places,
    plane,
    random_direction,
)
from fmsam_lib.flatness.weight_space import TERMS, WeightSpace, vector
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Landscape, Train
from fmsam_lib.records import DataError, write_csv
from fmsam_lib.training.loop import starting
from fmsam_lib.training.losses import Batch
from tests.conftest import fingerprint

RUN = {"validation": 0} | {
    "out": "run", "train_domain": "brain-mr", "optimizer": "adam", "seed": 0, "shape": [24, 24], "data": "",
    "down": [4, 4], "levels": 2, "last_step": False, "steps": 1, "batch": 1, "lr": 1e-3, "rho": 0.0,
    "lmbda": 1.5, "sigma": 3.0, "threads": 1,
}  # fmt: skip
SETTINGS = {
    "run": "", "out": "run", "test_domains": ["heart-mr"], "data": "", "pairs": 2, "radius": 0.4, "line_points": 5,
    "plane_points": 3, "directions": 3, "normalisation": "filter", "direction_seed": 0, "measured_on": [],
    "rhos": [0.01], "draws": 2, "ascent_steps": 1, "eigenvalues": 0, "probes": 0, "lanczos_steps": 2, "threads": 1,
}  # fmt: skip
SHAPES = {"2-D": (24, 24), "3-D": (16, 16, 16)}


class Bowl(nn.Module):
    """Weights (3, 1, 1, -1) as a matrix, so that a slice of `(w - 1)^T C (w - 1) / 2` is a parabola known before."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 1.0], [1.0, -1.0]], dtype=torch.float64))


CURVATURES = {"total": [1.0, 2.0, 3.0, 4.0], "similarity": [5.0, 0.5, 0.25, 2.0], "regulariser": [0.0, 1.0, 0.0, -1.0]}
ALONG, ACROSS = np.array([1.0, -0.5, 0.25, 2.0]), np.array([0.3, 1.0, -2.0, 0.7])


def bowls(net):
    w = net.w.detach().flatten().numpy() - 1
    return np.array([0.5 * (np.array(c) * w**2).sum() for c in CURVATURES.values()])


def parabola(term, alpha, beta=0.0):
    w = Bowl().w.detach().flatten().numpy() + alpha * ALONG + beta * ACROSS
    return 0.5 * (np.array(CURVATURES[term]) * (w - 1) ** 2).sum()


def as_direction(values):
    return [torch.tensor(values).reshape(2, 2)]


def of(table, term="total"):
    return table[table.term == term]


# --- bowls ---


@pytest.mark.parametrize("radius", [0.1, 1 / 3, 2.3])
@pytest.mark.parametrize("points", [3, 5, 23, 39])  # np.linspace(-0.1, 0.1, 23) has no 0
def test_places_are_symmetric_about_an_exact_zero(radius, points):
    found = places(radius, points)
    assert found[points // 2] == 0
    assert (found == -found[::-1]).all()
    assert found[-1] == radius
    np.testing.assert_allclose(found, np.linspace(-radius, radius, points), atol=1e-15)


@pytest.mark.parametrize("points", [3, 5, 23])
@pytest.mark.parametrize("term", TERMS)
def test_a_line_has_the_parabolas_values_at_absolute_places(points, term):
    table = of(line(Bowl(), bowls, as_direction(ALONG), radius=0.1, points=points), term)
    assert table.alpha.tolist() == places(0.1, points).tolist()
    np.testing.assert_allclose(table.value, [parabola(term, alpha) for alpha in table.alpha], rtol=1e-12, atol=1e-13)
    assert table.value[table.alpha == 0].tolist() == [parabola(term, 0.0)]  # to the bit


@pytest.mark.parametrize("points", [3, 5, 23])
@pytest.mark.parametrize("term", TERMS)
def test_every_value_of_a_plane_is_in_its_place(points, term):
    table = of(plane(Bowl(), bowls, as_direction(ALONG), as_direction(ACROSS), radius=0.1, points=points), term)
    assert table.beta.tolist() == [b for b in places(0.1, points) for _ in range(points)]
    assert table.alpha.tolist() == places(0.1, points).tolist() * points
    expected = [parabola(term, a, b) for a, b in zip(table.alpha, table.beta, strict=True)]
    np.testing.assert_allclose(table.value, expected, rtol=1e-12, atol=1e-13)
    assert table.value[(table.alpha == 0) & (table.beta == 0)].tolist() == [parabola(term, 0.0)]


def test_round_the_minimum_of_a_bowl_opposite_places_are_equal():
    net = Bowl()
    with torch.no_grad():
        net.w.fill_(1.0)
    for points in (3, 7):
        table = of(plane(net, bowls, as_direction(ALONG), as_direction(ACROSS), radius=1.0, points=points))
        values = table.value.to_numpy().reshape(points, points)
        assert values.min() == values[points // 2, points // 2] == 0
        np.testing.assert_allclose(values, values[::-1, ::-1], rtol=1e-12)


# --- beside loss-landscapes ---


def moved(net, distance, direction):
    """A copy of the network at `w + distance * direction`."""
    with WeightSpace(net).at(vector(direction), distance) as there:
        return copy.deepcopy(there)


def test_a_line_is_loss_landscapes_own_behind_its_start():
    net, end = Bowl(), moved(Bowl(), 0.5, as_direction(ALONG))
    found = loss_landscapes.linear_interpolation(
        net, end, lambda w: bowls(w.modules[0])[0], steps=4, deepcopy_model=True
    )
    ours = of(line(net, bowls, as_direction(ALONG), radius=0.5, points=9)).value.to_numpy()
    np.testing.assert_array_equal(found, ours[5:])


def test_directions_are_nearly_orthogonal_and_finite_where_biases_are_zero():
    net = network()
    assert any(p.dim() == 1 and not p.any() for p in net.parameters())
    first, second = (random_direction(net, seed=seed) for seed in (0, 1))
    assert all(torch.isfinite(d).all() for d in first)
    assert abs(torch.cosine_similarity(vector(first), vector(second), dim=0)) < 0.15


# --- directions ---


def network(shape=(24, 24), **changes):
    net = starting(Train(**(RUN | {"shape": list(shape)} | changes)))
    for unet in net.steps:
        nn.init.normal_(unet.last.weight, std=0.05)
    return net.eval()


def uneven(dim=2):
    """No two channel counts alike."""
    net = GradICON(dim, down=(4, 6), levels=1, last_step=False)
    nn.init.normal_(net.steps[0].last.weight)
    return net


@pytest.mark.parametrize("dim", [2, 3])
def test_directions_have_the_filters_norms_and_leave_vectors_alone(dim):
    net = uneven(dim)
    for (name, p), d in zip(net.named_parameters(), random_direction(net, seed=3), strict=True):
        if p.dim() > 1:
            output = 1 if ".up." in name else 0
            filters, own = (t.detach().movedim(output, 0).flatten(1).norm(dim=1) for t in (d, p))
            torch.testing.assert_close(filters, own)
        else:
            assert not d.any()


def test_directions_by_layer_have_the_tensors_norms_and_keep_the_draws_direction():
    net = uneven()
    by_layer, plain = (random_direction(net, seed=3, normalisation=n) for n in ("layer", "none"))
    for p, d, drawn in zip(net.parameters(), by_layer, plain, strict=True):
        if p.dim() > 1:
            torch.testing.assert_close(d.norm(), p.detach().norm())
            assert torch.cosine_similarity(d.flatten(), drawn.flatten(), dim=0) == pytest.approx(1, abs=1e-6)
        else:
            assert not d.any()
    filters = random_direction(net, seed=3, normalisation="filter")
    assert not torch.allclose(filters[0], by_layer[0])


def test_a_direction_without_normalisation_has_length_one_and_moves_what_is_zero():
    net = GradICON(2, down=(4, 4), levels=1, last_step=False)  # its last convolution is zero
    direction = random_direction(net, seed=0, normalisation="none")
    assert vector(direction).norm() == pytest.approx(1, rel=1e-6)
    assert direction[-2].any()
    assert not any(d.any() for p, d in zip(net.parameters(), direction, strict=True) if p.dim() == 1)


@pytest.mark.parametrize("normalisation", ["filter", "layer"])
def test_zero_filters_and_tensors_do_not_move(normalisation):
    net = GradICON(2, down=(4, 4), levels=1, last_step=False)  # its last convolution is zero
    with torch.no_grad():
        net.steps[0].down[0].weight[1] = 0
        net.steps[0].up[0].weight[:, 2] = 0  # transposed: a filter is a slice of the second axis
    direction = random_direction(net, seed=0, normalisation=normalisation)
    named = dict(zip(dict(net.named_parameters()), direction, strict=True))
    assert all(torch.isfinite(d).all() for d in direction)
    assert not named["steps.0.last.weight"].any()
    down, up = named["steps.0.down.0.weight"], named["steps.0.up.0.weight"]
    assert (not down[1].any(), not up[:, 2].any()) == ((normalisation == "filter"),) * 2
    assert down[0].any()
    assert up[:, 0].any()
    assert up[2].any()


def test_directions_are_seeded_and_leave_the_random_state_alone():
    net, state = uneven(), torch.get_rng_state()
    a, again, b = (vector(random_direction(net, seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("normalisation", ["filter", "layer", "none"])
def test_directions_and_batches_go_where_the_network_is(normalisation, monkeypatch):
    """The device without numbers stands for a GPU."""
    net = network().to("meta")
    monkeypatch.setattr(module, "norm", lambda tensors: 1.0)  # which needs numbers
    drawn = random_direction(net, seed=0, normalisation=normalisation)
    assert {d.device.type for d in drawn} == {"meta"}
    seen = []
    monkeypatch.setattr(module, "objective", lambda net, batch: seen.append(batch) or [])
    loss_of(Batch(*torch.rand(3, 1, 1, 16, 16)))(net)
    assert {tensor.device.type for tensor in seen[0] if tensor is not None} == {"meta"}


# --- networks ---


def own_hash(net):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def measured(shape=(24, 24), net=None, **changes):
    run, dataset = Train(**(RUN | {"shape": list(shape)})), open_domain("heart-mr", shape=shape)
    net = network(shape) if net is None else net
    batch = fixed_batch(dataset, pairs=2)
    return landscape(net, batch, "heart-mr", run, Landscape(**(SETTINGS | changes))), batch


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_landscape_is_centred_on_the_loss_at_the_weights(shape):
    net = network(shape)
    table, batch = measured(shape, net)
    centre = loss_of(batch, lmbda=1.5, sigma=3.0)(net).tolist()
    lines, planes = (table[table.kind == kind] for kind in ("line", "plane"))
    assert len(lines) == 3 * 5 * len(TERMS)
    assert len(planes) == 9 * len(TERMS)
    for direction in range(3):
        assert lines[(lines.alpha == 0) & (lines.direction == direction)].value.tolist() == centre  # to the bit
    assert planes[(planes.alpha == 0) & (planes.beta == 0)].value.tolist() == centre
    assert set(table.test_domain) == {"heart-mr"}
    assert lines[lines.term == "total"].value.std() > 1e-4
    totals = [lines[lines.term == term].value.to_numpy() for term in TERMS]
    np.testing.assert_allclose(totals[0], totals[1] + 1.5 * totals[2], rtol=1e-5)


def test_lines_lie_in_the_plane_and_both_are_where_the_weights_say():
    net = network()
    table, batch = measured(net=net, line_points=3, direction_seed=7)
    loss = loss_of(batch, lmbda=1.5, sigma=3.0)
    along, across = (random_direction(net, seed=seed) for seed in (7, 8))
    lines, planes = (of(table[table.kind == kind]) for kind in ("line", "plane"))
    for i, (direction, other) in enumerate([(along, "beta"), (across, "alpha")]):
        on_axis = planes[planes[other] == 0].value
        np.testing.assert_allclose(lines[lines.direction == i].value, on_axis, rtol=1e-5)
        assert on_axis.iloc[-1] == pytest.approx(loss(moved(net, 0.4, direction))[0], rel=1e-5)
    far = moved(moved(net, -0.4, across), 0.4, along)
    corner = planes[(planes.alpha == 0.4) & (planes.beta == -0.4)].value.item()
    assert corner == pytest.approx(loss(far)[0], rel=1e-5)


def test_the_cosines_of_all_directions_are_told():
    net = network()
    table, _ = measured(net=net, direction_seed=5)
    cosines = table[table.kind == "cosine"].astype({"direction": int, "alpha": int})
    drawn = [vector(random_direction(net, seed=seed)).double() for seed in (5, 6, 7)]
    pairs = list(zip(cosines.direction, cosines.alpha, strict=True))
    assert sorted(pairs) == [(0, 1), (0, 2), (1, 2)]
    expected = [torch.cosine_similarity(drawn[i], drawn[j], dim=0).item() for i, j in pairs]
    np.testing.assert_allclose(cosines.value, expected, rtol=1e-6)
    assert all(0 < abs(value) < 0.15 for value in expected)


def test_a_plane_needs_two_directions_though_one_line_is_asked_for():
    table, _ = measured(directions=1)
    assert set(table[table.kind == "line"].direction) == {0}
    assert len(table[table.kind == "plane"]) == 9 * len(TERMS)
    assert len(table[table.kind == "cosine"]) == 1


def test_measuring_leaves_the_network_as_it_was():
    net = network()
    net.steps[0].last.bias.requires_grad_(False)
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, float(i))
    grads, flags = [p.grad.clone() for p in net.parameters()], [p.requires_grad for p in net.parameters()]
    before, states = (fingerprint(net), own_hash(net)), torch.get_rng_state()
    measured(net=net)
    assert (fingerprint(net), own_hash(net)) == before
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert not any(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), states)


def test_the_same_measurement_twice_is_the_same():
    assert measured()[0].equals(measured()[0])


def test_neither_mode_nor_memory_layout_changes_a_landscape():
    net = network(down=[8, 16])
    expected, _ = measured(net=net)
    net = net.to(memory_format=torch.channels_last).train()
    before = fingerprint(net)
    assert not all(p.is_contiguous() for p in net.parameters())
    assert measured(net=net)[0].equals(expected)
    assert fingerprint(net) == before
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("part", ["all", "a norm"])
def test_a_line_through_a_network_in_training_mode_is_that_in_eval_mode(part):
    net, batch = network(), fixed_batch(open_domain("heart-mr", shape=(24, 24)), pairs=1)
    how = {"direction": random_direction(net, seed=0), "radius": 0.1, "points": 3}
    loss = loss_of(batch, lmbda=1.5, sigma=3.0)
    expected, before = line(net, loss, **how), fingerprint(net)
    (net if part == "all" else net.steps[0].norm[0]).train()
    assert line(net, loss, **how).equals(expected)
    assert fingerprint(net) == before


# --- batches ---


def test_the_training_batch_is_the_same_for_every_seed_and_optimizer():
    runs = [Train(**(RUN | changes)) for changes in ({}, {"seed": 3, "optimizer": "sam"})]
    batches = [batches_of(run, [], pairs=2)[TRAINING] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*(batch[:3] for batch in batches), strict=True))
    assert batches[0].moving.shape == (2, 1, 24, 24)
    mixture = batches_of(Train(**(RUN | {"train_domain": "brain-mr+heart-mr"})), [], pairs=2)[TRAINING]
    assert torch.equal(mixture.fixed[0], batches[0].fixed[0])
    heart = open_domain("heart-mr", shape=(24, 24))
    assert torch.equal(mixture.fixed[1], heart.training_pair(0).fixed)


def test_the_training_batch_is_of_the_seed_that_the_domain_was_opened_with(tmp_path):
    (tmp_path / "config.json").write_text('{"domain_seed": 3}')
    batch = batches_of(Train(**(RUN | {"out": str(tmp_path)})), [], pairs=1)[TRAINING]
    assert torch.equal(batch.fixed[0], open_domain("brain-mr", shape=(24, 24), seed=3).training_pair(0).fixed)


def test_a_network_is_measured_on_its_training_images_and_every_test_domain():
    batches = batches_of(Train(**RUN), ["brain-mr", "heart-mr"], pairs=1)
    assert list(batches) == [TRAINING, "brain-mr", "heart-mr"]
    assert torch.equal(batches["heart-mr"].moving[0], open_domain("heart-mr", shape=(24, 24)).test_pair(0).moving)
    assert len({float(batch.moving.sum()) for batch in batches.values()}) == 3
    assert all(torch.equal(batch.points, batches[TRAINING].points) for batch in batches.values())


class Damaged:
    """Three test pairs, of which the first cannot be read."""

    name, test_count = "damaged", 3

    def test_pair(self, index):
        if index == 0:
            raise DataError("a.nii.gz: cut short")
        return open_domain("heart-mr", shape=(24, 24)).test_pair(index)


def test_a_pair_that_cannot_be_read_is_passed_over(monkeypatch):
    assert torch.equal(fixed_batch(Damaged(), pairs=2).fixed[0], Damaged().test_pair(1).fixed)
    monkeypatch.setattr(Damaged, "test_count", 1)
    with pytest.raises(DataError, match=r"(?s)no test pair that can be read.*a\.nii\.gz"):
        fixed_batch(Damaged(), pairs=2)


def test_a_written_landscape_has_all_columns(tmp_path):
    table, _ = measured()
    write_csv(table.assign(train_domain="brain-mr", optimizer="adam", seed=0), tmp_path / "landscape.csv", COLUMNS)
    read = pd.read_csv(tmp_path / "landscape.csv")
    assert list(read.columns) == COLUMNS
    np.testing.assert_array_equal(read.value, table.value)


def test_the_loss_is_looked_at_within_the_masks_that_training_had():
    domain = open_domain("brain-mr", shape=(16, 16))
    pair = domain.test_pair(0)
    masked = replace(pair, moving_mask=pair.moving > 0.2, fixed_mask=pair.fixed > 0.2)
    given = SimpleNamespace(name="masked", test_count=1, test_pair=lambda index: masked)
    batch = fixed_batch(given, pairs=1)
    assert torch.equal(batch.fixed_mask, masked.fixed_mask[None])
    assert torch.equal(batch.moving_mask, masked.moving_mask[None])
    assert torch.equal(batch.moving, fixed_batch(domain, pairs=1).moving)
    assert fixed_batch(domain, pairs=1).moving_mask is None
