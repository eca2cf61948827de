"""`python -m fmsam_lib.study NAME`: a graph of papermill notebooks (`Snakefile`), computed into `runs/<study>/`."""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import pandas as pd
import yaml

from fmsam_lib.checking import ConfigError, in_project
from fmsam_lib.flatness.landscape import TRAINING
from fmsam_lib.images.domains import FileDomain, open_domain
from fmsam_lib.images.manifest import Manifest, data_folder
from fmsam_lib.model.weights import OFFICIAL, sha256, shipped
from fmsam_lib.parameters import Train
from fmsam_lib.records import PROJECT, DataError, read_json, sources, written_whole
from fmsam_lib.study.file import placed, read_study
from fmsam_lib.study.gather import differing
from fmsam_lib.study.grid import Study
from fmsam_lib.study.notebooks import Job, executed, jobs, plan, write_if_new
from fmsam_lib.training.checkpoint import hash_of_images, hashed, trained_with

# Ends the process group of Snakemake and its workers when nobody holds the other end of its pipe, so also when this
# process was killed. A notebook's kernel looks by itself whether its parent is there.
LAST = "trap '' INT TERM HUP; read _; kill -9 0"
COPY_OF = "# copy of "


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m fmsam_lib.study", description="Compute a whole study.")
    arguments.add_argument("study", help="name of a file in studies/, without .yaml; or a path, with it")
    arguments.add_argument("--data", default="", help="folder of data sets (default: FMSAM_DATA, else data)")
    arguments.add_argument("--runs", default="runs", help="folder for the results (default: %(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arguments.add_argument("--cores", type=int, default=cores, help="of this machine to use (default: all allowed)")
    arguments.add_argument("--profile", type=profile, help="kubernetes, slurm, or another Snakemake profile's folder")
    given = arguments.parse_args()
    try:
        if given.cores < 1:
            raise ConfigError(f"expected --cores of 1 or more, got {given.cores}")
        study_file, root = placed(given.study, Path(given.runs).expanduser())
        return computed(study_file, root, str(data_folder(given.data).resolve()), given.cores, given.profile)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, mostly
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        cure = "mend the disk" if error.errno == errno.EROFS else "make room"
        todo = f"{cure} and run the same command again, or name another folder with --runs (make study RUNS=folder)"
        told = f"nothing more can be written to {root} ({error.strerror}): {todo}" if full else error
        print(f"error: {told}", file=sys.stderr)
        return 1


def computed(study_file: Path, root: Path, data: str, cores: int, profile: str | None) -> int:
    """Compute what the study lacks, telling how far it is and what came out; the command's exit code.

    Raises ConfigError, DataError before anything is computed; OSError where the folder `root` takes nothing more.
    """
    study, text = read_study(study_file), study_file.read_text(encoding="utf-8")
    study, left_out = preflight(study, data)
    lock = locked(root)
    opened = [open_domain(domain, shape=tuple(study.shape), data=data) for domain in study.test_domains]
    stamps = {domain.name: stamp(domain.manifest) for domain in opened if isinstance(domain, FileDomain)}
    copy = root / "40_compare.study.yaml"  # what the report reads: the file may change meanwhile
    work = jobs(study, root, data, copy, stamps)
    refuse_another(work, root, study_file)
    write_if_new(copy, f"{text}\n{COPY_OF}{study_file}\n")
    write_if_new(root / "left_out.json", json.dumps(left_out))
    distrust(root)
    left = plan(work, root)
    made_by = {job.name: sources() for job in left if job.notebook != "10_train"}  # trainings record their own
    write_if_new(root / "sources.json", json.dumps(read_json(root / "sources.json", {}) | made_by))
    remember([job for job in work if not left or (job.folder and job not in left)], root)
    snakemake = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--directory", str(root)),
        *("--workflow-profile", str(PROJECT / "profiles" / "default")),
        *(("--profile", profile) if profile else ("--cores", str(cores))),
    ]
    where = f"with the profile {profile}" if profile else f"on {cores} cores"
    print(f"study {study_file.stem} {where}; log: {root / 'snakemake.log'}", flush=True)
    report, before = root / "report.html", root / "report_before.html"
    if report.exists() and not before.exists():  # until there is another of all runs
        with written_whole(before) as partial:
            shutil.copy(report, partial)
    done = compute(snakemake, work, root, lock.fileno())
    if not done:
        failed = [problem for *_, problems in executed(work, root) for problem in problems]
        for problem in failed:
            print(f"failed: {problem}", file=sys.stderr)
        with TemporaryFile(dir=root) as room:
            room.write(bytes(2**24))  # which a disk takes that is not full
        told = (root / "snakemake.log").read_text(encoding="utf-8", errors="replace")
        if "DeadKernelError" in told:
            todo = "mostly for want of memory. Fewer at a time (--cores 1) take less, as does save_memory in training"
            print(f"failed: the process of a notebook was killed, {todo}", file=sys.stderr)
        elif told.count("Error in rule") > len(failed) or not failed:
            print("\n".join(["failed outside a notebook; the log ends:", *told.splitlines()[-30:]]), file=sys.stderr)
        if not compute([*snakemake, "what_there_is"], [], root, lock.fileno(), "report.log"):
            print(f"error: no report could be made of what there is; its log: {root / 'report.log'}", file=sys.stderr)
            return 1
    else:
        before.unlink(missing_ok=True)
    remember(work, root)
    problems = read_json(root / "problems.json", ["problems.json cannot be read: delete it and run this again"])
    print(f"\n{(root / 'summary.txt').read_text(encoding='utf-8')}\n{times(work, root)}\n")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not done:
        print("What was computed is kept: mend the cause and run the same command again.", file=sys.stderr)
    print(f"report: {report}")
    return 0 if done and set(problems) <= set(left_out) else 1


