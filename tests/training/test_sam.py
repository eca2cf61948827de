import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.loop import fit, make_batches, starting
from fmsam_lib.training.losses import Loss, objective
from fmsam_lib.training.sam import SAM, norm
from fmsam_lib.training.step import perturbation, train_step


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


def test_one_block_of_autocast_around_both_passes_climbs_as_two_do():
    """It keeps the weights' copies in half precision to its end."""

    def half(precision: bool):
        return torch.autocast("cpu", torch.bfloat16) if precision else contextlib.nullcontext()

    torch.manual_seed(0)
    net, x, found = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 4), []
    for one in (True, False):
        net.zero_grad()
        sam = SAM(net.parameters(), rho=1.0)
        with half(one):
            with half(not one):
                net(x).square().mean().backward()
            with sam.perturbed(), half(not one):
                net.zero_grad()
                net(x).square().mean().backward()
            with half(not one):
                found.append([*(p.grad.clone() for p in net.parameters()), net(x).detach()])
    assert all(map(torch.equal, *found))


def test_the_adaptive_step_is_relative_to_the_weights():
    w = nn.Parameter(torch.tensor([2.0, -0.5], dtype=torch.float64))
    w.grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
    scaled = w.detach().abs() * w.grad
    expected = w.detach() + 0.2 * w.detach().abs() * scaled / scaled.norm()
    with SAM([w], rho=0.2, adaptive=True).perturbed():
        torch.testing.assert_close(w.detach().clone(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"by_layer": True}, {"random_seed": 0}])
def test_two_parameters_of_one_memory_are_refused(options):
    """They would be moved twice: by |w|, not by rho."""
    encoder, decoder = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
    decoder.weight = nn.Parameter(encoder.weight.t())
    before = encoder.weight.detach().clone()
    decoder(encoder(torch.rand(2, 4))).sum().backward()
    sam = SAM([encoder.weight, decoder.weight], rho=0.1, **options)
    with pytest.raises(RuntimeError, match="parameters with memory of their own"), sam.perturbed():
        pass
    assert torch.equal(encoder.weight, before)
    flat = torch.rand(6)
    parts = [nn.Parameter(flat[:3]), nn.Parameter(flat[3:])]  # of one memory, each its own part of it
    torch.cat(parts).square().sum().backward()
    sam = SAM(parts, rho=0.1)
    with sam.perturbed():
        pass
    assert sam.step_norm > 0


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


