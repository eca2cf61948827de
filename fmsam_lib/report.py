"""What the comparison notebook shows: everything a study's runs have left, and what is missing."""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fmsam_lib.config import Compare, written_whole
from fmsam_lib.data import DataError
from fmsam_lib.domains import open_domain, readable_test_pairs
from fmsam_lib.evaluate import per_pair, read_results, readable
from fmsam_lib.study import Study, grid
from fmsam_lib.synthetic import Pair
from fmsam_lib.weights import load


class Found(NamedTuple):
    """All tables of a study; `configs` by run folder; `problems` in plain words, nothing dropped."""

    results: pd.DataFrame
    landscape: pd.DataFrame
    history: pd.DataFrame
    configs: dict[str, dict]
    problems: list[str]


def gather(study: Study, folder: Path | str) -> Found:
    """Read what the runs of the study's grid wrote; a file that is not there is a problem named, not an error.

    Raises DataError when there is no result at all.
    """
    folder = Path(folder)
    results, landscapes, histories, configs, problems = [], [], [], {}, []
    problems += _json(folder / "left_out.json", [])
    if (folder / "none/results.csv").exists():
        results.append(read_results(folder / "none/results.csv"))
    else:
        problems.append("none/results.csv: the test pairs before registration were not measured")
    problems += _json(folder / "none/problems.json", [])
    for run in grid(study):
        there = folder / run.folder
        if not (there / "weights.pt").exists():  # what else lies there is of an earlier training
            problems.append(f"{run.folder}: this run was not trained to its end")
            continue
        about = {"train_domain": run.train_domain, "optimizer": run.optimizer, "seed": run.seed}
        for file, tables, reader in (
            ("results.csv", results, read_results),
            ("landscape.csv", landscapes, pd.read_csv),
            ("history.jsonl", histories, _read_history),
        ):
            if (there / file).exists():
                tables.append(reader(there / file).assign(**about))
            else:
                problems.append(f"{run.folder}/{file}: this run did not get there")
        configs[run.folder] = _json(there / "config.json", {})
        problems += _json(there / "problems.json", [])
    if not results:
        raise DataError(f"no results under {folder}: run the study first (make study STUDY=...)")
    tables = (pd.concat(t, ignore_index=True) if t else pd.DataFrame() for t in (results, landscapes, histories))
    return Found(*tables, configs, list(dict.fromkeys(problems)))


def _read_history(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True)


def _json(path: Path, default):
    return json.loads(path.read_text()) if path.exists() else default


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
