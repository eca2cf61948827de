import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load, unigradicon
from fmsam_lib.parameters import Optimizer, Train
from fmsam_lib.records import DataError
from fmsam_lib.training.augmentation import other_scanner
from fmsam_lib.training.checkpoint import State, trained_with
from fmsam_lib.training.loop import (
    AHEAD,
    GIVE_UP_AFTER,
    Stopped,
    ahead,
    device_of,
    fit,
    learning_rate,
    make_batches,
    snapshot_steps,
    starting,
    train,
    validate,
)
from fmsam_lib.training.losses import Batch, objective
from fmsam_lib.training.sam import SAM
from fmsam_lib.training.step import gradient, perturbation, train_step
from tests.images.test_files import dataset, own_cache  # noqa: F401


def tiny(out, **changes) -> Train:
    settings = {"out": str(out), "shape": [16, 16], "down": [4, 4], "levels": 2, "steps": 20, "batch": 1}
    return read(Train, settings | {"validation": 0, "every": 3, "sigma": 3.0} | changes)


@functools.cache
def domain_of(name, shape):
    """The same pairs for every training here, made once."""
    return open_domain(name, shape=shape)


def run(settings: Train):
    net = starting(settings)
    history = fit(net, domain_of(settings.train_domain, tuple(settings.shape)), settings, progress=False)
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
    nets = []
    for i in range(2):
        domain_of.cache_clear()  # the pairs are made anew
        nets.append(run(tiny(tmp_path / str(i), optimizer=optimizer))[0])
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


CLIMBING = [name for name in OPTIMIZERS if not name.startswith("adam")]


@pytest.mark.parametrize("optimizer", CLIMBING)
def test_rho_zero_is_adam_to_the_bit_in_every_variant(tmp_path, optimizer):
    adam, other = (run(tiny(tmp_path / o, optimizer=o, rho=0.0, steps=5))[0] for o in ("adam", optimizer))
    assert torch.equal(weights(adam), weights(other))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_variant_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    monkeypatch.setattr("fmsam_lib.training.loop.LOG_EVERY", 1)
    settings = tiny(tmp_path / "killed", optimizer=optimizer, rho_schedule="lr")
    with interrupted_in_step(13, monkeypatch):
        run(settings)
    resumed, history = run(settings)
    domain_of.cache_clear()  # the pairs are made anew, in another order
    whole, expected = run(settings.model_copy(update=dict(out=str(tmp_path / "whole"))))
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
    assert [line["rho"] for line in history] == pytest.approx(
        [0.01 * learning_rate(s - 1, settings) / 1e-3 for s in (10, 20)]
    )


CODE = (
    "import json, sys; from fmsam_lib.training import loop as t; from fmsam_lib.parameters import Train\n"
    "from fmsam_lib.images.domains import open_domain\n"
    "t.CHECKPOINT_EVERY, t.LOG_EVERY, t.VALIDATE_EVERY, run = 7, 3, 20, Train(**json.loads(sys.argv[1]))\n"
    "t.fit(t.starting(run), open_domain(run.train_domain, shape=tuple(run.shape)), run, progress=False)\n"
)


def lines_of(folder):
    """The history's whole lines, without the times."""
    log = folder / "history.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in read]


def test_a_training_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    """Real processes, struck at steps drawn anew in every run of the test, then the same call again."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = tiny(killed, optimizer="looksam", last_step=True, first_stage=100, steps=400, augment=True, validation=2)
    command = [sys.executable, "-c", CODE, json.dumps(settings.model_dump())]
    seed = random.SystemRandom().randrange(10**6)
    print("seed of the kills:", seed)
    rng = random.Random(seed)
    for kill in range(4):
        before = [line["step"] for line in lines_of(killed)]
        after = max(rng.randrange(60 * kill, 60 * kill + 50), *before[-1:], 0)
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        while not any(line["step"] > after for line in lines_of(killed)) and time.monotonic() < deadline:
            time.sleep(rng.uniform(0.001, 0.02))
        sign = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        os.kill(process.pid, sign)
        assert process.wait() == -sign  # it was still at work
        assert after < lines_of(killed)[-1]["step"] < 400
    subprocess.run(command, check=True)
    subprocess.run(
        [*command[:-1], json.dumps(settings.model_copy(update=dict(out=str(whole))).model_dump())], check=True
    )

    assert torch.equal(weights(load(killed / "weights.pt")), weights(load(whole / "weights.pt")))
    assert [line["step"] for line in lines_of(killed)] == [*range(3, 400, 3), 400]
    assert lines_of(killed) == lines_of(whole)
    resumed = json.loads((killed / "config.json").read_text())["resumed"]
    assert len(resumed) >= 3  # the first kill may precede any checkpoint


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    net, history = run(tiny(tmp_path))
    monkeypatch.setattr("fmsam_lib.training.loop.train_step", lambda *_: pytest.fail("trained again"))
    again, same = run(tiny(tmp_path))
    assert torch.equal(weights(net), weights(again))
    assert same == history


def test_a_folder_of_another_training_is_refused_with_the_difference(tmp_path):
    run(tiny(tmp_path, steps=1))
    with pytest.raises(ConfigError, match=r"(?s)other parameters.*lr: 0.001 there, 0.01 now.*choose another"):
        run(tiny(tmp_path, steps=1, lr=0.01))


def test_a_refused_training_leaves_the_network_as_it_was(tmp_path, domain):
    run(tiny(tmp_path, steps=1))
    net = GradICON(2, down=(4, 4), levels=2)
    net.shape, net.about = (64, 48), {"golden": [1.0]}
    with pytest.raises(ConfigError, match="other parameters"):
        fit(net, domain, tiny(tmp_path, steps=2), progress=False)
    assert (net.shape, net.about) == ((64, 48), {"golden": [1.0]})


def test_a_stopped_fine_tuning_does_not_pass_for_the_training_before(tmp_path, domain):
    """Its weights would answer the older ones' check, and be judged by what those had seen."""
    net, _ = run(tiny(tmp_path / "first", steps=1))
    assert net.about
    with pytest.raises(Stopped):
        fit(net, domain, tiny(tmp_path / "second"), progress=False, watch=lambda state, net: state.step == 3)
    assert not net.about


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.12.partial").write_bytes(b"half")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / ".step000001.pt.12.partial").write_bytes(b"half")
    of_others = [tmp_path / ".results.csv.12.partial", tmp_path / "another/.checkpoint.pt.12.partial"]
    of_others[1].parent.mkdir()
    for file in of_others:  # which may be at work
        file.touch()
    run(tiny(tmp_path, steps=1))
    assert sorted(tmp_path.rglob(".*.partial")) == sorted(of_others)


