"""pyproject.toml, constraints.txt and environment.yml say the same, and the repository holds nothing it should not."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import fmsam_lib
from fmsam_lib.model.weights import SHIPPED

PROJECT = Path(__file__).resolve().parents[1]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-").replace(".", "-")


def constraints():
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", pin) for pin in pins), "every constraint is one exact version"
    return {name_of(pin): pin.split("==")[1] for pin in pins}


def test_every_dependency_is_pinned():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert {name_of(r) for r in wanted} <= constraints().keys()
    assert constraints()["torch"] == "2.13.0"


def test_conda_gets_the_same():
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[ants,test]"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    python = next(e for e in conda["dependencies"] if isinstance(e, str) and e.startswith("python="))
    assert python.split("=")[1] == project["requires-python"].removeprefix(">=")


@pytest.mark.parametrize("path", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_no_large_or_private_file_is_committed():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [PROJECT / line for line in listed.stdout.splitlines() if (PROJECT / line).is_file()]
    networks = [f for f in files if f.parent == SHIPPED]
    assert sum(f.stat().st_size for f in networks) <= 10_000_000
    files = [f for f in files if f not in networks]
    assert not [str(f) for f in files if f.stat().st_size > 1_000_000]
    assert not [str(f) for f in files if f.name.endswith((".nii", ".nii.gz", ".pt", ".trch"))]


def test_an_installed_wheel_has_every_room(tmp_path):
    """Built from a copy, unpacked elsewhere, used from a third folder: nothing of the checkout takes part."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PROJECT / "fmsam_lib", source / "fmsam_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    build = "import setuptools.build_meta as build; build.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    shutil.unpack_archive(next(source.glob("*.whl")), site, "zip")
    installed = {path.relative_to(site) for path in (site / "fmsam_lib").rglob("*") if path.is_file()}
    kinds = ("*.py", "*.js", "*.css", "*.pt", "*.sha256")
    own = {path.relative_to(PROJECT) for kind in kinds for path in (PROJECT / "fmsam_lib").rglob(kind)}
    assert installed == own | {Path("fmsam_lib/py.typed")}
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import fmsam_lib as fm, fmsam_lib.study.run, fmsam_lib.registration.command as command\n"
        "print(fm.__file__, fm.open_domain('brain-mr', shape=(16, 16)).test_pair(0).name)\n"
        "from fmsam_lib.records import provenance; print(provenance()['commit'])\n"
        "from fmsam_lib.parameters import Train; print(Train().out)\n"
        "command.main(['--help'])"
    )
    (tmp_path / "elsewhere").mkdir()
    path = {"PYTHONPATH": str(site)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=os.environ | path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0] == f"{site / 'fmsam_lib' / '__init__.py'} brain-mr-0-1000000"
    assert lines[1] == "unknown"  # no checkout
    assert lines[2] == str(tmp_path / "elsewhere/runs/mine/brain-mr/sam/seed0")
    assert lines[3].startswith("usage: fmsam-register")


def test_what_a_researcher_calls_is_exported_and_documented():
    assert len(fmsam_lib.__all__) == 17
    assert all(getattr(fmsam_lib, name).__doc__ for name in fmsam_lib.__all__)
