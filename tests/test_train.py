import dataclasses
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import typing

import pytest
import torch

from fmsam_lib.config import ConfigError, Optimizer, Train, as_dict
from fmsam_lib.domains import open_domain
from fmsam_lib.network import GradICON
from fmsam_lib.train import GIVE_UP_AFTER, cosine, make_batch, starting, train, train_step
from fmsam_lib.weights import load


def tiny(out, **changes) -> Train:
    settings = {
        "out": str(out), "train_domain": "brain-mr", "optimizer": "sam", "seed": 0, "shape": [16, 16], "data": "",
        "weights": "", "down": [4, 4], "levels": 2, "last_step": False, "steps": 20, "batch": 1, "lr": 1e-3,
        "rho": 0.01, "rho_schedule": "constant", "every": 3, "alpha": 0.7, "lmbda": 1.5, "similarity": "lncc",
        "sigma": 3.0, "joint": True, "save_memory": False, "threads": 1,
    }  # fmt: skip
    return Train(**(settings | changes))


def run(settings: Train):
    net = starting(settings)
    history = train(net, open_domain(settings.train_domain, shape=tuple(settings.shape)), settings, progress=False)
    return net, history


def weights(net):
    return torch.cat([value.flatten().double() for value in net.state_dict().values()])


def test_training_lowers_the_loss(tmp_path):
    _, history = run(tiny(tmp_path, optimizer="adam", shape=[32, 32], steps=200, lr=3e-3))
    assert [line["step"] for line in history] == list(range(10, 201, 10))
    losses = [line["total"] for line in history]  # of single pairs, which differ in difficulty
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


OPTIMIZERS = typing.get_args(Optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_seed_gives_the_same_weights(tmp_path, optimizer):
    nets = [run(tiny(tmp_path / str(i), optimizer=optimizer))[0] for i in range(2)]
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    other = run(tiny(tmp_path / "other", optimizer=optimizer, seed=1))[0]
    assert not torch.equal(weights(nets[0]), weights(other))


def test_optimizers_differ_from_the_second_step(tmp_path):
    """In the first, the zero last layer leaves ASAM nowhere to climb."""
    nets = [run(tiny(tmp_path / o, optimizer=o, steps=3))[0] for o in OPTIMIZERS]
    assert len({weights(net).sum().item() for net in nets}) == len(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", ["sam-every", "looksam"])
def test_climbing_in_every_step_is_sam_to_the_bit(tmp_path, optimizer):
    sam, other = run(tiny(tmp_path / "sam"))[0], run(tiny(tmp_path / "other", optimizer=optimizer, every=1))[0]
    assert torch.equal(weights(sam), weights(other))


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:])
def test_rho_zero_is_adam_to_the_bit_in_every_variant(tmp_path, optimizer):
    adam, other = (run(tiny(tmp_path / o, optimizer=o, rho=0.0, steps=5))[0] for o in ("adam", optimizer))
    assert torch.equal(weights(adam), weights(other))