def test_a_checkpoint_that_the_disk_does_not_give_is_kept_for_later(tmp_path, monkeypatch):
    whole, _ = run(tiny(tmp_path / "whole", steps=8))
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 4)
    with interrupted_in_step(7, monkeypatch):
        run(tiny(tmp_path / "run", steps=8))

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("fmsam_lib.training.checkpoint.whole", stale)
        with pytest.raises(OSError, match="Stale"):
            run(tiny(tmp_path / "run", steps=8))
    net, _ = run(tiny(tmp_path / "run", steps=8))
    assert torch.equal(weights(net), weights(whole))
    assert not (tmp_path / "run/checkpoint_damaged.pt").exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-500])


def one_bit_changed(path):
    """Of the weights: torch reads that without a word."""
    content = bytearray(path.read_bytes())
    content[content.index(next(iter(torch.load(path, weights_only=True)["net"].values())).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def of_something_else(path):
    torch.save({"step": 12}, path)


@pytest.mark.parametrize("damage", [cut_short, one_bit_changed, of_something_else, Path.unlink])
def test_a_training_whose_checkpoint_is_damaged_starts_anew_to_the_same_weights(tmp_path, damage, monkeypatch):
    whole, _ = run(tiny(tmp_path / "whole", steps=8))
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 4)
    with interrupted_in_step(7, monkeypatch):
        run(tiny(tmp_path / "run", steps=8))
    checkpoint = tmp_path / "run/checkpoint.pt"
    damage(checkpoint)
    damaged = checkpoint.read_bytes() if checkpoint.exists() else b""
    with pytest.warns(match=r"checkpoint\.pt cannot be read .*trains anew") if damaged else contextlib.nullcontext():
        net, history = run(tiny(tmp_path / "run", steps=8))
    assert torch.equal(weights(net), weights(whole))
    assert [line["step"] for line in history] == [8]
    if damaged:  # what took computing is not deleted, and the training can be run again
        assert (tmp_path / "run/checkpoint_damaged.pt").read_bytes() == damaged


def test_a_finished_training_without_its_checkpoint_is_left_as_it_is(tmp_path):
    run(tiny(tmp_path, steps=4))
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "weights.pt").stat().st_mtime_ns
    with pytest.raises(
        ConfigError, match=r"a finished training, but no checkpoint.pt: delete weights.pt to train anew"
    ):
        run(tiny(tmp_path, steps=4))
    assert (tmp_path / "weights.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", '{"parameters": {"lr": 0.0', "[]", "{}"])
def test_a_training_whose_record_is_damaged_goes_on_to_the_same_weights(tmp_path, content, monkeypatch):
    whole, _ = run(tiny(tmp_path / "whole", steps=8))
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 4)
    with interrupted_in_step(7, monkeypatch):
        run(tiny(tmp_path / "run", steps=8))
    (tmp_path / "run/config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"lr: 0.001 there, 0.01 now"):
        run(tiny(tmp_path / "run", steps=8, lr=0.01))
    net, _ = run(tiny(tmp_path / "run", steps=8))
    assert torch.equal(weights(net), weights(whole))
    assert json.loads((tmp_path / "run/config.json").read_text())["parameters"]["steps"] == 8


@pytest.mark.parametrize("optimizer", ["adam", "sam"])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(tmp_path, optimizer):
    settings = tiny(tmp_path, optimizer=optimizer)
    net = starting(settings)
    (batch,) = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    batch.moving[0, 0, 3, 3] = float("nan")
    before = [value.clone() for value in net.state_dict().values()]  # BatchNorm's statistics too
    sam = SAM(net.parameters(), 0.01, net=net) if optimizer == "sam" else None
    state = State()
    train_step(net, [batch], settings, torch.optim.Adam(net.parameters()), sam, state)
    assert (state.skipped, state.in_a_row, state.gradients) == (1, 1, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), before, strict=True))


def test_training_gives_up_when_nothing_stays_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=f"{GIVE_UP_AFTER} steps in a row.*smaller lr"):
        run(tiny(tmp_path, lr=1e30, steps=100))


def test_a_training_that_diverges_says_so_once(tmp_path):
    with pytest.warns(UserWarning, match="seed 0: the loss grew tenfold or more: try a smaller lr .3") as told:
        _, history = run(tiny(tmp_path, lr=3.0, steps=60))
    assert min(line["total"] for line in history) > 100  # the first logged one, too
    assert len([w for w in told if "tenfold" in str(w.message)]) == 1


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    dataset = open_domain("brain-mr", shape=(16, 16))
    (first,), (again,) = (make_batches(dataset, tiny(tmp_path), 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.moving, make_batches(dataset, tiny(tmp_path), 8)[0].moving)
    assert not torch.equal(first.points, make_batches(dataset, tiny(tmp_path, seed=1), 7)[0].points)


@pytest.mark.parametrize("optimizer", ["adam", "adam-2x", "sam", "asam", "random"])
def test_climbing_now_and_then_needs_its_optimizer(optimizer):
    domain = open_domain("brain-mr", shape=(16, 16))
    with pytest.raises(ConfigError, match="expected optimizer sam-every or looksam with `every`"):
        train(domain, **OPTIONS | {"optimizer": optimizer}, every=2)


class Masked:
    """Pairs of a domain with masks, all but every `bare`-th."""

    def __init__(self, bare=0):
        self.domain, self.bare = open_domain("brain-mr", shape=(16, 16)), bare

    def training_pair(self, index):
        pair = self.domain.training_pair(index)
        if self.bare and index % self.bare == 0:
            return dataclasses.replace(pair, fixed_mask=pair.fixed > 0.2)
        return dataclasses.replace(pair, moving_mask=pair.moving > 0.2, fixed_mask=pair.fixed > 0.2)


@pytest.mark.parametrize("augment", [False, True])
def test_masks_go_with_their_images_into_the_loss(tmp_path, augment):
    settings = tiny(tmp_path, batch=4, accumulate=2, augment=augment)
    for plain, masked in zip(
        make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 5),
        make_batches(Masked(), settings, 5),
        strict=True,
    ):
        assert torch.equal(plain.moving, masked.moving)
        assert torch.equal(plain.fixed, masked.fixed)
        for image, mask in ((masked.moving, masked.moving_mask), (masked.fixed, masked.fixed_mask)):
            agree = (mask == (image > 0.2)).float().mean()
            assert agree == 1 if not augment else agree > 0.9
        net = starting(settings)
        losses = [objective(net, batch, lmbda=1.5, sigma=3.0).total for batch in (plain, masked)]
        assert losses[0] != losses[1]


