"""Does flatness explain generalisation? Rank correlation of every measure with the Dice, over all runs of a study."""

import numpy as np
import pandas as pd

from fmsam_lib.evaluation.statistics import per_pair, seen

DRAWS = 2000


RUN = ["train_domain", "optimizer", "seed"]


MEASURE = ["measure", "rho", "term", "test_domain"]


COLUMNS = [*MEASURE, "performance", "tau", "low", "high", "p", "n"]


FEWEST = 5  # runs: with four, even perfect order comes by chance once in twelve times


def performance(results: pd.DataFrame) -> pd.DataFrame:
    """A line per run: train_domain, optimizer, seed, and its Dice "seen", "unseen": means over pairs, then domains."""
    dice = per_pair(results, "dice")
    dice = dice[(dice.train_domain != "") & ~dice.optimizer.str.endswith("+io")]
    kind = [seen(*cell) for cell in zip(dice.train_domain, dice.test_domain, strict=True)]
    dice = dice.assign(kind=pd.Series(kind, dice.index, dtype=object).map({True: "seen", False: "unseen"}))
    domains = dice.groupby([*RUN, "kind", "test_domain"], as_index=False).value.mean()
    # a run without one of the domains is not to be ranked beside complete ones: NaN
    tested = domains.groupby(["train_domain", "kind"]).test_domain.transform("nunique")
    whole = domains.groupby([*RUN, "kind"]).test_domain.transform("nunique") == tested
    wide = domains[whole].pivot_table(index=RUN, columns="kind", values="value")
    return wide.reindex(columns=["seen", "unseen"]).rename_axis(columns=None).reset_index()


def with_measures(flatness: pd.DataFrame, results: pd.DataFrame, *, test_domain: str, term: str) -> pd.DataFrame:
    """`performance` with a column for every measure on the images of `test_domain`, "sam_rise 0.01" with its radius."""
    rows = flatness[(flatness.test_domain == test_domain) & flatness.term.fillna("").isin([term, ""])]
    names = [m if pd.isna(rho) else f"{m} {rho:g}" for m, rho in zip(rows.measure, rows.rho, strict=True)]
    wide = rows.assign(name=names).pivot_table(index=RUN, columns="name", values="value")
    return performance(results).merge(wide.rename_axis(columns=None).reset_index(), on=RUN, how="left")


def correlation(flatness: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau-b of every measure with the Dice on seen and on unseen domains; the columns `COLUMNS`.

    flatness: of `flatness.csv`, all runs. Only runs of the same training domain are compared with each other, for tasks
    differ in Dice and in sharpness alike. low, high: 95 % bootstrap interval over runs; p: of 2,000 permutations within
    training domains. Below `FEWEST` runs these are NaN; n tells how many there were with both values. Below 0: the
    sharper, the worse. Interval and p take runs for independent, and they are not: seeds begin alike, and an optimizer
    shifts measure and Dice of all its runs at once, so that with few optimizers both are far too sure. It is a
    description of these runs.
    """
    runs = performance(results)
    lines = []
    for key, rows in flatness.groupby(MEASURE, dropna=False, sort=False):
        merged = runs.merge(rows[[*RUN, "value"]], on=RUN)
        for name in ("seen", "unseen"):
            there = merged.dropna(subset=[name, "value"])
            if runs[name].notna().any():
                found = kendall(there.value.to_numpy(), there[name].to_numpy(), there.train_domain.to_numpy())
                lines.append(dict(zip(MEASURE, key, strict=True)) | {"performance": name, "n": len(there)} | found)
    return pd.DataFrame(lines, columns=COLUMNS)


def kendall(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Kendall's tau-b (1945) within groups, all pairs of one group counted together: tau, low, high, p.

    `sum sign(dx) sign(dy) / sqrt(sum sign(dx)^2 sum sign(dy)^2)` over pairs i, j of one group; NaN where x or y is
    constant. A bootstrap draw weights the runs; a permutation is one within the groups.
    """
    if len(x) < 2:
        return dict.fromkeys(("tau", "low", "high", "p"), np.nan)
    rng = np.random.default_rng(0)
    within = groups[:, None] == groups
    signs_x, signs_y = (np.sign(v[:, None] - v) * within for v in (x, y))
    weights = np.vstack([np.ones(len(x)), rng.multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS)])

    def weighted(matrix: np.ndarray) -> np.ndarray:
        return ((weights @ matrix) * weights).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        taus = weighted(signs_x * signs_y) / np.sqrt(weighted(signs_x**2) * weighted(signs_y**2))
    if len(x) < FEWEST or not np.isfinite(taus[0]):
        return {"tau": taus[0], "low": np.nan, "high": np.nan, "p": np.nan}
    low, high = np.nanpercentile(taus[1:], [2.5, 97.5])
    orders = np.lexsort((rng.random((DRAWS, len(x))), np.broadcast_to(_codes(groups), (DRAWS, len(x)))))
    at = np.argsort(_codes(groups), kind="stable")  # where each group's members stand
    shuffled = np.empty_like(orders)
    shuffled[:, at] = orders
    chance = np.abs([(signs_x * signs_y[np.ix_(order, order)]).sum() for order in shuffled])
    observed = abs((signs_x * signs_y).sum())
    return {"tau": taus[0], "low": low, "high": high, "p": float((1 + (chance >= observed).sum()) / (DRAWS + 1))}


def _codes(groups: np.ndarray) -> np.ndarray:
    return np.unique(groups, return_inverse=True)[1]
