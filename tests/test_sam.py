import pytest
import torch
from torch import nn

from fmsam_lib.sam import SAM


def quadratic(w, curvature):
    return 0.5 * (curvature * w**2).sum()


def test_the_rise_on_a_bowl_is_the_analytic_one():
    """L(w + rho g/|g|) - L(w) with g = c w."""
    c = torch.tensor([1.0, 10.0], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))
    quadratic(w, c).backward()
    before, g, sam = quadratic(w, c).item(), w.grad.clone(), SAM([w], rho=0.1)
    with sam.perturbed():
        after = quadratic(w, c).item()
    eps = 0.1 * g / g.norm()
    assert after - before == pytest.approx((g @ eps + 0.5 * (c * eps**2).sum()).item(), rel=1e-12)
    assert sam.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)
    assert sam.step_norm == pytest.approx(0.1, rel=1e-12)


def test_the_adaptive_step_is_relative_to_the_weights():
    w = nn.Parameter(torch.tensor([2.0, -0.5], dtype=torch.float64))
    w.grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
    scaled = w.detach().abs() * w.grad
    expected = w.detach() + 0.2 * w.detach().abs() * scaled / scaled.norm()
    with SAM([w], rho=0.2, adaptive=True).perturbed():
        torch.testing.assert_close(w.detach().clone(), expected, rtol=1e-12, atol=0)


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(16, 5)
    return net, lambda: (net(x) - x.sum(1, keepdim=True)).pow(2).mean()


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(net, saved):
    return all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_weights_and_statistics_come_back_to_the_bit_on_every_way_out(raised):
    net, loss = model()
    loss().backward()
    saved, storage = state(net), [p.data_ptr() for p in net.parameters()]
    sam = SAM(net.parameters(), rho=0.3, net=net)
    try:
        with sam.perturbed():
            assert not same(net, saved)
            net.zero_grad()
            loss().backward()  # moves BatchNorm's statistics
            if raised:
                raise raised
    except (ValueError, KeyboardInterrupt):
        assert raised
    assert same(net, saved)
    assert storage == [p.data_ptr() for p in net.parameters()]


def test_a_parameter_whose_second_gradient_is_none_comes_back_too():
    net, loss = model()
    loss().backward()
    saved = state(net)
    with SAM(net.parameters(), rho=0.3, net=net).perturbed():
        net.zero_grad(set_to_none=True)
    assert same(net, saved)


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    net, loss = model()
    loss().backward()
    saved = state(net)
    next(net.parameters()).grad[0] = float("nan")
    with SAM(net.parameters(), rho=0.3, net=net).perturbed():
        assert not all(torch.isfinite(p).all() for p in net.parameters())
    assert same(net, saved)


def test_frozen_parameters_do_not_move():
    net, loss = model()
    net[0].weight.requires_grad_(False)
    loss().backward()
    frozen = net[0].weight.clone()
    with SAM(net.parameters(), rho=0.3).perturbed():
        assert torch.equal(net[0].weight, frozen)


def train(rho, steps=10):
    net, loss = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    sam = None if rho is None else SAM(net.parameters(), rho, net=net)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        if sam:
            with sam.perturbed():
                optimizer.zero_grad()
                loss().backward()
        optimizer.step()
    return state(net)


def test_rho_zero_is_the_base_optimizer_to_the_bit():
    base, sam = train(None), train(0.0)
    assert all(torch.equal(base[name], sam[name]) for name in base)
    assert any(not torch.equal(base[name], value) for name, value in train(0.1).items())


def test_groups_have_their_own_rho_and_one_norm():
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    with SAM([{"params": [a], "rho": 1.0}, {"params": [b]}], rho=10.0).perturbed():
        assert a.item() == pytest.approx(3 / 5)
        assert b.item() == pytest.approx(10 * 4 / 5)


def test_a_zero_gradient_moves_nothing():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    with SAM([w], rho=0.1).perturbed():
        assert torch.equal(w, torch.ones(3))


def test_half_precision_gradients_do_not_overflow_the_norm():
    w = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    w.grad = torch.full((4,), 30000.0, dtype=torch.float16)
    sam = SAM([w], rho=1.0)
    with sam.perturbed():
        assert w.tolist() == pytest.approx([0.5] * 4, abs=1e-3)
    assert sam.gradient_norm == pytest.approx(60000)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="rho to be a finite number >= 0, got -1"):
        SAM([nn.Parameter(torch.ones(1))], rho=-1)
    with pytest.raises(ValueError, match="expected parameters"):
        SAM([], rho=0.1)
    with pytest.raises(RuntimeError, match="call backward"), SAM([nn.Parameter(torch.ones(1))], rho=0.1).perturbed():
        pass
