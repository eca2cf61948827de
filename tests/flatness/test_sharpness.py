"""Flatness on quadratic bowls, where every measure is known, and on networks that should stay as they are."""

import copy

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from fmsam_lib.flatness.sharpness import COLUMNS, mean_interval, sharpness
from fmsam_lib.flatness.weight_space import TERMS
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Landscape
from fmsam_lib.training.losses import Batch, jittered_points, objective
from fmsam_lib.training.sam import SAM
from tests.conftest import fingerprint

LOSS = {"lmbda": 1.5, "sigma": 3.0}
HOW = Landscape(rhos=[0.01, 0.5], draws=50, ascent_steps=60)
PARAMETERS = 9


class Weights(nn.Module):
    """Two tensors of weights, nine in all, none of them 0."""

    def __init__(self):
        super().__init__()
        drawn = torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(0))
        self.a, self.b = nn.Parameter(drawn[:6].view(2, 3)), nn.Parameter(drawn[6:])

    def w(self):
        return torch.cat([self.a.flatten(), self.b])


def matrix(seed, *, sign=0):
    """A symmetric one; sign 1: positive definite."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((PARAMETERS, PARAMETERS)))[0]
    eigenvalues = np.linspace(-1.5, 4, PARAMETERS)
    return q @ np.diag(np.abs(eigenvalues) if sign else eigenvalues) @ q.T


HESSIANS = {"total": matrix(1), "similarity": matrix(2, sign=1), "regulariser": np.zeros((PARAMETERS, PARAMETERS))}
SLOPES = dict(zip(TERMS, np.random.default_rng(3).standard_normal((3, PARAMETERS)), strict=True))


def bowls(net):
    """`w^T H w / 2 + b^T w`, H and b of each term's own; the last one is a plane."""
    w = net.w()
    pairs = [[torch.tensor(part, dtype=w.dtype) for part in (HESSIANS[t], SLOPES[t])] for t in TERMS]
    return tuple(w @ hessian @ w / 2 + slope @ w for hessian, slope in pairs)


def at_w(term):
    """Weights, gradient and Hessian of a bowl where `Weights` starts."""
    w = Weights().w().detach().double().numpy()
    return w, HESSIANS[term] @ w + SLOPES[term], HESSIANS[term]


def of(table, measure, term="total", rho=None):
    rows = table[(table.measure == measure) & (table.term == term)]
    return rows[rows.rho.isna() if rho is None else rows.rho == rho].squeeze()


@pytest.fixture(scope="module")
def measured():
    return sharpness(Weights().eval(), bowls, HOW)


def test_there_is_a_row_for_every_measure_radius_and_term(measured):
    assert list(measured.columns) == COLUMNS
    assert not measured.duplicated(["measure", "rho", "term"]).any()
    assert len(measured) == 1 + 3 * 3 + 3 * 2 * 7
    assert measured.n.dropna().unique() == [50]
    assert measured[~measured.measure.str.contains("noise")][["low", "high", "n"]].isna().all(axis=None)


@pytest.mark.parametrize("term", TERMS)
def test_loss_and_lengths(measured, term):
    w, g, hessian = at_w(term)
    assert of(measured, "loss", term).value == pytest.approx(w @ hessian @ w / 2 + SLOPES[term] @ w, rel=1e-12)
    assert of(measured, "gradient_norm", term).value == pytest.approx(np.linalg.norm(g), rel=1e-12)
    assert of(measured, "adaptive_gradient_norm", term).value == pytest.approx(np.linalg.norm(w * g), rel=1e-12)
    assert of(measured, "weight_norm", "").value == pytest.approx(np.linalg.norm(w), rel=1e-12)


