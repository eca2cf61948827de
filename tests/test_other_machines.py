"""What fmsam takes for granted about a machine: no module that Windows lacks, no torch with holes."""

import ast
import importlib.util
import json
import locale
import os
import runpy
import subprocess
import sys
import tomllib

import pytest
import torch

from fmsam_lib.images.domains import open_domain
from tests.conftest import PROJECT, as_module
from tests.test_environment import constraints, name_of

# Modules that only POSIX systems have. The library may not import them; what it imports may, where it knows better.
WITHOUT = """
import builtins, sys
real = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    if name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
        if (globals or {}).get("__name__", "").split(".")[0] in ("fmsam_lib", "__main__"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = without
"""


def test_all_but_computing_a_study_is_imported_where_posix_modules_are_missing():
    paths = (path.relative_to(PROJECT) for path in (PROJECT / "fmsam_lib").rglob("*.py"))
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    # Computing a study takes Snakemake and process groups: Linux and macOS.
    modules = [m for m in modules if not m.endswith("__main__") and m != "fmsam_lib.study.run"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([WITHOUT, *(f"import {module}" for module in sorted(modules))])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_on_windows_a_study_says_what_to_use(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"needs Linux or macOS; on Windows, use WSL"):
        runpy.run_module("fmsam_lib.study", run_name="__main__")


def test_in_another_locale_a_study_starts_again_in_utf8(monkeypatch):
    asked = []

    def execve(program, arguments, environment):
        asked.append((program, arguments, environment["PYTHONUTF8"]))
        raise SystemExit  # what comes after is the new program's

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fmsam_lib.study", "smoke"])
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "ANSI_X3.4-1968")
    with pytest.raises(SystemExit):
        runpy.run_module("fmsam_lib.study", run_name="__main__")
    assert asked == [(sys.executable, [sys.executable, "-X", "utf8", "-m", "fmsam_lib.study", "smoke"], "1")]


@pytest.mark.parametrize("path", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_imports_what_windows_lacks(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse("".join(cell["source"])))]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in imports if line.split()[1].split(".")[0] in ("fcntl", "resource", "pwd", "termios")]
    assert not [line for line in imports if "study.run" in line]


def test_every_dependency_has_a_lowest_version_that_is_not_above_the_tested_one():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {name_of(wanted): wanted.partition(">=")[2] for wanted in project["dependencies"]}
    assert all(lowest.values()), lowest
    numbers = {name: [int(n) for n in version.split(".")] for name, version in lowest.items()}
    pinned = {name: [int(n) for n in constraints()[name].split(".")] for name in numbers}
    assert all(numbers[name] <= pinned[name] for name in numbers)
    assert numbers["torch"] >= [2, 12]  # before 2.10, a file could break out of `weights_only` (CVE-2026-24747)


def test_without_a_gpu_its_benchmark_says_so_and_leaves_the_record(monkeypatch, capsys):
    if not importlib.util.find_spec("icon_registration"):
        pytest.skip("the peers are not installed: make .venv/peers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu = as_module("benchmarks/gpu.py")
    monkeypatch.setattr(gpu, "record", None)  # would be called
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "benchmarks/gpu.csv stays as it is" in line


def test_images_of_test_pairs_are_not_kept(tmp_path, monkeypatch):
    """Else an evaluation's memory would grow with every pair."""
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    longrun = as_module("benchmarks/longrun.py")
    longrun.of_files(tmp_path, 3)
    domain = open_domain("Files", shape=(32, 32), data=tmp_path)
    first = domain.test_pair(0)
    assert not domain.samples
    domain.training_pair(0)
    assert len(domain.samples) == 2
    assert torch.equal(domain.test_pair(0).moving, first.moving)
