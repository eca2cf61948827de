import hashlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from fmsam_lib.config import ADDED, Landscape, Train
from fmsam_lib.data import DataError
from fmsam_lib.domains import open_domain
from fmsam_lib.landscape import (
    TERMS,
    filter_normalised_direction,
    fixed_batch,
    landscape,
    line,
    loss_of,
    moved,
    plane,
    segment,
)
from fmsam_lib.network import GradICON
from fmsam_lib.train import starting

RUN = ADDED | {
    "out": "", "train_domain": "brain-mr", "optimizer": "adam", "seed": 0, "shape": [24, 24], "data": "",
    "down": [4, 4], "levels": 2, "last_step": False, "steps": 1, "batch": 1, "lr": 1e-3, "rho": 0.0,
    "lmbda": 1.5, "sigma": 3.0, "threads": 1,
}  # fmt: skip
SETTINGS = {
    "run": "", "out": "", "test_domains": [], "data": "", "pairs": 2, "radius": 0.4, "line_points": 5,
    "plane_points": 3, "directions": 2, "rhos": [0.01, 0.1], "direction_seed": 0, "threads": 1,
}  # fmt: skip


class Bowl(nn.Module):
    """Loss `|w - 1|^2 / 2`, so that every slice is a parabola known in advance."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 1.0], [1.0, -1.0]], dtype=torch.float64))


def bowl_loss(net):
    value = 0.5 * (net.w.detach() - 1).pow(2).sum().item()
    return np.array([value, 2 * value, 0.0])


def values(table, term="total"):
    return table[table.term == term].value.to_numpy()


def test_a_line_has_the_parabolas_values_at_absolute_places():
    net, direction = Bowl(), [torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)]
    table = line(net, bowl_loss, direction, radius=0.5, points=5)
    alphas = [-0.5, -0.25, 0, 0.25, 0.5]
    assert table[table.term == "total"].alpha.tolist() == alphas
    expected = [0.5 * ((2 + a) ** 2 + (-2 + 2 * a) ** 2) for a in alphas]
    np.testing.assert_allclose(values(table), expected, rtol=1e-12)
    np.testing.assert_allclose(values(table, "similarity"), 2 * np.array(expected), rtol=1e-12)


def test_every_row_of_a_plane_is_in_its_place():
    net = Bowl()
    along, across = ([torch.tensor(d, dtype=torch.float64)] for d in ([[1.0, 0], [0, 0]], [[0, 0], [0, 1.0]]))
    table = plane(net, bowl_loss, along, across, radius=1.0, points=5).query("term == 'total'")
    expected = 0.5 * ((2 + table.alpha) ** 2 + (-2 + table.beta) ** 2)
    np.testing.assert_allclose(table.value, expected, rtol=1e-12)
    assert len(table) == 25


def test_a_segment_contains_both_ends():
    start = Bowl()
    end = moved(start, (1.0, [torch.ones(2, 2, dtype=torch.float64)]))
    np.testing.assert_allclose(segment(start, end, bowl_loss, 3)[[0, -1]], [bowl_loss(start), bowl_loss(end)])


def network():
    net = starting(Train(**RUN))
    for unet in net.steps:
        nn.init.normal_(unet.last.weight, std=0.05)
    return net.eval()


def test_directions_have_the_filters_norms_and_leave_vectors_alone():
    net = GradICON(2, down=(4, 6), levels=1, last_step=False)  # no two channel counts alike
    nn.init.normal_(net.steps[0].last.weight)
    named = zip(net.named_parameters(), filter_normalised_direction(net, seed=3), strict=True)
    for (name, p), d in named:
        if p.dim() > 1:
            output = 1 if ".up." in name else 0
            filters, own = (t.detach().movedim(output, 0).flatten(1).norm(dim=1) for t in (d, p))
            torch.testing.assert_close(filters, own)
        else:
            assert not d.any()


def test_a_zero_filter_does_not_move():
    net = GradICON(2, down=(4, 4), levels=1, last_step=False)  # its last convolution is zero
    assert not filter_normalised_direction(net, seed=0)[-2].any()
    assert all(torch.isfinite(d).all() for d in filter_normalised_direction(net, seed=0))


def test_directions_are_seeded_and_nearly_orthogonal():
    net = network()
    a, again, b = (nn.utils.parameters_to_vector(filter_normalised_direction(net, seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert abs(torch.cosine_similarity(a, b, dim=0).item()) < 0.15


def fingerprint(net):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def test_measuring_leaves_the_network_as_it_was():
    net, dataset = network(), open_domain("heart-mr", shape=(24, 24))
    before, gradients = fingerprint(net), [p.requires_grad for p in net.parameters()]
    table = landscape(net, dataset, Train(**RUN), Landscape(**SETTINGS))
    assert fingerprint(net) == before
    assert [p.requires_grad for p in net.parameters()] == gradients
    assert all(p.grad is None for p in net.parameters())
    assert not net.training

    lines = table[(table.kind == "line") & (table.term == "total")]
    assert len(lines) == 2 * 5
    centre = loss_of(fixed_batch(dataset, pairs=2), lmbda=1.5, sigma=3.0)(net)[0]
    np.testing.assert_allclose(lines[lines.alpha == 0].value, centre, rtol=1e-5)
    planes = table[(table.kind == "plane") & (table.term == "total")]
    np.testing.assert_allclose(planes[(planes.alpha == 0) & (planes.beta == 0)].value, centre, rtol=1e-5)
    assert len(planes) == 9
    assert set(table[table.kind == "rise"].rho) == {0.01, 0.1}
    assert table[table.kind == "weight_norm"].value.item() == pytest.approx(
        math.sqrt(sum(p.detach().pow(2).sum().item() for p in net.parameters())), rel=1e-5
    )
    assert set(table.term.dropna()) == set(TERMS)


def test_the_same_measurement_twice_is_the_same():
    net, dataset = network(), open_domain("heart-mr", shape=(24, 24))
    tables = [landscape(net, dataset, Train(**RUN), Landscape(**SETTINGS)) for _ in range(2)]
    assert tables[0].equals(tables[1])


def test_a_small_step_up_the_gradient_raises_the_loss():
    table = landscape(network(), open_domain("heart-mr", shape=(24, 24)), Train(**RUN), Landscape(**SETTINGS))
    assert table[(table.kind == "rise") & (table.rho == 0.01) & (table.term == "total")].value.item() > 0


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        landscape(network().train(), open_domain("heart-mr", shape=(24, 24)), Train(**RUN), Landscape(**SETTINGS))


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
