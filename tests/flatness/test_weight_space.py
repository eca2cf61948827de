"""The one way through weight space: there and back to the bit, in any memory layout, dtype and mode."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmsam_lib.flatness.weight_space import TERMS, WeightSpace, terms_on, vector
from fmsam_lib.model.network import GradICON
from fmsam_lib.training.losses import Batch, jittered_points, objective
from tests.conftest import fingerprint

LOSS = {"lmbda": 1.5, "sigma": 3.0}


def network(dim=2, *, down=(4, 8), levels=2):
    torch.manual_seed(0)
    net = GradICON(dim, down=down, levels=levels, last_step=False)
    for step in net.steps:
        nn.init.normal_(step.last.weight, std=0.3)
    return net.eval()


def images(shape=(16, 16)):
    """Smooth blobs, and the points of the penalty."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 1, *[5] * len(shape), generator=generator)
    smooth = F.interpolate(coarse, shape, mode="bilinear" if len(shape) == 2 else "trilinear", align_corners=True)
    return Batch(smooth[:2], smooth[2:], jittered_points(shape, generator))


def partly(net):
    """A part in training mode, the rest not."""
    net.steps[0].norm[0].train()
    return net


LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
MODES = {"eval": nn.Module.eval, "training": nn.Module.train, "partly": partly}


def test_it_goes_anywhere_and_back_to_the_bit():
    net = network()
    space, direction = WeightSpace(net), torch.randn(vector(network()).shape)
    with space.at(direction, 0.5) as there:
        assert torch.equal(vector(there), torch.add(vector(net), direction, alpha=0.5))
    assert fingerprint(space.net) == fingerprint(net)
    with space.at(origin=direction) as there:
        assert torch.equal(vector(there), direction)
    with pytest.raises(KeyboardInterrupt), space.at(direction):
        raise KeyboardInterrupt
    assert fingerprint(space.net) == fingerprint(net)


def test_parameters_take_their_own_part_of_the_vector():
    space = WeightSpace(nn.Linear(3, 2))
    with space.at(torch.arange(8.0), origin=torch.zeros(8)) as there:
        assert there.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert there.bias.tolist() == [6, 7]


def test_buffers_that_move_inside_are_put_back():
    net, batch = network(), images()
    space = WeightSpace(net, terms_on(batch, torch.float32, **LOSS), training=True)
    moving = copy.deepcopy(net).train()
    objective(moving, batch, **LOSS)
    assert fingerprint(moving) != fingerprint(net)  # as BatchNorm's statistics do
    space.values()
    space.gradient(0)
    with space.at() as there:
        objective(there, batch, **LOSS)
        next(there.buffers()).fill_(9)
    assert fingerprint(space.net) == fingerprint(net)


def test_buffers_that_are_replaced_inside_are_put_back():
    net = nn.Linear(2, 1)
    net.register_buffer("mean", torch.zeros(3))
    net.register_buffer("window", torch.ones(1).expand(3))
    space = WeightSpace(net)
    with space.at() as there:
        there.mean += 1
        there.mean = there.mean + 1
    assert fingerprint(space.net) == fingerprint(net)


@pytest.mark.parametrize("dim", LAYOUTS)
def test_the_memory_layout_changes_neither_values_nor_gradient(dim):
    net, terms = network(dim), terms_on(images((16,) * dim), torch.float64, **LOSS)
    plain, strided = WeightSpace(net, terms, torch.float64), copy.deepcopy(net).to(memory_format=LAYOUTS[dim])
    before = fingerprint(strided)
    other = WeightSpace(strided, terms, torch.float64)
    assert torch.equal(other.w, plain.w)
    eps = 0.01 * torch.randn(len(plain.w), dtype=torch.float64)
    for i, term in enumerate(TERMS):
        (value, gradient), found = plain.gradient(i, eps), other.gradient(i, eps)
        assert found[0] == value == plain.values(eps)[i], term
        assert torch.equal(found[1], gradient)
        assert gradient.any()
    assert fingerprint(strided) == before
    assert not all(p.is_contiguous() for p in strided.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_networks_mode_neither_counts_nor_changes(mode):
    terms = terms_on(images(), torch.float64, **LOSS)
    expected = {training: terms(network().double().train(training)) for training in (False, True)}
    assert expected[False][0] != expected[True][0]
    net = MODES[mode](network())
    before, modes = fingerprint(net), [m.training for m in net.modules()]
    for training, values in expected.items():
        space = WeightSpace(net, terms, torch.float64, training=training)
        assert space.values().tolist() == [float(value.detach()) for value in values]
        assert space.gradient(0)[0] == float(values[0].detach())
    assert fingerprint(net) == before
    assert [m.training for m in net.modules()] == modes


def test_the_gradient_is_that_of_a_small_step():
    net, terms = network(), terms_on(images(), torch.float64, **LOSS)
    space = WeightSpace(net, terms, torch.float64)
    value, g = space.gradient(0)
    assert value == space.values()[0]
    step = 1e-7 * g / g.norm()
    slope = (space.values(step)[0] - space.values(-step)[0]) / 2e-7
    assert slope == pytest.approx(float(g.norm()), rel=1e-4)


def test_what_is_constant_or_not_finite():
    space = WeightSpace(nn.Linear(2, 1), lambda net: (torch.tensor(2.0), net.bias.sum()))
    assert space.gradient(0)[0] == 2
    assert not space.gradient(0)[1].any()
    assert space.gradient(1)[1].tolist() == [0, 0, 1]
    space.terms = lambda net: (net.weight.sum() / 0, net.bias.sum())
    assert np.isnan(space.values()[0])
    assert np.isfinite(space.values()[1])
    assert np.isnan(space.gradient(1)[0])


def test_float64_is_not_rounded_by_half_precision():
    net, terms = network(), terms_on(images(), torch.float64, **LOSS)
    expected = WeightSpace(net, terms, torch.float64).values()
    net.precision = "bf16"
    assert WeightSpace(net, terms, torch.float64).values().tolist() == expected.tolist()
    assert net.precision == "bf16"


def test_the_fingerprint_is_of_every_bit_and_name():
    net = network(down=(4, 4))
    seen = {fingerprint(net), fingerprint(copy.deepcopy(net))}
    assert len(seen) == 1
    with torch.no_grad():
        bits = net.steps[0].down[0].weight.view(torch.int32)
        bits.view(-1)[5] ^= 1
    seen.add(fingerprint(net))
    net.steps[0].norm[0].running_mean[1] += 1
    seen.add(fingerprint(net))
    net.steps[0].norm[0].num_batches_tracked += 1
    seen.add(fingerprint(net))
    net.steps[0].first = net.steps[0]._modules.pop("last")  # another name
    seen.add(fingerprint(net))
    seen.add(fingerprint(net.to(torch.bfloat16)))
    assert len(seen) == 6
