"""What tables of results say: means with intervals, and treatment against baseline, paired.

The same test pairs are registered by the networks of every seed, so seeds and pairs are crossed: a bootstrap
replicate draws seeds with replacement, then pairs, the same ones for every seed drawn (Owen 2007, the pigeonhole
bootstrap), which does not take a pair that every seed finds hard for several pairs. What belongs together is drawn
together: a pair and its mirror image (b<-a beside a<-b), and all slices of one subject.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from fmsam_lib.images.manifest import subject_of

DRAWS = 2000
DISTANCES = ("hd95", "surface_distance")  # of structures
LESS_IS_BETTER = (*DISTANCES, "tre", "map_error", "folding_percent", "sdlogj", "sdlogj_learn2reg", "inverse_error")
CELL = ["train_domain", "test_domain"]
DECIMALS = 10  # of a difference that count: sums and means of measures err by less, none is as fine


class Interval(NamedTuple):
    """A mean with its 95 % interval, NaN where there is only one unit to draw from."""

    mean: float
    low: float
    high: float
    seeds: int
    units: int


class Difference(NamedTuple):
    """Treatment - baseline on the same pairs and seeds.

    low, high: 95 % interval of the mean (see `difference`). p: Wilcoxon's signed-rank test over units. d_z: mean over
    standard deviation of the units' differences; rank_biserial: `(W+ - W-) / (W+ + W-)`, W the sums of ranks of the
    differences above and below 0 (Kerby 2014), -1 to 1; what is equal but for rounding is a tie in both. worst_…: the
    5th percentile of the values (95th where less is better). left_out: values without a partner, or NaN.
    """

    mean: float
    low: float
    high: float
    p: float
    d_z: float
    rank_biserial: float
    worst_baseline: float
    worst_treatment: float
    seeds: int
    units: int
    pairs: int
    left_out: int
    mean_baseline: float
    mean_treatment: float


def per_pair(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One value a pair: the mean over its labels of `metric`, NaN where one of them is NaN.

    A pair with a structure that registration lost has no distance: NaN, and `difference` leaves it out of both methods.
    """
    keys = [*CELL, "optimizer", "seed", "pair", *results.columns.intersection(["drawn"])]
    rows = results[results.metric == metric]
    if metric in DISTANCES:
        lost = results[results.metric == "missing_in_warped"].assign(metric=metric, value=np.nan)
        rows = pd.concat([rows, lost]) if len(lost) else rows
    return rows.groupby(keys, dropna=False, as_index=False).value.mean(skipna=False)


def seen(rows: pd.DataFrame) -> pd.Series:
    """For each row "seen" where its test domain is one of its training domains, else "unseen".

    >>> seen(pd.DataFrame({"train_domain": ["a+b", "a+b"], "test_domain": ["b", "c"]})).tolist()
    ['seen', 'unseen']
    """
    cells = zip(rows.train_domain, rows.test_domain, strict=True)
    return pd.Series(["seen" if test in train.split("+") else "unseen" for train, test in cells], rows.index, dtype=str)


def whole_seeds(rows: pd.DataFrame, *cell: str) -> pd.DataFrame:
    """Without the seeds that lack a cell (`CELL`) which others have: their means would lean on the rest."""
    cells = rows.groupby([*cell] or CELL, dropna=False).ngroup()
    return rows[cells.groupby(rows.seed).transform("nunique") == cells.nunique()]


@cache
def unit_of(pair: str) -> str:
    """What is drawn as one, told by the pair's name: its subjects, in no order.

    >>> [unit_of(name) for name in ("b<-a", "a<-b", "SC-01_slice02_ED<-SC-01_slice02_ES", "brain-mr-0-7")]
    ['a|b', 'a|b', 'SC-01', 'brain-mr-0-7']
    """
    return "|".join(sorted({subject_of(name) for name in pair.split("<-")}))


