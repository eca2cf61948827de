"""What only a GPU can show: recorded steps, and layers that are computed in another way there."""

import copy

import pytest
import torch

from fmsam_lib.checking import read
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.losses import Batch, gaussian_blur, jittered_points
from fmsam_lib.training.step import Recorded, gradient, perturbation, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: expected one that torch can use")
SHAPES = [(32, 28), (24, 20, 17)]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def settings(shape, **changes) -> Train:
    values = {"shape": [*shape], "down": [8, 12], "levels": 2, "last_step": True, "batch": 2, "sigma": 3.0, "steps": 9}
    return read(Train, values | {"optimizer": "adam"} | changes)


def network(run: Train) -> GradICON:
    torch.manual_seed(0)
    net = GradICON(len(run.shape), down=tuple(run.down), levels=run.levels, last_step=run.last_step)
    for step in net.steps:  # small maps: of large ones the gradient jumps where a point changes its cell
        torch.nn.init.normal_(step.last.weight, std=0.01)
    net.precision, net.save_memory = run.precision, run.save_memory
    return net.train()


def micro(run: Train, seed=0, masks=False, device="cuda") -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    shape, n = tuple(run.shape), run.batch // run.accumulate
    parts = []
    for _ in range(run.accumulate):
        images = torch.rand(4, n, 1, *shape, generator=random)
        images[:2] = gaussian_blur(images[:2], 2.0)
        given = [*(images[2:] > 0.3)] if masks else []
        parts.append(Batch(*images[:2], jittered_points(shape, random), *given).to(torch.device(device)))
    return parts


def gradients(net, parts, run, recorded=None):
    loss, finite = gradient(net, parts, run, torch.optim.SGD(net.parameters()), State(scale=256.0), recorded)
    assert finite
    return torch.stack([x.cpu() for x in loss]), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_maps_as_on_a_processor(shape):
    net = network(settings(shape))
    images = torch.rand(2, 3, 1, *shape, generator=torch.Generator().manual_seed(0))
    net(*images)  # BatchNorm's statistics
    for mode in (net.train, net.eval):
        mode()
        with torch.no_grad():
            here, there = net(*images).map, copy.deepcopy(net).cuda()(*images.cuda()).map.cpu()
        torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch": 4, "accumulate": 2}, {"save_memory": True}, {"precision": "bf16"}, {"precision": "fp16"}],
    ids=str,
)
def test_a_recorded_gradient_is_the_gradient(shape, changes):
    run = settings(shape, **changes)
    net = network(run)
    there, again = copy.deepcopy(net).cuda(), copy.deepcopy(net).cuda()
    recorded = Recorded(there, run)
    for seed, masks in ((0, False), (1, False), (2, True), (3, False)):
        parts = micro(run, seed, masks)
        found, expected = gradients(there, parts, run, recorded), gradients(again, parts, run)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
        apart = 2e-3 if run.precision == "float32" else 0.3  # rounded to 8 bits, sums in another order differ
        assert (found[1] - expected[1]).norm() < apart * expected[1].norm()
        if run.precision == "float32":
            here = gradients(net, micro(run, seed, masks, "cpu"), run)
            torch.testing.assert_close(found[0], here[0], rtol=1e-4, atol=1e-5)
            assert (found[1] - here[1]).norm() < 2e-3 * here[1].norm()
    assert len(recorded.kinds) == 2  # with masks and without
    for a, b in zip(there.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sam", "looksam"])
def test_recorded_steps_train_as_others_do(optimizer):
    run = settings((32, 28), optimizer=optimizer, rho=0.002, every=2)
    ways = []
    for record in (True, False):
        net = network(run).cuda()
        recorded = Recorded(net, run) if record else None
        adam, sam, state = torch.optim.SGD(net.parameters(), lr=1e-3), perturbation(net, run), State()
        start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        for i in range(3):
            train_step(net, micro(run, i), run, adam, sam, state, recorded=recorded)
        ways.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach() - start)
    assert (ways[0] - ways[1]).norm() < 0.1 * ways[1].norm()


def test_the_first_stage_is_recorded_apart():
    run = settings((32, 28))
    net = network(run).cuda()
    recorded = Recorded(net, run)
    for first_stage in (True, False):
        net.first_stage = first_stage
        gradient(net, micro(run), run, torch.optim.SGD(net.parameters()), State(), recorded)
        assert (net.steps[-1].last.weight.grad is None) is first_stage


def test_what_is_not_finite_moves_nothing():
    run = settings((32, 28), optimizer="sam")
    net = network(run).cuda()
    recorded, sam, state = Recorded(net, run), perturbation(net, run), State()
    adam = torch.optim.Adam(net.parameters())
    train_step(net, micro(run), run, adam, sam, state, recorded=recorded)
    before = [value.clone() for value in net.state_dict().values()]
    bad = [part._replace(moving=part.moving * float("nan")) for part in micro(run, 1)]
    train_step(net, bad, run, adam, sam, state, recorded=recorded)
    assert (state.skipped, state.in_a_row) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    train_step(net, micro(run, 2), run, adam, sam, state, recorded=recorded)
    assert state.in_a_row == 0
