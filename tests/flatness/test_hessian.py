"""Curvature on bowls and against dense Hessians of small registration networks."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmsam_lib.flatness import hessian
from fmsam_lib.flatness.hessian import curvature, lanczos, largest_eigenvalues, measures, spectral_density, trace
from fmsam_lib.flatness.sharpness import COLUMNS
from fmsam_lib.flatness.weight_space import TERMS, WeightSpace
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Landscape
from fmsam_lib.training.losses import Batch, jittered_points, objective
from tests.conftest import fingerprint

LOSS = {"lmbda": 1.5, "sigma": 3.0}
SMALL = {"eigenvalues": 2, "probes": 3, "lanczos_steps": 4}
ALL = Landscape(**SMALL, rhos=[0.1], draws=2, ascent_steps=2)


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return q @ np.diag(eigenvalues) @ q.T


def product(matrix):
    return lambda v: matrix @ v


def test_the_largest_of_a_spectrum():
    eigenvalues = np.concatenate([[9, 7, 6.5], np.linspace(-2, 3, 40), [-5]])
    found = largest_eigenvalues(product(symmetric(eigenvalues)), len(eigenvalues), 3)
    np.testing.assert_allclose(found, [9, 7, 6.5], rtol=1e-9)


def test_many_equal_eigenvalues_do_not_mislead():
    found = largest_eigenvalues(product(symmetric([4, 4, 1, *[0] * 17])), 20, 3)
    np.testing.assert_allclose(found, [4, 4, 1], atol=1e-9)
    np.testing.assert_allclose(largest_eigenvalues(product(np.eye(6)), 6, 2), 1)
    assert largest_eigenvalues(product(np.zeros((6, 6))), 6, 2) == [0, 0]


def test_an_eigenvalue_that_does_not_converge_is_nan_and_said(monkeypatch):
    monkeypatch.setattr(hessian, "RESTARTS", 1)
    eigenvalues = np.linspace(0, 1, 500)
    expected = "of the 2 largest eigenvalues did not converge in 1 restarts and are NaN"
    with pytest.warns(UserWarning, match=expected):
        found = largest_eigenvalues(product(np.diag(eigenvalues)), 500, 2)
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_products_that_are_not_finite_have_no_eigenvalues(at, value):
    calls = itertools.count()
    found = largest_eigenvalues(lambda v: (v + value) if next(calls) == at else np.arange(100) * v, 100, 3)
    assert np.isnan(found).tolist() == [True] * 3


def test_the_trace_lies_in_its_interval():
    matrix = symmetric(np.linspace(-3, 8, 60))
    mean, low, high = trace(product(matrix), 60, 200)
    assert low < matrix.trace() < high
    assert low < mean < high
    diagonal = trace(product(np.diag(np.arange(5.0))), 5, 2)
    assert diagonal == pytest.approx((10, 10, 10))  # signs have no variance there


def test_the_quadrature_has_the_moments_of_its_start():
    """m nodes are exact for polynomials up to `2 m - 1`: `sum weight node^k = z^T H^k z / z^T z`."""
    matrix, start = symmetric(np.linspace(-3, 8, 60)), np.random.default_rng(1).standard_normal(60)
    nodes, weights = lanczos(product(matrix), start, 5)
    assert len(nodes) == 5
    for k in range(10):
        expected = start @ np.linalg.matrix_power(matrix, k) @ start / (start @ start)
        assert weights @ nodes**k == pytest.approx(expected, rel=1e-10)
    assert abs(weights @ nodes**10 / (start @ np.linalg.matrix_power(matrix, 10) @ start / (start @ start)) - 1) > 1e-6


def test_as_many_steps_as_rows_find_the_whole_spectrum():
    eigenvalues = np.concatenate([np.linspace(-1, 1, 40), [1000, 3000]])  # far apart, as networks' are
    nodes, _ = lanczos(product(symmetric(eigenvalues)), np.random.default_rng(1).standard_normal(42), 42)
    np.testing.assert_allclose(nodes, np.sort(eigenvalues), rtol=1e-6, atol=1e-6)


def test_few_different_eigenvalues_make_few_nodes():
    eigenvalues = [5.0] * 3 + [0.0] * 15 + [-1.0] * 2
    density = spectral_density(product(symmetric(eigenvalues)), 20, 400, 10)
    assert (density.groupby("probe").size() == 3).all()
    weights = density.assign(node=density.node.round(6) + 0.0).groupby("node").weight.sum() / 400
    np.testing.assert_allclose(weights.index, [-1, 0, 5])
    np.testing.assert_allclose(weights, [0.1, 0.75, 0.15], atol=0.02)


def test_the_density_is_that_of_the_eigenvalues():
    eigenvalues = np.linspace(-3, 8, 60)
    density = spectral_density(product(symmetric(eigenvalues)), 60, 100, 20)
    np.testing.assert_allclose(density.groupby("probe").weight.sum(), 1, rtol=1e-12)
    below = density.weight[density.node < 0].sum() / 100
    assert below == pytest.approx(np.mean(eigenvalues < 0), abs=0.03)
    for k in (1, 2):
        assert (density.weight * density.node**k).sum() / 100 == pytest.approx(np.mean(eigenvalues**k), rel=0.05)
    assert density.equals(spectral_density(product(symmetric(eigenvalues)), 60, 100, 20))
    assert not density.equals(spectral_density(product(symmetric(eigenvalues)), 60, 100, 20, seed=1))


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        drawn = torch.randn(12, generator=torch.Generator().manual_seed(0))
        self.a, self.b, self.unused = (nn.Parameter(part) for part in (drawn[:6].view(2, 3), drawn[6:9], drawn[9:]))


EIGENVALUES = np.concatenate([[6, 4], np.linspace(-2, 3, 7)])


def bowl(net):
    w = torch.cat([net.a.flatten(), net.b])
    return w @ torch.tensor(symmetric(EIGENVALUES), dtype=w.dtype) @ w / 2 + w.sum(), 3 * w.sum(), torch.tensor(2.0)


def by_measure(table, term):
    return table[table.term == term].set_index("measure").value


def test_a_bowls_curvature_and_zeros_of_linear_and_constant_terms():
    table, spectrum = curvature(Weights().eval(), bowl, Landscape(eigenvalues=2, probes=300, lanczos_steps=12))
    assert list(table.columns) == COLUMNS
    total = by_measure(table, "total")
    assert list(total.index) == ["eigenvalue_1", "eigenvalue_2", "trace"]
    np.testing.assert_allclose(total[:2], [6, 4], rtol=1e-9)
    row = table[(table.measure == "trace") & (table.term == "total")].squeeze()
    assert row.low < EIGENVALUES.sum() < row.high
    assert row.n == 300
    for term in ("similarity", "regulariser"):
        assert list(by_measure(table, term)) == [0, 0, 0]
        nodes = spectrum[spectrum.term == term]
        assert set(nodes.node) == {0}
        assert set(nodes.weight) == {1}
    assert list(spectrum.columns) == ["probe", "node", "weight", "term"]
    mean = spectrum[spectrum.term == "total"].eval("node * weight").sum() / 300  # over the unused weights' zeros too
    assert mean == pytest.approx(EIGENVALUES.sum() / 12, rel=0.1)


def test_parts_can_be_left_out():
    table, spectrum = curvature(Weights().eval(), bowl, Landscape(eigenvalues=0, probes=0, lanczos_steps=5))
    assert (len(table), list(table.columns)) == (0, COLUMNS)
    assert (len(spectrum), list(spectrum.columns)) == (0, ["probe", "node", "weight", "term"])
    table, spectrum = curvature(Weights().eval(), bowl, Landscape(eigenvalues=0, probes=2, lanczos_steps=2))
    assert set(table.measure) == {"trace"}
    assert set(spectrum.probe) == {0, 1}
    table, _ = curvature(Weights().eval(), bowl, Landscape(eigenvalues=1, probes=0, lanczos_steps=2))
    assert set(table.measure) == {"eigenvalue_1"}


def test_a_term_that_is_not_finite_has_nan():
    def terms(net):
        return net.a.sum() / 0, (net.a**2).sum(), (net.b**2).sum()

    def steep(net):  # a finite loss whose gradient is not
        root = torch.sqrt((net.a * 0).sum())
        return root, root, (net.b**2).sum()

    for broken in (terms, steep):
        table, spectrum = curvature(Weights().eval(), broken, Landscape(**SMALL))
        assert by_measure(table, "total").isna().all()
        nodes = spectrum[spectrum.term == "total"]
        assert list(nodes.probe) == [0, 1, 2]
        assert nodes[["node", "weight"]].isna().all(axis=None)
    assert by_measure(table, "regulariser").eigenvalue_1 == pytest.approx(2)


def images(dim):
    """Smooth blobs, and the points of the penalty."""
    shape, generator = (16,) * dim, torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 1, *[5] * dim, generator=generator)
    smooth = F.interpolate(coarse, shape, mode="bilinear" if dim == 2 else "trilinear", align_corners=True)
    return Batch(smooth[:1], smooth[1:], jittered_points(shape, generator))


def network(dim, *, levels=1):
    torch.manual_seed(0)
    net = GradICON(dim, down=(1,), levels=levels, last_step=False)
    for step in net.steps:
        nn.init.normal_(step.last.weight, std=0.3)
    return net.eval()


def in_float64(batch):
    return Batch(*(None if tensor is None else tensor.double() for tensor in batch))


@pytest.fixture(scope="module")
def planar():
    net, batch = network(2, levels=2), in_float64(images(2))
    return net, batch, [dense_hessian(net, batch, term) for term in range(3)]


def dense_hessian(net, batch, term):
    """By torch's own function of a vector of weights."""
    double = copy.deepcopy(net).double()
    names, params = zip(*double.named_parameters(), strict=True)

    def value(w):
        parts = zip(names, params, w.split([p.numel() for p in params]), strict=True)
        weights = {name: part.view(p.shape) for name, p, part in parts}
        return objective(lambda *pair: torch.func.functional_call(double, weights, pair), batch, **LOSS)[term]

    w = nn.utils.parameters_to_vector(params).detach()
    return torch.autograd.functional.hessian(value, w).numpy()


