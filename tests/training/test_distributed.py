"""Two processes, really started, train what one trains."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from fmsam_lib.checking import ConfigError
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import load
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.checkpoint import alone
from fmsam_lib.training.loop import make_batches, starting, train
from fmsam_lib.training.losses import Batch, objective
from fmsam_lib.training.sam import norm
from tests.images.test_files import dataset
from tests.training.test_loop import CODE, run, tiny, weights


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
    two = one.model_copy(update=dict(out=str(tmp_path / "two"), processes=2))
    (alone, expected), (together, history) = run(one), run(two)
    apart = {name: (together.state_dict()[name] - value).abs().max() for name, value in alone.state_dict().items()}
    # BatchNorm takes what `up`'s biases add away again: their gradient is rounding alone, of which Adam makes steps
    no_effect = [name for name in apart if (".up." in name and "bias" in name) or "running_mean" in name]
    assert (
        max(value for name, value in apart.items() if name not in no_effect) < 3e-5
    )  # small gradients carry rounding, which Adam enlarges
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


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A single step of two processes that climb by the whole batch: its settings, and what came of it."""
    settings = tiny(tmp_path_factory.mktemp("two"), batch=4, steps=1, processes=2)
    return settings, *run(settings)


def test_running_means_are_those_of_one_process(one_step, tmp_path):
    """After a single step, in which Adam has not yet moved the biases before BatchNorm."""
    settings, together, _ = one_step
    alone = run(settings.model_copy(update={"out": str(tmp_path), "processes": 1}))[0]
    means = [name for name in alone.state_dict() if "running_mean" in name]
    assert len(means) == 4
    for name in means:
        assert torch.allclose(alone.state_dict()[name], together.state_dict()[name], atol=1e-6)


def test_processes_that_climb_apart_may_not_keep_directions_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="sync_climb with looksam"):
        tiny(tmp_path, optimizer="looksam", batch=2, processes=2, sync_climb=False)


def test_each_climbs_by_its_own_part_or_all_by_the_whole_batch(one_step, tmp_path):
    """The gradient of the climb, which the first process logs; BatchNorm sees the whole batch in either case."""
    settings = one_step[0].model_copy(update={"processes": 1})
    net = starting(settings).train()
    (batch,) = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    whole = net(torch.cat([batch.moving, batch.fixed]), torch.cat([batch.fixed, batch.moving]))
    own = Batch(batch.moving[:2], batch.fixed[:2], batch.points)  # of the first of two processes
    lengths = {}
    for name, part, phi in (("apart", own, whole[[0, 1, 4, 5]]), ("together", batch, whole)):
        loss = objective(lambda *_, phi=phi: phi, part, **settings.loss()).total
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        lengths[name] = norm([g for g in gradients if g is not None])
    assert lengths["apart"] > 1.05 * lengths["together"]  # something to tell apart
    apart = one_step[0].model_copy(update={"out": str(tmp_path), "sync_climb": False})
    for name, (of, _, history) in {"apart": (apart, *run(apart)), "together": one_step}.items():
        length = lengths[name]
        assert history[-1]["gradient_norm"] == pytest.approx(length, rel=1e-4)
        assert history[-1]["step_norm"] == pytest.approx(settings.rho, rel=1e-4)
        record = json.loads((Path(of.out) / "config.json").read_text())
        assert record["parameters"]["sync_climb"] is (name == "together")


def test_several_processes_open_the_domain_that_was_given(tmp_path, monkeypatch):
    """Its shape, and its folder of data sets, which is not the environment's."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("FMSAM_DATA", str(tmp_path / "elsewhere"))
    dataset(tmp_path / "sets" / "Own")
    domain = open_domain("Own", shape=(18, 16), data=tmp_path / "sets")
    options = {"down": [4], "levels": 1, "steps": 2, "batch": 2, "validation": 0, "sigma": 3.0, "progress": False}
    net, history = train(domain, processes=2, **options)
    alone, expected = train(domain, **options)
    assert history[-1]["total"] == pytest.approx(expected[-1]["total"], abs=1e-5)
    assert net.shape == alone.shape == (18, 16)
    assert net.about.keys() == alone.about.keys() == {"seen", "golden", "norm"}
    assert not net.training


def test_a_failing_process_is_reported(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="failed in one of its 2 processes"):
        run(tiny(tmp_path, batch=2, steps=30, processes=2, lr=1e30))
    assert "steps in a row" in capfd.readouterr().err


def test_the_processes_of_a_training_end_with_the_one_that_started_them(tmp_path):
    """A kernel that memory's end has killed, say: processes left over would hold the folder."""
    settings = tiny(tmp_path, batch=2, steps=100_000, processes=2)
    process = subprocess.Popen([sys.executable, "-c", CODE, json.dumps(settings.model_dump())])
    deadline = time.monotonic() + 120
    while not (tmp_path / "history.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # torchrun and its two
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive
    with alone(tmp_path):
        pass
