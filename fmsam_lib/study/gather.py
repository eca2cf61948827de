"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fmsam_lib.evaluation.comparison import gaps
from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, PAIRS, read_results
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import RUN, TRAINING
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.parameters import Train, trained_with
from fmsam_lib.records import DataError, sources
from fmsam_lib.study.grid import Study, grid
from fmsam_lib.study.notebooks import NOTEBOOKS, Job, jobs
from fmsam_lib.training.checkpoint import MAY_DIFFER

PROVENANCE = ("time", "commit", "sources", "cpu", "cores", "packages")  # what the report shows of a run's


class Found(NamedTuple):
    """All tables of a study, without rows where no run has any; `configs` by run folder.

    pairs: the subjects of every test pair. problems: what went wrong or is not there; notes: what else a reader of the
    tables must know (`comparison.gaps`); both in plain words.
    """

    results: pd.DataFrame
    costs: pd.DataFrame
    pairs: pd.DataFrame
    robustness: pd.DataFrame
    landscape: pd.DataFrame
    flatness: pd.DataFrame
    between: pd.DataFrame
    history: pd.DataFrame
    configs: dict[str, dict[str, Any]]
    problems: list[str]
    notes: list[str]


def gather(study: Study, folder: Path | str) -> Found:
    """Read what the notebooks of the study wrote; a file that is not there is a problem named, not an error.

    What is not this study's, a run with other parameters or a test domain it does not have, is left out and named.
    Raises DataError when there is no result at all.
    """
    folder = Path(folder)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in READERS}
    configs: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    work = jobs(study, folder, "", Path())[:-1]  # without the report
    runs = {run.folder: asdict(run) for run in grid(study)}
    _json(folder, "left_out.json", problems)
    for job in work:
        if job.notebook == "10_train":
            configs |= _training(folder, job, problems)
        needed = {file.rpartition("/")[0] for file in (*job.needs, *job.makes)} & runs.keys()
        if job.folder == "io" or needed <= configs.keys():  # of a run that is left out, io takes the network's form
            _read(folder, job, runs.get(job.folder), parts, problems)
            _json(folder, f"{job.folder}/problems.json", problems)
    if not parts["results.csv"]:
        raise DataError(f"no results under {folder}: run the study first (make study STUDY=...)")
    found = {Path(name).stem: _together(parts[name], columns) for name, (_, columns) in READERS.items()}
    found["pairs"] = found["pairs"].drop_duplicates(ignore_index=True)
    if strange := sorted(set(found["results"].test_domain) - set(study.test_domains)):
        problems.append(f"results of {', '.join(strange)}, which the study does not test on, are left out")
        kept = [*study.test_domains, TRAINING, ""]
        found = {name: t[t.test_domain.isin(kept)] if "test_domain" in t else t for name, t in found.items()}
    by = _computed_by(folder, work, configs)
    problems = list(dict.fromkeys([*problems, *_unlike(study, configs, by)]))
    notes = gaps(found["results"])
    if older := sorted({*by.values()} - {sources()}):
        notes.append(f"computed by the library's sources {', '.join(older)}, not by the present ones, {sources()}")
    return Found(**found, configs=configs, problems=problems, notes=notes)


