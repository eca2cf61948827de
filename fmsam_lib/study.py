"""A whole study: its file, its grid of runs, and `python -m fmsam_lib.study NAME` that computes it.

The work is a graph of papermill notebooks (`Snakefile`), for every train domain x optimizer x seed: train,
evaluate, landscape; then one comparison. Everything goes to `runs/<study>/`; what is there already
is not computed again.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from fmsam_lib.config import (
    PROJECT,
    ConfigError,
    Evaluate,
    Landscape,
    Optimizer,
    Train,
    nearest,
    problems_of,
    read,
    written_whole,
)
from fmsam_lib.data import DataError, data_folder
from fmsam_lib.domains import fetch_hippocampus, open_domain

BASELINE = "adam"  # the other optimizers are compared with it


@dataclass(frozen=True, kw_only=True)
class Study:
    """The grid train domain x optimizer x seed; the sections override the notebooks' own defaults.

    variants: further optimizers by name, `{sam-0.03: {optimizer: sam, rho: 0.03}}`: an optimizer and what else of the
    training's parameters differs.
    """

    description: str
    train_domains: list[str]
    test_domains: list[str]
    optimizers: list[str]
    seeds: list[int]
    shape: list[int]
    train: dict[str, object]
    evaluate: dict[str, object]
    landscape: dict[str, object]
    variants: dict[str, dict] = field(default_factory=dict)


SECTIONS = {"train": Train, "evaluate": Evaluate, "landscape": Landscape}
SET_BY_THE_STUDY = ("out", "run", "train_domain", "test_domains", "optimizer", "seed", "shape", "data")


def read_study(path: Path | str) -> Study:
    """A study file; unknown names, in its sections too, are errors that list the known ones."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"no study file {path}; known studies: {known}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of {', '.join(f.name for f in fields(Study))}, got {values!r}")
    study = read(Study, values, source=str(path))
    for section, kind in SECTIONS.items():
        _check_section(getattr(study, section), kind, f"{path}, section {section}")
    for name, variant in study.variants.items():
        if not re.fullmatch(r"[\w.-]+", str(name)) or not isinstance(name, str) or name in typing.get_args(Optimizer):
            raise ConfigError(
                f"{path}, variant {name!r}: expected a name of letters, digits, '.', '_' and '-' that is no optimizer's"
            )
        if not isinstance(variant, dict) or "optimizer" not in variant:
            raise ConfigError(f"{path}, variant {name}: expected a mapping with an optimizer, got {variant!r}")
        _check_section(variant, Train, f"{path}, variant {name}", also=("optimizer",))
    known = [*typing.get_args(Optimizer), *study.variants]
    problems = [f"{name}: unknown{nearest(name, known)}" for name in study.optimizers if name not in known]
    if problems:
        raise ConfigError(f"{path}, optimizers: expected some of {', '.join(known)}; got\n- " + "\n- ".join(problems))
    return study


def _check_section(given: dict, kind: type, where: str, also: tuple[str, ...] = ()) -> None:
    hints = typing.get_type_hints(kind).items()
    hints = {name: hint for name, hint in hints if name in also or name not in SET_BY_THE_STUDY}
    problems = [f"{n}: unknown; known are {', '.join(hints)}{nearest(n, hints)}" for n in sorted(given.keys() - hints)]
    problems += [f"{n}: {p}" for n in sorted(given.keys() & hints) for p in problems_of(n, given[n], hints[n])]
    if problems:
        raise ConfigError(f"{where}:\n" + "\n".join(f"- {p}" for p in problems))


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    train_domain: str
    optimizer: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.train_domain}/{self.optimizer}/seed{self.seed}"


def grid(study: Study) -> list[Run]:
    """All runs of a study."""
    return [Run(*cell) for cell in itertools.product(study.train_domains, study.optimizers, study.seeds)]


def parameters(study: Study, run: Run | None, root: Path, data: str, study_file: Path) -> dict[str, dict]:
    """What each notebook of `run` takes beyond its defaults, by the notebook's name; None: those of no run."""
    common = {"test_domains": study.test_domains, "data": data}
    if run is None:
        evaluate = study.evaluate | common | {"run": "", "out": f"{root}/none", "shape": study.shape}
        baseline = BASELINE if BASELINE in study.optimizers else study.optimizers[0]
        others = [o for o in study.optimizers if o != baseline] or [baseline]
        treatment = next((o for o in others if o != "adam-2x"), others[0])
        compare = {"study": str(study_file), "folder": str(root), "baseline": baseline, "treatment": treatment}
        return {"none/20_evaluate": evaluate, "40_compare": compare}
    out = f"{root}/{run.folder}"
    cell = {"train_domain": run.train_domain, "seed": run.seed}
    cell |= study.variants.get(run.optimizer, {"optimizer": run.optimizer})
    return {
        f"{run.folder}/10_train": study.train | cell | {"out": out, "shape": study.shape, "data": data},
        f"{run.folder}/20_evaluate": study.evaluate | common | {"run": out, "out": out, "shape": study.shape},
        f"{run.folder}/30_loss_landscape": study.landscape | common | {"run": out, "out": out},
    }


def plan(study: Study, root: Path, data: str, study_file: Path) -> None:
    """Write every notebook's parameter file; one that says the same already keeps its date."""
    for run in (None, *grid(study)):
        for name, values in parameters(study, run, root, data, study_file).items():
            write_if_new(root / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it says the same already, so that its date tells when it last changed."""
    if not path.exists() or path.read_text() != text:
        with written_whole(path) as partial:
            partial.write_text(text)


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
            if domain == "HippocampusMR":
                if not (Path(data) / domain).exists():
                    print(f"fetching {domain} into {data}", flush=True)
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
    outputs = [root / "none/results.csv", root / "report.html"]
    outputs += [root / run.folder / f for run in grid(study) for f in ("weights.pt", "results.csv", "landscape.csv")]
    parts = [f"{sum(path.exists() for path in outputs)} of {len(outputs)} notebooks done"]
    for run in grid(study):
        folder = root / run.folder
        history = folder / "history.jsonl"
        if history.exists() and not (folder / "weights.pt").exists() and (lines := history.read_text().splitlines()):
            last = json.loads(lines[-1])
            parts.append(
                f"{run.train_domain} {run.optimizer} seed {run.seed}: step {last['step']}, loss {last['total']:.3f}"
            )
    return " | ".join(parts)


def failures(study: Study, root: Path) -> list[str]:
    """What went wrong in the study's notebooks, from the errors they hold."""
    found = []
    names = [name for run in (None, *grid(study)) for name in parameters(study, run, root, "", Path())]
    for notebook in (root / f"{name}.ipynb" for name in names):
        cells = json.loads(notebook.read_text())["cells"] if notebook.exists() else []
        errors = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
        found += [f"{notebook}: {error['ename']}: {error['evalue']}" for error in errors]
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
