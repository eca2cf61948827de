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
from typing import Literal

import yaml

from fmsam_lib.config import (
    PROJECT,
    Between,
    ConfigError,
    Evaluate,
    Landscape,
    Method,
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
EQUAL_COMPUTE = "adam-2x"  # and with Adam at twice the steps, SAM's cost, where a study has it
Baseline = Literal["ants-syn", "io"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The grid train domain x optimizer x seed; the sections override the notebooks' own defaults.

    leave_one_out: domains of which all but one are trained on together, each left out in turn: so many training domains
    more. baselines: registrations without training, for the same tables: ANTs' SyN, instance optimisation alone.
    variants: further optimizers by name, `{sam-0.03: {optimizer: sam, rho: 0.03}}`: an optimizer and what else of the
    training's parameters differs.
    """

    description: str
    test_domains: list[str]
    optimizers: list[str]
    seeds: list[int]
    shape: list[int]
    train: dict[str, object]
    evaluate: dict[str, object]
    landscape: dict[str, object]
    between: dict[str, object] = field(default_factory=dict)
    train_domains: list[str] = field(default_factory=list)
    leave_one_out: list[str] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    variants: dict[str, dict] = field(default_factory=dict)


SECTIONS = {"train": Train, "evaluate": Evaluate, "landscape": Landscape, "between": Between}
SET_BY_THE_STUDY = ("out", "run", "train_domain", "test_domains", "optimizer", "seed", "shape", "data", "methods")
SET_BY_THE_STUDY += ("baseline", "treatment")
TAKEN = (*typing.get_args(Optimizer), *typing.get_args(Method), "between")  # no variant's names; the last is a folder's


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
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in TAKEN:
            raise ConfigError(
                f"{path}, variant {name!r}: expected a name of letters, digits, '.', '_' and '-' that is no "
                f"optimizer's or method's, none of {', '.join(TAKEN)}"
            )
        if not isinstance(variant, dict) or "optimizer" not in variant:
            raise ConfigError(f"{path}, variant {name}: expected a mapping with an optimizer, got {variant!r}")
        _check_section(variant, Train, f"{path}, variant {name}", also=("optimizer",))
    known = [*typing.get_args(Optimizer), *study.variants]
    problems = [f"{name}: unknown{nearest(name, known)}" for name in study.optimizers if name not in known]
    if problems:
        raise ConfigError(f"{path}, optimizers: expected some of {', '.join(known)}; got\n- " + "\n- ".join(problems))
    return dataclasses.replace(study, train_domains=_train_domains(study, path))


def _train_domains(study: Study, path: Path) -> list[str]:
    """Those of the file, and all but one of `leave_one_out` for each of its domains."""
    left_out = study.leave_one_out
    if len(left_out) == 1:
        raise ConfigError(f"{path}, leave_one_out: expected two domains or more, got {left_out[0]} alone")
    others = ["+".join(other for other in left_out if other != domain) for domain in left_out]
    both = list(dict.fromkeys([*study.train_domains, *others]))
    if not both:
        raise ConfigError(f"{path}: expected train_domains or leave_one_out, got neither: name what to train on")
    return both


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


def compared(study: Study) -> tuple[str, str]:
    """Baseline and treatment of the report: Adam, and the first optimizer that is another one at the same steps."""
    baseline = BASELINE if BASELINE in study.optimizers else study.optimizers[0]
    others = [o for o in study.optimizers if o != baseline] or [baseline]
    return baseline, next((o for o in others if o != EQUAL_COMPUTE), others[0])


def twins(study: Study) -> list[tuple[Run, Run]]:
    """Runs of baseline and treatment with the same training domain and seed, so the same start."""
    baseline, treatment = compared(study)
    runs = {(run.train_domain, run.optimizer, run.seed): run for run in grid(study)}
    found = [(runs[d, baseline, s], runs[d, treatment, s]) for d in study.train_domains for s in study.seeds]
    return [pair for pair in found if pair[0] != pair[1]]


def between_folder(run: Run) -> str:
    """Where notebook 35 puts what lies between the solutions of this training domain and seed."""
    return f"{run.train_domain}/between/seed{run.seed}"


def parameters(study: Study, run: Run | None, root: Path, data: str, study_file: Path) -> dict[str, dict]:
    """What each notebook of `run` takes beyond its defaults, by the notebook's name; None: those of no single run."""
    common = {"test_domains": study.test_domains, "data": data}
    if run is None:
        evaluate = study.evaluate | common | {"shape": study.shape}
        alone = ["none", *(["ants-syn"] if "ants-syn" in study.baselines else [])]
        notebooks = {"none/20_evaluate": evaluate | {"run": "", "out": f"{root}/none", "methods": alone}}
        if "io" in study.baselines:  # takes the network's form and the loss from a run
            of = {"run": f"{root}/{grid(study)[0].folder}", "out": f"{root}/io", "methods": ["io"]}
            notebooks["io/20_evaluate"] = evaluate | of
        for pair in twins(study):
            out = between_folder(pair[0])
            of = dict(zip(("baseline", "treatment"), (f"{root}/{run.folder}" for run in pair), strict=True))
            notebooks[f"{out}/35_between_minima"] = study.between | common | of | {"out": f"{root}/{out}"}
        baseline, treatment = compared(study)
        report = {"study": str(study_file), "folder": str(root), "baseline": baseline, "treatment": treatment}
        return notebooks | {"40_compare": report}
    out = f"{root}/{run.folder}"
    cell = {"train_domain": run.train_domain, "seed": run.seed}
    cell |= study.variants.get(run.optimizer, {"optimizer": run.optimizer})
    methods = ["network", *(["network+io"] if study.evaluate.get("io") else [])]
    evaluate = study.evaluate | common | {"run": out, "out": out, "shape": study.shape, "methods": methods}
    return {
        f"{run.folder}/10_train": study.train | cell | {"out": out, "shape": study.shape, "data": data},
        f"{run.folder}/20_evaluate": evaluate,
        f"{run.folder}/30_loss_landscape": study.landscape | common | {"run": out, "out": out},
    }


def outputs(study: Study) -> list[str]:
    """The files that the notebooks of a study write last, beside the trainings': `report.html` and those it needs."""
    alone = ["none", *(["io"] if "io" in study.baselines else [])]
    runs = [f"{run.folder}/{file}" for run in grid(study) for file in ("results.csv", "landscape.csv")]
    return [
        *(f"{name}/results.csv" for name in alone),
        *runs,
        *(f"{between_folder(a)}/between.csv" for a, _ in twins(study)),
    ]


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