@pytest.mark.parametrize("rho", HOW.rhos)
@pytest.mark.parametrize("term", TERMS)
def test_each_term_rises_along_its_own_gradient(measured, term, rho):
    w, g, hessian = at_w(term)
    plain, adaptive = rho * g / np.linalg.norm(g), rho * w**2 * g / np.linalg.norm(w * g)
    for measure, eps in (("sam_rise", plain), ("asam_rise", adaptive)):
        assert of(measured, measure, term, rho).value == pytest.approx(g @ eps + eps @ hessian @ eps / 2, rel=1e-9)
    curvature = g @ hessian @ g / (g @ g)
    assert of(measured, "gradient_curvature", term, rho).value == pytest.approx(curvature, abs=1e-9)


def highest_in_ball(g, hessian, rho):
    """The maximum of `g^T v + v^T H v / 2` on the boundary `|v| = rho`: `(mu - H) v = g`, mu above H's largest."""
    values, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ g
    length = lambda mu: np.linalg.norm(along / (mu - values))  # noqa: E731
    start = max(values[-1], 0)
    mu = scipy.optimize.brentq(lambda mu: length(mu) - rho, start + 1e-12, start + 2 * np.linalg.norm(g) / rho)
    v = vectors @ (along / (mu - values))
    return g @ v + v @ hessian @ v / 2


@pytest.mark.parametrize("rho", HOW.rhos)
@pytest.mark.parametrize("term", TERMS)
def test_the_ascent_finds_the_highest_place_in_the_ball(measured, term, rho):
    w, g, hessian = at_w(term)
    s = np.abs(w)
    expected = highest_in_ball(g, hessian, rho), highest_in_ball(s * g, s[:, None] * hessian * s, rho)
    found = [of(measured, measure, term, rho).value for measure in ("ascent_rise", "adaptive_ascent_rise")]
    assert found == pytest.approx(expected, rel=1e-6)


def test_near_the_minimum_the_ascent_climbs_the_steepest_eigenvector():
    net = Weights().eval()
    with torch.no_grad():
        nn.utils.vector_to_parameters(1e-6 * torch.ones(PARAMETERS), net.parameters())

    def bowl(net):
        w = net.w()
        value = w @ torch.tensor(HESSIANS["similarity"]).to(w) @ w / 2
        return value, value, value

    table = sharpness(net, bowl, Landscape(rhos=[0.3], draws=2, ascent_steps=200))
    assert of(table, "ascent_rise", rho=0.3).value == pytest.approx(0.3**2 * 4 / 2, rel=1e-3)
    assert of(table, "sam_rise", rho=0.3).value < 0.9 * 0.3**2 * 4 / 2


def test_an_ascent_is_never_lower_than_sams_step():
    for steps in (0, 1, 3):
        table = sharpness(Weights().eval(), bowls, Landscape(rhos=[0.01, 3.0], draws=2, ascent_steps=steps))
        for sam, ascent in (("sam_rise", "ascent_rise"), ("asam_rise", "adaptive_ascent_rise")):
            first, higher = (table[table.measure == name].value.to_numpy() for name in (sam, ascent))
            assert (higher >= first).all()
            assert (steps == 0) == (higher == first).all()


def test_noise_rises_by_the_mean_curvature(measured):
    """`rho^2 trace(H) / (2 n)` in expectation, whatever the gradient; adaptive: of `s H s`."""
    net, rho = Weights().eval(), 0.5
    table = sharpness(net, bowls, Landscape(rhos=[rho], draws=2000, ascent_steps=0, direction_seed=4))
    for term in ("total", "similarity"):
        w, _, hessian = at_w(term)
        for measure, trace in (("noise_rise", hessian.trace()), ("adaptive_noise_rise", w**2 @ hessian.diagonal())):
            row, wide = of(table, measure, term, rho), of(measured, measure, term, rho)
            assert row.low < rho**2 * trace / (2 * PARAMETERS) < row.high
            assert row.low < row.value < row.high
            assert row.high - row.low < 0.3 * (wide.high - wide.low)  # 40 times as many draws
    assert of(table, "noise_rise", "regulariser", rho).value == pytest.approx(0, abs=1e-12)  # pairs cancel a slope


