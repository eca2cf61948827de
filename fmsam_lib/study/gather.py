"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, read_results, write_results
from fmsam_lib.evaluation.statistics import per_pair
from fmsam_lib.evaluation.tables import gaps, readable
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import RUN, TRAINING
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.images.domains import open_domain, readable_test_pairs
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import EQUAL_COMPUTE, Compare, Train, trained_with
from fmsam_lib.records import DataError, sources, write_json, written_whole
from fmsam_lib.study.grid import Study, compared, grid
from fmsam_lib.study.notebooks import NOTEBOOKS, Job, jobs
from fmsam_lib.training.checkpoint import MAY_DIFFER

PROVENANCE = ("time", "commit", "sources", "cpu", "cores", "packages")  # what the report shows of a run's
PANELS = 14  # in a figure, at most
SHOWN = ("sam_rise 0.01", "ascent_rise 0.01", "asam_rise 0.01", "eigenvalue_1", "trace", "weight_norm")  # beside Dice


class Found(NamedTuple):
    """All tables of a study, without rows where no run has any; `configs` by run folder.

    pairs: the subjects of every test pair. problems: what went wrong or is not there; notes: what else a reader of the
    tables must know (`tables.gaps`); both in plain words.
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
    "pairs.csv": (partial(pd.read_csv, dtype=str, keep_default_na=False), ("test_domain", "pair", "subjects")),
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


def caption(study: Study, found: Found) -> str:
    """Data, numbers of pairs and seeds, grid: what every figure's reader needs to know."""
    pairs = found.results.groupby("test_domain").pair.nunique()
    return (
        f"Trained on {', '.join(study.train_domains)}; tested on "
        + ", ".join(f"{domain} ({count} pairs)" for domain, count in pairs.items())
        + f"; optimizers {', '.join(study.optimizers)}; {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
        + f" ({', '.join(map(str, study.seeds))}); grid of {' x '.join(map(str, study.shape))} samples."
    )


