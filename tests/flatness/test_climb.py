"""What the climb does to a network, against dense Hessians and on networks that should stay as they are."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from fmsam_lib.flatness import climb as explain
from fmsam_lib.flatness.landscape import fixed_batch
from fmsam_lib.flatness.weight_space import vector
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.training.losses import objective
from fmsam_lib.training.sam import SAM

SETTINGS = {"lmbda": 1.5, "sigma": 3.0}


@pytest.fixture(scope="module")
def dataset():
    return open_domain("brain-mr", shape=(32, 32))


@pytest.fixture
def batch(dataset):
    return fixed_batch(dataset, pairs=2)


def network(*, moved=True, down=(4, 8), levels=2):
    """As initialised, or with last layers that are no longer zero."""
    torch.manual_seed(0)
    net = GradICON(2, down=down, levels=levels, last_step=False)
    with torch.no_grad():
        for step in net.steps if moved else []:
            step.last.weight.normal_(std=0.02)
            step.last.bias.normal_(std=0.05)
    return net


def test_curvature_is_that_of_the_dense_hessian(batch):
    net = network(down=(2,), levels=1)
    facts = explain.at_weights(net, batch, **SETTINGS)
    double = copy.deepcopy(net).double().train()
    exact = type(batch)(*(None if t is None else t.double() for t in batch))
    names, shapes, sizes = zip(*((n, p.shape, p.numel()) for n, p in double.named_parameters()), strict=True)

    def loss(flat):
        weights = {n: part.view(s) for n, part, s in zip(names, flat.split(sizes), shapes, strict=True)}
        whole = lambda *images: torch.func.functional_call(double, weights, images)  # noqa: E731
        return objective(whole, exact, **SETTINGS).total

    flat = torch.nn.utils.parameters_to_vector(double.parameters()).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
    rows = [torch.autograd.grad(g[i], flat, retain_graph=True)[0] for i in range(len(flat))]
    d = g.detach() / g.detach().norm()
    assert facts["c total"] == pytest.approx(float(d @ torch.stack(rows) @ d), rel=1e-8)
    assert facts["|g|"] == pytest.approx(float(g.detach().norm()), rel=1e-10)


def test_the_parts_add_up_and_lambda_counts(batch):
    net = network()
    facts = explain.at_weights(net, batch, **SETTINGS)
    for what in ("slope", "c"):
        assert facts[f"{what} total"] == pytest.approx(facts[f"{what} similarity"] + facts[f"{what} penalty"])
    assert facts["slope total"] == pytest.approx(facts["|g|"])
    assert facts["rho*"] == pytest.approx(2 * facts["|g|"] / facts["c total"])
    without = explain.at_weights(net, batch, lmbda=0.0, sigma=3.0)
    assert without["c penalty"] == 0
    table = explain.climb(net, batch, [0.001, 0.1], **SETTINGS)
    wide = table.pivot(index="rho", columns="term", values="rise")
    assert np.allclose(wide.total, wide.similarity + wide.penalty)


def test_at_initialisation_the_whole_climb_falls_on_the_last_layers(batch):
    facts = explain.at_weights(network(moved=False), batch, **SETTINGS)
    assert facts["last, of |eps|^2"] == pytest.approx(1, abs=1e-12)
    assert facts["|w last|"] == 0
    assert facts["last, of the weights"] < 0.2
    assert explain.at_weights(network(), batch, **SETTINGS)["last, of |eps|^2"] < 0.999


def test_small_climbs_rise_as_predicted(batch):
    table = explain.climb(network(), batch, [1e-6, 1e-5], **SETTINGS)
    total = table[table.term == "total"]
    assert np.allclose(total.rise, total["first"], rtol=0.02)
    assert np.allclose(total.back, -total["first"], rtol=0.02)
    assert (total.cosine > 0.99).all()


def test_at_the_identity_interpolation_has_a_kink(batch):
    """The loss falls both ways: no slope predicts that."""
    row = explain.climb(network(moved=False), batch, [1e-5], **SETTINGS).iloc[0]
    assert row["first"] > 0
    assert max(row.rise, row.back) < 0


def test_the_network_and_its_climbing_copy_stay_as_they_are(batch):
    net = network().eval()
    before = copy.deepcopy(net.state_dict())
    space = explain.climber(net, batch, **SETTINGS)
    g, inside = explain.uphill(space), copy.deepcopy(space.net.state_dict())
    explain.at_weights(net, batch, **SETTINGS)
    explain.climb(net, batch, [0.1], **SETTINGS)
    with space.at(g / g.norm(), 0.5) as there:
        assert float((vector(there) - space.w).norm()) == pytest.approx(0.5)
        there(batch.moving.double(), batch.fixed.double())
    assert all(torch.equal(inside[name], value) for name, value in space.net.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


def test_a_climb_is_sams_own(batch):
    net = network()
    row = explain.climb(net, batch, [0.05], **SETTINGS).iloc[0]
    double = copy.deepcopy(net).double().train()
    exact = type(batch)(*(None if t is None else t.double() for t in batch))
    at_w = objective(double, exact, **SETTINGS).total
    at_w.backward()
    with SAM(double.parameters(), 0.05, net=double).perturbed():
        there = objective(double, exact, **SETTINGS).total
    assert row.rise == pytest.approx(float((there - at_w).detach()), rel=1e-9)


def test_neither_mode_nor_memory_layout_changes_a_climb(batch):
    net = network().eval()
    expected = explain.climb(net, batch, [0.01], **SETTINGS)
    net = net.to(memory_format=torch.channels_last).train()
    assert explain.climb(net, batch, [0.01], **SETTINGS).equals(expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(lambda rho: rho**2 * 5, 0.4), (lambda rho: 3 * rho, 0.0), (lambda rho: 0 * rho, np.inf)],
)
def test_the_first_order_holds_up_to(error, expected):
    """The rise of a quadratic of slope 2 and curvature 10 is twice its first order at 2 |g| / c."""
    rho = np.geomspace(1e-3, 3, 9)
    table = pd.DataFrame({"rho": rho, "term": "total", "rise": 2 * rho + error(rho), "first": 2 * rho})
    assert explain.holds_up_to(table) == pytest.approx(expected)


def test_what_cannot_be_is_named(batch):
    with pytest.raises(ValueError, match=r"expected radii above 0, got \[0.1, -1\]"):
        explain.climb(network(), batch, [0.1, -1], **SETTINGS)
    broken = explain.climber(network(), batch._replace(moving=batch.moving * np.nan), **SETTINGS)
    with pytest.raises(ValueError, match="expected a gradient to climb along, got one of length nan"):
        explain.uphill(broken)
    blank = batch._replace(moving=batch.moving * 0, fixed=batch.fixed * 0)
    with pytest.raises(ValueError, match=r"expected a gradient to climb along, got one of length 0\.0"):
        explain.uphill(explain.climber(network(moved=False), blank, **SETTINGS))