def with_drawn(rows: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the column `drawn`, what the bootstrap draws as one: a pair's subjects, in no order.

    pairs: test_domain, pair and subjects, such as "s1|s2", of `pairs.csv`. Where it has none, as of synthetic pairs,
    the pair's name tells (see `unit_of`).
    """
    if rows.empty or pairs.empty:
        return rows
    named = pairs[pairs.subjects != ""].drop_duplicates(["test_domain", "pair"]).set_index(["test_domain", "pair"])
    units = named.subjects.map(lambda subjects: "|".join(sorted(set(subjects.split("|")))))
    found = units.reindex(pd.MultiIndex.from_frame(rows[["test_domain", "pair"]])).set_axis(rows.index)
    return rows.assign(drawn=found.where(found.notna(), rows.pair.map(unit_of)))


def mean_interval(rows: pd.DataFrame) -> Interval:
    """The mean of `value` over pair and seed, every test domain with the same weight, and its interval.

    rows: columns pair, seed, value and, where there are several, train_domain and test_domain; drawn tells what the
    bootstrap draws as one, else the pair's name does. With one seed the interval is over pairs alone: it says nothing
    of another training. With two seeds that matter as much as pairs, a nominal 95 % covers the truth in 71 % of cases
    (simulated), with eight that matter half as much in 93 %. NaN is left out: who loses hard pairs gains by it.
    """
    rows = _complete(rows.dropna(subset="value"))
    if rows.empty:
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    means = _replicates(rows)
    units, several = len(rows[["test_domain", "drawn"]].drop_duplicates()), rows.groupby(CELL).drawn.nunique().max() > 1
    low, high = np.percentile(means, [2.5, 97.5]) if several and len(means) else (np.nan, np.nan)
    return Interval(float(rows.groupby(CELL).value.mean().mean()), float(low), float(high), rows.seed.nunique(), units)


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column that is counted by; a seed of -1 for methods without training."""
    rows = rows.assign(**{name: "" for name in CELL if name not in rows})
    rows = rows if "drawn" in rows else rows.assign(drawn=rows.pair.map(unit_of))
    return rows.assign(seed=rows.seed.astype(object).where(rows.seed.notna(), -1), value=rows.value.astype(float))


def _replicates(rows: pd.DataFrame) -> np.ndarray:
    """Bootstrap means, `(DRAWS,)`: of each train x test domain, then over these.

    Seeds are drawn once for all trainings, for one seed means the same first weights and order of batches in each; test
    pairs once for all networks that were tested on them.
    """
    seeds = np.sort(rows.seed.unique())
    units = {test: np.sort(mine.drawn.unique()) for test, mine in rows.groupby("test_domain")}
    *drawn, drawn_seeds = _drawn((*map(len, units.values()), len(seeds)))
    drawn_units = dict(zip(units, drawn, strict=True))
    sums_and_counts = rows.groupby([*CELL, "seed", "drawn"], as_index=False).value.agg(["sum", "count"])
    means = []
    for (_, test), cells in sums_and_counts.groupby(CELL):
        grid = np.zeros((2, len(seeds), len(units[test])))
        at = np.searchsorted(seeds, cells.seed), np.searchsorted(units[test], cells.drawn)
        grid[:, *at] = cells[["sum", "count"]].T
        total, number = (((drawn_seeds @ part) * drawn_units[test]).sum(1) for part in grid)
        means.append(np.divide(total, number, out=np.full(DRAWS, np.nan), where=number > 0))
    of_cells = np.array(means)  # (domains, DRAWS)
    return of_cells[:, np.isfinite(of_cells).all(0)].mean(0)  # without draws that fall into holes of the grid


@lru_cache(maxsize=64)
def _drawn(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """For every number n of things to draw from, how often each is drawn, `(DRAWS, n)`; the same each time."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float) for n in sizes]


def difference(rows: pd.DataFrame, baseline: str, treatment: str) -> Difference:
    """Treatment - baseline on the same pair and seed, of one metric.

    rows: columns pair, seed, optimizer, value and, where there are several, train_domain and test_domain, which then
    have the same weight in the mean; metric, if it is there, tells which end is the worst; drawn what is drawn as one.
    The mean's interval is that of `mean_interval`. p is about these networks on other pairs, not about other trainings:
    units are pairs, their seeds' differences averaged first. Raises ValueError where nothing is paired, or where a
    value comes twice (tables of several studies?).
    """
    both = _complete(rows[rows.optimizer.isin([baseline, treatment])])
    keys = [*CELL, "pair", "drawn", "seed"]
    twice = both.duplicated([*keys, "optimizer"])
    if twice.any():
        found = f"{int(twice.sum())} twice, first {both[twice].iloc[0].to_dict()}"
        raise ValueError(f"expected one value per pair, seed and optimizer, got {found}: are several studies mixed?")
    wide = both.pivot(index=keys, columns="optimizer", values="value").reindex(columns=[baseline, treatment])
    paired = wide.dropna().reset_index()
    if paired.empty:
        there = ", ".join(map(str, rows.optimizer.unique())) or "no rows"
        raise ValueError(f"expected {treatment!r} and {baseline!r} on the same pairs and seeds, got {there}")
    values = paired.assign(value=paired[treatment] - paired[baseline])
    means = paired.groupby(CELL)[[baseline, treatment]].mean().mean()
    of_units = values.groupby(["test_domain", "drawn"]).value.mean().to_numpy()
    rounded = of_units.round(DECIMALS)  # each one's rank by magnitude, with its sign; no difference has 0
    ranks = np.sign(rounded) * (stats.rankdata(np.abs(rounded)) - (rounded == 0).sum())
    metric = rows.metric.iloc[0] if "metric" in rows and len(rows) else ""
    worst = 95 if metric in LESS_IS_BETTER else 5
    return Difference(
        **mean_interval(values)._asdict(),
        p=float(stats.wilcoxon(ranks).pvalue) if ranks.any() else 1.0,
        d_z=float(of_units.mean() / of_units.std(ddof=1)) if np.ptp(ranks) else np.nan,
        rank_biserial=float(ranks.sum() / np.abs(ranks).sum()) if ranks.any() else 0.0,
        worst_baseline=float(np.percentile(paired[baseline], worst)),
        worst_treatment=float(np.percentile(paired[treatment], worst)),
        pairs=len(paired[[*CELL, "pair"]].drop_duplicates()),
        left_out=int(len(both) - 2 * len(paired)),
        mean_baseline=float(means[baseline]),
        mean_treatment=float(means[treatment]),
    )