def test_masks_count_only_where_every_image_of_a_batch_has_one(tmp_path):
    (batch,) = make_batches(Masked(bare=2), tiny(tmp_path, batch=2), 5)
    assert batch.moving_mask is batch.fixed_mask is None
    (plain,) = make_batches(open_domain("brain-mr", shape=(16, 16)), tiny(tmp_path, batch=2), 5)
    assert torch.equal(batch.moving, plain.moving)


def test_provenance_stays_that_of_the_training(tmp_path, monkeypatch):
    run(tiny(tmp_path, steps=10))
    made = (tmp_path / "config.json").read_text()
    monkeypatch.setattr("fmsam_lib.training.checkpoint.provenance", lambda: {"commit": "another"})
    run(tiny(tmp_path, steps=10))
    assert (tmp_path / "config.json").read_text() == made


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training"):
            run(tiny(tmp_path, steps=1))


def test_a_disk_without_locks_is_told_and_trained_on(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"this disk keeps no locks \(No locks available\); never train here twice"):
        run(tiny(tmp_path, steps=1))
    assert (tmp_path / "weights.pt").exists()


def test_fine_tuning_goes_on_from_a_file(tmp_path):
    first, _ = run(tiny(tmp_path / "first"))
    file = str(tmp_path / "first" / "weights.pt")
    assert torch.equal(weights(starting(tiny(tmp_path, weights=file))), weights(first))
    tuned, _ = run(tiny(tmp_path / "tuned", weights=file, down=[9, 9, 9], steps=2))
    assert 0 < (weights(tuned) - weights(first)).norm() < 0.1 * weights(first).norm()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["network"]["down"] == [4, 4]
    assert load(tmp_path / "tuned" / "weights.pt").shape == (16, 16)


def test_weights_count_from_the_projects_folder(tmp_path, monkeypatch):
    first, _ = run(tiny(tmp_path / "first", steps=1))
    monkeypatch.setattr("fmsam_lib.checking.PROJECT", tmp_path)
    monkeypatch.chdir("/")
    assert torch.equal(weights(starting(tiny(tmp_path, weights="first/weights.pt"))), weights(first))


def test_a_training_goes_on_from_its_own_first_weights_alone(tmp_path, domain, monkeypatch):
    options = {name: value for name, value in OPTIONS.items() if name not in ("down", "levels")}
    first, other = (GradICON(2, down=(4, 4), levels=2, last_step=False) for _ in range(2))
    again = copy.deepcopy(first)
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    with interrupted_in_step(8, monkeypatch):
        train(domain, net=first, out=tmp_path / "a", **options)
    with pytest.raises(ConfigError, match=r"(?s)other parameters or images:\n- start: '\w+' there, '\w+' now\n"):
        train(domain, net=other, out=tmp_path / "a", **options)
    train(domain, net=first, out=tmp_path / "a", **options)  # the same network, which has moved meanwhile
    train(domain, net=again, out=tmp_path / "a", **options)  # as of another day
    assert torch.equal(weights(first), weights(again))
    first.save(tmp_path / "start.pt")
    run(tiny(tmp_path / "b", weights=str(tmp_path / "start.pt"), steps=1))
    other.save(tmp_path / "start.pt")
    with pytest.raises(ConfigError, match="start: '"):
        run(tiny(tmp_path / "b", weights=str(tmp_path / "start.pt"), steps=1))


def test_a_training_stopped_in_its_first_stage_leaves_the_network_whole(tmp_path, domain):
    net, settings = GradICON(2, down=(4,)), tiny(tmp_path, first_stage=10, last_step=True)
    with pytest.raises(Stopped):
        fit(net, domain, settings, progress=False, watch=lambda state, net: state.step == 3)
    assert not net.first_stage
    assert not net.training


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


def gradients_of(tmp_path, batch, **changes):
    """The gradient at the start, of one batch, in float64."""
    settings = tiny(tmp_path, batch=batch, **changes)
    net = starting(settings).double()
    micro = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    micro = [Batch(*(None if tensor is None else tensor.double() for tensor in part)) for part in micro]
    net.eval()  # without BatchNorm's statistics, which are each micro-batch's own
    gradient(net, micro, settings, torch.optim.Adam(net.parameters()), State())
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    whole, parts = gradients_of(tmp_path, 4), gradients_of(tmp_path, 4, accumulate=2)
    assert whole.norm() > 0
    assert (parts - whole).norm() < 1e-12 * whole.norm()


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiple of processes x accumulate, 2, got 3"):
        tiny(tmp_path, batch=3, accumulate=2)