def test_a_networks_curvature_is_that_of_its_dense_hessian(planar):
    net, batch, dense = planar
    table, spectrum = curvature(
        net, lambda net: objective(net, batch, **LOSS), Landscape(eigenvalues=3, probes=30, lanczos_steps=10)
    )
    for term, matrix in zip(TERMS, dense, strict=True):
        eigenvalues = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(by_measure(table, term)[:3], eigenvalues[[-1, -2, -3]], rtol=1e-6)
        assert eigenvalues[0] < 0 < eigenvalues[-1]
        row = table[(table.measure == "trace") & (table.term == term)].squeeze()
        assert row.low < matrix.trace() < row.high

        nodes = spectrum[spectrum.term == term]
        first = nodes.eval("weight * node").groupby(nodes.probe).sum()
        assert abs(first.mean() - matrix.trace() / len(matrix)) < 3 * first.sem()


def test_a_3d_networks_curvature_is_that_of_its_dense_hessian():
    net, batch = network(3), in_float64(images(3))
    dense = dense_hessian(net, batch, 0)
    zero = torch.zeros(())

    def terms(net):
        return objective(net, batch, **LOSS).total, zero, zero

    v = np.random.default_rng(0).standard_normal(len(dense))
    found = hessian.hessian(WeightSpace(net, terms, torch.float64), 0)(v)
    np.testing.assert_allclose(found, dense @ v, atol=1e-10 * np.linalg.norm(dense @ v))
    table, _ = curvature(net, terms, Landscape(eigenvalues=1, probes=0, lanczos_steps=2))
    assert by_measure(table, "total").eigenvalue_1 == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-6)


