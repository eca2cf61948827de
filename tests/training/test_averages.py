"""Averages of the weights against sums written out from the weights of every step."""

import copy
import json
import shutil

import pytest
import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Train
from fmsam_lib.training.averages import Averages, gather_statistics
from fmsam_lib.training.loop import fit, make_batches, starting


def run(out, **changes):
    given = {"out": str(out), "shape": [16, 16], "down": [4, 4], "levels": 2, "steps": 20, "batch": 2, "validation": 0}
    settings = read(Train, given | {"sigma": 3.0, "averages": True, "snapshots": 20} | changes)
    dataset = open_domain("brain-mr", shape=(16, 16))
    return settings, dataset, fit(starting(settings), dataset, settings, progress=False)


def vector(net):
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("steps", [1, 2])
def test_the_tail_of_a_very_short_training_is_its_last_step(tmp_path, steps):
    run(tmp_path, steps=steps, snapshots=0)
    tail, last = (load(tmp_path / f"weights{name}.pt") for name in ("_tail", ""))
    assert torch.equal(vector(tail), vector(last))


@pytest.mark.parametrize("optimizer", ["adam", "sam"])
def test_averages_are_those_of_the_weights_of_every_step(tmp_path, optimizer):
    settings, dataset, _ = run(tmp_path, optimizer=optimizer)
    snapshots = [tmp_path / "snapshots" / f"step{step:06d}.pt" for step in range(1, 21)]
    steps = [torch.load(snapshot, weights_only=True).double() for snapshot in snapshots]
    tail, ema = torch.stack(steps[15:]).mean(0), steps[0]
    for n, w in enumerate(steps[1:], start=1):
        ema = (1 + n) / (10 + n) * ema + 9 / (10 + n) * w
    for name, expected in {"tail": tail, "ema": ema}.items():
        net = load(tmp_path / f"weights_{name}.pt")
        assert torch.allclose(vector(net).double(), expected, atol=1e-7)
        assert not torch.allclose(vector(net).double(), steps[-1], atol=1e-5)
        assert net.shape == (16, 16)
        assert net.about["seen"].keys() == {"brain-mr"}
        batches = [batch for step in range(20) for batch in make_batches(dataset, settings, step)]
        copied = load(tmp_path / "weights.pt")
        torch.nn.utils.vector_to_parameters(vector(net), copied.parameters())
        gather_statistics(copied, [(batch.moving, batch.fixed) for batch in batches])
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), copied.buffers(), strict=True))


def test_statistics_are_gathered_in_full_precision():
    net, pairs = GradICON(2, down=(4, 4), levels=1), [tuple(torch.rand(2, 2, 1, 16, 16)) for _ in range(3)]
    expected = copy.deepcopy(net)
    gather_statistics(expected, pairs)
    net.precision = "bf16"
    for averaged in Averages(net, 4).networks(pairs).values():
        assert averaged.precision == "float32"
        assert all(torch.equal(a, b) for a, b in zip(averaged.buffers(), expected.buffers(), strict=True))


def test_of_the_first_weights_little_is_left():
    net = GradICON(2, down=(4,), levels=1)
    averages, first = Averages(net, 400), vector(net)
    averages.follow(net, 1)
    torch.nn.init.constant_(net.steps[0].last.bias, 1.0)
    for step in range(2, 401):
        averages.follow(net, step)
    assert torch.allclose(vector(averages["ema"].module), vector(net), atol=1e-4)
    assert not torch.allclose(first, vector(net), atol=0.5)


def test_averaging_leaves_the_training_as_it_is(tmp_path):
    for name, averages in (("with", True), ("without", False)):
        run(tmp_path / name, averages=averages)
    a, b = (load(tmp_path / name / "weights.pt").state_dict() for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "without" / "weights_ema.pt").exists()


def test_a_training_that_goes_on_ends_with_the_same_averages(tmp_path, monkeypatch):
    run(tmp_path / "whole", steps=60)
    real, stop = torch.optim.Adam.step, {"at": 55}

    def step(self, *given):
        stop["at"] -= 1
        if stop["at"] < 0:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", steps=60)
    monkeypatch.undo()
    run(tmp_path / "stopped", steps=60)
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["resumed"][0]["step"] == 50
    for file in ("weights.pt", "weights_ema.pt", "weights_tail.pt"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected averages in one process"):
        run(tmp_path, processes=2)
    assert not shutil.os.path.exists(tmp_path / "config.json")


def test_statistics_that_fail_leave_the_network_as_usable_as_before():
    net = GradICON(2, down=(4, 4), levels=1, last_step=False)
    images = torch.rand(2, 1, 16, 16)
    with pytest.raises(RuntimeError):
        gather_statistics(net, [(images, images[..., :8])])
    net(images, images)
