"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, read_results, write_results
from fmsam_lib.evaluation.statistics import per_pair
from fmsam_lib.evaluation.tables import gaps, readable
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import TRAINING
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.images.domains import open_domain, readable_test_pairs
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import EQUAL_COMPUTE, Compare
from fmsam_lib.records import DataError, write_json, written_whole
from fmsam_lib.study.file import Study
from fmsam_lib.study.grid import Run, between_folder, compared, grid, twins
from fmsam_lib.study.notebooks import parameters
from fmsam_lib.training.checkpoint import MAY_DIFFER

PANELS = 14  # in a figure, at most


SHOWN = ("sam_rise 0.01", "ascent_rise 0.01", "asam_rise 0.01", "eigenvalue_1", "trace", "weight_norm")  # beside Dice


class Found(NamedTuple):
    """All tables of a study, empty where no run has any; `configs` by run folder.

    problems: what went wrong or is not there; notes: what else a reader of the tables must know (`tables.gaps`); both
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