def test_noise_is_seeded(measured):
    again, other = (
        sharpness(Weights().eval(), bowls, HOW.model_copy(update={"direction_seed": seed})) for seed in (0, 1)
    )
    assert again.equals(measured)
    assert of(other, "noise_rise", rho=0.5).value != of(measured, "noise_rise", rho=0.5).value


def test_the_interval_is_students():
    samples = np.random.default_rng(0).standard_normal(7)
    mean, low, high = mean_interval(samples)
    expected = scipy.stats.t.interval(0.95, 6, loc=samples.mean(), scale=scipy.stats.sem(samples))
    assert (mean, low, high) == pytest.approx((samples.mean(), *expected))
    assert np.isnan(mean_interval([1.0])[1:]).all()


def test_adaptive_measures_do_not_see_a_rescaling_of_the_layers():
    """Ten times the first layer and a tenth of the second is the same function (Dinh 2017), but elsewhere in absolute
    distances."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.LeakyReLU(), nn.Linear(8, 2, bias=False)).eval()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    rescaled = copy.deepcopy(net)
    with torch.no_grad():
        rescaled[0].weight.mul_(8)  # powers of 2 round nothing
        rescaled[2].weight.div_(8)

    def terms(net):
        errors = (net(x) - y) ** 2
        return errors.mean(), errors[:, 0].mean(), errors[:, 1].mean()

    one, other = (sharpness(n, terms, Landscape(rhos=[0.1, 0.5], draws=3, ascent_steps=5)) for n in (net, rescaled))
    adaptive = one.measure.str.contains("adaptive|asam") | (one.measure == "loss")
    np.testing.assert_allclose(one[adaptive].value, other[adaptive].value, rtol=1e-9)
    plain = one[~adaptive & (one.measure != "gradient_curvature")].index
    assert (np.abs(one.value[plain] / other.value[plain] - 1) > 0.05).all()


def test_a_weight_of_zero_stays_in_adaptive_measures():
    net = Weights().eval()
    nn.init.zeros_(net.b)

    def terms(net):
        of_b = net.b.sum() + (net.b**2).sum()
        return of_b, of_b, net.a.sum()

    table = sharpness(net, terms, Landscape(rhos=[0.1], draws=2, ascent_steps=3))
    for measure in ("adaptive_gradient_norm", "asam_rise", "adaptive_ascent_rise", "adaptive_noise_rise"):
        assert table[(table.measure == measure) & (table.term == "total")].value.item() == 0
    assert of(table, "sam_rise", rho=0.1).value > 0.1


def test_without_a_gradient_there_is_no_climb():
    net = Weights().eval()
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.zeros(PARAMETERS), net.parameters())

    def terms(net):  # a minimum, a constant with a graph, one without
        return (net.w() ** 2).sum(), 0 * net.w().sum() + 2, torch.tensor(3.0)

    table = sharpness(net, terms, Landscape(rhos=[0.5], draws=3, ascent_steps=3))
    for term in TERMS:
        for measure in ("sam_rise", "asam_rise", "ascent_rise", "adaptive_ascent_rise"):
            assert of(table, measure, term, 0.5).value == 0
        assert np.isnan(of(table, "gradient_curvature", term, 0.5).value)
        assert of(table, "gradient_norm", term).value == 0
    assert of(table, "noise_rise", rho=0.5).value > 0
    assert of(table, "noise_rise", "regulariser", 0.5).value == 0
    assert list(table[table.measure == "loss"].value) == [0, 2, 3]


def test_what_meets_a_loss_that_is_not_finite_is_nan():
    net = Weights().eval()
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.full((PARAMETERS,), 0.1), net.parameters())

    def terms(net):  # defined up to |w| = 1; infinite; a plane
        w = net.w()
        return 1 - torch.sqrt(1 - w @ w), w.sum() / 0, w.sum()

    table = sharpness(net, terms, Landscape(rhos=[0.1, 2.0], draws=2, ascent_steps=2))
    assert len(table) == 1 + 3 * 3 + 3 * 2 * 7
    by_term = {term: table[table.term == term] for term in TERMS}
    assert by_term["similarity"].value.isna().all()
    assert np.isfinite(of(table, "noise_rise", "total", 0.1).value)
    assert np.isnan(of(table, "noise_rise", "total", 2.0).value)
    assert by_term["regulariser"][by_term["regulariser"].measure.isin(["loss", "noise_rise"])].value.notna().all()


def images(shape=(16, 16), n=1, seed=0):
    """Smooth blobs, and the points of the penalty."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2 * n, 1, *[5] * len(shape), generator=generator)
    smooth = F.interpolate(coarse, shape, mode="bilinear" if len(shape) == 2 else "trilinear", align_corners=True)
    return Batch(smooth[:n], smooth[n:], jittered_points(shape, generator))


