"""Treatment against baseline in every cell of a study's results, corrected for how many there are; and what is missing.

Holm (1979), "A simple sequentially rejective multiple test procedure".
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from fmsam_lib.evaluation.statistics import CELL, difference, per_pair, seen

GRID = [*CELL, "optimizer", "seed"]
COLUMNS = [*CELL, "metric", "unit", "baseline", "treatment", "seeds", "pairs", "units", "left_out"]
COLUMNS += ["mean_baseline", "mean_treatment", "mean", "low", "high", "p", "p_holm", "d_z", "rank_biserial"]
COLUMNS += ["worst_baseline", "worst_treatment"]


def comparison(results: pd.DataFrame, against: list[tuple[str, str]], *, metrics=("dice",)) -> pd.DataFrame:
    """Every statistic of `difference`, a line per metric, (baseline, treatment) of `against`, train and test domain.

    The lines "seen" and "unseen" in place of a test domain are means over those domains (where there are several, and
    of one unit), the lines "each" in place of a training domain means over trainings too, as leave-one-domain-out
    wants them. p_holm: p corrected (Holm 1979) over all cells of train and test domain of one metric, baseline and
    treatment. A cell in which nothing is paired has its line, with NaN; a metric that is not in the results has none.
    """
    lines = []
    for metric in metrics:
        values, units = per_pair(results, metric).assign(metric=metric), units_of(results, metric)
        for baseline, treatment in against:
            rows = values[(values.train_domain != "") & values.optimizer.isin([baseline, treatment])]
            about = {"metric": metric, "baseline": baseline, "treatment": treatment}
            for train, test, group in _groups(rows):
                unit = set(units.reindex(group.test_domain).dropna())
                if len(unit) != 1:
                    continue  # a mean of millimetres and voxels says nothing; none where every result lost a structure
                line = about | {"train_domain": train, "test_domain": test, "unit": unit.pop()}
                try:
                    lines.append(line | difference(group, baseline, treatment)._asdict())
                except ValueError:
                    lines.append(line | {"units": 0, "pairs": 0, "seeds": 0, "left_out": len(group)})
    table = pd.DataFrame(lines, columns=COLUMNS)
    # over several domains a large one would outweigh the others, unlike in the mean
    table.loc[table.test_domain.isin(["seen", "unseen"]), ["p", "d_z", "rank_biserial"]] = np.nan
    for _, group in table[table.p.notna()].groupby(["metric", "baseline", "treatment"]):
        table.loc[group.index, "p_holm"] = multipletests(group.p, method="holm")[1]
    return table


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(training, test, rows) of every cell, then of the means "seen" and "unseen", by training and over them."""
    for (train, test), mine in rows.groupby(CELL):
        yield train, test, mine
    kind = seen(rows)
    for (train, name), mine in rows.groupby(["train_domain", kind]):
        if mine.test_domain.nunique() > 1:
            yield train, name, mine
    if rows.train_domain.nunique() > 1:
        for name, mine in rows.groupby(kind):
            yield "each", name, mine


def units_of(results: pd.DataFrame, metric: str) -> pd.Series:
    """The unit that each test domain's values of a metric are in: mm, or voxels where the spacing is not known."""
    return results[results.metric == metric].groupby("test_domain").unit.first()


def gaps(results: pd.DataFrame) -> list[str]:
    """What a table of results lacks or has too much of, in plain words: nothing should be dropped in silence.

    Values that are there twice (of several studies?), NaN values, holes of train x test x optimizer x seed, single
    seeds, domains without labels, structures missing from labels.
    """
    found = []
    twice = results[results.duplicated([*GRID, "pair", "label", "metric"])]
    for row in twice.head(1).itertuples():
        first = f"{row.metric} of {row.optimizer} on {row.pair}"
        found.append(f"{len(twice)} values are there twice, first {first}: are studies mixed, or a pair listed twice?")
    for (metric, optimizer), number in results[results.value.isna()].groupby(["metric", "optimizer"]).size().items():
        found.append(f"{metric} of {optimizer}: {number} values are NaN; they are left out of means")
    trained = results[results.train_domain != ""]
    there = set(trained[GRID].itertuples(index=False, name=None))
    for train, test, optimizer, seed in itertools.product(*(trained[name].unique() for name in GRID)):
        if (train, test, optimizer, seed) not in there:
            found.append(f"no result of {optimizer}, seed {int(seed)}, trained on {train}, tested on {test}")
    if trained.seed.nunique() == 1:
        found.append("one seed only: intervals are over test pairs and say nothing of another training")
    labelled = set(results.test_domain[results.metric == "dice"])
    found += [f"{d} has no labels: no Dice, no distances" for d in results.test_domain.unique() if d not in labelled]
    missing = results.assign(where=results.metric.str.extract("missing_in_(.*)", expand=False))  # else NaN
    for (domain, label, where), pairs in missing.groupby(["test_domain", "label", "where"]).pair.nunique().items():
        said = f"is not in the {where} label of {pairs} pairs; it is in none of their means"
        if where == "warped":
            said = f"was lost in the warped label of {pairs} pairs: Dice 0, no distance"
        found.append(f"{domain}: {label} {said}")
    return found