class Moving(nn.Module):
    """A layer that puts other tensors in its buffers' place, beside a buffer that nobody can write to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("late", None)
        self.register_buffer("window", torch.ones(1).expand(2))

    def forward(self, x):
        y = self.layer(x) * self.window
        self.mean, self.late = 0.9 * self.mean + 0.1 * y.detach().mean(0), y.detach()
        return y - self.mean


def test_buffers_that_a_module_replaces_come_back_too():
    net, x = Moving(), torch.randn(4, 3)
    sam = SAM(net.parameters(), rho=0.5, net=net)
    net(x).pow(2).sum().backward()
    buffers, values = dict(net.named_buffers()), [buffer.clone() for buffer in net.buffers()]
    with sam.perturbed():
        net.mean += 1
        net(x).pow(2).sum().backward()
    assert all(net.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(torch.equal(*both) for both in zip(net.buffers(), values, strict=True))


def test_buffers_that_grow_or_cannot_be_written_to_stop_nothing():
    net = nn.Linear(4, 2)
    net.register_buffer("kept", torch.ones(2))
    with torch.inference_mode():
        net.register_buffer("fixed", torch.zeros(3))
    sam, before = SAM(net.parameters(), rho=0.5, net=net), net.weight.detach().clone()
    sam.remember()
    net(torch.randn(4, 4)).sum().backward()
    after = torch.get_rng_state()
    with sam.perturbed():
        net.kept.resize_(5).fill_(7)
        net(torch.randn(4, 4)).sum().backward()
    assert net.kept.tolist() == [1, 1]
    assert torch.equal(net.weight, before)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_parameter_whose_second_gradient_is_none_comes_back_too():
    net, loss = model()
    loss().backward()
    saved = state(net)
    with SAM(net.parameters(), rho=0.3, net=net).perturbed():
        net.zero_grad(set_to_none=True)
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


TAKEN = {  # ways to give a layer's weight and bias, all of which torch's optimizers take
    "a list": lambda w, b: [w, b],
    "a generator": lambda w, b: (p for p in (w, b)),
    "a dict's values": lambda w, b: {"w": w, "b": b}.values(),
    "named": lambda w, b: [("w", w), ("b", b)],
    "a generator of named": lambda w, b: (pair for pair in (("w", w), ("b", b))),
    "groups of one tensor": lambda w, b: [{"params": w}, {"params": b}],
    "a generator of groups": lambda w, b: ({"params": p} for p in (w, b)),
    "a tensor, a tuple": lambda w, b: [{"params": w}, {"params": (b,)}],
    "groups of generators": lambda w, b: [{"params": (p for p in (w, b))}],
    "groups of named": lambda w, b: [{"params": [("w", w)]}, {"params": iter([("b", b)])}],
    "an empty group": lambda w, b: [{"params": []}, {"params": [w, b]}],
    "other keys": lambda w, b: [{"params": w, "lr": 0.1, "name": "w"}, {"params": [b], "weight_decay": 0.0}],
    "an optimizer's groups": lambda w, b: torch.optim.AdamW([{"params": w, "lr": 0.1}, {"params": b}]).param_groups,
    "its groups, named": lambda w, b: torch.optim.SGD([("w", w), ("b", b)], lr=0.1).param_groups,
}


@pytest.mark.parametrize("give", TAKEN.values(), ids=TAKEN.keys())
def test_what_torchs_optimizers_take_climbs_whole(give):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    torch.optim.SGD(give(layer.weight, layer.bias), lr=0.1)
    sam = SAM(give(layer.weight, layer.bias), 0.1)
    layer(torch.randn(8, 5).double()).pow(2).mean().backward()
    w, g = flat(layer), torch.cat([p.grad.flatten() for p in layer.parameters()])
    with sam.perturbed():
        torch.testing.assert_close(flat(layer) - w, 0.1 * g / g.norm(), rtol=1e-12, atol=1e-15)
    assert torch.equal(flat(layer), w)


def test_every_group_of_one_tensor_has_its_rho():
    a, b, c = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(3))
    for p, g in ((a, 2.0), (b, 3.0), (c, 6.0)):
        p.grad = torch.tensor(g, dtype=torch.float64)
    with SAM([{"params": a, "rho": 7.0}, {"params": [b], "rho": 14.0}, {"params": c}], rho=1.0).perturbed():
        assert [p.item() for p in (a, b, c)] == pytest.approx([2, 6, 6 / 7], rel=1e-12)


def test_the_groups_given_stay_as_they_are():
    w = nn.Parameter(torch.ones(2))
    optimizer, group = torch.optim.Adam([w]), {"params": w}
    before = [dict(g) for g in optimizer.param_groups]
    SAM(optimizer.param_groups, 0.1)
    SAM([group], 0.1)
    assert optimizer.param_groups == before
    assert group.keys() == {"params"}
    assert group["params"] is w


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (nn.Parameter(torch.ones(2)), "iterable of Tensors or dicts"),
        (nn.Parameter(torch.ones(())), "iterable of Tensors or dicts"),
        (nn.Linear(2, 1), "not iterable"),
        (nn.Sequential(nn.Linear(2, 1)), "one of the params is torch.nn.modules.linear.Linear"),
        ({"params": [nn.Parameter(torch.ones(2))]}, "one of the params is str"),
        ([1.0], "one of the params is float"),
        ([{"params": [None]}], "one of the params is NoneType"),
        ([{"rho": 0.1}], r"KeyError\(.params.\)"),
        ([{"params": [nn.Parameter(torch.ones(2))]}, nn.Parameter(torch.ones(2))], "must be a dict"),
        ([{"params": {nn.Parameter(torch.ones(2))}}], "ordered collections"),
        ([2 * nn.Parameter(torch.ones(2))], "non-leaf"),
    ],
)  # fmt: skip
def test_what_torchs_optimizers_refuse_is_refused(params, match):
    with pytest.raises(ValueError, match=f"expected parameters as torch's optimizers take them.*{match}"):
        SAM(params, 0.1)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"random_seed": 0}, {"every": 2, "alpha": 0.7}], ids=str)
@pytest.mark.parametrize("kind", ["complex", "sparse_coo"])
def test_complex_and_sparse_gradients_are_refused_before_anything_moves(kind, options):
    net, loss = model()
    strange = (
        nn.Parameter(torch.ones(4, dtype=torch.complex64)) if kind == "complex" else nn.Embedding(5, 2, sparse=True)
    )
    value = strange.abs().pow(2).sum() if kind == "complex" else strange(torch.tensor([1, 3])).pow(2).sum()
    (loss() + value).backward()
    saved = state(net)
    sam = SAM([*net.parameters(), *([strange] if kind == "complex" else strange.parameters())], 0.1, **options)
    with pytest.raises(RuntimeError, match=f"expected real, dense gradients, got .*{kind}"), sam.perturbed():
        pytest.fail("entered the block")
    assert same(net, saved)


def test_complex_weights_without_a_gradient_do_no_harm():
    net, loss = model()
    loss().backward()
    saved = state(net)
    with SAM([*net.parameters(), nn.Parameter(torch.ones(4, dtype=torch.complex64))], 0.1).perturbed():
        assert not same(net, saved)


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


# The equations, over whole trainings

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def smooth(dtype=torch.float32):
    """A network without kinks, and its loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(16, 5).to(dtype)
    return net, lambda: (net(x) - torch.sin(x[:, :2])).pow(2).mean()


