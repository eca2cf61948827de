"""Recorded steps, and layers that a GPU computes in another way. Without one a stand-in plays the recorded steps."""

import contextlib
import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from fmsam_lib.checking import read
from fmsam_lib.model.network import BuffersKept, GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.losses import Batch, gaussian_blur, jittered_points
from fmsam_lib.training.step import Recorded, gradient, perturbation, train_step

SHAPES = [(32, 28), (24, 20, 17)]


class StandIn:
    """A graph of no GPU: playing it computes again what was recorded, into the tensors that came of it then."""

    def replay(self):
        kinds = self.names["self"].kinds.values()
        loss, gradients = next(kind[3:] for kind in kinds if kind[0] is self)
        before = {p: p.grad for p in gradients}
        for p in before:
            p.grad = None
        loss.copy_(self.names["both_ways"]())
        for p, kept in gradients.items():
            kept.copy_(p.grad)
            p.grad = before[p]


@contextlib.contextmanager
def recording(graph, pool):
    graph.names = sys._getframe(2).f_locals  # of `Recorded.record`
    with BuffersKept(graph.names["self"].net):  # a GPU notes what to do and does not do it yet
        yield


@pytest.fixture(params=["cuda", "stand-in"])
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param == "stand-in":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(Recorded, "side", lambda self, device: stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU: expected one that torch can use")
    return "cuda"


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


def micro(run: Train, device, seed=0, masks=False) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    shape, n = tuple(run.shape), run.batch // run.accumulate
    parts = []
    for _ in range(run.accumulate):
        images = torch.rand(4, n, 1, *shape, generator=random)
        images[:2] = gaussian_blur(images[:2], 2.0)
        given = [*(images[2:] > 0.3)] if masks else []
        parts.append(Batch(*images[:2], jittered_points(shape, random), *given).to(torch.device(device)))
    return parts


def gradients(net, parts, run):
    loss, finite = gradient(net, parts, run, torch.optim.SGD(net.parameters()), State(scale=256.0))
    assert finite
    return torch.stack([x.cpu() for x in loss]), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_maps_as_on_a_processor(shape, device, monkeypatch):
    net = network(settings(shape))
    there = copy.deepcopy(net).to(device)
    images = torch.rand(2, 3, 1, *shape, generator=torch.Generator().manual_seed(0))
    here = [net(*images).map, net.eval()(*images).map]
    if device == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the GPU's way, on the processor
    with torch.enable_grad():
        found = [there(*images.to(device)).map, there.eval()(*images.to(device)).map]
    for a, b in zip(found, here, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch": 4, "accumulate": 2}, {"save_memory": True}, {"precision": "bf16"}, {"precision": "fp16"}],
    ids=str,
)
def test_a_recorded_gradient_is_the_gradient(shape, changes, device):
    if device == "cpu" and len(shape) == 3 and changes.get("precision") == "fp16":
        pytest.skip("half a minute on a processor, which has no quick way to compute in fp16")
    run = settings(shape, **changes)
    net = network(run)
    there, again = copy.deepcopy(net).to(device), copy.deepcopy(net).to(device)
    there.recorded = Recorded(there, run)
    for seed, masks in ((0, False), (1, False), (2, True), (3, False)):
        parts = micro(run, device, seed, masks)
        found, expected = gradients(there, parts, run), gradients(again, parts, run)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
        apart = 2e-3 if run.precision == "float32" else 0.3  # rounded to 8 bits, sums in another order differ
        assert (found[1] - expected[1]).norm() < apart * expected[1].norm()
        if run.precision == "float32":
            here = gradients(net, micro(run, "cpu", seed, masks), run)
            torch.testing.assert_close(found[0], here[0], rtol=1e-4, atol=1e-5)
            assert (found[1] - here[1]).norm() < 3e-2 * here[1].norm()  # a leaky ReLU's kink is met on either side
    assert len(there.recorded.kinds) == 2  # with masks and without
    for a, b in zip(there.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "sam", "looksam"])
def test_recorded_steps_train_as_others_do(optimizer, device):
    run = settings((32, 28), optimizer=optimizer, rho=0.002, every=2)
    ways = []
    for record in (True, False):
        net = network(run).to(device)
        net.recorded = Recorded(net, run) if record else None
        adam, sam, state = torch.optim.SGD(net.parameters(), lr=1e-3), perturbation(net, run), State()
        start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        for i in range(3):
            train_step(net, micro(run, device, i), run, adam, sam, state)
        ways.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach() - start)
    assert (ways[0] - ways[1]).norm() < 0.1 * ways[1].norm()


def test_the_first_stage_is_recorded_apart(device):
    run = settings((32, 28))
    net = network(run).to(device)
    net.recorded = Recorded(net, run)
    for first_stage in (True, False):
        net.first_stage = first_stage
        gradient(net, micro(run, device), run, torch.optim.SGD(net.parameters()), State())
        assert (net.steps[-1].last.weight.grad is None) is first_stage


def test_what_is_not_finite_moves_nothing(device):
    run = settings((24, 20, 17), optimizer="sam")  # going back through NaN, torch's 2-D grid_sample crashes on a CPU
    net = network(run).to(device)
    net.recorded, sam, state = Recorded(net, run), perturbation(net, run), State()
    adam = torch.optim.Adam(net.parameters())
    train_step(net, micro(run, device), run, adam, sam, state)
    before = [value.clone() for value in net.state_dict().values()]
    bad = [part._replace(moving=part.moving * float("nan")) for part in micro(run, device, 1)]
    train_step(net, bad, run, adam, sam, state)
    assert (state.skipped, state.in_a_row) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    train_step(net, micro(run, device, 2), run, adam, sam, state)
    assert state.in_a_row == 0


def test_a_copy_of_a_network_is_not_recorded(device):
    run = settings((32, 28))
    net = network(run).to(device)
    net.recorded = Recorded(net, run)
    gradient(net, micro(run, device), run, torch.optim.SGD(net.parameters()), State())
    assert copy.deepcopy(net).recorded is None