def test_all_micro_batches_are_seen_at_w_then_all_at_w_plus_eps(tmp_path, monkeypatch):
    settings = tiny(tmp_path, batch=4, accumulate=2, rho=0.5)
    net, seen = starting(settings), []

    def spy(net, batch, **options):
        seen.append((torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone(), batch.moving))
        return objective(net, batch, **options)

    monkeypatch.setattr("fmsam_lib.training.step.objective", spy)
    micro = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    sam, state = SAM(net.parameters(), settings.rho, net=net), State()
    train_step(net, micro, settings, torch.optim.Adam(net.parameters()), sam, state)
    at = [w for w, _ in seen]
    assert torch.equal(at[0], at[1])
    assert torch.equal(at[2], at[3])
    assert (at[2] - at[0]).norm() == pytest.approx(0.5, rel=1e-5)
    assert [torch.equal(images, micro[i % 2].moving) for i, (_, images) in enumerate(seen)] == [True] * 4
    assert state.gradients == 2


def one_step(net, settings, device="cpu"):
    """Loss and SAM's rise of a step of a copy of `net`, and the gradient that would move it."""
    net, state = copy.deepcopy(net).to(device).train(), State()
    net.precision = settings.precision
    sam, optimizer = perturbation(net, settings), torch.optim.SGD(net.parameters(), lr=0.0)
    micro = [batch.to(device) for batch in make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 20)]
    loss = train_step(net, micro, settings, optimizer, sam, state)
    assert state.skipped == 0
    return loss.total.item(), float(sam.rise) if sam else 0.0, torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("optimizer", ["adam", "sam", "looksam"])
def test_half_precision_takes_nearly_the_same_step(tmp_path, optimizer):
    """Of SAM the second pass stands at w + eps, not at autocast's copies of w."""
    settings = tiny(tmp_path, optimizer=optimizer, seed=1)
    net, _ = run(settings)
    loss, rise, step = one_step(net, settings)
    for precision in ("bf16", "fp16"):
        other, other_rise, other_step = one_step(net, settings.model_copy(update=dict(precision=precision)))
        assert other == pytest.approx(loss, rel=1e-3)
        assert other_rise == pytest.approx(rise, rel=0.02)
        assert 0 < (other_step - step).norm() < 0.04 * step.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_to_the_same_loss(tmp_path, precision):
    _, history = run(tiny(tmp_path / "full"))
    net, other = run(tiny(tmp_path / "half", precision=precision))
    assert net.precision == "float32"  # as its file, read again
    assert net.steps[0].last.weight.dtype == torch.float32
    assert other[-1]["total"] == pytest.approx(history[-1]["total"], abs=0.005)
    assert other[-1]["skipped"] == 0


def test_an_overflow_halves_the_scale_and_leaves_the_weights(tmp_path):
    settings = tiny(tmp_path, precision="fp16")
    net, state = starting(settings), State(scale=2.0**126)
    net.precision = "fp16"
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    micro = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    adam, before = torch.optim.Adam(net.parameters()), weights(net)
    while state.scale > 2.0**124:
        train_step(net, micro, settings, adam, SAM(net.parameters(), settings.rho, net=net), state)
    assert (state.skipped, state.in_a_row) == (2, 2)
    assert torch.equal(weights(net), before)
    state.scale = 2.0**5  # a processor with fp16 arithmetic of its own overflows sooner than one without
    train_step(net, micro, settings, adam, SAM(net.parameters(), settings.rho, net=net), state)
    assert (state.in_a_row, state.scaled_well) == (0, 1)
    assert not torch.equal(weights(net), before)


def test_the_second_gradient_alone_is_clipped(tmp_path):
    """Adam's first moment holds a tenth of the first step's gradient."""
    settings = tiny(tmp_path, clip=0.01)
    net = starting(settings)
    adam, sam = torch.optim.Adam(net.parameters()), SAM(net.parameters(), settings.rho, net=net)
    micro = make_batches(open_domain("brain-mr", shape=(16, 16)), settings, 0)
    train_step(net, micro, settings, adam, sam, State())
    moment = torch.cat([s["exp_avg"].flatten() for s in adam.state.values()])
    assert sam.gradient_norm > 0.02  # the climb's gradient was as long as it was
    assert sam.gradient_norm_there > 0.02
    assert moment.norm() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_two_stages_add_the_last_step(tmp_path):
    settings = tiny(tmp_path / "two", last_step=True, first_stage=10, optimizer="adam", lr_schedule="constant")
    at_start = weights(starting(settings).steps[-1])
    stopped = []

    def stop(*args):
        if args[-1].step == 10:
            stopped.append([weights(unet) for unet in args[0].steps])
        return train_step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmsam_lib.training.loop.train_step", stop)
        trained, _ = run(settings)
    *before, last = stopped[0]
    assert torch.equal(last, at_start)  # untouched so far
    assert not torch.equal(weights(trained.steps[-1]), at_start)
    net = starting(settings)
    net.steps, net.scales = net.steps[:-1], net.scales[:-1]  # the same network without its last step
    alone = settings.model_copy(
        update=dict(out=str(tmp_path / "one"), steps=10, first_stage=0, last_step=False, optimizer="adam")
    )
    fit(net, open_domain("brain-mr", shape=(16, 16)), alone, progress=False)
    assert all(torch.equal(weights(a), b) for a, b in zip(net.steps, before, strict=True))
    with pytest.raises(ConfigError, match="first_stage to be below steps"):
        tiny(tmp_path, last_step=True, first_stage=20)
    with pytest.raises(ConfigError, match="last_step, which is added after it"):
        tiny(tmp_path, first_stage=5)
    GradICON(2, down=(4,)).save(tmp_path / "with.pt")
    GradICON(2, down=(4,), last_step=False).save(tmp_path / "without.pt")
    run(tiny(tmp_path / "with", first_stage=5, weights=str(tmp_path / "with.pt"), steps=6))
    with pytest.raises(ConfigError, match="network with a last step, which first_stage leaves out"):
        run(tiny(tmp_path / "without", first_stage=5, weights=str(tmp_path / "without.pt"), last_step=True))
    assert tiny(tmp_path, last_step=True, first_stage=15, optimizer="adam-2x").stages == (30, 40)