@pytest.mark.parametrize("optimizer", OPTIMIZERS[2:])
def test_every_variant_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr("fmsam_lib.train.CHECKPOINT_EVERY", 5)
    monkeypatch.setattr("fmsam_lib.train.LOG_EVERY", 1)
    settings, done = tiny(tmp_path / "killed", optimizer=optimizer, rho_schedule="lr"), itertools.count(1)

    def interrupted(*args):
        if next(done) == 13:
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fmsam_lib.train.train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    resumed, history = run(settings)
    whole, expected = run(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    assert torch.equal(weights(resumed), weights(whole))
    timeless = [[{k: v for k, v in line.items() if "seconds" not in k} for line in h] for h in (history, expected)]
    assert timeless[0] == timeless[1]


def test_the_log_tells_of_the_climb(tmp_path):
    _, history = run(tiny(tmp_path / "sam", steps=10))
    line = history[-1]
    assert line["rho"] == 0.01
    assert line["step_norm"] == pytest.approx(0.01, rel=1e-5)
    assert 0 < line["step_ratio"] < 0.01
    assert line["gradient_norm"] > 0
    assert line["gradient_norm_there"] > 0
    assert line["rise"] == pytest.approx(0.01 * line["gradient_norm"], rel=0.5)  # to first order


def test_rho_falls_with_the_learning_rate(tmp_path):
    settings = tiny(tmp_path, rho_schedule="lr")
    _, history = run(settings)
    assert [line["rho"] for line in history] == pytest.approx([0.01 * cosine(s - 1, settings) / 1e-3 for s in (10, 20)])


def test_sam_with_rho_zero_is_adam_to_the_bit(tmp_path):
    adam, sam = run(tiny(tmp_path / "a", optimizer="adam"))[0], run(tiny(tmp_path / "s", rho=0.0))[0]
    assert torch.equal(weights(adam), weights(sam))


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    """A real SIGKILL of a real process, then the same call again."""
    settings = tiny(tmp_path / "killed", steps=400)
    code = (
        "import json, sys; from fmsam_lib.config import Train; from fmsam_lib.domains import open_domain\n"
        "from fmsam_lib.train import train, starting\n"
        "run = Train(**json.loads(sys.argv[1]))\n"
        "train(starting(run), open_domain(run.train_domain, shape=tuple(run.shape)), run, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(as_dict(settings))])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    first = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < first < 400

    resumed, _ = run(settings)
    whole, history = run(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    assert torch.equal(weights(resumed), weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "killed" / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in history]
    assert [line["total"] for line in lines] == [line["total"] for line in history]


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    net, history = run(tiny(tmp_path))
    monkeypatch.setattr("fmsam_lib.train.train_step", lambda *_: pytest.fail("trained again"))
    again, same = run(tiny(tmp_path))
    assert torch.equal(weights(net), weights(again))
    assert same == history


def test_a_folder_of_another_training_is_refused_with_the_difference(tmp_path):
    run(tiny(tmp_path, steps=1))
    with pytest.raises(ConfigError, match=r"(?s)other parameters.*lr: 0.001 there, 0.01 now.*choose another"):
        run(tiny(tmp_path, steps=1, lr=0.01))


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tiny(tmp_path, steps=1))
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"checkpoint\.pt cannot be read"):
        run(tiny(tmp_path, steps=1))


@pytest.mark.parametrize("optimizer", ["adam", "sam"])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(tmp_path, optimizer):
    settings = tiny(tmp_path, optimizer=optimizer)
    net = starting(settings)
    batch = make_batch(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    batch.moving[0, 0, 3, 3] = float("nan")
    before = [value.clone() for value in net.state_dict().values()]  # BatchNorm's statistics too
    from fmsam_lib.sam import SAM

    sam = SAM(net.parameters(), 0.01, net=net) if optimizer == "sam" else None
    _, finite = train_step(net, batch, settings, torch.optim.Adam(net.parameters()), sam)
    assert not finite
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), before, strict=True))


def test_training_gives_up_when_nothing_stays_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=f"{GIVE_UP_AFTER} steps in a row.*smaller lr"):
        run(tiny(tmp_path, lr=1e30, steps=100))


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    dataset = open_domain("brain-mr", shape=(16, 16))
    first, again = (make_batch(dataset, tiny(tmp_path), 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.moving, make_batch(dataset, tiny(tmp_path), 8).moving)
    assert not torch.equal(first.points, make_batch(dataset, tiny(tmp_path, seed=1), 7).points)


def test_provenance_stays_that_of_the_training(tmp_path, monkeypatch):
    run(tiny(tmp_path, steps=10))
    made = (tmp_path / "config.json").read_text()
    monkeypatch.setattr("fmsam_lib.train.provenance", lambda: {"commit": "another"})
    run(tiny(tmp_path, steps=10))
    assert (tmp_path / "config.json").read_text() == made


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training"):
            run(tiny(tmp_path, steps=1))


def test_fine_tuning_goes_on_from_a_file(tmp_path):
    first, _ = run(tiny(tmp_path / "first"))
    file = str(tmp_path / "first" / "weights.pt")
    assert torch.equal(weights(starting(tiny(tmp_path, weights=file))), weights(first))
    tuned, _ = run(tiny(tmp_path / "tuned", weights=file, down=[9, 9, 9], steps=2))
    assert 0 < (weights(tuned) - weights(first)).norm() < 0.1 * weights(first).norm()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["network"]["down"] == [4, 4]
    assert load(tmp_path / "tuned" / "weights.pt").shape == (16, 16)


def test_weights_of_another_dimension_are_refused(tmp_path):
    GradICON(3, down=(4,)).save(tmp_path / "cube.pt")
    with pytest.raises(ConfigError, match="weights of a 2-D network, got a 3-D one"):
        starting(tiny(tmp_path, weights=str(tmp_path / "cube.pt")))


def test_saving_memory_trains_the_same_network(tmp_path):
    nets = [run(tiny(tmp_path / str(save), save_memory=save, last_step=True))[0] for save in (False, True)]
    assert torch.equal(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize("change", [{"similarity": "mind"}, {"similarity": "lncc2"}, {"joint": False}], ids=str)
def test_other_losses_train_another_network(tmp_path, change):
    plain, other = run(tiny(tmp_path / "plain"))[0], run(tiny(tmp_path / "other", **change))[0]
    assert torch.isfinite(weights(other)).all()
    assert not torch.equal(weights(plain), weights(other))
