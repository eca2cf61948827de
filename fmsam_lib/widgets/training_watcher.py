"""A training as it runs in a notebook: loss, validation Dice, the warp of one pair, and a button that stops it."""

import asyncio
import signal
import time
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.display import display

from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Train
from fmsam_lib.plotting import slices
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.loop import fit
from fmsam_lib.widgets import canvas
from fmsam_lib.widgets.sliders import in_a_notebook

EVERY, SHARE = 2.0, 0.02  # draw every so many seconds, but take no more of the time than this share
LOSS: dict[str, Any] = {"colors": "#0072B2", "linewidths": 1.5, "linestyles": "solid"}
DICE = LOSS | {"colors": "#D55E00"}


async def watched(net: GradICON, dataset, run: Train, *, interactive: bool | None = None) -> list[dict]:
    """`fit`, shown in place and with a button that stops it; alone without a notebook, or for several processes.

    It runs in a thread, so that the kernel can hear the button meanwhile (ipykernel 7.4); interrupting the kernel does
    the same. interactive: as `sliders.in_a_notebook` decides. Raises `Stopped`, and as `fit`.
    """
    if run.processes > 1 or not in_a_notebook(interactive):
        return fit(net, dataset, run)
    watcher = Watcher(dataset.validation_pair(0) if dataset.validation_count else dataset.training_pair(0), run)
    display(watcher.widget)
    before = signal.signal(signal.SIGINT, watcher.stop)
    try:
        return await asyncio.to_thread(fit, net, dataset, run, watch=watcher)
    finally:
        signal.signal(signal.SIGINT, before)
        watcher.button.disabled, watcher.button.description = True, "stopped" if watcher.asked else "done"


class Watcher:
    """What `fit` takes as `watch`: draws curves and a pair's registration if it is time; `stop` ends the training."""

    def __init__(self, pair: Pair, run: Train):
        self.pair, self.run, self.asked, self.due = pair, run, False, 0.0
        self.canvas = canvas.Canvas()
        self.button = widgets.Button(description="stop", icon="stop", tooltip="ends after this step, with a checkpoint")
        self.button.on_click(self.stop)
        self.widget = widgets.VBox([self.canvas, self.button])

    def stop(self, *_: Any) -> None:
        self.asked = True

    def __call__(self, state: State, net: GradICON) -> bool:
        start, asked = time.perf_counter(), self.asked
        if asked or state.step == self.run.updates or start >= self.due:
            self._draw(state, net)
            self.due = start + max(EVERY, (time.perf_counter() - start) / SHARE)
        return asked

    def _draw(self, state: State, net: GradICON) -> None:
        net.eval()
        phi = net.map_of(self.pair.moving, self.pair.fixed).nan_to_num()
        net.train()
        dice = f"{mean_dice(self.pair, phi):.3f}"
        curves = [self._curve("total loss", "total", state, LOSS), self._curve("validation Dice", "dice", state, DICE)]
        with self.canvas.hold_sync():
            self.canvas.panels = [*curves, canvas.registered(slices.cut(self.pair, phi))[0]]
            self.canvas.facts = {"step": f"{state.step} of {self.run.updates}", "Dice of the pair shown": dice}

    def _curve(self, title: str, name: str, state: State, look: dict[str, Any]) -> dict[str, Any]:
        every = np.array([(line["step"], line[name]) for line in state.history], float).reshape(-1, 2)  # None is NaN
        steps, values = every[np.isfinite(every[:, 1])].T
        if not len(steps):
            return canvas.panel(f"{title}: not yet", [])
        low, high = values.min(), values.max()
        y = 0.1 + 0.75 * (values - low) / max(high - low, 1e-12)
        points = np.stack([0.03 + 0.94 * steps / self.run.updates, y], 1)
        texts = [(0.03, 0.91, f"{high:.3g}"), (0.03, 0.02, f"{low:.3g}")]
        return canvas.panel(f"{title}: {values[-1]:.3f}", [canvas.line(points, look)], texts=texts)
