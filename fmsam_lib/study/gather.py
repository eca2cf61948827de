"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fmsam_lib.checking import in_project
from fmsam_lib.evaluation.comparison import gaps
from fmsam_lib.evaluation.correlation import RUN as ABOUT
from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, PAIRS, read_results, together
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import RUN, TRAINING
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.model.weights import OFFICIAL, load
from fmsam_lib.parameters import Train
from fmsam_lib.records import DataError, read_json, sources
from fmsam_lib.study.grid import Study, grid
from fmsam_lib.study.notebooks import NOTEBOOKS, Job, jobs
from fmsam_lib.training.checkpoint import MAY_DIFFER, diverged, trained_with

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
    Several versions of the library are named too: a training records its own, also when it goes on after a stop, the
    study's `sources.json` those of the other notebooks. Raises DataError when there is no result at all.
    """
    folder = Path(folder)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in READERS}
    configs: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    runs = {run.folder: {name: getattr(run, name) for name in ABOUT} for run in grid(study)}
    made_by, by = read_json(folder / "sources.json", {}), dict[str, str]()
    _json(folder, "left_out.json", problems)
    for job in jobs(study, folder, "", Path())[:-1]:  # without the report
        if job.notebook == "10_train":
            configs |= _training(folder, job, problems)
        needed = {file.rpartition("/")[0] for file in (*job.needs, *job.makes)} & runs.keys()
        if job.folder == "io" or needed <= configs.keys():  # of a run that is left out, io takes the network's form
            _read(folder, job, runs.get(job.folder), parts, problems)
            _json(folder, f"{job.folder}/problems.json", problems)
            by |= {job.name: made_by[job.name]} if job.name in made_by else {}
    if not any(part.train_domain.any() for part in parts["results.csv"]):  # without training there are others
        told = f"no results under {folder} of a run: run the study first (make study STUDY=...)"
        raise DataError("\n- ".join([told, *problems[:9]]))
    found = {Path(name).stem: together(parts[name], columns) for name, (_, columns) in READERS.items()}
    found["pairs"] = found["pairs"].drop_duplicates(ignore_index=True)
    if strange := sorted(set(found["results"].test_domain) - set(study.test_domains)):
        problems.append(f"results of {', '.join(strange)}, which the study does not test on, are left out")
        kept = [*study.test_domains, TRAINING, ""]
        found = {name: t[t.test_domain.isin(kept)] if "test_domain" in t else t for name, t in found.items()}
    for run, config in configs.items():
        by[run] = config["provenance"]["sources"]
        by |= {f"{run} from step {made['step']}": made["sources"] for made in config.get("resumed", [])}
    problems = list(dict.fromkeys([*problems, *_unlike(study, configs, by)]))
    notes = gaps(found["results"])
    for (domain, optimizer, seed), loss in found["history"].groupby(ABOUT).total:
        if diverged(first := loss.iloc[0], last := loss.iloc[-1]):
            notes.append(f"{optimizer}, seed {seed}, trained on {domain} diverged: loss {first:.3g}, then {last:.3g}")
    for weights in sorted({config["parameters"]["weights"] for config in configs.values()} - {"", *OFFICIAL}):
        with suppress(ValueError):  # a file that is gone does not say what it was trained on, nor do the official ones
            before = load(path if Path(path := in_project(weights)).is_file() else weights).about.get("seen", {})
            unseen = [d for d in study.test_domains if any(d not in names.split("+") for names in study.train_domains)]
            if known := ", ".join(d for d in unseen if d in before):
                notes.append(f"{known}: tested as never seen, but the weights {weights} it began with saw it")
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
        config: dict[str, Any] = read_json(run / "config.json")  # which can be read, as `trained_with` did
        config["provenance"] = {name: config["provenance"][name] for name in PROVENANCE}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{job.folder}/config.json: this cannot be read, so the run is left out ({error!r})")
        return {}
    if told := differing(there, job.values):
        problems.append(f"{job.folder}: a run of another study, left out ({told})")
        return {}
    return {job.folder: config}


def differing(there: dict[str, Any], values: dict[str, Any]) -> str:
    """In which parameters a recorded training is another than the study's, in words; "" where it is the same."""
    other = {name: value for name, value in values.items() if name not in MAY_DIFFER and there[name] != value}
    return ", ".join(f"{name}: {there[name]!r} there, {value!r} in the study" for name, value in other.items())


def _read(folder: Path, job: Job, about: dict | None, parts: dict[str, list], problems: list[str]) -> None:
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
        except (ValueError, OSError) as error:
            made_by = " and weights.pt" * (name in notebook.keeps)
            problems.append(f"{job.folder}/{name}: this cannot be read ({error}); remove it{made_by}, compute again")
        else:
            if about and "optimizer" in columns and not table.empty:
                after = table.optimizer.str.extract(r"(\+\w+)$", expand=False).fillna("") if "pair" in table else ""
                table = table.assign(**about | {"optimizer": about["optimizer"] + after})
            parts[name].append(table)


def _unlike(study: Study, configs: dict[str, dict[str, Any]], by: dict[str, str]) -> list[str]:
    """What the study leaves to notebook 10, and in which its runs differ all the same; `by` which sources, too."""
    meant = {"train_domain", "optimizer", "seed", *MAY_DIFFER, *(name for v in study.variants.values() for name in v)}
    differ = {"the library (hash of its sources)": by}
    for name in sorted(Train.model_fields.keys() - meant):
        differ[name] = {run: repr(config["parameters"][name]) for run, config in configs.items()}
    for file in {config["parameters"]["weights"] for config in configs.values()} - {""}:
        of = {run: str(c.get("start")) for run, c in configs.items() if c["parameters"]["weights"] == file}
        differ[f"the content of {file}, which they began with"] = of
    problems = []
    for name, values in differ.items():
        first = {value: run for run, value in reversed(values.items())}
        if len(runs := Counter(values.values())) > 1:
            told = "; ".join(f"{value} in {number}, first {first[value]}" for value, number in runs.items())
            problems.append(f"the runs differ in {name} ({told}): are several studies mixed?")
    return problems


def _read_history(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True).assign(train_domain="", optimizer="", seed=-1)  # the grid knows whose it is


TEXT = ("train_domain", "test_domain", "optimizer", "kind", "term", "measure", "statistics")
_read_measures = partial(pd.read_csv, converters=dict.fromkeys(TEXT, str))  # "" where there is none
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
    damaged = [f"{name}: this cannot be read; remove the tables beside it, compute again"]
    problems += read_json(folder / name, damaged) if (folder / name).exists() else []
