"""pyproject.toml, constraints.txt and environment.yml say the same, and the repository holds nothing it should not."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

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


def test_no_large_or_private_file_is_committed():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [PROJECT / line for line in listed.stdout.splitlines() if (PROJECT / line).is_file()]
    assert not [str(f) for f in files if f.stat().st_size > 1_000_000]
    assert not [str(f) for f in files if f.name.endswith((".nii", ".nii.gz", ".pt", ".trch"))]
