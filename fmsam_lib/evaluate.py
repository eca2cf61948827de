"""Pairs x metrics -> one tidy table, and what the table says."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from fmsam_lib.config import Evaluate, written_whole
from fmsam_lib.data import DataError
from fmsam_lib.domains import open_domain
from fmsam_lib.metrics import measure
from fmsam_lib.network import GradICON

COLUMNS = ["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric", "value", "unit"]


def evaluate(net: GradICON | None, dataset, *, pairs: int, progress: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """Metrics of `net` (None: no registration) on the first test pairs of `dataset`.

    Returns the rows (the columns of `results.csv` from `pair` on, and `test_domain`) and the problems: a pair
    whose files cannot be read is named there and the others go on.
    """
    rows, problems = [], []
    for i in tqdm(range(min(pairs, dataset.test_count)), disable=not progress, desc=dataset.name, unit="pair"):
        try:
            pair = dataset.test_pair(i)
        except DataError as error:
            problems.append(str(error))
            continue
        phi_map = None
        if net is not None:
            with torch.no_grad():
                phi_map = net(pair.moving[None], pair.fixed[None]).map
            if not torch.isfinite(phi_map).all():
                problems.append(f"{dataset.name}, {pair.name}: the network's map is not finite; left out")
                continue
        rows += [{"test_domain": dataset.name, "pair": pair.name} | row for row in measure(pair, phi_map)]
    return pd.DataFrame(rows, columns=[c for c in COLUMNS if c not in ("train_domain", "optimizer", "seed")]), problems


def evaluate_all(net: GradICON | None, settings: Evaluate, *, progress: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """`evaluate` on every test domain of the settings; one that cannot be opened is a problem, not the end.

    Raises DataError when nothing could be measured and that was for problems (not for want of labels).
    """
    tables, problems = [], []
    for domain in settings.test_domains:
        try:
            dataset = open_domain(domain, shape=tuple(settings.shape), data=settings.data or None)
        except DataError as error:
            problems.append(str(error))
            continue
        rows, of_domain = evaluate(net, dataset, pairs=settings.pairs, progress=progress)
        tables.append(rows)
        problems += of_domain
    if problems and not any(len(table) for table in tables):
        raise DataError("no test pair could be measured:\n- " + "\n- ".join(problems))
    return pd.concat(tables, ignore_index=True), problems


def write_results(results: pd.DataFrame, path: Path | str) -> None:
    """`results.csv`: the columns in order, numbers in full, so that the same run gives the same bytes."""
    with written_whole(path) as partial:
        results.reindex(columns=COLUMNS).to_csv(partial, index=False, lineterminator="\n")


def read_results(path: Path | str) -> pd.DataFrame:
    """A `results.csv`; `seed` is a nullable integer, text columns are never NaN."""
    text = dict.fromkeys(("train_domain", "test_domain", "optimizer", "pair", "label", "metric", "unit"), str)
    return pd.read_csv(
        path, dtype=text | {"seed": "Int64"}, keep_default_na=False, na_values={"value": [""], "seed": [""]}
    )


def per_pair(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One value a pair: the mean over its labels of `metric`."""
    keys = ["train_domain", "test_domain", "optimizer", "seed", "pair"]
    rows = results[results.metric == metric]
    return rows.groupby(keys, dropna=False, as_index=False).value.mean()


def table(results: pd.DataFrame, *, baseline: str = "adam", treatment: str = "sam") -> pd.DataFrame:
    """The comparison: a line per train x test domain, Dice before and after, and the paired difference.

    Dice: mean over labels, then pairs and seeds; NaN where there are no labels. The difference treatment -
    baseline pairs the same pair and seed (see `paired_difference`). missing: how often a structure was in only
    one, or none, of a pair's labels.
    """
    dice, folding = (per_pair(results, metric) for metric in ("dice", "folding_percent"))
    before = dice[dice.optimizer == "none"].groupby("test_domain").value.mean()
    trained = results[results.optimizer != "none"]
    lines = []
    for (train_domain, test_domain), rows in trained.groupby(["train_domain", "test_domain"]):
        mine, folds = (v[(v.train_domain == train_domain) & (v.test_domain == test_domain)] for v in (dice, folding))
        line = {
            "train_domain": train_domain,
            "test_domain": test_domain,
            "seen": "yes" if test_domain in train_domain.split("+") else "no",
            "pairs": rows.pair.nunique(),
            "seeds": rows.seed.nunique(),
            "before": before.get(test_domain, np.nan),
        }
        optimizers = rows.optimizer.unique()
        line |= {o: mine.value[mine.optimizer == o].mean() for o in optimizers}
        line |= {f"folding {o} %": folds.value[folds.optimizer == o].mean() for o in optimizers}
        line["missing"] = int((rows.metric == "missing").sum())
        lines.append(line | paired_difference(mine, baseline, treatment))
    return pd.DataFrame(lines)


def paired_difference(rows: pd.DataFrame, baseline: str, treatment: str) -> dict:
    """Mean of treatment - baseline over (pair, seed) with a 95 % bootstrap interval; `{}` without both.

    The bootstrap draws test pairs, with all their seeds, and with the mirrored pair (b<-a beside a<-b), for
    these are not independent; so it says nothing of how much another seed would differ.
    """
    wide = rows.pivot_table(index=["pair", "seed"], columns="optimizer", values="value")
    if not {baseline, treatment} <= set(wide.columns):
        return {}
    difference = (wide[treatment] - wide[baseline]).dropna().reset_index(name="value")
    unit = difference.pair.map(lambda pair: "<-".join(sorted(pair.split("<-"))))
    sums = difference.groupby(unit).value.agg(["sum", "count"]).to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))].sum(1)  # (2000, 2)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    name = f"{treatment} - {baseline}"
    return {name: difference.value.mean(), f"{name} low": low, f"{name} high": high}


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The comparison as text for people: three decimals, the interval in one column with its mean."""
    text = summary.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)).replace("nan", "-")
    for name in [column for column in summary.columns if f"{column} low" in summary.columns]:
        low, high = text.pop(f"{name} low"), text.pop(f"{name} high")
        text[name] += " [" + low + ", " + high + "]"
        text = text.rename(columns={name: f"{name} [95 %]"})
    return text.rename(columns={"train_domain": "trained on", "test_domain": "tested on"})
