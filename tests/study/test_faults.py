"""Faults that strike a whole study, for real: afterwards the same command gives what an undisturbed run gives.

`docs/faults.md` has the table of all faults and of the tests that try them.
"""

import fcntl
import signal
import subprocess
import time
from functools import partial

import psutil
import pytest
import yaml

import tests.study.test_run as of_studies
from tests.study.test_run import SMALL, compute

project = of_studies.project  # the fixture: a copy of the checkout, beside a data set
ONE = SMALL | {"landscape": None, "optimizers": ["sam"], "train": SMALL["train"] | {"steps": 120, "snapshots": 2}}


@pytest.fixture(scope="module")
def study(project):
    """The smallest study that trains: a function that computes it into a folder of runs."""
    (project / "studies/one.yaml").write_text(yaml.safe_dump(ONE), encoding="utf-8")
    return partial(compute, project, study="one")


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory):
    """What a study leaves that nothing disturbed."""
    runs = tmp_path_factory.mktemp("undisturbed")
    process = study("--runs", str(runs))
    assert process.returncode == 0, process.stderr
    return results(runs / "one")


def results(root):
    """The bytes of all that is promised to be the same: tables without times, and weights."""
    names = {"results.csv", "pairs.csv", "robustness.csv", "comparison.csv", "summary.csv", "summary.txt", "weights.pt"}
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.name in names}


def workers(process, what, seconds=90):
    """The launcher's descendants, once one of them runs `what`."""
    deadline, found = time.monotonic() + seconds, []
    while not any(what in " ".join(command_of(child)) for child in found):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
        found = psutil.Process(process.pid).children(recursive=True)
    return found


def command_of(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGHUP])
def test_a_launcher_that_is_killed_alone_takes_its_workers_along(study, tmp_path, sign):
    process = study("--runs", str(tmp_path), "--cores", "1", run=subprocess.Popen)
    children = workers(process, "ipykernel_launcher")
    process.send_signal(sign)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert process.wait(10) == -sign
    process.communicate()
    with open(tmp_path / "one/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_ctrl_c_reaches_a_launcher_that_a_shell_started_in_the_background(study, tmp_path):
    """A script's shell has what it starts by `&` ignore SIGINT."""
    how = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_IGN)}
    process = study("--runs", str(tmp_path), "--cores", "1", run=subprocess.Popen, **how)
    children = workers(process, "ipykernel_launcher")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