def run(optimizer, sam, loss, steps=20):
    """The loop of the README."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        if sam.due:
            with sam.perturbed():
                optimizer.zero_grad()
                loss().backward()
        else:
            sam.between()
        optimizer.step()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
def test_twenty_steps_are_those_of_pytorch_optimizer(base, adaptive):
    peer = pytest.importorskip("pytorch_optimizer")
    ours, loss = smooth()
    run(BASES[base](ours.parameters()), SAM(ours.parameters(), 0.1, adaptive), loss)
    theirs, loss = smooth()
    settings = dict(BASES[base](theirs.parameters()).defaults)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[base]
    settings = {k: v for k, v in settings.items() if k in ("lr", "momentum", "weight_decay")}
    optimizer = peer.SAM(theirs.parameters(), kind, rho=0.1, adaptive=adaptive, **settings)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(20):
        closure()
        optimizer.step(closure)
    assert (flat(ours) - flat(theirs)).abs().max() <= 1e-6
    assert (flat(ours) - flat(smooth()[0])).abs().max() > 0.05


def by_the_paper(net, loss, base, steps=20, *, rho=0.1, adaptive=False, every=1, alpha=0.0):
    """SAM (Foret et al. 2021), ASAM (Kwon et al. 2021), LookSAM (Liu et al. 2022), written out on one vector."""
    optimizer = BASES[base](net.parameters())
    put, vertical = torch.nn.utils.vector_to_parameters, None

    def gradient(w):
        put(w, net.parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(net.parameters()))])

    for t in range(steps):
        w = flat(net)
        g = gradient(w)
        if t % every == 0:
            eps = rho * w**2 * g / (w * g).norm() if adaptive else rho * g / g.norm()
            moving = gradient(w + eps)
            cosine = torch.cosine_similarity(g, moving, dim=0)
            vertical = moving - moving.norm() * cosine * g / g.norm()
        else:
            moving = g + alpha * g.norm() / vertical.norm() * vertical if alpha else g
        put(w, net.parameters())
        parts = moving.split([p.numel() for p in net.parameters()])
        for p, part in zip(net.parameters(), parts, strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()


@pytest.mark.parametrize(
    "variant", [{}, {"adaptive": True}, {"every": 5}, {"every": 5, "alpha": 0.7}, {"every": 1, "alpha": 0.7}], ids=str
)
@pytest.mark.parametrize("base", BASES)
def test_twenty_steps_are_those_of_the_papers_equations(base, variant):
    ours, loss = smooth(torch.float64)
    run(BASES[base](ours.parameters()), SAM(ours.parameters(), 0.1, **variant), loss)
    reference, loss = smooth(torch.float64)
    by_the_paper(reference, loss, base, **variant)
    assert (flat(ours) - flat(reference)).abs().max() <= 1e-12


def test_looksam_is_that_of_pytorch_optimizer_on_one_tensor():
    """The peer takes g_v tensor by tensor, the paper over all weights: the same where there is one tensor.

    In float64, as g_v is a small difference of large vectors; what is left is the 1e-8 that the peer adds to |g_v|.
    """
    peer = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    start, curvature = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def bowl(w):
        return quadratic(w, curvature) + 0.1 * torch.sin(w).prod()

    run(torch.optim.SGD([ours], lr=0.05), SAM([ours], 0.1, every=5, alpha=0.7), lambda: bowl(ours))
    optimizer = peer.LookSAM([theirs], torch.optim.SGD, rho=0.1, k=5, alpha=0.7, lr=0.05)

    def closure():
        optimizer.zero_grad()
        bowl(theirs).backward()

    for _ in range(20):
        closure()
        optimizer.step(closure)
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("base", BASES)
def test_looksam_with_every_step_is_sam_to_the_bit(base):
    nets = []
    for options in ({}, {"every": 1, "alpha": 0.7}):
        net, loss = smooth()
        run(BASES[base](net.parameters()), SAM(net.parameters(), 0.1, **options), loss)
        nets.append(flat(net))
    assert torch.equal(*nets)


@pytest.mark.parametrize(
    "variant", [{"adaptive": True}, {"every": 5}, {"every": 5, "alpha": 0.7}, {"random_seed": 3}], ids=str
)
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_every_base_optimizer_to_the_bit_in_every_variant(base, variant):
    net, loss = smooth()
    run(BASES[base](net.parameters()), SAM(net.parameters(), 0.0, **variant), loss)
    plain, loss = smooth()
    optimizer = BASES[base](plain.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert torch.equal(flat(net), flat(plain))


def test_what_looksam_keeps_is_vertical_and_as_long_as_promised():
    net, loss = smooth(torch.float64)
    sam = SAM(net.parameters(), 0.1, every=2, alpha=0.7)
    loss().backward()
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    with sam.perturbed():
        net.zero_grad()
        loss().backward()
    vertical = torch.cat([v.flatten() for v in sam.vertical])
    assert abs(vertical @ g) < 1e-12 * vertical.norm() * g.norm()
    assert not sam.due
    net.zero_grad()
    loss().backward()
    before = torch.cat([p.grad.flatten() for p in net.parameters()])
    sam.between()
    added = torch.cat([p.grad.flatten() for p in net.parameters()]) - before
    assert added.norm().item() == pytest.approx(0.7 * before.norm().item(), rel=1e-12)
    assert sam.due


def test_climbs_come_every_so_many_steps():
    net, loss = smooth()
    sam, due = SAM(net.parameters(), 0.1, every=3), []
    for _ in range(7):
        loss().backward()
        due.append(sam.due)
        if sam.due:
            with sam.perturbed():
                pass
        else:
            sam.between()
    assert due == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    "variant", [{}, {"every": 4}, {"every": 4, "alpha": 0.7}, {"random_seed": 1}, {"adaptive": True}], ids=str
)
@pytest.mark.parametrize("kept", [6, 8])
def test_a_training_goes_on_from_its_state_to_the_bit(kept, variant, tmp_path):
    whole, loss = smooth()
    run(BASES["adam"](whole.parameters()), SAM(whole.parameters(), 0.1, **variant), loss, 13)

    net, loss = smooth()
    optimizer, sam = BASES["adam"](net.parameters()), SAM(net.parameters(), 0.1, **variant)
    run(optimizer, sam, loss, kept)
    torch.save([net.state_dict(), optimizer.state_dict(), sam.state_dict()], tmp_path / "state.pt")
    net, loss = smooth()
    optimizer, sam = BASES["adam"](net.parameters()), SAM(net.parameters(), 99.0, **variant)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((net, optimizer, sam), states, strict=True):
        part.load_state_dict(state)
    run(optimizer, sam, loss, 13 - kept)
    assert torch.equal(flat(net), flat(whole))


# The climb


def test_a_random_direction_has_the_same_radius_and_is_drawn_by_seed_and_step():
    steps = []
    for seed in (0, 0, 1):
        net, loss = smooth(torch.float64)
        before = flat(net)
        loss().backward()
        state = torch.get_rng_state()
        sam = SAM(net.parameters(), 0.1, random_seed=seed)
        for _ in range(2):
            with sam.perturbed():
                steps.append(flat(net) - before)
        assert torch.equal(state, torch.get_rng_state())
    assert [step.norm().item() for step in steps] == pytest.approx([0.1] * 6, rel=1e-12)
    assert torch.equal(steps[0], steps[2])
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[4])


def test_a_random_direction_is_not_the_noise_of_the_losss_points():
    """A training jitters the points of GradICON's penalty by the generator of seed * 1_000_003 + step."""
    for seed in (0, 3):
        w = nn.Parameter(torch.zeros(200))
        sam = SAM([w], 1.0, random_seed=seed)
        for step in range(3):
            w.grad = torch.ones(200)
            noise = torch.randn(200, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
            with sam.perturbed():
                assert abs(torch.cosine_similarity(w, noise, dim=0)) < 0.3


def test_what_is_logged_is_what_happened():
    net, loss = smooth(torch.float64)
    w, value = flat(net), loss()
    value.backward()
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    sam = SAM(net.parameters(), 0.1, adaptive=True)
    with sam.perturbed():
        eps = flat(net) - w
        net.zero_grad()
        there = loss()
        there.backward()
    sam.rise = there.detach() - value.detach()
    second = torch.cat([p.grad.flatten() for p in net.parameters()])
    expected = {
        "rho": 0.1, "gradient_norm": g.norm(), "gradient_norm_there": second.norm(), "step_norm": eps.norm(),
        "step_ratio": eps.norm() / w.norm(), "rise": (there - value).detach(),
    }  # fmt: skip
    assert sam.logged() == pytest.approx({name: float(v) for name, v in expected.items()}, rel=1e-9)


def test_the_radius_may_change_from_step_to_step():
    w = nn.Parameter(torch.zeros(1))
    w.grad = torch.ones(1)
    sam = SAM([w], 0.1)
    sam.groups[0]["rho"] = 0.06
    with sam.perturbed():
        assert w.item() == pytest.approx(0.06)


def test_a_group_of_rho_zero_stays_and_counts_in_the_norm():
    a, b = (nn.Parameter(torch.tensor([-0.0], dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    with SAM([{"params": [a], "rho": 0.0}, {"params": [b], "rho": 1.0}]).perturbed():
        assert a.item() == 0
        assert b.item() == pytest.approx(4 / 5)
    assert torch.signbit(a).item()  # back to the bit


# Ways of going wrong


@pytest.mark.parametrize("kernel", ["_foreach_copy_", "_foreach_mul_", "_foreach_add_"])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_what_is_raised_in_the_middle_of_the_climb_leaves_no_trace(kernel, raised, monkeypatch):
    net, loss = model()
    loss().backward()
    saved, sam, works = state(net), SAM(net.parameters(), rho=0.3, net=net), getattr(torch, kernel)

    def fails_once(*args):
        monkeypatch.setattr(torch, kernel, works)
        works(*args)
        raise raised

    monkeypatch.setattr(torch, kernel, fails_once)
    with pytest.raises(raised), sam.perturbed():
        pytest.fail("entered the block")
    assert same(net, saved)


@pytest.mark.parametrize("way", ["return", "break", "sys.exit", "generator"])
def test_other_ways_out_of_the_block_restore_too(way):
    net, loss = model()
    loss().backward()
    saved, sam = state(net), SAM(net.parameters(), rho=0.3, net=net)

    def leave():
        for _ in range(1):
            with sam.perturbed():
                loss()
                if way == "generator":
                    yield
                if way == "sys.exit":
                    raise SystemExit
                if way == "return":
                    return
                break

    if way == "sys.exit":
        with pytest.raises(SystemExit):
            list(leave())
    elif way == "generator":
        walking = leave()
        next(walking)
        assert not same(net, saved)
        walking.close()
    else:
        list(leave())
    assert same(net, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"random_seed": 0}, {"by_layer": True}], ids=str)
def test_one_gradient_that_is_not_finite_leaves_none_that_looks_fine(value, options):
    net, loss = model()
    loss().backward()
    saved = state(net)
    net[0].bias.grad[3] = value
    with SAM(net.parameters(), rho=0.3, net=net, **options).perturbed():
        assert same(net, saved)
        net.zero_grad()
        loss().backward()
    assert same(net, saved)
    assert all(torch.isnan(p.grad).all() for p in net.parameters())


def test_a_loop_may_go_back_through_finite_losses_alone():
    net, loss = model()
    loss().backward()
    saved = state(net)
    net[0].bias.grad[3] = float("nan")
    with SAM(net.parameters(), rho=0.3, net=net).perturbed():
        net.zero_grad()
    assert same(net, saved)
    assert all(p.grad is None for p in net.parameters())


def test_the_second_gradient_not_finite_is_not_kept_by_looksam():
    net, loss = smooth()
    sam = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    loss().backward()
    with sam.perturbed():
        net[0].bias.grad[0] = float("nan")
    assert sam.due  # climbs again, at once
    net.zero_grad()
    loss().backward()
    with sam.perturbed():
        net.zero_grad()
        loss().backward()
    assert not sam.due
    assert all(torch.isfinite(v).all() for v in sam.vertical)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", ["inside", "behind", "behind, a tensor"])
def test_looksam_keeps_nothing_of_a_second_pass_that_stopped_half_way(when, value):
    """The loss of the second micro-batch is not finite: `.grad` holds the first one's gradient, all finite."""
    net, loss = smooth()
    sam = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    loss().backward()
    with sam.perturbed():
        net.zero_grad()
        (loss() / 2).backward()
        if when == "inside":
            sam.rise = value
    if when != "inside":
        sam.rise = torch.tensor(value) if "tensor" in when else value
    assert sam.vertical is None
    assert sam.due
    net.zero_grad()
    loss().backward()
    with sam.perturbed():  # what went wrong then counts no more
        net.zero_grad()
        loss().backward()
    assert not sam.due
    sam.rise = 0.1
    assert not sam.due


def test_a_rise_that_hangs_on_its_graph_is_cut_off(recwarn):
    w = nn.Parameter(torch.ones(2))
    sam = SAM([w], every=2, alpha=0.7)
    w.prod().backward()
    with sam.perturbed():
        w.prod().backward()
    sam.rise = w.prod()
    assert not sam.rise.requires_grad
    copy.deepcopy(sam)
    assert not recwarn


@pytest.mark.parametrize("set_to_none", [True, False])
def test_looksam_keeps_nothing_of_a_second_pass_without_any_gradient(set_to_none):
    net, loss = smooth()
    sam = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    loss().backward()
    with sam.perturbed():
        net.zero_grad(set_to_none=set_to_none)
    assert sam.vertical is None
    assert sam.due


@pytest.mark.parametrize("rise", [None, 0.1])
def test_looksams_direction_comes_back_from_its_state_whether_or_not_the_rise_was_set(rise):
    net, loss = smooth()
    sam = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    loss().backward()
    with sam.perturbed():
        net.zero_grad()
        loss().backward()
    if rise is not None:
        sam.rise = rise
    other = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    for _ in range(2):  # also over a state that it has already
        other.load_state_dict(sam.state_dict())
        assert not other.due
        assert all(torch.equal(a, b) for a, b in zip(other.vertical, sam.vertical, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_training_steps_second_pass_that_is_not_finite_leaves_looksam_no_direction(accumulate, monkeypatch, tmp_path):
    settings = {"out": str(tmp_path), "shape": [16, 16], "down": [4, 4], "levels": 2, "steps": 20, "batch": 4}
    run = read(Train, settings | {"sigma": 3.0, "optimizer": "looksam", "every": 5, "accumulate": accumulate})
    net, data, state, calls = (
        starting(run).train(),
        open_domain("brain-mr", shape=(16, 16)),
        State(),
        itertools.count(1),
    )
    net.shape = (16, 16)
    sam, optimizer = perturbation(net, run), torch.optim.Adam(net.parameters(), run.lr)

    def poisoned(*args, **options):
        loss = objective(*args, **options)
        return Loss(*(part * float("nan") for part in loss)) if next(calls) == 2 * accumulate else loss

    monkeypatch.setattr("fmsam_lib.training.step.objective", poisoned)
    train_step(net, make_batches(data, run, 0), run, optimizer, sam, state)
    assert (state.skipped, sam.vertical, sam.due) == (1, None, True)
    train_step(net, make_batches(data, run, 1), run, optimizer, sam, state)
    assert (state.skipped, sam.due) == (1, False)
    assert sam.vertical is not None


def test_looksam_takes_a_missing_second_gradient_as_zero():
    net, loss = smooth()
    sam = SAM(net.parameters(), 0.1, every=5, alpha=0.7)
    loss().backward()
    saved = state(net)
    with sam.perturbed():
        net.zero_grad()
        loss().backward()
        net[2].bias.grad = None
    assert same(net, saved)
    net.zero_grad()
    loss().backward()
    net[0].bias.grad = None
    sam.between()
    assert net[0].bias.grad is None


def test_a_parameter_frozen_after_its_gradient_does_not_move():
    net, loss = model()
    loss().backward()
    net[0].weight.requires_grad_(False)
    frozen, g = net[0].weight.clone(), [p.grad.clone() for p in net.parameters() if p.requires_grad]
    sam = SAM(net.parameters(), rho=0.3)
    with sam.perturbed():
        assert torch.equal(net[0].weight, frozen)
    assert sam.gradient_norm == pytest.approx(torch.cat([x.flatten() for x in g]).norm().item(), rel=1e-6)


def test_a_parameter_frozen_after_looksams_climb_does_not_count_in_the_next_step():
    p, frozen = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    sam = SAM([p, frozen], 0.1, every=2, alpha=0.5)
    for side in (1.0, -1.0):
        p.grad, frozen.grad = torch.tensor([3.0, side]), torch.tensor([4.0, 4.0])
        if side == 1:
            with sam.perturbed():
                p.grad, frozen.grad = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    frozen.requires_grad_(False)
    g, v = p.grad.clone(), sam.vertical[0]
    sam.between()
    torch.testing.assert_close(p.grad, g + 0.5 * g.norm() / v.norm() * v)
    assert frozen.grad.tolist() == [4.0, 4.0]


def test_random_numbers_are_drawn_again_and_the_stream_goes_on_as_without_a_second_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x, sam = torch.randn(8, 4), SAM(net.parameters(), 0.0)

    def twice(*, remember, fails=False):
        torch.manual_seed(1)
        if remember:
            sam.remember()
        first = net(x)
        first.sum().backward()
        expected = torch.get_rng_state()
        try:
            with sam.perturbed():
                second = net(x)
                torch.rand(100)
                if fails:
                    raise ValueError
        except ValueError:
            pass
        return torch.equal(first, second), torch.equal(expected, torch.get_rng_state())

    assert twice(remember=True) == (True, True)
    assert twice(remember=False) == (False, False)  # what was remembered counts once
    assert twice(remember=True, fails=True) == (True, True)
    sam.remember()
    sam.between()
    assert twice(remember=False) == (False, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_are_drawn_again():
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    x, sam = torch.randn(8, 4).cuda(), SAM(net.parameters(), 0.0)
    saved = state(net)
    sam.remember()
    first = net(x)
    first.sum().backward()
    expected = torch.cuda.get_rng_state()
    with sam.perturbed():
        assert torch.equal(first, net(x))
    assert torch.equal(expected, torch.cuda.get_rng_state())
    assert same(net, saved)


def test_micro_batches_sum_to_the_whole_batch():
    """All at w, then all at w + eps."""
    torch.manual_seed(0)
    x = torch.randn(16, 5, dtype=torch.float64)
    nets = []
    for parts in (1, 4):
        net, _ = smooth(torch.float64)
        optimizer, sam = BASES["adam"](net.parameters()), SAM(net.parameters(), 0.1)

        def backward(net=net, parts=parts):
            for part in x.chunk(parts):
                ((net(part) - torch.sin(part[:, :2])).pow(2).mean() / parts).backward()

        for _ in range(20):
            optimizer.zero_grad()
            backward()
            with sam.perturbed():
                optimizer.zero_grad()
                backward()
            optimizer.step()
        nets.append(flat(net))
    assert (nets[0] - nets[1]).abs().max() <= 1e-12


def test_clipping_behind_the_block_clips_the_second_gradient_alone():
    net, loss = smooth()
    loss().backward()
    sam = SAM(net.parameters(), 0.1)
    with sam.perturbed():
        net.zero_grad()
        loss().backward()
    second = torch.cat([p.grad.flatten() for p in net.parameters()])
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    clipped = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert sam.step_norm == pytest.approx(0.1, rel=1e-6)
    torch.testing.assert_close(clipped, 0.01 * second / second.norm())


@pytest.mark.parametrize("variant", [{}, {"adaptive": True}, {"every": 3, "alpha": 0.7}], ids=str)
def test_a_scaled_loss_climbs_the_same(variant):
    """A power of two, as GradScaler's: only exponents change, so the steps are the same to the bit."""
    nets = []
    for enabled in (False, True):
        net, loss = smooth()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        optimizer, sam = BASES["sgd"](net.parameters()), SAM(net.parameters(), 0.1, **variant)
        for _ in range(10):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            if sam.due:
                with sam.perturbed():
                    optimizer.zero_grad()
                    scaler.scale(loss()).backward()
            else:
                sam.between()
            scaler.step(optimizer)
            scaler.update()
        nets.append(flat(net))
    torch.testing.assert_close(*nets, rtol=1e-6, atol=1e-7)


def test_an_overflow_of_the_first_pass_makes_the_scaler_skip_the_step():
    net, loss = smooth()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    optimizer, sam = BASES["sgd"](net.parameters()), SAM(net.parameters(), 0.1)
    before = flat(net)
    scaler.scale(1e6 * loss()).backward()
    with sam.perturbed():
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(net), before)
    assert scaler.get_scale() == 2.0**125


def test_layers_of_half_precision_climb_where_their_norms_overflow():
    w = nn.Parameter(torch.full((400,), 4000.0, dtype=torch.float16))  # of length 80,000: 65,504 is the largest float16
    w.grad = torch.full_like(w, 5000.0)
    with SAM([w], 0.1, by_layer=True).perturbed():
        assert w.tolist() == pytest.approx([4400.0] * 400, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_half_precision_weights_climb_as_in_float32(dtype, adaptive):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1000, dtype=dtype))
    w.grad = torch.randn(1000).mul(20000).to(dtype).clamp(-60000, 60000)
    before, g = w.detach().clone(), w.grad.float()
    direction = before.float().abs() * g if adaptive else g
    eps = 3 * direction / direction.norm() * (before.float().abs() if adaptive else 1)
    with SAM([w], 3.0, adaptive).perturbed():
        torch.testing.assert_close(
            w.detach(), (before.float() + eps).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0
        )
    assert torch.equal(w, before)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"random_seed": 0}], ids=str)
