"""A person's way: JupyterLab in a real browser, every cell run, a slider moved."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import pytest

from tests.conftest import PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: expected chromium on the PATH (apt install chromium)"),
]


def free_port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--port-retries=0",
    ]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    own = {"PYTHONPATH": str(PROJECT), "HOME": str(folder), "FMSAM_HEADLESS": ""}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, (folder / "lab.log").read_text()
            assert time.monotonic() < deadline, "JupyterLab did not answer within 90 s"
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def edit_parameter(page, old, new):
    """Change a value in the parameter cell as a person would."""
    line = page.locator(".cm-line", has_text=old).first
    line.click()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    page.keyboard.type(new)


@pytest.mark.parametrize(
    ("notebook", "old", "new"),
    [
        ("00_start_here", "steps: int = 150", "steps: int = 10"),
        ("01_look_at_the_data", "shape: list = [64, 64, 64]", "shape: list = [32, 32, 32]"),
        ("50_register_your_own", "io: int = 100", "io: int = 5"),
    ],
)
def test_all_cells_run_and_the_strength_slider_redraws(lab, page, notebook, old, new):
    page.goto(f"{lab}/lab/tree/notebooks/{notebook}.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    edit_parameter(page, old, new)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    picture = page.locator(".widget-image, .jupyter-widgets img").last
    picture.wait_for(state="visible")
    assert (
        page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Error").count()
        == 0
    )
    before = picture.get_attribute("src")
    slider = page.locator(".widget-slider", has_text="strength").locator("[role=slider]")
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("([image, old]) => image.src !== old", arg=[picture.element_handle(), before])
    assert "0.6" in page.locator(".widget-slider", has_text="strength").locator(".widget-readout").inner_text()
    if shots := os.environ.get("FMSAM_SCREENSHOTS"):
        picture.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=f"{shots}/{notebook}.png")


# --- widgets that answer while they are dragged or while the kernel is busy


def opened(lab, page, notebook, parameters):
    """The notebook in the browser, with these lines (by their beginning) changed in its parameter cell."""
    page.goto(f"{lab}/lab/tree/notebooks/{notebook}.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    cell = page.locator(".jp-Notebook .jp-CodeCell .cm-content").first
    cell.click()
    page.keyboard.press("Control+End")
    page.keyboard.press("Enter")
    page.keyboard.insert_text("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def shot(page, name, at):
    """Screenshots in a wide and in a narrow window, where a person wants them."""
    if shots := os.environ.get("FMSAM_SCREENSHOTS"):
        for width in (800, 1300):
            page.set_viewport_size({"width": width, "height": 1000})
            at.scroll_into_view_if_needed()
            page.wait_for_timeout(700)
            page.screenshot(path=f"{shots}/{name}_{width}.png")


def facts(page):
    """What a canvas says below its pictures, by name."""
    cells = page.locator(".fmsam table").first.locator("td").all_inner_texts()
    return dict(zip(cells[::2], cells[1::2], strict=True))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Folders of two short trainings from one start, and their domain."""
    from fmsam_lib import open_domain, train

    folder, domain = tmp_path_factory.mktemp("runs"), open_domain("brain-mr", shape=(64, 64))
    for optimizer in ("adam", "sam"):
        train(domain, optimizer=optimizer, steps=20, out=folder / optimizer / "seed0", progress=False, lr=0.003)
    return folder, domain


def test_a_dragged_point_shows_the_loss_of_its_weights(lab, page, two_runs):
    from fmsam_lib.flatness.landscape import batch_with
    from fmsam_lib.flatness.mode_connectivity import Solutions, from_one_start
    from fmsam_lib.training.losses import objective

    folder, domain = two_runs
    given = {"run": str(folder / "adam/seed0"), "other": str(folder / "sam/seed0"), "out": str(folder / "out")}
    opened(lab, page, "30_loss_landscape", given | {"plane_points": 9})
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    for _ in range(5):  # down to the walker: the measures below it take minutes
        page.keyboard.press("Shift+Enter")
    surface = page.locator(".fmsam .surface")
    surface.wait_for()
    _, (run, _), nets = from_one_start(given["run"], given["other"])
    plane, batch = Solutions(*nets), batch_with([domain.test_pair(0)])
    surface.scroll_into_view_if_needed()
    area, taken, seen = surface.bounding_box(), [], set()

    def moved(what):
        """Do it, and wait for the answer to be drawn."""
        before = surface.get_attribute("data-drawn")
        what()
        page.wait_for_function(
            "old => { const { drawn, point } = document.querySelector('.fmsam .surface').dataset; "
            "return drawn !== old && drawn === point }",
            arg=before,
        )

    page.mouse.move(area["x"] + 0.4 * area["width"], area["y"] + 0.5 * area["height"])
    page.mouse.down()
    for i in range(40):
        x, y = 0.3 + 0.01 * i, 0.6 - 0.007 * i
        moved(lambda x=x, y=y: page.mouse.move(area["x"] + x * area["width"], area["y"] + y * area["height"]))
        taken.append(float(surface.get_attribute("data-milliseconds")))
        seen.add(facts(page)["total loss"])
    page.mouse.up()
    taken.sort()
    print(f"a move takes {taken[20]:.0f} ms (median), {taken[37]:.0f} ms (95th percentile)")
    assert len(seen) > 20
    for keys in ([], ["ArrowRight"] * 5, ["Shift+ArrowUp"]):
        for key in keys:
            moved(lambda key=key: surface.press(key))
        found = facts(page)
        alpha, beta = map(float, surface.get_attribute("data-point").split(","))
        assert found["(α, β)"] == f"({alpha:.3g}, {beta:.3g})"
        with plane.at(alpha, beta) as net:
            total = objective(net, batch, **run.loss()).total.item()
        assert float(found["total loss"]) == pytest.approx(total, abs=1e-4)
    shot(page, "walker", surface)


def test_a_training_stopped_by_its_button_goes_on_to_the_same_weights(lab, page, tmp_path):
    import torch

    from fmsam_lib.images.domains import open_domain
    from fmsam_lib.model.weights import load
    from fmsam_lib.parameters import Train
    from fmsam_lib.training.loop import fit, starting

    small = {"shape": [32, 32], "down": [8, 16], "levels": 2, "steps": 60, "validation": 2}
    opened(lab, page, "10_train", small | {"out": str(tmp_path / "run")})
    run_all(page)
    stop = page.locator(".jupyter-button", has_text="stop")
    stop.wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.fmsam td')].some(td => / of 60/.test(td.textContent))"
    )
    stop.click()
    page.get_by_text("The training stopped after step").first.wait_for()
    assert not (tmp_path / "run/weights.pt").exists()
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["state"]["step"]
    assert f"{step} of 60" in facts(page)["step"]
    assert 0 < step < 60
    run_all(page)
    page.get_by_text("gradients evaluated").first.wait_for()
    assert page.locator(".jupyter-button", has_text="done").count() == 1
    shot(page, "watcher", page.locator(".fmsam").first)
    run = Train(**small, out=str(tmp_path / "undisturbed"))
    fit(starting(run), open_domain("brain-mr", shape=(32, 32)), run, progress=False)
    ours, theirs = (load(tmp_path / name / "weights.pt").state_dict() for name in ("run", "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run/weights.pt").read_bytes() == (tmp_path / "undisturbed/weights.pt").read_bytes()