def profile(name: str) -> str:
    """The folder of a Snakemake profile, by its name in `profiles/` or its path."""
    found = [path for path in (PROJECT / "profiles" / name, Path(name).resolve()) if (path / "config.yaml").is_file()]
    if not found:
        raise argparse.ArgumentTypeError(f"no profile {name}: expected kubernetes, slurm or a folder with config.yaml")
    return str(found[0])


def locked(root: Path) -> TextIO:
    """The lock on a study's folder, which is made. Raises ConfigError where another process holds it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held until this process and Snakemake end
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is computing this study in {root}; wait for it or end it") from None
    except OSError as error:
        todo = "name a folder that you may write to with --runs (make study RUNS=folder)"
        raise ConfigError(f"the results cannot go to {root} ({error.strerror}); {todo}") from None
    return lock


def preflight(study: Study, data: str) -> tuple[Study, list[str]]:
    """The study without the test domains that are not there, and a line about each of those.

    Raises DataError when a training domain is not there (after an attempt to fetch it).
    """
    left_out = {}
    for domain in dict.fromkeys([*study.train_domains, *study.test_domains]):
        try:
            if "HippocampusMR" in domain.split("+") and not [*Path(data).glob("HippocampusMR/*_dataset.json")]:
                print(f"fetching HippocampusMR into {data}", flush=True)
                fetch = [sys.executable, str(PROJECT / "studies/fetch_hippocampus.py"), data]
                if (done := subprocess.run(fetch, stderr=subprocess.PIPE, text=True, check=False)).returncode:
                    raise DataError(done.stderr.strip().split("\n")[-1])
            opened = open_domain(domain, shape=tuple(study.shape), data=data)
            if domain in study.test_domains and not opened.test_count:
                left_out[domain] = f"{domain} is left out of the tests: it has no test pairs"
        except DataError as error:
            if domain in study.train_domains:
                raise
            left_out[domain] = f"{domain} is left out of the tests: {error}"
    if not (there := [domain for domain in study.test_domains if domain not in left_out]):
        raise DataError("no test domain is there:\n- " + "\n- ".join(left_out.values()))
    landscape = study.landscape and {**study.landscape}
    if landscape and (measured := landscape.get("measured_on")):  # empty would be all
        landscape["measured_on"] = [domain for domain in measured if domain not in left_out] or [TRAINING]
    return study.model_copy(update={"test_domains": there, "landscape": landscape}), [*left_out.values()]


def stamp(manifest: Manifest) -> str:
    """A hash of what a data set tests with, wherever it lies: its manifest's file, test images and what is beside."""
    folder, images = manifest.folder, {image for pair in manifest.test_pairs for image in pair}
    named = {*folder.glob("*_dataset.json"), *images, *(of[i] for of in manifest.beside.values() for i in images)}
    files = {file: mark for path in named if path for file, mark in hashed(path).items()}
    found = sorted(f"{os.path.relpath(file, folder)} {mark}" for file, mark in files.items())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]