def test_one_copy_of_the_weights_is_made_and_none_is_kept(options):
    """Bytes of all tensors alive, by torch's own account. A random direction also holds one tensor's draw."""
    net = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(100)])
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    sam = SAM(net.parameters(), 0.1, net=net, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:  # noqa: SIM117
        with sam.perturbed():
            pass
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert size <= max(alive) <= 1.02 * size
    assert alive[-1] == 0


def test_more_misuse_is_named():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="every to be a whole number >= 1, got 0"):
        SAM([w], every=0)
    with pytest.raises(ValueError, match="alpha to be a finite number >= 0, got nan"):
        SAM([w], alpha=float("nan"))
    with pytest.raises(ValueError, match="random_seed to be a whole number >= 0, got -1"):
        SAM([w], random_seed=-1)
    for name, value in itertools.product(("rho", "alpha", "every", "random_seed"), ("0.1", True, [1], object())):
        with pytest.raises(ValueError, match=f"expected {name} to be a (finite|whole) number >= "):
            SAM([w], **{name: value})
    for name in ("every", "random_seed"):
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number >= ., got 1.5"):
            SAM([w], **{name: 1.5})
    with pytest.raises(ValueError, match="expected rho to be a finite number >= 0, got None"):
        SAM([{"params": [w], "rho": None}])
    assert SAM([w], rho=torch.tensor(0.5), every=np.int64(3)).logged()["rho"] == 0.5
    with pytest.raises(ValueError, match="every parameter once"):
        SAM([w, w])
    other = SAM([{"params": [w]}, {"params": [nn.Parameter(torch.ones(3))]}])
    with pytest.raises(ValueError, match="over the same parameters"):
        SAM([w]).load_state_dict(other.state_dict())