def test_measures_in_float32_are_near_those_in_float64(planar):
    net, batch, _ = planar
    settings = Landscape(eigenvalues=1, probes=4, lanczos_steps=2, rhos=[0.1], draws=2, ascent_steps=1)
    exact, _ = curvature(net, lambda net: objective(net, batch, **LOSS), settings)
    found, _ = measures(net, batch, LOSS, settings)
    for name in ("eigenvalue_1", "trace"):
        near = found[found.measure == name].value.to_numpy()
        np.testing.assert_allclose(near, exact[exact.measure == name].value, rtol=1e-3)


def test_another_library_finds_the_same_largest_eigenvalues(planar):
    peer = pytest.importorskip("hessian_eigenthings", reason="the second opinion needs hessian-eigenthings")
    net, batch, _ = planar
    table, _ = curvature(
        net, lambda net: objective(net, batch, **LOSS), Landscape(eigenvalues=2, probes=0, lanczos_steps=2)
    )
    double = copy.deepcopy(net).double()
    for term, name in enumerate(TERMS):
        operator = peer.HessianOperator(double, [()], lambda net, _, t=term: objective(net, batch, **LOSS)[t])
        found = peer.lanczos(operator, k=2, max_iter=60, which="LA", seed=0, reorthogonalize=True).eigenvalues
        ours = by_measure(table, name)[["eigenvalue_1", "eigenvalue_2"]]
        np.testing.assert_allclose(np.sort(found.numpy())[::-1], ours, rtol=1e-6)