def refuse_another(work: list[Job], root: Path, study_file: Path) -> None:
    """Raise ConfigError where a finished training has other parameters or images than it now would, one to come starts
    from a file that is not there, or the study that was computed here is another file, which is there and says else.

    Before anything is written: a newer parameter file would have Snakemake run the training again, which refuses.
    """
    other, text = None, study_file.read_bytes()
    with contextlib.suppress(OSError, ValueError):  # never computed here, or the copy is damaged
        said = Path(Path(work[-1].values["study"]).read_text(encoding="utf-8").rstrip("\n").rpartition(COPY_OF)[2])
        other = said if said.read_bytes() != text else None
    if other:
        todo = "give one of them another name, or name another folder with --runs (make study RUNS=folder)"
        raise ConfigError(f"{root} has the results of another study, {other}, not of {study_file}: {todo}")
    found, known = [], ("", *OFFICIAL, *shipped())
    how: dict = {"shape": (16, 16), "data": work[-1].values["data"]}  # images are the same for every shape
    images_of = functools.cache(lambda name, number: hash_of_images(open_domain(name, subjects=number, **how)))
    for job in (job for job in work if job.notebook == "10_train"):
        if (root / job.folder / "weights.pt").exists():
            with contextlib.suppress(ConfigError):  # a record that cannot be read: `gather` names it
                there, given, run = trained_with(root / job.folder).model_dump(), {*job.values}, Train(**job.values)
                with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):  # it is not there or damaged
                    # What the study has given it so far: what it gives no more is a default.
                    given |= {*yaml.safe_load((root / f"{job.name}.yaml").read_bytes())}
                now = {name: value for name, value in run.model_dump().items() if name in given}
                before = read_json(root / job.folder / "config.json").get("hash_of_images")  # none, of older ones
                other = before and before != images_of(run.train_domain, run.subjects)
                if told := differing(there, now) or "trained on other images or masks than are there now" * bool(other):
                    found.append(f"- {root / job.folder}: {told}")
        elif (file := job.values.get("weights", "")) not in known and not Path(in_project(file)).is_file():
            told = f"run {job.folder}: expected weights of a file or one of {', '.join(known[1:])}, got {file!r}"
            raise ConfigError(f"{told}; relative paths count from {PROJECT}")
    if found:
        todo = "copy it to another name in studies/ and compute that; or delete these folders to train them anew."
        told = "Nothing was touched. To keep them, give the changed study another name: " + todo
        raise ConfigError("\n".join(["the study was changed after it ran; these trainings are done:", *found, told]))