def _training(folder: Path, job: Job, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The run's record by its folder; {} and a line why, where it is not a whole training of this study."""
    run = folder / job.folder
    if not (run / "weights.pt").exists():  # what else lies there is of an earlier training
        problems.append(f"{job.folder}: this run was not trained to its end")
        return {}
    try:
        there = trained_with(run).model_dump()
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
        if absent := [name for name in PROVENANCE if name not in config["provenance"]]:
            raise ValueError(f"no {', '.join(absent)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{job.folder}/config.json: this cannot be read, so the run is left out ({error!r})")
        return {}
    other = [name for name in job.values if name not in MAY_DIFFER and there[name] != job.values[name]]
    told = ", ".join(f"{name}: {there[name]!r} there, {job.values[name]!r} in the study" for name in other)
    problems += [f"{job.folder}: a run of another study, left out ({told})"] if other else []
    return {} if other else {job.folder: config}


def _read(
    folder: Path, job: Job, about: dict[str, Any] | None, parts: dict[str, list[pd.DataFrame]], problems: list[str]
) -> None:
    """Add the tables that the job left; a line about each that is not there or damaged.

    about: the run's columns, with the study's own name for the optimizer, which may be a variant.
    """
    notebook = NOTEBOOKS[job.notebook]
    for name in (file for file in (*notebook.makes, *notebook.keeps) if file in READERS):
        reader, columns = READERS[name]
        try:
            table = reader(folder / job.folder / name)
            if absent := [column for column in columns if column not in table]:
                raise ValueError(f"no column {', '.join(absent)}")
        except FileNotFoundError:
            problems.append(f"{job.folder}/{name}: this was not computed")
            continue
        except (ValueError, OSError) as error:
            todo = f"remove the tables in {job.folder}, compute again"
            problems.append(f"{job.folder}/{name}: this cannot be read ({error}); {todo}")
            continue
        if about and "optimizer" in columns and not table.empty:
            after = table.optimizer.str.extract(r"(\+io)$", expand=False).fillna("") if "pair" in table else ""
            table = table.assign(**about | {"optimizer": about["optimizer"] + after})
        parts[name].append(table)


def _together(parts: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    filled = [part for part in parts if len(part)]  # an empty one would take the others' types away
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _unlike(study: Study, configs: dict[str, dict[str, Any]], by: dict[str, str]) -> list[str]:
    """What the study leaves to notebook 10, and in which its runs differ all the same; `by` which sources, too."""
    meant = {"train_domain", "optimizer", "seed", *MAY_DIFFER, *(name for v in study.variants.values() for name in v)}
    differ = {"the library (hash of its sources)": by}
    for name in sorted(Train.model_fields.keys() - meant):
        differ[name] = {run: repr(config["parameters"][name]) for run, config in configs.items()}
    shared = {name: _shared(values) for name, values in differ.items()}
    return [f"the runs differ in {name} ({told}): are several studies mixed?" for name, told in shared.items() if told]


def _computed_by(folder: Path, work: list[Job], configs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The hash of the library's sources that computed each run and table.

    A training records its own, and others with which it went on after a stop. For the other notebooks `sources.jsonl`,
    with a line for each time that the study was started, tells which were at work when they wrote.
    """
    by = {run: config["provenance"]["sources"] for run, config in configs.items()}
    for run, config in configs.items():
        by |= {f"{run} from step {made['step']}": made["sources"] for made in config.get("resumed", [])}
    log = folder / "sources.jsonl"
    starts = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for job in work:
        made = folder / job.makes[0]
        if job.notebook != "10_train" and made.exists():
            before = [start["sources"] for start in starts if start["time"] <= made.stat().st_mtime]
            by |= {job.name: before[-1]} if before else {}
    return by


def _shared(values: dict[str, str]) -> str:
    """What has each of the values, in words; "" where all have the same."""
    by: dict[str, list[str]] = {}
    for name, value in values.items():
        by.setdefault(value, []).append(name)
    return "; ".join(f"{value} in {len(of)}, first {of[0]}" for value, of in by.items()) if len(by) > 1 else ""


def _read_history(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True).assign(train_domain="", optimizer="", seed=-1)  # the grid knows whose it is


def _read_measures(path: Path) -> pd.DataFrame:
    names = ("train_domain", "test_domain", "optimizer", "kind", "term", "measure", "statistics")
    table = pd.read_csv(path, dtype=dict.fromkeys(names, str))
    return table.assign(**{name: table[name].fillna("") for name in names if name in table})


READERS: dict[str, tuple[Callable[[Path], pd.DataFrame], Sequence[str]]] = {  # and the columns that it must have
    "results.csv": (read_results, COLUMNS),
    "costs.csv": (read_results, COLUMNS),
    "pairs.csv": (partial(pd.read_csv, dtype=str, keep_default_na=False), PAIRS),
    "robustness.csv": (read_results, CURVES),
    "landscape.csv": (_read_measures, LANDSCAPE),
    "flatness.csv": (_read_measures, (*RUN, *FLATNESS)),
    "between.csv": (_read_measures, BETWEEN),
    "history.jsonl": (_read_history, ("train_domain", "optimizer", "seed", "step", "total", "seconds")),
}


def _json(folder: Path, name: str, problems: list[str]) -> None:
    """Add the lines of a `problems.json` to the problems; that it is damaged is one."""
    try:
        problems += json.loads((folder / name).read_text()) if (folder / name).exists() else []
    except ValueError as error:
        problems.append(f"{name}: this cannot be read ({error}); remove the tables beside it, compute again")
