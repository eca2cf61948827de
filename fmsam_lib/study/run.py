"""A whole study: its file, its grid of runs, and `python -m fmsam_lib.study NAME` that computes it.

The work is a graph of papermill notebooks (`Snakefile`), for every train domain x optimizer x seed: train,
evaluate, landscape; then one comparison. Everything goes to `runs/<study>/`; what is there already
is not computed again.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fmsam_lib.checking import ConfigError
from fmsam_lib.images.domains import open_domain
from fmsam_lib.images.download import fetch_hippocampus
from fmsam_lib.images.manifest import data_folder
from fmsam_lib.records import PROJECT, DataError
from fmsam_lib.study.file import Study, read_study
from fmsam_lib.study.grid import grid
from fmsam_lib.study.notebooks import failures, outputs, plan, write_if_new

# --- the command ---


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m fmsam_lib.study", description="Compute a whole study.")
    arguments.add_argument("study", help="name of a file in studies/, without .yaml")
    arguments.add_argument("--data", default="", help="folder of data sets (default: FMSAM_DATA, else data)")
    arguments.add_argument("--runs", default="runs", help="folder for the results (default: %(default)s)")
    arguments.add_argument("--cores", type=int, default=os.cpu_count(), help="notebooks at a time (default: all cores)")
    given = arguments.parse_args()
    root = Path(given.runs).resolve() / given.study
    data = str(data_folder(given.data).resolve())
    study_file = PROJECT / "studies" / f"{given.study}.yaml"
    try:
        study, left_out = preflight(read_study(study_file), data)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    root.mkdir(parents=True, exist_ok=True)
    lock = open(root / ".lock", "w")  # noqa: SIM115 - held until this process and Snakemake have ended
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: another process is computing this study in {root}; wait for it or end it", file=sys.stderr)
        return 2
    write_if_new(root / "left_out.json", json.dumps(left_out))
    plan(study, root, data, study_file)
    done = compute(study, given.study, root, given.cores, locked=(lock.fileno(),))
    for problem in failures(study, root):
        print(f"failed: {problem}", file=sys.stderr)
    if not done:  # compare what there is
        command = [sys.executable, "-m", "snakemake", "what_there_is", *snakemake_arguments(given.study, root, 1)]
        if subprocess.run(command, capture_output=True).returncode:
            print("error: there is no result to compare yet", file=sys.stderr)
            return 1
    problems = json.loads((root / "problems.json").read_text())
    print("\n" + (root / "summary.txt").read_text())
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not done:
        print("What was computed is kept: mend the cause and run the same command again.", file=sys.stderr)
    print(f"report: {root / 'report.html'}")
    return 0 if done and set(problems) <= set(left_out) else 1


def preflight(study: Study, data: str) -> tuple[Study, list[str]]:
    """The study without the test domains that are not there, and a line about each of those.

    Raises DataError when a training domain is not there (after an attempt to fetch it).
    """
    left_out = []
    for domain in dict.fromkeys([*study.train_domains, *study.test_domains]):
        try:
            if "HippocampusMR" in domain.split("+"):
                if not (Path(data) / "HippocampusMR").exists():
                    print(f"fetching HippocampusMR into {data}", flush=True)
                fetch_hippocampus(data)  # returns at once where it is there already
            open_domain(domain, shape=tuple(study.shape), data=data)
        except DataError as error:
            if domain in study.train_domains:
                raise
            left_out.append(f"{domain} is left out of the tests: {error}")
    there = [domain for domain in study.test_domains if not any(line.startswith(f"{domain} is ") for line in left_out)]
    if not there:
        raise DataError("no test domain is there:\n- " + "\n- ".join(left_out))
    return dataclasses.replace(study, test_domains=there), left_out


def snakemake_arguments(name: str, root: Path, cores: int) -> list[str]:
    return [
        *("--snakefile", str(PROJECT / "Snakefile"), "--directory", str(PROJECT), "--cores", str(cores)),
        *("--profile", str(PROJECT / "profiles" / "default"), "--config", f"study={name}", f"root={root}"),
    ]


def compute(study: Study, name: str, root: Path, cores: int, *, locked: tuple[int, ...] = ()) -> bool:
    """Run the graph, telling how far it is; whether all of it was done."""
    command = [sys.executable, "-m", "snakemake", *snakemake_arguments(name, root, cores)]
    start, told, every = time.monotonic(), "", 2 if sys.stdout.isatty() else 20
    print(f"study {name} on {cores} cores; log: {root / 'snakemake.log'}", flush=True)
    with open(root / "snakemake.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=locked)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(every)
                seconds, now = int(time.monotonic() - start), progress(study, root)
                if now != told:
                    print(f"{seconds // 60:3d}:{seconds % 60:02d}  {now}", flush=True)
                    told = now
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches Snakemake too; trainings go on from their checkpoints next time
            raise
    return process.returncode == 0


def progress(study: Study, root: Path) -> str:
    """How many notebooks are done, and where the trainings under way stand."""
    files = [*outputs(study), "report.html", *(f"{run.folder}/weights.pt" for run in grid(study))]
    parts = [f"{sum((root / file).exists() for file in files)} of {len(files)} notebooks done"]
    for run in grid(study):
        folder = root / run.folder
        history = folder / "history.jsonl"
        if history.exists() and not (folder / "weights.pt").exists() and (lines := history.read_text().splitlines()):
            last = json.loads(lines[-1])
            parts.append(
                f"{run.train_domain} {run.optimizer} seed {run.seed}: step {last['step']}, loss {last['total']:.3f}"
            )
    return " | ".join(parts)