def test_the_baseline_at_equal_cost_takes_twice_the_steps(tmp_path):
    _, adam = run(tiny(tmp_path / "adam", optimizer="adam"))
    _, twice = run(tiny(tmp_path / "twice", optimizer="adam-2x"))
    _, sam = run(tiny(tmp_path / "sam"))
    evaluations = [history[-1]["gradient_evaluations"] for history in (adam, twice, sam)]
    assert evaluations == [20, 40, 40]
    assert [h[-1]["step"] for h in (adam, twice, sam)] == [20, 40, 20]
    assert twice[-1]["lr"] < 0.02 * twice[0]["lr"]  # the schedule ends with the training


def test_dice_on_validation_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("fmsam_lib.training.loop.VALIDATE_EVERY", 5)
    monkeypatch.setattr("fmsam_lib.training.loop.LOG_EVERY", 5)
    dice = iter([0.3, 0.7, math.nan, 0.5])
    monkeypatch.setattr("fmsam_lib.training.loop.validate", lambda net, pairs: next(dice))
    _, history = run(tiny(tmp_path, validation=2))
    assert [line["dice"] for line in history] == [0.3, 0.7, None, 0.5]
    assert lines_of(tmp_path)[1]["dice"] == 0.7


def test_validation_leaves_the_training_as_it_is(tmp_path):
    plain, watched = (run(tiny(tmp_path / str(n), validation=n))[0] for n in (0, 3))
    assert torch.equal(weights(plain), weights(watched))


def test_validation_is_the_mean_dice_of_the_pairs(tmp_path):
    dataset = open_domain("brain-mr", shape=(16, 16))
    pairs, net = [dataset.validation_pair(i) for i in range(2)], starting(tiny(tmp_path)).train()
    means = [statistics.mean(row["value"] for row in measure(pair, None) if row["metric"] == "dice") for pair in pairs]
    assert validate(net, pairs) == pytest.approx(statistics.mean(means))  # untrained: the identity
    assert net.training
    unlabelled = [dataclasses.replace(pair, fixed_label=None) for pair in pairs]
    assert math.isnan(validate(net, unlabelled))
    assert validate(net, [pairs[0], unlabelled[1]]) == validate(net, pairs[:1])


def test_batches_are_made_ahead_in_order_and_no_further():
    made, taken = [], []

    def make(step):
        made.append(step)
        return step

    for batch in ahead(make, range(3, 9)):
        taken.append(batch)
        assert len(made) <= len(taken) + AHEAD
    assert taken == made == [3, 4, 5, 6, 7, 8]


def test_making_batches_leaves_the_number_of_threads_alone(tmp_path, monkeypatch):
    """A training with two threads computes with two, and so does whatever else it starts, while pairs are made."""
    settings, seen = tiny(tmp_path, threads=2, steps=6), []

    def look(*args):
        with ThreadPoolExecutor(1) as pool:  # a thread that torch has not met yet takes the process's number
            seen.append((torch.get_num_threads(), pool.submit(torch.get_num_threads).result()))
        return train_step(*args)

    class Forgetful(type(open_domain("brain-mr", shape=(16, 16)))):
        def training_pair(self, index):
            self.made.clear()
            return super().training_pair(index)

    monkeypatch.setattr("fmsam_lib.training.loop.train_step", look)
    set_num_threads, called = torch.set_num_threads, []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (called.append(n), set_num_threads(n)))
    set_num_threads(1)
    fit(starting(settings), Forgetful("brain-mr", (16, 16), 0), settings, progress=False)
    assert seen == [(2, 2)] * 6
    assert called == [2, 1]  # for the training, and back


def test_what_goes_wrong_in_making_a_batch_is_raised():
    def make(step):
        if step == 2:
            raise DataError("file 2 is broken")
        return step

    batches = ahead(make, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="file 2 is broken"):
        next(batches)


def test_augmentation_changes_the_images_alone(tmp_path):
    dataset = open_domain("brain-mr", shape=(16, 16))
    (plain,), (other,) = (make_batches(dataset, tiny(tmp_path, augment=a), 3) for a in (False, True))
    (again,) = make_batches(dataset, tiny(tmp_path, augment=True), 3)
    assert torch.equal(other.moving, again.moving)
    assert torch.equal(plain.points, other.points)
    assert not torch.equal(plain.moving, other.moving)


def test_a_checkpoint_of_another_training_is_refused_without_its_record_too(tmp_path):
    run(tiny(tmp_path, steps=1))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"(?s)other parameters.*rho: 0.01 there, 0.02 now"):
        run(tiny(tmp_path, steps=1, rho=0.02))


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a GPU for each process, 1, torch finds 0: choose cpu or auto"):
        run(tiny(tmp_path, device="cuda"))
    assert device_of(tiny(tmp_path, device="auto")) == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert device_of(tiny(tmp_path, device="auto")) == torch.device("cuda")
    assert device_of(tiny(tmp_path, device="auto", batch=2, processes=2)) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: expected one that torch can use")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_gpu_trains_nearly_the_same_network(tmp_path, precision):
    settings = tiny(tmp_path / "cpu", seed=1)
    net, expected = run(settings)
    loss, rise, step = one_step(net, settings)
    there = one_step(net, settings.model_copy(update=dict(precision=precision)), "cuda")
    assert there[0] == pytest.approx(loss, rel=1e-3)
    assert there[1] == pytest.approx(rise, rel=0.02)
    assert (there[2].cpu() - step).norm() < 0.04 * step.norm()
    _, history = run(tiny(tmp_path / "gpu", device="cuda", precision=precision, seed=1))
    assert history[-1]["total"] == pytest.approx(expected[-1]["total"], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"snapshots": 0}, []),
        ({"snapshots": 1}, [20]),
        ({"snapshots": 3}, [7, 13, 20]),
        ({"snapshots": 4, "optimizer": "adam-2x"}, [10, 20, 30, 40]),
        ({"snapshots": 20}, list(range(1, 21))),
    ],
    ids=str,
)
def test_snapshots_are_evenly_spread_up_to_the_end(tmp_path, changes, expected):
    assert sorted(snapshot_steps(tiny(tmp_path, **changes))) == expected