def steps_of(tmp_path, **changes):
    """A network after one `train_step` on a batch of two pairs, its gradient, and what is needed to do it by hand."""
    given = {
        "out": str(tmp_path),
        "shape": [16, 16],
        "down": [4, 4],
        "levels": 2,
        "batch": 2,
        "sigma": 3.0,
        "rho": 0.03,
    }
    run = read(Train, given | {"steps": 4} | changes)
    dataset = open_domain("brain-mr", shape=(16, 16))
    net = starting(run).train()
    for i, p in enumerate(net.parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    before = copy.deepcopy(net)
    state, sam = State(), perturbation(net, run)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    train_step(net, make_batches(dataset, run, 0), run, optimizer, sam, state)
    return run, make_batches(dataset, run, 0), before, [p.grad for p in net.parameters()], state, sam


def gradients_at(net, batch, run, eps=None):
    moved = copy.deepcopy(net)
    for p, e in zip(moved.parameters(), eps or itertools.repeat(0.0), strict=False):
        p.data += e
    objective(moved, batch, **run.loss()).total.backward()
    return [p.grad for p in moved.parameters()]


def apart(expected, found):
    """How far two gradients are from each other, of the first one's length: rounding, and the loss has kinks."""
    return norm([a - b for a, b in zip(expected, found, strict=True)]) / norm(expected)


def test_each_part_climbs_by_its_own_gradient(tmp_path):
    run, micro, net, found, state, sam = steps_of(tmp_path, climb="part", accumulate=2)
    total = [torch.zeros_like(p) for p in net.parameters()]
    for batch in micro:
        g = gradients_at(net, batch, run)
        eps = [0.03 * x / norm(g) for x in g]
        total = [t + there / 2 for t, there in zip(total, gradients_at(net, batch, run, eps), strict=True)]
    assert apart(total, found) < 1e-3
    assert state.gradients == 2
    assert sam.rise > 0
    assert apart(steps_of(tmp_path, accumulate=2)[3], found) > 1e-2


def test_each_layer_climbs_in_proportion_to_its_length(tmp_path):
    run, (batch,), net, found, *_ = steps_of(tmp_path, climb="layer")
    g = gradients_at(net, batch, run)
    eps = [0.03 * p.detach().norm() * x / x.norm() for p, x in zip(net.parameters(), g, strict=True)]
    assert apart(gradients_at(net, batch, run, eps), found) < 1e-3


def test_only_norms_climb(tmp_path):
    run, (batch,), net, found, *_, sam = steps_of(tmp_path, climb="norms")
    g = gradients_at(net, batch, run)
    names = [name for name, _ in net.named_parameters()]
    norms = {
        f"{name}.{of}" for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) for of in ("weight", "bias")
    }
    length = norm([x for name, x in zip(names, g, strict=True) if name in norms])
    eps = [0.03 * x / length if name in norms else 0.0 for name, x in zip(names, g, strict=True)]
    assert apart(gradients_at(net, batch, run, eps), found) < 1e-3
    assert len(sam.params) == len(norms) == 4 * 2


