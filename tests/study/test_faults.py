"""Faults that strike a whole study, for real: afterwards the same command gives what an undisturbed run gives.

`docs/faults.md` has the table of all faults and of the tests that try them.
"""

import fcntl
import os
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

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
def undisturbed(study, once):
    """What a study leaves that nothing disturbed."""

    def make(runs):
        process = study("--runs", str(runs))
        assert process.returncode == 0, process.stderr

    return results(once("undisturbed", make) / "one")


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
def test_a_launcher_that_is_killed_alone_takes_its_workers_along(study, undisturbed, tmp_path, sign):
    how = {"preexec_fn": partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)}  # which nohup would have it ignore
    process = study("--runs", str(tmp_path), "--cores", "1", run=subprocess.Popen, **how)
    children = workers(process, "ipykernel_launcher")
    process.send_signal(sign)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert process.wait(10) == -sign
    process.communicate()
    with open(tmp_path / "one/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert study("--runs", str(tmp_path)).returncode == 0
    assert results(tmp_path / "one") == undisturbed


@pytest.mark.slow
def test_ctrl_c_reaches_a_launcher_that_a_shell_started_in_the_background(study, undisturbed, tmp_path):
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
    assert study("--runs", str(tmp_path)).returncode == 0
    assert results(tmp_path / "one") == undisturbed


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_a_study_gives_the_same(study, undisturbed, tmp_path):
    """SIGKILL and SIGTERM by turns, at moments of a seed, while it trains, evaluates or reports; each time all that is
    there is moved a day into the future, as if the clock had gone back."""
    rng = random.Random(20)
    for sign, what in [(signal.SIGKILL, "10_train"), (signal.SIGTERM, "10_train"), (signal.SIGKILL, "20_evaluate")]:
        process = study("--runs", str(tmp_path), run=subprocess.Popen)
        children = workers(process, what)
        time.sleep(rng.uniform(0, 8))
        process.send_signal(sign)
        process.communicate(timeout=60)
        psutil.wait_procs(children, timeout=20)
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}[sign]
        for path in tmp_path.rglob("*"):
            os.utime(path, (path.stat().st_mtime + 86400,) * 2)
    process = study("--runs", str(tmp_path))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(tmp_path / "one") == undisturbed


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_with_room_again_the_study_goes_on(study, undisturbed, tmp_path):
    """A real file system of 1.2 MB, then of 32: as it fills up, notebooks and tables are written by half."""
    small = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(tmp_path)]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        process = study("--runs", str(tmp_path))
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith(f"error: nothing more can be written to {tmp_path}/one (No space left on device): make")
        subprocess.run(["mount", "-o", "remount,size=32m", str(tmp_path)], check=True)
        process = study("--runs", str(tmp_path))
        assert (process.returncode, process.stderr) == (0, "")
        assert results(tmp_path / "one") == undisturbed
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_disk_that_turns_read_only_midway_ends_in_a_sentence_and_the_study_goes_on(study, undisturbed, disk):
    """At moments of a seed, while it trains, evaluates and reports."""
    rng = random.Random(22)
    mounted, _, read_only = disk
    for what in ["10_train", "20_evaluate", "40_compare"]:
        process = study("--runs", str(mounted), run=subprocess.Popen)
        workers(process, what)
        time.sleep(rng.uniform(0, 4))
        with read_only():
            _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert last.startswith(f"error: nothing more can be written to {mounted}/one (Read-only file system): mend")
    process = study("--runs", str(mounted))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(mounted / "one") == undisturbed


@pytest.mark.slow
def test_after_power_cuts_a_study_goes_on_to_the_same(study, undisturbed, disk):
    """At moments of a seed, while it trains, evaluates and reports; then at its end, when all is newly written."""
    rng = random.Random(21)
    mounted, power_cut, _ = disk
    for what in ["10_train", "10_train", "10_train", "20_evaluate", "40_compare", None]:
        process = study("--runs", str(mounted), run=subprocess.Popen)
        children = workers(process, what) if what else []
        if what:
            time.sleep(rng.uniform(0, 8))
        else:
            process.communicate()
        with power_cut():
            process.kill()
            process.communicate()
            psutil.wait_procs(children, timeout=20)
    process = study("--runs", str(mounted))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(mounted / "one") == undisturbed
    assert all(path.stat().st_size for end in ("ipynb", "html") for path in mounted.rglob(f"*.{end}"))


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """A study that is computed, for faults that strike afterwards; every test leaves it so."""
    runs = tmp_path_factory.mktemp("whole")
    assert study("--runs", str(runs)).returncode == 0
    return runs