def test_more_snapshots_than_steps_keep_every_step_once(tmp_path):
    run(tiny(tmp_path, steps=3, snapshots=50))
    assert sorted(file.name for file in (tmp_path / "snapshots").iterdir()) == [
        f"step{step:06d}.pt" for step in (1, 2, 3)
    ]


def snapshots_in(folder):
    files = sorted((folder / "snapshots").glob("*"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def test_snapshots_are_the_weights_after_their_step(tmp_path, monkeypatch):
    after = {}

    def keep(*args):
        loss = train_step(*args)
        after[f"step{args[-1].step + 1:06d}.pt"] = torch.nn.utils.parameters_to_vector(args[0].parameters()).detach()
        return loss

    monkeypatch.setattr("fmsam_lib.training.loop.train_step", keep)
    net, _ = run(tiny(tmp_path, snapshots=4))
    found = snapshots_in(tmp_path)
    assert list(found) == [f"step{step:06d}.pt" for step in (5, 10, 15, 20)]
    assert all(torch.equal(vector, after[name]) for name, vector in found.items())
    assert torch.equal(found["step000020.pt"], torch.nn.utils.parameters_to_vector(net.parameters()))
    assert not any(vector.requires_grad for vector in found.values())


def test_without_snapshots_there_is_no_folder_and_the_training_is_the_same(tmp_path):
    plain, watched = (run(tiny(tmp_path / str(n), snapshots=n))[0] for n in (0, 7))
    assert not (tmp_path / "0" / "snapshots").exists()
    assert torch.equal(weights(plain), weights(watched))


def test_a_resumed_training_leaves_the_same_snapshots(tmp_path, monkeypatch):
    """Killed after step 12, whose last checkpoint is of step 10: the snapshot of step 12 is made a second time."""
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    settings = tiny(tmp_path / "killed", snapshots=5)
    with interrupted_in_step(13, monkeypatch):
        run(settings)
    before = snapshots_in(tmp_path / "killed")
    assert list(before) == [f"step{step:06d}.pt" for step in (4, 8, 12)]
    run(settings)
    run(settings.model_copy(update=dict(out=str(tmp_path / "whole"))))
    resumed, whole = (snapshots_in(tmp_path / name) for name in ("killed", "whole"))
    assert list(resumed) == list(whole) == [f"step{step:06d}.pt" for step in (4, 8, 12, 16, 20)]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert all(torch.equal(resumed[name], before[name]) for name in before)


def test_a_training_may_go_on_with_another_number_of_snapshots(tmp_path, monkeypatch):
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    with interrupted_in_step(11, monkeypatch):
        run(tiny(tmp_path / "killed", snapshots=0))
    resumed, _ = run(tiny(tmp_path / "killed", snapshots=4))
    whole, _ = run(tiny(tmp_path / "whole", snapshots=0))
    assert torch.equal(weights(resumed), weights(whole))
    assert list(snapshots_in(tmp_path / "killed")) == ["step000015.pt", "step000020.pt"]  # those still to come
    record = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert record["parameters"]["snapshots"] == 4
    assert record["resumed"][0]["step"] == 10


def test_a_training_that_is_done_leaves_no_other_snapshots(tmp_path):
    run(tiny(tmp_path, snapshots=2))
    with pytest.raises(ConfigError, match=r"snapshots: 2 there, 4 now\ndelete the folder"):
        run(tiny(tmp_path, snapshots=4))
    run(tiny(tmp_path, snapshots=0))
    assert list(snapshots_in(tmp_path)) == ["step000010.pt", "step000020.pt"]


OPTIONS = {"down": [4, 4], "levels": 2, "steps": 12, "batch": 1, "validation": 0, "sigma": 3.0, "progress": False}


@contextlib.contextmanager
def interrupted_in_step(number, monkeypatch):
    """A training in this block is interrupted in this step of its own, the first being 1."""
    done = itertools.count(1)

    def interrupted(*args):
        if next(done) == number:
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fmsam_lib.training.loop.train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def domain():
    return open_domain("brain-mr", shape=(16, 16))


def test_a_network_that_moved_before_its_first_checkpoint_is_no_start(tmp_path, domain, monkeypatch):
    net, how = GradICON(2, down=(4,)), {"out": tmp_path, "steps": 20, "validation": 0, "sigma": 3.0, "progress": False}
    with interrupted_in_step(5, monkeypatch):
        train(domain, net=net, **how)
    with pytest.raises(ConfigError, match=r"start: '\w+' there, '\w+' now"):
        train(domain, net=net, **how)


def test_train_is_the_notebooks_training(tmp_path, domain):
    """`domain` gives name, shape and data; every other field has its default."""
    settings = Train(**{name: OPTIONS[name] for name in OPTIONS if name != "progress"}, out=str(tmp_path / "fit"),
                     train_domain="brain-mr", shape=[16, 16])  # fmt: skip
    expected, lines = run(settings)
    net, history = train(domain, out=tmp_path / "train", **OPTIONS)
    assert torch.equal(weights(net), weights(expected))
    assert not net.training
    assert isinstance(history, list)
    assert [{k: v for k, v in line.items() if "seconds" not in k} for line in history] == lines_of(tmp_path / "fit")
    assert len(lines) == len(history) == 2
    written = [json.loads((tmp_path / of / "config.json").read_text())["parameters"] for of in ("train", "fit")]
    assert written[0] == written[1] | {"out": str(tmp_path / "train")}


def test_without_out_nothing_is_kept(tmp_path, tmp_path_factory, domain, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch")))  # which torch makes when used
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    train(domain, snapshots=2, **OPTIONS)
    with pytest.raises(FloatingPointError):
        train(domain, **OPTIONS | {"lr": 1e30})
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "temporary"]


def test_out_counts_from_the_working_directory_and_resumes(tmp_path, domain, monkeypatch):
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    monkeypatch.chdir(tmp_path)
    with interrupted_in_step(8, monkeypatch):
        train(domain, out="runs/mine", optimizer="looksam", **OPTIONS)
    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists()
    resumed, _ = train(domain, out="runs/mine", optimizer="looksam", **OPTIONS)
    record = json.loads((tmp_path / "runs" / "mine" / "config.json").read_text())
    assert [line["step"] for line in record["resumed"]] == [5]
    whole, _ = train(domain, optimizer="looksam", **OPTIONS)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(ConfigError, match="domain_seed: 0 there, 3 now"):
        train(open_domain("brain-mr", shape=(16, 16), seed=3), out="runs/mine", optimizer="looksam", **OPTIONS)


def real_domain(folder, **options):
    return open_domain("Own", shape=(16, 16), data=folder, **options)


class Own:
    """A domain of somebody's own: the library knows nothing of where its images come from."""

    def __init__(self, images):
        self.name, self.shape, self.images = "mine", (16, 16), open_domain(images, shape=(16, 16))
        self.test_count = self.validation_count = 0

    def training_pair(self, index):
        return self.images.training_pair(index)


def test_other_images_of_ones_own_domain_are_another_training(tmp_path):
    options = OPTIONS | {"out": tmp_path / "run"}
    first, _ = train(Own("brain-mr"), **options)
    assert torch.equal(weights(train(Own("brain-mr"), **options)[0]), weights(first))
    with pytest.raises(ConfigError, match=r"or images:\n- hash_of_images: '\w+' there, '\w+' now\n"):
        train(Own("lung-ct"), **options)

    class Drawn(Own):
        def training_pair(self, index):
            pair = super().training_pair(index)
            return dataclasses.replace(pair, moving=(pair.moving + 0.1 * torch.rand(1, 16, 16)).clamp(0, 1))

    options["out"] = tmp_path / "drawn"
    first, _ = train(Drawn("brain-mr"), **options)
    assert torch.equal(weights(train(Drawn("brain-mr"), **options)[0]), weights(first))  # nobody knows


def test_other_images_of_a_changed_synthetic_domain_are_another_training(tmp_path):
    class Darker(type(open_domain("brain-mr", shape=(16, 16)))):
        power = 1

        def training_pair(self, index):
            pair = super().training_pair(index)
            return dataclasses.replace(pair, moving=pair.moving**self.power)

    options = OPTIONS | {"out": tmp_path / "run"}
    train(Darker("brain-mr", (16, 16), 0), **options)
    Darker.power = 3
    with pytest.raises(ConfigError, match="hash_of_images"):
        train(Darker("brain-mr", (16, 16), 0), **options)


def test_other_images_are_another_training(tmp_path, monkeypatch):
    images, mask = dataset(tmp_path / "Own") / "imagesTr", tmp_path / "Own/masksTr/p2_ED.nii.gz"
    domain, options = real_domain(tmp_path), OPTIONS | {"out": tmp_path / "run"}
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    with interrupted_in_step(8, monkeypatch):
        train(domain, **options)
    shutil.copytree(tmp_path / "Own", tmp_path / "moved/Own", copy_function=shutil.copyfile)  # with new dates
    resumed, _ = train(real_domain(tmp_path / "moved"), **options)
    assert torch.equal(weights(resumed), weights(train(domain, **OPTIONS)[0]))
    manifest = tmp_path / "Own/Own_dataset.json"
    first, (one, two) = manifest.read_text(), sorted(images.glob("p[12]_ED.nii.gz"))
    before, fewer = one.read_bytes(), json.loads(first)
    del fewer["training"][1]
    for change, back in (
        (lambda: shutil.copyfile(two, one), lambda: one.write_bytes(before)),
        (lambda: shutil.copytree(images, mask.parent), lambda: shutil.rmtree(mask.parent)),
        (lambda: manifest.write_text(json.dumps(fewer)), lambda: manifest.write_text(first)),
    ):
        change()
        with pytest.raises(ConfigError, match=r"or images:\n- hash_of_images: '\w+' there, '\w+' now\n"):
            train(real_domain(tmp_path), **options)
        back()
    assert torch.equal(weights(train(real_domain(tmp_path), **options)[0]), weights(resumed))
    shutil.copyfile(two, one)  # which the domain has in memory as it was
    found, fresh = (weights(train(d, **OPTIONS)[0]) for d in (domain, real_domain(tmp_path)))
    assert torch.equal(found, fresh)
    assert not torch.equal(found, weights(resumed))


def test_the_callers_threads_are_as_before_afterwards(domain, monkeypatch):
    torch.set_num_threads(1)
    seen = []
    monkeypatch.setattr(
        "fmsam_lib.training.loop.train_step", lambda *args: (seen.append(torch.get_num_threads()), train_step(*args))[1]
    )
    train(domain, threads=2, **OPTIONS)
    assert torch.get_num_threads() == 1
    with pytest.raises(FloatingPointError):
        train(domain, threads=3, **OPTIONS | {"lr": 1e30})
    assert torch.get_num_threads() == 1
    assert set(seen) == {2, 3}


def test_a_network_is_trained_further_in_place(tmp_path, domain):
    net = GradICON(2, down=(3, 5), levels=1, last_step=False)
    before = weights(net)
    options = {name: value for name, value in OPTIONS.items() if name not in ("down", "levels")}
    trained, _ = train(domain, net=net, out=tmp_path, **options)
    assert trained is net
    assert not torch.equal(weights(net), before)
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["parameters"]["down"], record["parameters"]["levels"]) == ([3, 5], 1)


def test_options_that_cannot_be_right_are_refused(domain):
    with pytest.raises(ConfigError, match=r"(?s)2 problems in the options of train.*rho.*step: unknown.*mean steps\?"):
        train(domain, rho=-1.0, step=3)
    with pytest.raises(ConfigError, match="out: expected at least one character, got ''"):
        train(domain, out="")
    with pytest.raises(
        ConfigError, match="expected data, shape from the domain and the network given, got options too"
    ):
        train(domain, shape=[16, 16], data="")
    with pytest.raises(ConfigError, match="expected down, weights from the domain and the network"):
        train(domain, net=GradICON(2, down=(4,)), down=[4], weights="unigradicon")


class Other(type(open_domain("brain-mr", shape=(16, 16)))):
    """A domain that its name does not give."""


@pytest.mark.parametrize("other", [Other("brain-mr", (16, 16), 0), open_domain("brain-mr", shape=(16, 16), seed=1)])
def test_several_processes_refuse_a_domain_that_its_name_does_not_give(other):
    with pytest.raises(ConfigError, match="each of several processes opens the domain by its name"):
        train(other, processes=2, **OPTIONS | {"batch": 2})
    assert len(train(other, **OPTIONS)[1]) == 2  # one process takes it


def test_several_processes_refuse_a_network_that_they_cannot_start_from(domain):
    options = {"steps": 2, "batch": 2, "processes": 2}
    with pytest.raises(ConfigError, match="several processes cannot start from `net`"):
        train(domain, net=GradICON(2, down=(4,), last_step=False), **options)


def test_a_network_that_is_frozen_is_not_trained(domain):
    with pytest.raises(ConfigError, match=r"expected weights to train, got all of them frozen: net.requires_grad_\(\)"):
        train(domain, net=GradICON(2, down=(4,), last_step=False).requires_grad_(False), steps=2, batch=2)


def test_a_network_of_the_other_dimension_is_not_trained(domain):
    with pytest.raises(ConfigError, match="expected a 2-D network for brain-mr, got a 3-D one"):
        train(domain, net=GradICON(3, down=(4,), last_step=False), steps=2)


def test_a_name_is_no_domain():
    with pytest.raises(ConfigError, match=r"expected a domain, got 'brain-mr': fm.open_domain"):
        train("brain-mr")


def test_unigradicons_own_architecture_is_a_few_parameters(tmp_path):
    given = {"down": [16, 32, 64, 256, 512], "up": [16, 32, 64, 128, 256], "levels": 3, "last_step": True}
    net = starting(tiny(tmp_path, shape=[80, 80, 80], **given))
    assert net.settings == unigradicon().settings
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in unigradicon().parameters())
    small, _ = run(tiny(tmp_path, down=[4, 8], up=[4, 6], steps=2))
    assert load(tmp_path / "weights.pt").settings["up"] == small.settings["up"] == [4, 6]
    with pytest.raises(ConfigError, match="as many channels up as down, 2, got 1"):
        tiny(tmp_path, up=[4])