def radii(found: Found) -> pd.DataFrame:
    """A line per run and kind of test domain: train_domain, optimizer, seed, lr, rho, loss, domains, dice.

    domains: "seen" in training or "unseen". loss: the mean of the last tenth of what the training logged, on its own
    batches.
    """
    dice = per_pair(found.results, "dice")
    lines = []
    for folder, config in found.configs.items():
        if "parameters" not in config or found.history.empty:
            continue  # named among the problems
        of, (*_, name, seed) = config["parameters"], folder.split("/")
        mine = {"train_domain": of["train_domain"], "optimizer": name, "seed": int(seed.removeprefix("seed"))}
        history, values = (select(table, **mine) for table in (found.history, dice))
        last = history.total.tail(max(1, len(history) // 10)).mean()
        seen = values.test_domain.isin(of["train_domain"].split("+")).map({True: "seen", False: "unseen"})
        run = mine | {"optimizer": of["optimizer"], "lr": of["lr"], "rho": of["rho"], "loss": last}
        means = values.groupby(seen.rename("domains")).value.mean()
        lines += [run | {"domains": domains, "dice": value} for domains, value in means.items()]
    return pd.DataFrame(lines, columns=["train_domain", "optimizer", "seed", "lr", "rho", "loss", "domains", "dice"])


def select(table: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows where columns have these values."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def against(study: Study, found: Found) -> list[tuple[str, str]]:
    """What the report compares: every other optimizer with Adam, at equal steps and, where there is one, equal cost.

    With instance optimisation behind both, too, where it was measured.
    """
    baselines = [compared(study)[0], *([EQUAL_COMPUTE] if EQUAL_COMPUTE in study.optimizers else [])]
    pairs = [(b, o) for o in study.optimizers if o not in baselines for b in baselines]
    if not pairs:
        pairs = [tuple(study.optimizers[:2])] if len(study.optimizers) > 1 else []
    there = set(found.results.optimizer)
    both = [*pairs, *((f"{b}+io", f"{o}+io") for b, o in pairs)]
    return [(b, o) for b, o in both if "+io" not in o or {b, o} <= there]


def keep_caption(folder: Path | str, name: str, says: str, table: pd.DataFrame, study: Study) -> str:
    """The figure's caption, whole: what it shows, data, n, seeds; also written beside it, `figures/<name>.txt`."""
    runs = table[table.train_domain != ""] if "train_domain" in table else table
    facts = [f"Trained on {', '.join(study.train_domains)}", f"grid of {' x '.join(map(str, study.shape))} samples"]
    if "pair" in table:
        counts = table.groupby("test_domain").pair.nunique()
        facts.append("test pairs: " + ", ".join(f"{domain} {n}" for domain, n in counts.items()))
    if "n" in table and "measure" in table and "tau" in table:
        facts.append(" to ".join(map(str, sorted({int(table.n.min()), int(table.n.max())}))) + " runs")
    seeds = sorted(runs.seed.dropna().astype(int).unique()) if "seed" in runs else study.seeds
    facts.append(f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''} ({', '.join(map(str, seeds))})")
    text = f"*{says} {'; '.join(facts)}.*"
    with written_whole(Path(folder) / "figures" / f"{name}.txt") as partial:
        partial.write_text(text.strip("*") + "\n")
    return text


def legible(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself or, of more than `PANELS` train x test cells, what was measured on training images alone."""
    if "test_domain" not in table or len(table[["train_domain", "test_domain"]].drop_duplicates()) <= PANELS:
        return table
    return table[table.test_domain.isin([TRAINING, ""])]


def write_table(table: pd.DataFrame, folder: Path | str, name: str) -> None:
    """One of the report's tables as `<name>.csv`."""
    with written_whole(Path(folder) / f"{name}.csv") as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def write_tables(found: Found, folder: Path | str) -> None:
    """The tables of all runs together, `results.csv` and so on, and `problems.json`."""
    write_results(found.results, Path(folder) / "results.csv")
    write_results(found.costs, Path(folder) / "costs.csv")
    write_results(found.robustness, Path(folder) / "robustness.csv", CURVES)
    for name in ("landscape", "flatness", "between"):
        write_table(getattr(found, name), folder, name)
    write_json(Path(folder) / "problems.json", found.problems)


def write_summary(summary: pd.DataFrame, study: Study, found: Found, folder: Path | str) -> None:
    """The comparison as `summary.csv` and, for a terminal, `summary.txt`."""
    with written_whole(Path(folder) / "summary.csv") as partial:
        summary.to_csv(partial, index=False, lineterminator="\n")
    with written_whole(Path(folder) / "summary.txt") as partial:
        partial.write_text(f"{caption(study, found)}\n\n{readable(summary).to_string(index=False)}\n")


def examples(study: Study, found: Found, settings: Compare) -> dict[str, tuple[Pair, Tensor]]:
    """The first test pair of each domain, and its map by the treatment's first network that is there."""
    trained = [run.folder for run in grid(study) if run.optimizer == settings.treatment and run.folder in found.configs]
    if not trained:
        return {}
    net = load(Path(settings.folder) / trained[0] / "weights.pt")
    data = found.configs[trained[0]]["parameters"]["data"]
    registered = {}
    for domain in study.test_domains:
        if domain not in set(found.results.test_domain):
            continue  # named among the problems
        dataset = open_domain(domain, shape=tuple(study.shape), data=data or None)
        (pair,) = readable_test_pairs(dataset, 1)
        with torch.no_grad():
            registered[domain] = pair, net(pair.moving[None], pair.fixed[None]).map
    return registered


def provenance_table(found: Found) -> str:
    """A Markdown table of every run's commit, hardware, versions and cost."""
    lines = ["| run | commit | processor | torch | threads | s a step | time |", "|---|---|---|---|---|---|---|"]
    for run, config in found.configs.items():
        of, made = config["parameters"], config["provenance"]
        history = found.history
        mine = history[(history.train_domain == of["train_domain"]) & (history.optimizer == of["optimizer"])]
        seconds = mine[mine.seed == of["seed"]].seconds.median()
        lines.append(
            f"| {run} | {made['commit']} | {made['cpu']} ({made['cores']} cores) | {made['packages']['torch']} "
            f"| {of['threads']} | {seconds:.3f} | {made['time']} |"
        )
    return "\n".join(lines)
