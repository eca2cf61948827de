"""The tables of a study's report: summary, comparison with every statistic, costs, and what is missing."""

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd

from fmsam_lib.evaluation.statistics import CELL, difference, mean_interval, per_pair, seen
from fmsam_lib.parameters import EQUAL_COMPUTE

KEYS = ["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric"]


METRICS = ("dice", "hd95", "surface_distance", "tre", "map_error", "folding_percent", "sdlogj", "inverse_error")


def summary(results: pd.DataFrame, *, baseline: str = "adam", treatment: str = "sam") -> pd.DataFrame:
    """A line per train x test domain: mean Dice before and after by every method, folding, and the paired difference.

    Dice: mean over labels, then pairs and seeds; NaN where there are no labels. missing: how often a structure was
    not in the fixed, the moving or the warped label.
    """
    dice, folding = (per_pair(results, metric) for metric in ("dice", "folding_percent"))
    alone = dice[dice.train_domain == ""].groupby(["test_domain", "optimizer"]).value.mean()
    lines = []
    for (train_domain, test_domain), rows in results[results.train_domain != ""].groupby(CELL):
        mine, folds = (v[(v.train_domain == train_domain) & (v.test_domain == test_domain)] for v in (dice, folding))
        line = {
            "train_domain": train_domain,
            "test_domain": test_domain,
            "seen": "yes" if seen(train_domain, test_domain) else "no",
            "pairs": rows.pair.nunique(),
            "seeds": rows.seed.nunique(),
            "before": alone.get((test_domain, "none"), np.nan),
        }
        others = alone[test_domain].drop("none", errors="ignore") if test_domain in alone else {}
        optimizers = rows.optimizer.unique()
        line |= dict(others) | {o: mine.value[mine.optimizer == o].mean() for o in optimizers}
        line |= {f"folding {o} %": folds.value[folds.optimizer == o].mean() for o in (baseline, treatment)}
        line["missing"] = int(rows.metric.str.startswith("missing_in_").sum())
        lines.append(line | _named_difference(mine, baseline, treatment))
    return pd.DataFrame(lines)


def _named_difference(rows: pd.DataFrame, baseline: str, treatment: str) -> dict:
    try:
        found = difference(rows, baseline, treatment)
    except ValueError:  # a hole of the grid, which the report names
        return {}
    name = f"{treatment} - {baseline}"
    return {name: found.mean, f"{name} low": found.low, f"{name} high": found.high}


def comparison(
    results: pd.DataFrame, against: list[tuple[str, str]], *, metrics: tuple[str, ...] = ("dice",)
) -> pd.DataFrame:
    """Every statistic of `difference`, a line per metric, (baseline, treatment) of `against`, train and test domain.

    The lines "seen" and "unseen" in place of a test domain are means over those domains (where there are several, and
    of one unit), the lines "each" in place of a training domain means over trainings too, as leave-one-domain-out
    wants them. p_holm: p corrected (Holm 1979) over all cells of train and test domain of one metric, baseline and
    treatment. equal: steps or compute. A cell in which nothing is paired has its line, with NaN; a metric that is not
    in the results has none.
    """
    parts = [
        _compared(results, metric, baseline, treatment)
        for metric in metrics
        if (results.metric == metric).any()
        for baseline, treatment in against
    ]
    columns = [*CELL, "metric", "unit", "baseline", "treatment", "equal", "seeds", "pairs", "units", "left_out"]
    columns += ["mean_baseline", "mean_treatment", "mean", "low", "high", "p", "p_holm", "d_z", "rank_biserial"]
    lines = [line for part in parts for line in part]
    return pd.DataFrame(lines, columns=[*columns, "worst_baseline", "worst_treatment"])


def _compared(results: pd.DataFrame, metric: str, baseline: str, treatment: str) -> list[dict]:
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    values = per_pair(results, metric)
    rows = values[(values.train_domain != "") & values.optimizer.isin([baseline, treatment])].assign(metric=metric)
    units = units_of(results, metric)
    equal = "compute" if baseline.removesuffix("+io") == EQUAL_COMPUTE else "steps"
    about = {"metric": metric, "baseline": baseline, "treatment": treatment, "equal": equal}
    lines, single = [], []
    for train, test, group in _groups(rows):
        unit = set(units[group.test_domain])
        if len(unit) > 1:
            continue  # a mean of millimetres and voxels says nothing
        line = about | {"train_domain": train, "test_domain": test, "unit": unit.pop()}
        try:
            line |= difference(group, baseline, treatment)._asdict()
        except ValueError:
            line |= {"mean": np.nan, "units": 0, "pairs": 0, "seeds": 0, "left_out": len(group)}
        lines.append(line)
        if test in ("seen", "unseen"):  # there a large domain would outweigh the others, unlike in the mean
            line |= dict.fromkeys(("p", "d_z", "rank_biserial"), np.nan)
        elif "p" in line:
            single.append(line)
    if single:
        corrected = multipletests([line["p"] for line in single], method="holm")[1]
        for line, p in zip(single, corrected, strict=True):
            line["p_holm"] = p
    return lines