def test_what_is_frozen_is_a_part_of_the_training(tmp_path, domain):
    def net():
        torch.manual_seed(3)
        return GradICON(2, down=(4,), last_step=False)

    train(domain, net=net(), out=tmp_path, steps=2, batch=2)
    partly = net()
    partly.steps[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="other parameters or images"):
        train(domain, net=partly, out=tmp_path, steps=2, batch=2)


def test_weights_are_those_of_the_current_folder(tmp_path, domain, monkeypatch):
    net, _ = train(domain, out=tmp_path / "first", **OPTIONS)
    monkeypatch.chdir(tmp_path)
    again, _ = train(domain, weights="first/weights.pt", lr=1e-9, **{**OPTIONS, "steps": 1})
    one, other = (torch.nn.utils.parameters_to_vector(n.parameters()) for n in (again, net))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_compiled_network_is_trained_as_itself(tmp_path, domain):
    torch.manual_seed(3)
    net = GradICON(2, down=(4,), last_step=False)
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    both = {"plain": net, "compiled": compiled}
    totals = [train(domain, net=n, out=tmp_path / name, steps=2, batch=2)[1][-1]["total"] for name, n in both.items()]
    assert totals[0] == pytest.approx(totals[1], abs=1e-5)


class Alike:
    """Pairs of one image with itself, and a mask."""

    def training_pair(self, index):
        pair = Masked().training_pair(index)
        return dataclasses.replace(pair, moving=pair.fixed, moving_mask=pair.fixed_mask)


