"""The training watcher: it shows what the training logged, stops it cleanly, and changes nothing."""

import asyncio
import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from fmsam_lib.checking import read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.spatial import warp
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Train
from fmsam_lib.training.loop import Stopped, fit, starting
from fmsam_lib.widgets import training_watcher
from fmsam_lib.widgets.training_watcher import Watcher, watched

DOMAIN = open_domain("brain-mr", shape=(16, 16))
SMALL = {"shape": [16, 16], "down": [4, 4], "levels": 2, "steps": 25, "batch": 1, "validation": 1, "sigma": 3.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Draw after every step; what is displayed goes nowhere; the interrupt is as before at the end."""
    monkeypatch.setattr(training_watcher, "EVERY", 0.0)
    monkeypatch.setattr(training_watcher, "SHARE", 1e9)
    monkeypatch.setattr(training_watcher, "display", lambda widget: None)
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, before)


def settings(out, **changes):
    return read(Train, SMALL | {"out": str(out)} | changes)


def train(run, watch=None):
    return fit(starting(run), DOMAIN, run, progress=False, watch=watch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder))
    return (folder / "weights.pt").read_bytes()


def test_watching_changes_no_weight_and_shows_what_was_logged(tmp_path, undisturbed):
    run = settings(tmp_path)
    watch = Watcher(DOMAIN.validation_pair(0), run)
    history = train(run, watch)
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed
    loss, dice, warp_shown = watch.canvas.panels
    assert loss["title"] == f"total loss: {history[-1]['total']:.3f}"
    assert dice["title"] == f"validation Dice: {history[-1]['dice']:.3f}"
    assert len(loss["lines"][0]["points"]) == 2 * 4 * len(history)
    pair, net = DOMAIN.validation_pair(0), load(tmp_path / "weights.pt")
    with torch.no_grad():
        warped = warp(pair.moving[None], net(pair.moving[None], pair.fixed[None]).map)[0, 0].T.flip(0)
    grey = np.frombuffer(warp_shown["pixels"], np.uint8).reshape(16, 16, 4)[..., 0] / 255
    assert np.abs(grey - warped.numpy().clip(0, 1)).max() < 0.01
    assert watch.canvas.facts["step"] == "25 of 25"


@pytest.mark.parametrize("press", ["button", "interrupt"])
def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path, undisturbed, monkeypatch, press):
    run, draw = settings(tmp_path), Watcher._draw

    def pressed(watcher, state, net):
        if state.step == 13 and press == "button":
            watcher.button.click()
        elif state.step == 13:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the main thread hears it
        draw(watcher, state, net)

    monkeypatch.setattr(Watcher, "_draw", pressed)
    with pytest.raises(Stopped, match=r"stopped after step 14 of 25: run this again"):
        asyncio.run(watched(starting(run), DOMAIN, run, interactive=True))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] == 14
    assert not (tmp_path / "weights.pt").exists()
    monkeypatch.undo()
    train(run)
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed
    assert [json.loads(line)["step"] for line in (tmp_path / "history.jsonl").open()] == [10, 20, 25]


def test_a_stop_at_the_last_step_is_the_end(tmp_path, undisturbed):
    train(settings(tmp_path), lambda state, net: state.step == 25)
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed


def test_a_notebook_shows_a_stop_without_a_traceback():
    assert Stopped("The training stopped.")._render_traceback_() == ["The training stopped."]


def test_drawing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(training_watcher, "SHARE", 0.02)
    clock = [0.0]
    monkeypatch.setattr(training_watcher.time, "perf_counter", lambda: clock[0])
    run = settings(tmp_path, steps=400)
    watch = Watcher(DOMAIN.validation_pair(0), run)
    drawn = []

    def draw(state, net):
        drawn.append(state.step)
        clock[0] += 0.1

    monkeypatch.setattr(watch, "_draw", draw)
    state = training_watcher.State()
    while state.step < 399:
        state.step += 1
        clock[0] += 0.1
        watch(state, None)
    assert 0.01 < 0.1 * len(drawn) / clock[0] < 0.03
    watch.stop()
    assert watch(state, None)


def test_no_headless_run_shows_it(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(training_watcher, "Watcher", None)
    run = settings(tmp_path)
    asyncio.run(watched(starting(run), DOMAIN, run))
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed
