"""Does flatness explain generalisation? Rank correlation of every measure with the Dice, over all runs of a study."""

import numpy as np
import pandas as pd

from fmsam_lib.evaluation.statistics import per_pair, seen

RUN = ["train_domain", "optimizer", "seed"]
MEASURE = ["measure", "rho", "term", "test_domain"]
COLUMNS = [*MEASURE, "performance", "tau", "n"]


def performance(results: pd.DataFrame) -> pd.DataFrame:
    """A line per run: train_domain, optimizer, seed, and its Dice "seen", "unseen": means over pairs, then domains."""
    dice = per_pair(results, "dice")
    dice = dice[(dice.train_domain != "") & ~dice.optimizer.str.contains("+", regex=False)]
    dice = dice.assign(kind=seen(dice))
    domains = dice.groupby([*RUN, "kind", "test_domain"], as_index=False).value.mean()
    # a run without one of the domains is not to be ranked beside complete ones: NaN
    tested = domains.groupby(["train_domain", "kind"]).test_domain.transform("nunique")
    whole = domains.groupby([*RUN, "kind"]).test_domain.transform("nunique") == tested
    wide = domains[whole].pivot_table(index=RUN, columns="kind", values="value")
    return wide.reindex(columns=["seen", "unseen"]).rename_axis(columns=None).reset_index()


def correlation(flatness: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau-b of every measure with the Dice on seen and on unseen domains; the columns `COLUMNS`.

    flatness: of `flatness.csv`, all runs. Only runs of the same training domain are compared with each other, for tasks
    differ in Dice and in sharpness alike. n: the runs that have both values. Below 0: the sharper, the worse. It
    describes these runs and has no interval: seeds begin alike, and an optimizer shifts measure and Dice of all its
    runs at once, so that an interval or a test that takes runs for independent would be far too sure.
    """
    runs = performance(results)
    lines = []
    for key, rows in flatness.groupby(MEASURE, dropna=False, sort=False):
        merged = runs.merge(rows[[*RUN, "value"]], on=RUN)
        for name in ("seen", "unseen"):
            there = merged.dropna(subset=[name, "value"])
            if runs[name].notna().any():
                tau = kendall(there.value.to_numpy(), there[name].to_numpy(), there.train_domain.to_numpy())
                lines.append(dict(zip(MEASURE, key, strict=True)) | {"performance": name, "tau": tau, "n": len(there)})
    return pd.DataFrame(lines, columns=COLUMNS)


def kendall(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """Kendall's tau-b (1945) within groups, all pairs of one group counted together; NaN where x or y is constant.

    `sum sign(dx) sign(dy) / sqrt(sum sign(dx)^2 sum sign(dy)^2)` over pairs i, j of one group.
    """
    within = groups[:, None] == groups
    signs_x, signs_y = (np.sign(v[:, None] - v) * within for v in (x, y))
    scale = np.sqrt((signs_x**2).sum() * (signs_y**2).sum())
    return float((signs_x * signs_y).sum() / scale) if scale > 0 else np.nan