def cut(path, size=40):
    path.write_bytes(path.read_bytes()[:-size])


def change_a_digit(path):
    content = path.read_text()
    where = content.rindex(".") + 2
    path.write_text(content[:where] + str((int(content[where]) + 1) % 10) + content[where + 1 :])


def drop_the_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.slow
def test_what_is_damaged_afterwards_is_noticed_and_made_again(study, whole, undisturbed):
    """The loss of a last write too: half a table, and one that ends where a line does, which no reader could notice."""
    root = whole / "one"
    run = root / "brain-mr/sam/seed0"
    damage = {
        root / "none/results.csv": drop_the_last_line, run / "results.csv": change_a_digit, run / "robustness.csv": cut,
        run / "weights.pt": cut, root / "none/20_evaluate.ipynb": cut, root / "report.html": Path.unlink,
        root / "sources.json": cut, root / "left_out.json": cut, root / "summary.csv": Path.unlink,
        root / "problems.json": cut,
    }  # fmt: skip
    for path, how in damage.items():
        how(path)
    process = study("--runs", str(whole))
    assert process.returncode == 0, process.stderr
    named = [line.split(" is not as it was made")[0] for line in process.stderr.splitlines()]
    told = (".csv", "weights.pt", "problems.json")
    assert {*named} == {str(p) for p, how in damage.items() if p.name.endswith(told) and how is not Path.unlink}
    assert results(root) == undisturbed
    assert (run / "damaged_weights.pt").exists()  # nothing is deleted


@pytest.mark.slow
def test_weights_of_which_a_bit_changed_are_not_evaluated(study, whole, undisturbed):
    weights = whole / "one/brain-mr/sam/seed0/weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    (weights.parent / "results.csv").unlink()
    weights.write_bytes(content)
    process = study("--runs", str(whole))
    assert process.returncode == 1
    assert "weights.pt, got: " in process.stderr
    assert "which is not as it was written; check the path, copy the file again or train anew" in process.stderr
    weights.unlink()
    assert study("--runs", str(whole)).returncode == 0
    assert results(whole / "one") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("days", [1, -10_000])
def test_a_clock_that_was_wrong_changes_nothing(project, study, whole, undisturbed, days):
    """All files are from the future, or from 1999; then one is computed anew, and the study asks for something else."""
    root, then = whole / "one", time.time() + days * 86400
    for path in root.rglob("*"):
        os.utime(path, (then, then))
    process = study("--runs", str(whole))
    assert (process.returncode, process.stderr) == (0, "")
    assert "Nothing to be done" in (root / "snakemake.log").read_text()
    for path in root.rglob("*"):
        os.utime(path, (then, then))
    (root / "none/results.csv").unlink()
    process = study("--runs", str(whole))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(root) == undisturbed
    for path in root.rglob("*"):
        os.utime(path, (then, then))
    file = project / "studies/one.yaml"
    file.write_text(yaml.safe_dump(ONE | {"evaluate": ONE["evaluate"] | {"pairs": 1}}), encoding="utf-8")
    try:
        assert study("--runs", str(whole)).returncode == 0
        assert (root / "none/pairs.csv").read_text().count("\n") == 2  # the header and one pair
    finally:
        file.write_text(yaml.safe_dump(ONE), encoding="utf-8")
    assert study("--runs", str(whole)).returncode == 0
    assert results(root) == undisturbed


@pytest.mark.slow
def test_a_notebooks_process_that_is_killed_is_told_as_want_of_memory(study, undisturbed, tmp_path):
    process = study("--runs", str(tmp_path), "--cores", "1", run=subprocess.Popen)
    while not (log := tmp_path / "one/brain-mr/sam/seed0/history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.2)
    assert log
    for child in workers(process, "ipykernel_launcher"):
        if "ipykernel_launcher" in " ".join(command_of(child)):
            child.kill()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "failed: the process of a notebook was killed, mostly for want of memory" in said
    assert "Traceback" not in said
    process = study("--runs", str(tmp_path))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(tmp_path / "one") == undisturbed


@pytest.mark.slow
def test_a_limit_of_memory_is_told_and_without_it_the_study_goes_on(study, undisturbed, tmp_path):
    """1.5 GB of address space: torch cannot even be imported, or the network cannot be computed."""
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (1_500_000_000, resource.RLIM_INFINITY))
    process = study("--runs", str(tmp_path), preexec_fn=limit)
    assert process.returncode
    assert "emory" in process.stderr
    assert "weights.pt" not in {path.name for path in tmp_path.rglob("*")}
    process = study("--runs", str(tmp_path))
    assert (process.returncode, process.stderr) == (0, "")
    assert results(tmp_path / "one") == undisturbed
