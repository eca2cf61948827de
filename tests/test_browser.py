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