def robust(robustness: pd.DataFrame, against: list[tuple[str, str]], *, metric: str = "dice") -> pd.DataFrame:
    """Treatment - baseline at every step of every corruption, all train and test domains with the same weight.

    robustness: of `robustness.csv`, all runs. Columns corruption, severity, baseline, treatment, and those of
    `Difference` but for its test and effect sizes.
    """
    rows = robustness[(robustness.metric == metric) & (robustness.train_domain != "")]
    lines = []
    for (kind, severity), mine in rows.groupby(["corruption", "severity"], sort=False):
        for baseline, treatment in against:
            if {baseline, treatment} <= set(mine.optimizer):
                found = difference(mine, baseline, treatment)._asdict()
                about = {"corruption": kind, "severity": severity, "baseline": baseline, "treatment": treatment}
                lines.append(about | {k: v for k, v in found.items() if k not in ("p", "d_z", "rank_biserial")})
    return pd.DataFrame(lines)


def units_of(results: pd.DataFrame, metric: str) -> pd.Series:
    """The unit that each test domain's values of a metric are in: mm, or voxels where the spacing is not known."""
    return results[results.metric == metric].groupby("test_domain").unit.first()


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(training, test, rows) of every cell, then of the means "seen" and "unseen", by training and over them."""
    for (train, test), mine in rows.groupby(CELL):
        yield train, test, mine
    kinds = {True: "seen", False: "unseen"}
    kind = pd.Series([kinds[seen(*cell)] for cell in zip(rows.train_domain, rows.test_domain, strict=True)], rows.index)
    for (train, name), mine in rows.groupby(["train_domain", kind]):
        if mine.test_domain.nunique() > 1:
            yield train, name, mine
    if rows.train_domain.nunique() > 1:
        for name, mine in rows.groupby(kind):
            yield "each", name, mine


def methods(results: pd.DataFrame, costs: pd.DataFrame, *, metrics: tuple[str, ...] = ("dice",)) -> pd.DataFrame:
    """A line per metric, test domain and method: the mean with its interval, and the median cost of a pair.

    Networks of every training domain have lines of their own; columns train_domain, test_domain, optimizer, metric,
    unit, seeds, pairs, mean, low, high, seconds, peak_memory (MiB).
    """
    lines = []
    for metric in metrics:
        values, units = per_pair(results, metric), units_of(results, metric)
        for key, rows in values.groupby(["train_domain", "test_domain", "optimizer"], sort=False):
            about = dict(zip(("train_domain", "test_domain", "optimizer"), key, strict=True))
            mine = costs[(costs[list(about)] == list(about.values())).all(axis=1)]
            cost = {name: mine.value[mine.metric == name].median() for name in ("seconds", "peak_memory")}
            about |= {"metric": metric, "unit": units[about["test_domain"]], "pairs": rows.pair.nunique()}
            lines.append(about | mean_interval(rows)._asdict() | cost)
    columns = ["train_domain", "test_domain", "optimizer", "metric", "unit", "seeds", "pairs", "mean", "low", "high"]
    return pd.DataFrame(lines, columns=[*columns, "seconds", "peak_memory"])


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as text for people: three decimals, the interval in one column with its mean."""
    text = table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)).replace("nan", "-")
    for name in [column for column in table.columns if f"{column} low" in table.columns]:
        low, high = text.pop(f"{name} low"), text.pop(f"{name} high")
        text[name] += " [" + low + ", " + high + "]"
        text = text.rename(columns={name: f"{name} [95 %]"})
    return text.rename(columns={"train_domain": "trained on", "test_domain": "tested on"})


def gaps(results: pd.DataFrame) -> list[str]:
    """What a table of results lacks or has too much of, in plain words: nothing should be dropped in silence.

    Values that are there twice (of several studies?), NaN values, holes of train x test x optimizer x seed, single
    seeds, domains without labels, structures missing from labels.
    """
    found = []
    twice = results.duplicated(KEYS)
    if twice.any():
        first = results[twice].iloc[0]
        found.append(
            f"{int(twice.sum())} values are there twice, first {first.metric} of {first.optimizer} on {first.pair}: "
            "are results of several studies mixed?"
        )
    for (metric, optimizer), values in results[results.value.isna()].groupby(["metric", "optimizer"]).value:
        found.append(f"{metric} of {optimizer}: {len(values)} values are NaN; they are left out of means")
    trained = results[results.train_domain != ""]
    there = set(trained[["train_domain", "test_domain", "optimizer", "seed"]].itertuples(index=False, name=None))
    axes = [list(dict.fromkeys(trained[c])) for c in ("train_domain", "test_domain", "optimizer", "seed")]
    for train, test, optimizer, seed in itertools.product(*axes):
        if (train, test, optimizer, seed) not in there:
            found.append(f"no result of {optimizer}, seed {seed:g}, trained on {train}, tested on {test}")
    if trained.seed.nunique() == 1:
        found.append("one seed only: intervals are over test pairs and say nothing of another training")
    labelled = set(results.test_domain[results.metric == "dice"])
    found += [f"{d} has no labels: no Dice, no distances" for d in results.test_domain.unique() if d not in labelled]
    missing = results[results.metric.str.startswith("missing_in_")]
    for (domain, label, metric), rows in missing.groupby(["test_domain", "label", "metric"]):
        where, pairs = metric.removeprefix("missing_in_"), rows.pair.nunique()
        if where != "warped":
            found.append(
                f"{domain}: {label} is not in the {where} label of {pairs} pairs; it is in none of their means"
            )
        else:
            found.append(f"{domain}: {label} was lost in the warped label of {pairs} pairs: Dice 0, no distance")
    return found
