"""The training watcher: it shows what the training logged, stops it cleanly, and changes nothing."""

import json
import signal

import pytest
import torch

from fmsam_lib.checking import read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.parameters import Train
from fmsam_lib.training.loop import Stopped, fit, starting
from fmsam_lib.widgets import training_watcher
from fmsam_lib.widgets.training_watcher import watcher

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
    watch = watcher(DOMAIN, run, interactive=True)
    history = train(run, watch)
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed
    loss, dice, warp = watch.canvas.panels
    assert loss["title"] == f"total loss: {history[-1]['total']:.3f}"
    assert dice["title"] == f"validation Dice: {history[-1]['dice']:.3f}"
    assert len(loss["lines"][0]["points"]) == 2 * 4 * len(history)
    assert len(warp["pixels"]) == 4 * 16 * 16
    assert watch.canvas.facts["step"] == "25 of 25"
    assert (watch.button.description, watch.button.disabled) == ("done", True)


@pytest.mark.parametrize("press", ["button", "interrupt"])
def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path, undisturbed, press):
    run = settings(tmp_path)
    watch = watcher(DOMAIN, run, interactive=True)

    def pressed(state, net):
        if state.step == 13:
            watch.button.click() if press == "button" else signal.raise_signal(signal.SIGINT)
        return watch(state, net)

    with pytest.raises(Stopped, match=r"stopped after step 13 of 25: run this again"):
        train(run, pressed)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] == 13
    assert not (tmp_path / "weights.pt").exists()
    assert watch.button.description == "stopped"
    train(run, watcher(DOMAIN, run, interactive=True))
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
    watch = watcher(DOMAIN, run, interactive=True)
    monkeypatch.setattr(watch, "_draw", lambda state, net: clock.__setitem__(0, clock[0] + 0.1))
    state = training_watcher.State()
    while state.step < 399:
        state.step += 1
        clock[0] += 0.1
        watch(state, None)
    assert 0.01 < watch.spent / clock[0] < 0.03
    watch.stop()
    assert watch(state, None)


def test_it_is_shown_in_no_headless_run_and_with_no_second_process(tmp_path):
    assert watcher(DOMAIN, settings(tmp_path)) is None
    assert watcher(DOMAIN, settings(tmp_path, processes=2, batch=2), interactive=True) is None