def distrust(root: Path) -> None:
    """Move aside what is not as it was made, times apart: it is made anew. Take back future dates: Snakemake fails."""
    for name, mark in read_json(root / "made.json", {}).items():
        if (path := root / name).exists() and path.name not in ("costs.csv", "methods.csv") and mark_of(path) != mark:
            aside = path.replace(path.with_name(f"damaged_{path.name}"))
            print(f"{path} is not as it was made: that is {aside} now, and it is made again", file=sys.stderr)
    now, dates = time.time(), {path: path.lstat().st_mtime for path in root.rglob("*")}
    rank = {date: i for i, date in enumerate(sorted({d for d in dates.values() if d > now}, reverse=True))}
    for path, date in dates.items():
        if date in rank:  # in the same order: the newest is of now, each before it a millisecond older
            os.utime(path, (now - rank[date] / 1000,) * 2, follow_symlinks=False)


def remember(work: list[Job], root: Path) -> None:
    """Write down how the files that these jobs made are, for `distrust`."""
    files = [file for job in work for file in job.makes if (root / file).exists()]
    write_if_new(root / "made.json", json.dumps({file: mark_of(root / file) for file in files}))


def mark_of(path: Path) -> str:
    """A file's hash; of weights, whose file has checksums that `weights.load` compares, the size."""
    return str(path.stat().st_size) if path.suffix == ".pt" else sha256(path)


def compute(snakemake: list[str], work: list[Job], root: Path, lock: int, log: str = "snakemake.log") -> bool:
    """Run the graph, telling how far it is; whether all of it was done. The lock is Snakemake's, too."""
    start, told, every = time.monotonic(), "", 2 if sys.stdout.isatty() else 20
    paths = [str(PROJECT / "profiles" / "jupyter"), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    own = os.environ | {"JUPYTER_PATH": os.pathsep.join(paths), "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    if "--profile" in snakemake:  # its folder may hold an executor of its own
        path = [snakemake[snakemake.index("--profile") + 1], *filter(None, [own.get("PYTHONPATH")])]
        own["PYTHONPATH"] = os.pathsep.join(path)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # Snakemake, Jupyter and Matplotlib keep things there
        own["HOME"] = str(root / ".snakemake" / "home")
    with (
        open(root / log, "w", encoding="utf-8") as file,
        subprocess.Popen(["sh", "-c", LAST], stdin=subprocess.PIPE, process_group=0) as last,
    ):
        graph = subprocess.Popen(snakemake, stdout=file, stderr=file, pass_fds=[lock], process_group=last.pid, env=own)
        try:
            while graph.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    graph.wait(every)
                seconds, now = int(time.monotonic() - start), progress(work, root)
                if work and now != told:
                    print(f"{seconds // 60:3d}:{seconds % 60:02d}  {now}", flush=True)
                    told = now
        except KeyboardInterrupt:  # trainings go on from their checkpoints next time
            for sign, seconds in ((signal.SIGINT, 30), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    os.killpg(last.pid, sign)
                    graph.wait(seconds)
                    break
            raise
    return graph.returncode == 0


def progress(work: list[Job], root: Path) -> str:
    """How many notebooks are done, and where the trainings under way stand."""
    left = [job for job in work if not all((root / file).exists() for file in job.makes)]
    told = [f"{len(work) - len(left)} of {len(work)} notebooks done"]
    for job in (job for job in left if job.notebook == "10_train"):
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):  # none yet, or damaged
            last = json.loads((root / job.folder / "history.jsonl").read_bytes().split(b"\n")[-2])  # the last whole one
            told.append(f"{job.folder}: step {last['step']}, loss {last['total']:.3f}")
    return " | ".join(told[:1] + told[1:][-4:] + [f"{len(told) - 5} more"] * (len(told) > 5))  # those begun last


def times(work: list[Job], root: Path) -> str:
    """Where the time went: how many notebooks of each kind were run, and the seconds that they took."""
    ran = pd.DataFrame([(job.notebook, seconds) for job, seconds, _ in executed(work, root)], columns=["notebook", "s"])
    table = ran.groupby("notebook").s.agg(number="size", seconds="sum", each="mean")
    table["share"] = (100 * table.seconds / table.seconds.sum()).round().map("{:.0f} %".format)
    return table.rename_axis(None).round(1).to_string()