def test_steps_that_are_left_out_have_no_curvature():
    net, batch = GradICON(2, down=(2,), levels=1), in_float64(images(2))
    for step in net.steps:
        nn.init.normal_(step.last.weight, std=0.3)
    net.eval().first_stage = True
    space = WeightSpace(net, lambda net: objective(net, batch, **LOSS), torch.float64)
    used = sum(p.numel() for p in net.steps[0].parameters())
    random = hessian.hessian(space, 0)(np.ones(len(space.w)))
    assert random[:used].any()
    assert not random[used:].any()


def test_saving_memory_changes_no_product():
    net, batch = network(2, levels=2), in_float64(images(2))
    v = np.random.default_rng(0).standard_normal(sum(p.numel() for p in net.parameters()))
    products = []
    for net.save_memory in (False, True):
        space = WeightSpace(net, lambda net: objective(net, batch, **LOSS), torch.float64)
        products.append(hessian.hessian(space, 0)(v))
    np.testing.assert_allclose(*products, rtol=1e-9, atol=1e-9)


def test_all_measures_of_a_network_that_stays_as_it_is():
    net, batch = network(2, levels=2), images(2)
    before, state = fingerprint(net), torch.get_rng_state()
    table, spectrum = measures(net, batch, LOSS, ALL)
    again, same = measures(net, batch, LOSS, ALL)
    assert table.equals(again)
    assert spectrum.equals(same)
    assert list(table.columns) == COLUMNS
    assert {"loss", "weight_norm", "sam_rise", "noise_rise", "eigenvalue_2", "trace"} <= set(table.measure)
    assert np.isfinite(table.value).all()
    total = objective(network(2, levels=2).double(), in_float64(batch), **LOSS).total.item()
    assert table[(table.measure == "loss") & (table.term == "total")].value.item() == pytest.approx(total, rel=1e-12)
    assert table.rho.dtype == table.n.dtype == float
    assert fingerprint(net) == before
    assert all(p.grad is None for p in net.parameters())
    assert not net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_of_nan_is_measured_as_nan():
    net = network(2)
    with torch.no_grad():
        net.steps[0].last.bias.fill_(np.nan)
    table, spectrum = measures(net, images(2), LOSS, ALL)
    assert table.value.isna().all()
    assert spectrum.node.isna().all()


def test_neither_mode_nor_memory_layout_changes_a_measure():
    torch.manual_seed(0)
    net, batch = GradICON(2, down=(4, 8), levels=2, last_step=False).eval(), images(2)
    for step in net.steps:
        nn.init.normal_(step.last.weight, std=0.3)
    expected = measures(net, batch, LOSS, ALL)
    net = net.to(memory_format=torch.channels_last).train()
    assert not all(p.is_contiguous() for p in net.parameters())
    found = measures(net, batch, LOSS, ALL)
    assert [a.equals(b) for a, b in zip(found, expected, strict=True)] == [True, True]
    assert not all(p.is_contiguous() for p in net.parameters())


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_measures_are_the_same_where_gradients_are_switched_off(switched_off):
    net, batch = network(2, levels=2), images(2)
    expected, _ = measures(net, batch, LOSS, ALL)
    with switched_off():
        found, _ = measures(net, batch, LOSS, ALL)
    assert expected.value.abs().max() > 0
    assert found.equals(expected)
