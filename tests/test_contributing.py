"""CONTRIBUTING's examples are applied to a copy of the library, and what they add works there."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import PROJECT

PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDED = {"Add a similarity", "Add a domain", "Add an optimizer", "Add a notebook"}
# Run in the copy; every example leaves its facts as JSON.
USE = """
import torch
import fmsam_lib as fm
from fmsam_lib.model.spatial import warp
from fmsam_lib.plotting.style import name_of
from fmsam_lib.training.losses import mse_loss

brain, thigh = (fm.open_domain(name, shape=(32, 32)) for name in ("brain-mr", "thigh-mr"))
small = {"down": [4, 8], "levels": 2, "validation": 0, "threads": 1, "progress": False}
net, _ = fm.train(brain, optimizer="adam", similarity="mse", lmbda=0.1, lr=0.005, steps=60, **small)
moving, fixed = (torch.stack(images) for images in zip(*[(p.moving, p.fixed) for p in map(brain.test_pair, range(8))]))
climbed = fm.train(thigh, optimizer="asam-every", every=2, rho=0.1, steps=10, **small)[1]
pairs = [thigh.test_pair(0) for _ in range(2)]
a, b = torch.rand(2, 2, 1, 16, 16)
here = torch.rand(2, 1, 16, 16) > 0.5
masked = ((a - b) ** 2)[0][here[0]].mean() / 2 + ((a - b) ** 2)[1][here[1]].mean() / 2
facts = {
    "mse": [float(mse_loss(a, a)), float(mse_loss(a, b, mask=here) - masked)],
    "trained": [float(mse_loss(image, fixed)) for image in (moving, warp(moving, net(moving, fixed).map))],
    "labels": sorted(pairs[0].fixed_label.unique().tolist()),
    "same": bool((pairs[0].fixed == pairs[1].fixed).all()),
    "rise": climbed[-1]["rise"],
    "called": name_of("asam-every"),
}
"""


def test_the_page_shows_the_four_additions():
    shown = {section.partition("\n")[0] for section in PAGE.split("\n## ") if "```diff" in section}
    assert shown == ADDED


def hunks():
    """(file, lines before, lines after) of every hunk: ` ` in both, `-` before, `+` after."""
    for language, block in FENCE.findall(PAGE):
        if language == "diff":
            for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
                name, *changes = re.split(r"\n@@.*\n", part.rstrip("\n"))
                for change in changes:
                    lines = change.split("\n")
                    assert {line[:1] for line in lines} <= {" ", "+", "-"}, change
                    yield name, *("".join(f"{x[1:]}\n" for x in lines if x[0] in (" ", kind)) for kind in "-+")


@pytest.mark.parametrize(("name", "before", "after"), list(hunks()))
def test_a_change_fits_the_code_of_today(name, before, after):
    assert (PROJECT / name).read_text(encoding="utf-8").count(before) == 1, f"{name}: expected once\n{before}"
    assert before != after


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the library with all changes of the page, formatted and typed as `make lint` wants it."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "fmsam_lib", folder / "fmsam_lib", ignore=ignore)
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "tests/test_parameters.py"):
        shutil.copy(PROJECT / name, folder / name)
    for name, before, after in hunks():
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(before, after), encoding="utf-8")
    return folder


def python(folder, *given):
    path = {"PYTHONPATH": str(folder), "FMSAM_HEADLESS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *given], cwd=folder, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("check", [("check",), ("format", "--check")], ids=" ".join)
def test_the_changes_keep_to_the_style(copy, check):
    python(copy, "-m", "ruff", *check, "--no-cache", "fmsam_lib", "tests")


@pytest.fixture(scope="module")
def facts(copy):
    cells = [block for language, block in FENCE.findall(PAGE) if language == "python"]
    assert len(cells) == 3
    started = "".join(cells).replace("globals()", "{**globals(), 'In': ['', CELL]}")
    code = f"CELL = {cells[0]!r}\n{started}\n{USE}\nimport json\n"
    code += "facts |= {'lncc': similarity, 'fm': fm.__file__, 'blur': run.model_dump()}\nprint(json.dumps(facts))"
    return json.loads(python(copy, "-c", code).splitlines()[-1])


def test_the_similarity_is_right_and_can_be_trained_with(facts, copy):
    assert facts["fm"] == str(copy / "fmsam_lib" / "__init__.py")
    assert facts["mse"] == pytest.approx([0, 0], abs=1e-6)
    before, after = facts["trained"]
    assert after < 0.9 * before


def test_the_domain_has_its_structures_and_is_the_same_each_time(facts):
    assert facts["labels"] == [0, 1, 2, 3]
    assert facts["same"]


def test_the_optimizer_climbs_and_has_a_name(facts):
    assert facts["rise"] > 0
    assert facts["called"] == "ASAM now and then"


def test_the_notebook_runs_on_its_parameters(facts, copy):
    assert facts["blur"] == {"domain": "brain-mr", "sigma": 2.0}
    assert 0.3 < facts["lncc"] < 0.99
    code = "from tests.test_parameters import KIND, parameter_cell; print(parameter_cell(KIND['07_blur']))"
    cell = next(block for language, block in FENCE.findall(PAGE) if language == "python")
    assert python(copy, "-c", code) == cell