@pytest.mark.parametrize("augmented", [False, True])
def test_contrast_changes_each_image_by_itself_and_nothing_where_it_is_0(tmp_path, augmented):
    changed, same, plain = (
        make_batches(Alike(), tiny(tmp_path, batch=2, augment=augmented, contrast=strength), 3)[0]
        for strength in (0.7, 0.7, 0.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(changed, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[2:], changed[2:], strict=True))  # points and masks
    assert augmented or torch.equal(plain.moving, plain.fixed)
    ratios = torch.cat([changed.moving / plain.moving, changed.fixed / plain.fixed]).nan_to_num(0, 0, 0).flatten(1)
    apart = torch.pdist(ratios) / ratios.norm(dim=1).mean()
    assert apart.min() > 0.05
    if not augmented:
        generator = torch.Generator().manual_seed(3 * 2)
        for image in (changed.moving[0], changed.fixed[0]):
            assert torch.equal(other_scanner(plain.moving[0], 0.7, generator), image)


def test_trainings_from_before_contrast_are_read_and_go_on(tmp_path, monkeypatch):
    domain, options = open_domain("brain-mr", shape=(16, 16)), OPTIONS | {"out": tmp_path / "run"}
    monkeypatch.setattr("fmsam_lib.training.loop.CHECKPOINT_EVERY", 5)
    with interrupted_in_step(8, monkeypatch):
        train(domain, **options)
    config, checkpoint = tmp_path / "run/config.json", tmp_path / "run/checkpoint.pt"
    there, saved = json.loads(config.read_text()), torch.load(checkpoint, weights_only=True)
    for parameters in (there["parameters"], saved["parameters"]):
        del parameters["contrast"]
    config.write_text(json.dumps(there))
    torch.save(saved, checkpoint)
    assert trained_with(tmp_path / "run").contrast == 0
    with pytest.raises(ConfigError, match=r"contrast: 0\.0 there, 0\.5 now"):
        train(domain, contrast=0.5, **options)
    assert torch.equal(weights(train(domain, **options)[0]), weights(train(domain, **OPTIONS)[0]))