def test_a_late_climb_leaves_the_steps_before_alone(tmp_path):
    histories = {}
    for name, changes in {"adam": {"optimizer": "adam"}, "late": {"late": 0.5}, "sam": {}}.items():
        given = {
            "out": str(tmp_path / name),
            "shape": [16, 16],
            "down": [4, 4],
            "levels": 2,
            "steps": 4,
            "snapshots": 4,
        }
        run = read(Train, given | {"sigma": 3.0, "rho": 0.03, "validation": 0} | changes)
        histories[name] = fit(starting(run), open_domain("brain-mr", shape=(16, 16)), run, progress=False)
    adam, late, sam = (
        [torch.load(p, weights_only=True) for p in sorted((tmp_path / name / "snapshots").iterdir())]
        for name in histories
    )
    assert [torch.equal(a, b) for a, b in zip(adam, late, strict=True)] == [True, True, False, False]
    assert not torch.equal(adam[0], sam[0])
    assert histories["late"][-1]["gradient_evaluations"] == 6


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adam", "late": 0.5}, {"optimizer": "asam", "climb": "layer"}, {"climb": "part"}]
)
def test_climbs_that_make_no_sense_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"expected the optimizer sam|expected accumulate of 2"):
        read(Train, {"out": str(tmp_path)} | changes)
    with pytest.raises(ValueError, match="by_layer alone"):
        SAM([torch.ones(1)], adaptive=True, by_layer=True)