def network(dim=2, *, down=(2,), levels=1):
    torch.manual_seed(0)
    net = GradICON(dim, down=down, levels=levels, last_step=False)
    for step in net.steps:
        nn.init.normal_(step.last.weight, std=0.3)
    return net.eval()


def terms_on(batch):
    batch = Batch(*(None if t is None else t.double() for t in batch))
    return lambda net: objective(net, batch, **LOSS)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_networks_rise_is_that_at_sams_own_step(dim, adaptive):
    net, terms = network(dim), terms_on(images((16,) * dim))
    table = sharpness(net, terms, Landscape(rhos=[0.05], draws=2, ascent_steps=3))
    double = copy.deepcopy(net).double()
    for i, term in enumerate(TERMS):
        double.zero_grad()
        terms(double)[i].backward()
        before = terms(double)[i].item()
        with SAM(double.parameters(), 0.05, adaptive).perturbed():
            expected = terms(double)[i].item() - before
        measure = "asam_rise" if adaptive else "sam_rise"
        assert of(table, measure, term, 0.05).value == pytest.approx(expected, rel=1e-8)
        assert of(table, measure, term, 0.05).value > 0


def test_the_network_stays_as_it_is():
    net = network(down=(4, 4), levels=2)
    net.steps[0].last.bias.requires_grad_(False)
    before, frozen, state = fingerprint(net), [p.requires_grad for p in net.parameters()], torch.get_rng_state()
    sharpness(net, terms_on(images()), Landscape(rhos=[0.1], draws=2, ascent_steps=2))
    assert fingerprint(net) == before
    assert [p.requires_grad for p in net.parameters()] == frozen
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training


def test_half_precision_in_training_does_not_round_what_is_measured():
    net, terms = network(), terms_on(images())
    expected = sharpness(net, terms, Landscape(rhos=[0.1], draws=2, ascent_steps=1))
    net.precision = "bf16"
    assert sharpness(net, terms, Landscape(rhos=[0.1], draws=2, ascent_steps=1)).equals(expected)
    assert net.precision == "bf16"


def test_a_network_of_nan_is_measured_as_nan():
    """Going back through NaN, grid_sample would take the process with it."""
    net = network(down=(4, 4), levels=2)
    with torch.no_grad():
        net.steps[0].last.bias.fill_(np.nan)
    table = sharpness(net, terms_on(images()), Landscape(rhos=[0.1], draws=2, ascent_steps=2))
    assert table.value.isna().all()


def test_a_networks_mode_changes_no_measure():
    net, terms, how = network(down=(4, 4), levels=2), terms_on(images()), Landscape(rhos=[0.1], draws=2, ascent_steps=1)
    expected, before = sharpness(net, terms, how), fingerprint(net)
    net.steps[0].norm[0].train()  # a part is enough to move its statistics
    assert sharpness(net, terms, how).equals(expected)
    assert sharpness(net.train(), terms, how).equals(expected)
    assert fingerprint(net) == before
    assert all(m.training for m in net.modules())
