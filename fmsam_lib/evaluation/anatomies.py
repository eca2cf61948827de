"""The study's answer: treatment - baseline on anatomies that no network was trained on, and a verdict by rule.

Every anatomy counts once, its data sets averaged. Seeds and patients are drawn at random: what is asked of is other
trainings and other patients (`docs/protocol.md`).
"""

import warnings

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.formula.api import mixedlm
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from fmsam_lib.evaluation.statistics import per_pair

UNIT = ["test_domain", "fixed", "moving"]
BAND, LEVEL = 0.01, 0.90  # of Dice: what matters; of the intervals
THESE, NEW = "these anatomies", "a new anatomy"
COLUMNS = ["anatomy", "metric", "baseline", "treatment", "mean_baseline", "mean_treatment"]
COLUMNS += ["mean", "low", "high", "p", "seeds", "units", "verdict"]
# crossed: the training, the training on this set, the patient of each image
EFFECTS = {"seed": "0 + C(seed)", "on_set": "0 + C(on_set)", "fixed": "0 + C(fixed)", "moving": "0 + C(moving)"}


def unseen(
    results: pd.DataFrame, pairs: pd.DataFrame, groups: dict[str, list[str]], methods: tuple[str, str], metric: str
) -> pd.DataFrame:
    """Both methods' values, a row per anatomy, set, seed and the two patients of a pair, whose slices are averaged.

    groups: the sets of every anatomy, of whose networks none has seen one. Columns anatomy, test_domain, seed, fixed,
    moving, baseline, treatment, difference. Raises ValueError where nothing is paired.
    """
    of_set = {name: anatomy for anatomy, names in groups.items() for name in names}
    rows = per_pair(results[results.optimizer.isin(methods)], metric)
    rows = rows.assign(anatomy=rows.test_domain.map(of_set)).dropna(subset="anatomy")
    trained_on = rows.train_domain.str.split("+")
    own = [set(names).isdisjoint(groups[anatomy]) for names, anatomy in zip(trained_on, rows.anatomy, strict=True)]
    keys = ["anatomy", "test_domain", "seed", "pair"]
    wide = rows.loc[own].pivot(index=keys, columns="optimizer", values="value").reindex(columns=list(methods))
    wide = wide.set_axis(["baseline", "treatment"], axis=1).dropna().reset_index()
    if wide.empty:
        raise ValueError(f"expected {' and '.join(methods)} on the same pairs of an anatomy never seen, got none")
    wide = wide.merge(pairs.drop_duplicates(["test_domain", "pair"]), on=["test_domain", "pair"])
    subjects = wide.subjects.where(wide.subjects != "", wide.pair)  # of a synthetic pair nobody else's image is there
    wide["fixed"], wide["moving"] = subjects.str.split("|").str[0], subjects.str.split("|").str[-1]
    means = wide.groupby([*keys[:3], "fixed", "moving"], as_index=False)[["baseline", "treatment"]].mean()
    return means.assign(difference=means.treatment - means.baseline)


