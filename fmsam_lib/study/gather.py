"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fmsam_lib.evaluation.comparison import gaps
from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, read_results
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import TRAINING
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.records import DataError
from fmsam_lib.study.file import Study
from fmsam_lib.study.grid import Run, between_folder, grid, twins
from fmsam_lib.study.notebooks import parameters
from fmsam_lib.training.checkpoint import MAY_DIFFER


class Found(NamedTuple):
    """All tables of a study, empty where no run has any; `configs` by run folder.

    problems: what went wrong or is not there; notes: what else a reader must know (`comparison.gaps`); both
    in plain words.
    """

    results: pd.DataFrame
    costs: pd.DataFrame
    robustness: pd.DataFrame
    landscape: pd.DataFrame
    flatness: pd.DataFrame
    between: pd.DataFrame
    history: pd.DataFrame
    configs: dict[str, dict]
    problems: list[str]
    notes: list[str]


def gather(study: Study, folder: Path | str) -> Found:
    """Read what the runs of the study's grid wrote; a file that is not there is a problem named, not an error.

    What is not this study's, a run with other parameters or a test domain it does not have, is left out and named.
    Raises DataError when there is no result at all.
    """
    folder = Path(folder)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in READERS}
    configs, problems = {}, []
    _json(folder, "left_out.json", problems)
    for name in ("none", *(["io"] if "io" in study.baselines else [])):
        problems += _read(folder, name, ("results.csv", "costs.csv", "robustness.csv"), tables)
        _json(folder, f"{name}/problems.json", problems)
    for run in grid(study):
        if not (folder / run.folder / "weights.pt").exists():  # what else lies there is of an earlier training
            problems.append(f"{run.folder}: this run was not trained to its end")
            continue
        try:
            config = json.loads((folder / run.folder / "config.json").read_text())
            other = _differing(study, run, config["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{run.folder}/config.json: this cannot be read, so the run is left out ({error!r})")
            continue
        if other:
            problems.append(f"{run.folder}: a run of another study, left out ({other})")
            continue
        about = {"train_domain": run.train_domain, "optimizer": run.optimizer, "seed": run.seed}
        problems += _read(folder, run.folder, [name for name in READERS if name != "between.csv"], tables, about)
        configs[run.folder] = config
        _json(folder, f"{run.folder}/problems.json", problems)
    for pair in twins(study):
        if all(run.folder in configs for run in pair):
            problems += _read(folder, between_folder(pair[0]), ["between.csv"], tables)
    if not tables["results.csv"]:
        raise DataError(f"no results under {folder}: run the study first (make study STUDY=...)")
    found = {Path(name).stem: _together(parts) for name, parts in tables.items()}
    strange = sorted(set(found["results"].test_domain) - set(study.test_domains))
    if strange:
        problems.append(f"results of {', '.join(strange)}, which the study does not test on, are left out")
        found = {name: _of(table, study.test_domains) for name, table in found.items()}
    problems += _unlike(study, configs)
    return Found(**found, configs=configs, problems=list(dict.fromkeys(problems)), notes=gaps(found["results"]))


def _together(parts: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [part for part in parts if len(part)]  # an empty one would take the others' types away
    return pd.concat(filled, ignore_index=True) if filled else (parts or [pd.DataFrame()])[0]


def _read(folder: Path, of: str, files, tables: dict[str, list[pd.DataFrame]], about: dict | None = None) -> list[str]:
    """Add the tables in the folder's folder `of` to `tables`; a line about each that is not there or damaged."""
    problems = []
    for name in files:
        reader, needed = READERS[name]
        try:
            table = reader(folder / of / name)
            if absent := [column for column in needed if column not in table]:
                raise ValueError(f"no column {', '.join(absent)}")
        except FileNotFoundError:
            problems.append(f"{of}/{name}: this was not computed")
            continue
        except (ValueError, OSError) as error:
            problems.append(f"{of}/{name}: this cannot be read ({error}); remove the tables in {of}, compute again")
            continue
        if about and not table.empty:  # a study's own name for the optimizer, which may be a variant
            after = table.optimizer.str.extract(r"(\+io)$", expand=False).fillna("") if "pair" in table else ""
            table = table.assign(**about | {"optimizer": about["optimizer"] + after})
        tables[name].append(table)
    return problems


def _differing(study: Study, run: Run, there: dict) -> str:
    """In what a run's recorded parameters differ from those that the study gives it; "" for nothing."""
    wanted = parameters(study, run, Path(), "", Path())[f"{run.folder}/10_train"]
    names = [n for n in wanted if n not in MAY_DIFFER and n in there and there[n] != wanted[n]]
    return ", ".join(f"{n}: {there[n]!r} there, {wanted[n]!r} in the study" for n in names)


def _unlike(study: Study, configs: dict[str, dict]) -> list[str]:
    """Parameters that the study leaves to notebook 10, and in which its runs differ all the same."""
    meant = {"train_domain", "optimizer", "seed", *MAY_DIFFER, *(name for v in study.variants.values() for name in v)}
    found = []
    for name in sorted({name for config in configs.values() for name in config["parameters"]} - meant):
        runs: dict[str, list[str]] = {}
        for run, config in configs.items():
            runs.setdefault(repr(config["parameters"].get(name)), []).append(run)
        if len(runs) > 1:
            told = "; ".join(f"{value} in {len(of)}, first {of[0]}" for value, of in runs.items())
            found.append(f"the runs differ in {name} ({told}): are several studies mixed?")
    return found


def _of(table: pd.DataFrame, test_domains: list[str]) -> pd.DataFrame:
    kept = [*test_domains, TRAINING, ""]
    return table[table.test_domain.isin(kept)] if "test_domain" in table else table


def _read_history(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True)


def _read_measures(path: Path) -> pd.DataFrame:
    names = ("train_domain", "test_domain", "optimizer", "kind", "term", "measure", "statistics")
    table = pd.read_csv(path, dtype=dict.fromkeys(names, str))
    return table.assign(**{name: table[name].fillna("") for name in names if name in table})


READERS = {  # how a table is read, and the columns that it must have
    "results.csv": (read_results, COLUMNS),
    "costs.csv": (read_results, COLUMNS),
    "robustness.csv": (read_results, CURVES),
    "landscape.csv": (_read_measures, LANDSCAPE),
    "flatness.csv": (_read_measures, FLATNESS),
    "between.csv": (_read_measures, BETWEEN),
    "history.jsonl": (_read_history, ("step", "total", "seconds")),
}


def _json(folder: Path, name: str, problems: list[str]) -> None:
    """Add the lines of a `problems.json` to the problems; that it is damaged is one."""
    try:
        problems += json.loads((folder / name).read_text()) if (folder / name).exists() else []
    except ValueError as error:
        problems.append(f"{name}: this cannot be read ({error}); remove the tables beside it, compute again")
