"""Which notebooks a study runs, what each one takes and makes, and what they left."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fmsam_lib.checking import ConfigError, Parameters, read
from fmsam_lib.parameters import Between, Compare, Evaluate, Landscape, Train
from fmsam_lib.records import read_json, written_whole
from fmsam_lib.study.grid import Resources, Run, Study, compared, grid, twins
from fmsam_lib.training.loop import GPU_THREADS

TABLES = """results costs robustness landscape flatness between trainings summary comparison methods
    robustness_differences correlation answer"""
REPORT = (*(f"{name}.csv" for name in TABLES.split()), "summary.txt", "problems.json", "report.html")
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text, seven times as fast


class Notebook(NamedTuple):
    """What a notebook takes, the section of the study file that says so, and the files it leaves.

    makes: into its job's folder, when it is done: removed, they are made again. keeps: what it adds to on the way.
    """

    takes: type[Parameters]
    section: str
    makes: tuple[str, ...]
    keeps: tuple[str, ...] = ()


NOTEBOOKS = {
    "10_train": Notebook(Train, "train", ("weights.pt",), keeps=("history.jsonl",)),
    "20_evaluate": Notebook(Evaluate, "evaluate", ("results.csv", "pairs.csv", "costs.csv", "robustness.csv")),
    "30_loss_landscape": Notebook(Landscape, "landscape", ("landscape.csv", "flatness.csv")),
    "35_between_minima": Notebook(Between, "between", ("between.csv",)),
    "40_compare": Notebook(Compare, "", REPORT),
}


class Job(NamedTuple):
    """One notebook to run: its folder below the study's, what it takes beyond its defaults, the files that it needs.

    asked: `values` wherever the study and its data lie: its folders count from the study's own. What is computed is
    compared with that, so that a study that was moved stays as it is. allowed: what it may use of a machine.
    """

    folder: str
    notebook: str
    values: dict[str, Any]
    asked: dict[str, Any]
    needs: tuple[str, ...]
    allowed: Resources

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.notebook}".lstrip("/")

    @property
    def resources(self) -> dict[str, int]:
        """What it may use, in Snakemake's words."""
        processes, of = self.values.get("processes", 1), self.allowed
        gpus = processes * (self.values.get("device") == "cuda")
        cpus = max(processes * self.values.get("threads", 1), gpus * GPU_THREADS)
        chosen = {"threads": of.cpus or cpus, "gpu": gpus if of.gpus is None else of.gpus}
        return chosen | {"mem_mb": of.memory_mb, "runtime": of.minutes}

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(f"{self.folder}/{file}".lstrip("/") for file in NOTEBOOKS[self.notebook].makes)


def jobs(study: Study, root: Path, data: str, study_file: Path, stamps: dict[str, str] | None = None) -> list[Job]:
    """Every notebook that a study in the folder `root` runs, the report last. stamps: of the data sets it tests on.

    Raises ConfigError where a section of the file sets what the study itself does.
    """
    found: list[Job] = []
    asked_for: dict = {**study.resources}
    allowed = {n: read(Resources, asked_for.get(n, {}), source=f"section resources, notebook {n}") for n in NOTEBOOKS}

    def add(notebook: str, folder: str, section: dict[str, Any], own: dict[str, Any], **trained: Run) -> None:
        """trained: the runs whose folders the notebook takes, by the names of these parameters."""
        folders = {"out": folder} | {name: run.folder for name, run in trained.items()}
        asked = own | folders
        if twice := sorted(section.keys() & {*asked, "data"}):
            where = NOTEBOOKS[notebook].section
            raise ConfigError(f"section {where}: the study itself sets {', '.join(twice)}: leave that out")
        here = {name: f"{root}/{path}" for name, path in folders.items()} | {"data": data}
        needs = tuple(f"{run.folder}/weights.pt" for run in trained.values())
        asked |= {"data": stamps} if stamps and "test_domains" in own else {}
        found.append(Job(folder, notebook, section | own | here, section | asked, needs, allowed[notebook]))

    tests, shape = dict[str, Any](test_domains=study.test_domains), dict[str, Any](shape=study.shape)
    alone = ["none", *(["ants-syn"] if "ants-syn" in study.baselines else [])]
    evaluate = {name: value for name, value in study.evaluate.items() if name != "methods"}
    add("20_evaluate", "none", evaluate, tests | shape | {"run": "", "methods": alone})
    if "io" in study.baselines:  # takes the network's form and the loss from a run
        add("20_evaluate", "io", evaluate, tests | shape | {"methods": ["io"]}, run=grid(study)[0])
    for run in grid(study):
        variant = study.variants.get(run.optimizer, {"optimizer": run.optimizer})
        values = study.train | {name: value for name, value in variant.items() if name != "optimizer"}
        cell = {"train_domain": run.train_domain, "optimizer": variant["optimizer"], "seed": run.seed}
        add("10_train", run.folder, values, shape | cell)
        methods = study.evaluate.get("methods", ["network", *(["network+io"] if study.evaluate.get("io") else [])])
        add("20_evaluate", run.folder, evaluate, tests | shape | {"methods": methods}, run=run)
        if study.landscape is not None:
            add("30_loss_landscape", run.folder, study.landscape, tests, run=run)
    for a, b in twins(study) if study.landscape is not None else []:
        between = study.run(a.train_domain, "between", a.seed).folder
        add("35_between_minima", between, study.between, tests, baseline=a, treatment=b)
    asked = dict(zip(("baseline", "treatment"), compared(study), strict=True))
    report = asked | {"study": str(study_file), "folder": str(root), "data": data}
    made = tuple(file for job in found for file in job.makes)
    return [*found, Job("", "40_compare", report, asked, made, allowed["40_compare"])]


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it says the same already, so that its date tells when it last changed."""
    if not path.exists() or path.read_bytes() != text.encode():
        with written_whole(path, synced=False) as partial:
            partial.write_text(text, encoding="utf-8")


def plan(work: list[Job], root: Path) -> list[Job]:
    """Write `plan.json` and parameter files; the jobs that lack a file, or made theirs when they were asked another.

    Beside it, `<notebook>.asked.yaml`: of both files the one that says the same in another place, so Snakemake's input.
    """
    left = []
    columns = ("folder", "notebook", "needs", "makes", "resources")
    write_if_new(root / "plan.json", json.dumps([{name: getattr(job, name) for name in columns} for job in work]))
    for job in work:
        asked = root / f"{job.name}.asked.yaml"
        write_if_new(root / f"{job.name}.yaml", yaml.dump(job.values, Dumper=DUMPER, sort_keys=False))
        write_if_new(asked, yaml.dump(job.asked, Dumper=DUMPER, sort_keys=False))
        whole = all((root / file).exists() for file in (*job.needs, *job.makes))
        if not whole or (root / job.makes[0]).stat().st_mtime < asked.stat().st_mtime:
            left.append(job)
    return left


def executed(work: list[Job], root: Path) -> Iterator[tuple[Job, float, list[str]]]:
    """The jobs that were run, the seconds that each took (0: it was killed), and its errors."""
    for job in work:
        path = root / f"{job.name}.ipynb"
        if (content := read_json(path)) is None:  # papermill could not start, or was killed while it wrote
            continue
        outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
        errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
        yield job, content["metadata"]["papermill"]["duration"] or 0.0, [f"{path}: {error}" for error in errors]