def answer_of(rows: pd.DataFrame, methods: tuple[str, str], metric="dice") -> pd.DataFrame:
    """A line for every anatomy of the rows that `unseen` gives, for `THESE` and for `NEW`; the columns `COLUMNS`.

    Intervals of 90 % and p are those of a mixed model (statsmodels' MixedLM, REML) with a mean for every set and the
    crossed random effects `EFFECTS`, whose variances all anatomies share; by t with anatomies x (seeds - 1) degrees of
    freedom, NaN with one seed. For a new anatomy: the t interval and p of the anatomies' own differences, never
    narrower or smaller than those of these. `verdict` is for Dice alone.
    """
    estimates, covariance = _sets(rows)
    anatomy_of = rows.groupby("test_domain").anatomy.first()
    weights = pd.crosstab(anatomy_of.index, anatomy_of, normalize="columns")  # (sets, anatomies)
    seeds, lines = rows.groupby("anatomy").seed.nunique(), []
    freedom = int((seeds - 1).sum())
    seeds[THESE] = seeds.min()
    means = rows.groupby("test_domain")[["baseline", "treatment"]].mean()
    for name, weight in [*weights.items(), (THESE, weights.mean(axis=1))]:
        mean, error = float(weight @ estimates), float(np.sqrt(weight @ covariance @ weight))
        reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * error if seeds[name] > 1 else np.nan
        p = 2 * stats.t.sf(abs(mean) / error, freedom) if seeds[name] > 1 and error else np.nan
        mine = rows if name == THESE else rows[rows.anatomy == name]
        about = {"anatomy": name, "seeds": seeds[name], "units": len(mine[UNIT].drop_duplicates())}
        about |= {"mean_baseline": float(weight @ means.baseline), "mean_treatment": float(weight @ means.treatment)}
        lines.append(about | {"mean": mean, "low": mean - reach, "high": mean + reach, "p": p})
    each = np.array([line["mean"] for line in lines[:-1]])
    if len(each) > 1:
        test = stats.ttest_1samp(each, 0.0)
        low, high = test.confidence_interval(LEVEL)
        of_these = lines[-1]  # a new anatomy cannot be known better than these: a few alike would say so by chance
        ends = {"low": float(np.minimum(low, of_these["low"])), "high": float(np.maximum(high, of_these["high"]))}
        lines.append(of_these | {"anatomy": NEW, "p": float(np.maximum(test.pvalue, of_these["p"]))} | ends)
    table = pd.DataFrame(lines).assign(metric=metric, baseline=methods[0], treatment=methods[1])
    said = [verdict(*ends) if metric == "dice" else "" for ends in zip(table.low, table.high, strict=True)]
    return table.assign(verdict=said)[COLUMNS]


def _sets(rows: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
    """The mean difference of every set, and the covariance of these means."""
    rows = rows.assign(on_set=rows.test_domain + "|" + rows.seed.astype(str), seed=rows.seed.astype(int))
    rows[["fixed", "moving"]] = rows[["fixed", "moving"]].add("|" + rows.test_domain, axis=0)
    means = rows.groupby("test_domain").difference.transform("mean")
    names, scale = sorted(rows.test_domain.unique()), float(rows.difference.std())
    if (rows.difference - means).abs().max() <= 1e-12 * rows[["baseline", "treatment"]].abs().max(axis=None):
        return rows.groupby("test_domain").difference.mean(), pd.DataFrame(0.0, names, names)  # all else is rounding
    scaled = rows.assign(difference=rows.difference / scale)  # variances near 1 converge
    same = {"on_set"} if rows.groupby("anatomy").test_domain.nunique().max() == 1 else set()  # as the seed's
    if len(rows[["fixed", "moving"]].drop_duplicates()) == rows.fixed.nunique() == rows.moving.nunique():
        same.add("moving")  # as the fixed patient's, who tells it: of one image, or in a ring of pairs
    effects = {name: formula for name, formula in EFFECTS.items() if name not in same}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a variance of 0 is at the edge of what there can be
        model = mixedlm("difference ~ 0 + C(test_domain)", scaled, groups="anatomy", re_formula="0", vc_formula=effects)
        fitted = model.fit(reml=True, method=["lbfgs", "powell"])
        for _ in range(3):  # lbfgs often stops far from the optimum, and says that it converged
            again = model.fit(reml=True, method=["powell", "lbfgs"], start_params=fitted.params_object)
            rose, fitted = again.llf - fitted.llf, max(fitted, again, key=lambda fit: fit.llf)
            if not rose > 1e-4:
                break
    covariance = fitted.cov_params().iloc[: len(names), : len(names)].to_numpy()
    return pd.Series(scale * fitted.fe_params.to_numpy(), names), pd.DataFrame(scale**2 * covariance, names, names)


def verdict(low: float, high: float) -> str:
    """The protocol's rule; the first that fits.

    >>> [verdict(*ends) for ends in ((0.011, 0.02), (-0.002, 0.004), (-0.03, -0.02), (-0.02, 0.005), (-0.005, 0.02))]
    ['helps', 'equivalent', 'harms', 'no relevant help', 'undecided']
    """
    if low > BAND:
        return "helps"
    if low > -BAND and high < BAND:
        return "equivalent"
    if high < BAND:
        return "harms" if high < 0 else "no relevant help"
    return "undecided"
