"""Two processes, really started, train what one trains."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from fmsam_lib.checking import ConfigError
from fmsam_lib.model.weights import load
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.loop import starting
from tests.training.test_loop import run, tiny, weights


def test_alone_nothing_changes():
    values = torch.tensor([1.0, 2.0])
    parallel.average([values])
    assert values.tolist() == [1.0, 2.0]
    assert parallel.all_agree(True, torch.device("cpu"))
    assert not parallel.all_agree(False, torch.device("cpu"))
    assert (parallel.count(), parallel.rank()) == (1, 0)


@pytest.mark.parametrize("dim", [2, 3])
def test_shared_batch_norm_of_one_process_is_torchs(dim, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    ours, theirs = (nn.Sequential([nn.BatchNorm2d, nn.BatchNorm3d][dim - 2](3)).double() for _ in range(2))
    for net in (ours, theirs):
        net[0].weight.data = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    names, parameters = list(ours.state_dict()), list(ours.parameters())
    parallel.share_batch_norm(ours)
    assert sorted(ours.state_dict()) == sorted(names)
    assert all(p is q for p, q in zip(ours.parameters(), parameters, strict=True))
    x = torch.randn(4, 3, *[5] * dim, dtype=torch.float64) * 3 + 100
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for net, given in zip((ours, theirs), inputs, strict=True):
        (net(given) ** 3).sum().backward()
    assert torch.allclose(ours[0].weight.grad, theirs[0].weight.grad, rtol=1e-10)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-10)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-12)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("optimizer", ["adam", "sam"])
def test_two_processes_train_the_network_of_one(tmp_path, optimizer):
    one = tiny(tmp_path / "one", optimizer=optimizer, batch=4, steps=6, validation=2, down=[8, 8])
    two = dataclasses.replace(one, out=str(tmp_path / "two"), processes=2)
    (alone, expected), (together, history) = run(one), run(two)
    apart = {name: (together.state_dict()[name] - value).abs().max() for name, value in alone.state_dict().items()}
    # BatchNorm takes what `up`'s biases add away again: their gradient is rounding alone, of which Adam makes steps
    no_effect = [name for name in apart if (".up." in name and "bias" in name) or "running_mean" in name]
    assert max(value for name, value in apart.items() if name not in no_effect) < 1e-5
    assert not together.training
    images = torch.rand(2, 4, 1, 16, 16)
    with torch.no_grad():
        assert (together.train()(*images).map - alone.train()(*images).map).abs().max() < 1e-5
    assert (weights(alone) - weights(starting(one))).abs().max() > 1e-3
    assert [line["step"] for line in history] == [6]
    for line, other in zip(history, expected, strict=True):
        assert line["total"] == pytest.approx(other["total"], abs=1e-5)
        assert line["gradient_evaluations"] == other["gradient_evaluations"]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["parameters"]["processes"] == 2
    assert load(tmp_path / "two" / "weights.pt").shape == (16, 16)


def test_running_means_are_those_of_one_process(tmp_path):
    """After a single step, in which Adam has not yet moved the biases before BatchNorm."""
    one = tiny(tmp_path / "one", batch=4, steps=1)
    alone, together = run(one)[0], run(dataclasses.replace(one, out=str(tmp_path / "two"), processes=2))[0]
    means = [name for name in alone.state_dict() if "running_mean" in name]
    assert len(means) == 4
    for name in means:
        assert torch.allclose(alone.state_dict()[name], together.state_dict()[name], atol=1e-6)


def test_processes_that_climb_apart_may_not_keep_directions_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="sync_climb with looksam"):
        tiny(tmp_path, optimizer="looksam", batch=2, processes=2, sync_climb=False)


def test_climbing_apart_is_another_objective(tmp_path):
    together = tiny(tmp_path / "together", batch=4, steps=5, processes=2, rho=0.1)
    apart = dataclasses.replace(together, out=str(tmp_path / "apart"), sync_climb=False)
    (first, _), (second, _) = run(together), run(apart)
    assert (weights(first) - weights(second)).abs().max() > 1e-4
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["parameters"]["sync_climb"] is False


def test_a_failing_process_is_reported(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="failed in one of its 2 processes"):
        run(tiny(tmp_path, batch=2, steps=30, processes=2, lr=1e30))
    assert "steps in a row" in capfd.readouterr().err
