"""How quick pair explorer and landscape walker answer, and whether memory stays flat: Chromium without a screen.

    python benchmarks/explorer.py

Writes benchmarks/explorer.csv, in two minutes. The page is the widget's own script, fed by a stand-in for the
notebook's model. A redraw is timed from a change of a value until the pixels of every canvas can be read: the median.
Of the landscape walker it is the kernel's part: loss, registration, Dice and outlines of a point.
"""

import functools
import http.server
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from recording import record

from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.weights import pretrained
from fmsam_lib.pair import Pair
from fmsam_lib.widgets.landscape_walker import walk
from fmsam_lib.widgets.pair_explorer import Explorer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-precise-memory-info", "--js-flags=--expose-gc"]
SHAPE = (175, 175, 175)  # uniGradICON's grid
MOVES = 500
REDRAWS = 18
PAGE = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="explorer.css"><div id="here"></div>
<script type="module">
import widget from "./explorer.js";
const state = await (await fetch("state.json")).json(), heard = {};
for (const name of state.volumes) {
  state.volumes[name] = new DataView(await (await fetch(name + ".bin")).arrayBuffer());
}
window.model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; (heard["change:" + name] ?? []).forEach((hears) => hears()); },
  save_changes: () => {},
  on: (event, hears) => (heard[event] ??= []).push(hears),
  off: () => {},
};
widget.render({ model, el: document.getElementById("here") });
window.drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))));
window.redraw = async (name, value) => {
  const began = performance.now();
  model.set(name, value);
  await new Promise((done) => requestAnimationFrame(done));  // after the widget's own
  for (const c of document.querySelectorAll("canvas")) c.getContext("2d").getImageData(0, 0, 1, 1);
  return performance.now() - began;
};
await drawn();
window.ready = true;
</script>"""


@contextmanager
def opened(page: Page, explorer: Explorer) -> Iterator[Page]:
    """The explorer alone in a page, its model as `window.model`; `drawn()` waits until it has drawn."""
    names = ("view", "plane", "at", "strength", "squares", "blend", "labels", "crosshair", "facts")
    state = {name: getattr(explorer, name) for name in names} | {"volumes": list(explorer.volumes)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in Path(Explorer.__init__.__code__.co_filename).parent.glob("pair_explorer.[cj]s*"):
            shutil.copy(path, folder / f"explorer{path.suffix}")
        for volume, content in explorer.volumes.items():
            (folder / f"{volume}.bin").write_bytes(content)
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (folder / "index.html").write_text(PAGE, encoding="utf-8")
        handler = functools.partial(Quiet, directory=name)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            page.wait_for_function("window.ready")
            yield page
            server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Nothing."""


def brain(shape: tuple[int, ...] = SHAPE) -> tuple[Pair, dict[str, torch.Tensor]]:
    """Balls in balls, labelled, and two smooth maps of them."""
    x = identity_map(shape)
    radius = (x[0] - 0.5).square().sum(0, keepdim=True).sqrt()
    label = (radius < 0.4).int() + (radius < 0.25).int() + (radius < 0.1).int()
    fixed = (label / 4 + 0.1 * torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    waves = {name: x + 0.02 * torch.sin(6 * torch.pi * x.flip(1) * n) for n, name in enumerate(("Adam", "SAM"), 1)}
    return Pair("balls", fixed.flip(1), fixed, label.flip(1), label, spacing=(1.0,) * len(shape)), waves


def main() -> None:
    pair, maps = brain()
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        for given in ({"warped": maps["SAM"]}, maps):
            with opened(page, Explorer(pair, given)):
                rows += measure(page, f"registrations: {len(given)}, 175^3, 3 planes")
        browser.close()
    record([*rows, walked()], __file__, threads=1)


def measure(page: Page, where: str) -> list[tuple]:
    rows = []
    for view in ("side by side", "overlay", "deformation grid", "Jacobian"):
        page.evaluate("async (view) => { await redraw('view', view); await drawn(); }", view)
        for move in ("at", "strength"):
            values = [[60 + i, 62 + i, 64 + i] if move == "at" else 0.4 + 0.02 * i for i in range(REDRAWS)]
            times = [page.evaluate("([name, value]) => redraw(name, value)", [move, value]) for value in values]
            what = "crosshair" if move == "at" else move
            rows.append((f"redraw, {what}, {view}, {where}", statistics.median(times[3:]), "<= 60", "ms"))
    heap = "() => { gc(); gc(); return performance.memory.usedJSHeapSize / 2**20 }"
    walk = "async (n) => { for (let i = 0; i < n; i++) await redraw('at', [i % 175, (3 * i) % 175, (7 * i) % 175]); }"
    page.evaluate("async () => { await redraw('view', 'side by side'); await drawn(); }")
    page.evaluate(walk, 50)
    before = page.evaluate(heap)
    page.evaluate(walk, MOVES)
    after = page.evaluate(heap)
    return [*rows, (f"heap after {MOVES} moves less before, {where}", after - before, "<= 1", "MB")]


def walked() -> tuple:
    """A move of the walker between the networks that come with fmsam, on a pair of 64 x 64."""
    torch.set_num_threads(1)
    walker = walk(
        {"Adam": pretrained("2d")}, open_domain("brain-mr", shape=(64, 64)).test_pair(0), interactive=True, points=3,
        lmbda=1.5, sigma=5.0,
    )  # fmt: skip
    times = []
    for i in range(MOVES // 10):
        began = time.perf_counter()
        walker.point = [0.002 * i, 0.1]
        times.append(1000 * (time.perf_counter() - began))
    return "move of the landscape walker, 64 x 64, the kernel's part", statistics.median(times[3:]), "<= 150", "ms"


if __name__ == "__main__":
    main()
