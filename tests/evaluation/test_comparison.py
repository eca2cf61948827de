import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from fmsam_lib.evaluation.comparison import comparison, gaps
from fmsam_lib.evaluation.evaluate import COLUMNS
from fmsam_lib.evaluation.statistics import difference


def made_up(gain=0.1, *, tests=("T",), train="T+U", optimizers=("adam", "sam"), seeds=(0, 1), spread=0.0):
    """Dice of two labels on eight pairs, where every further optimizer is better by `gain` than the one before."""
    rng = np.random.default_rng(0)
    rows = []
    for test in tests:
        for pair in "abcdefgh":
            for label in ("x", "y"):
                base = rng.uniform(0.4, 0.6)
                rows.append(["", test, "none", None, pair, label, "dice", base - 0.2, "1"])
                for seed in seeds:
                    for i, optimizer in enumerate(optimizers):
                        value = base + i * gain + rng.normal(0, spread) * bool(spread)
                        rows.append([train, test, optimizer, seed, pair, label, "dice", value, "1"])
    return pd.DataFrame(rows, columns=COLUMNS)


def test_equal_steps_and_equal_compute_have_lines_of_their_own():
    table = comparison(made_up(optimizers=("adam", "adam-2x", "sam")), [("adam", "sam"), ("adam-2x", "sam")])
    assert table["mean"].tolist() == pytest.approx([0.2, 0.1])
    assert (table.mean_treatment - table.mean_baseline).tolist() == pytest.approx([0.2, 0.1])
    assert table.seeds.tolist() == [2, 2]


def test_a_domain_where_every_result_lost_the_structure_has_no_line():
    rows = made_up(tests=("T", "U"))
    lost = {"metric": "missing_in_warped", "value": 1.0, "unit": "count"}
    rows = rows.assign(metric="hd95", unit="mm").where(rows.test_domain == "T", rows.assign(**lost))
    assert comparison(rows, [("adam", "sam")], metrics=("hd95",)).test_domain.tolist() == ["T", "seen"]


def test_holm_corrects_over_the_test_domains():
    rows = made_up(0.02, tests=("T", "U", "V"), spread=0.05)
    table = comparison(rows, [("adam", "sam")])
    single = table[table.test_domain.isin(["T", "U", "V"])]
    assert single.p_holm.tolist() == pytest.approx(multipletests(single.p, method="holm")[1].tolist())
    assert (single.p_holm >= single.p).all()
    assert single.p.nunique() == 3


def test_seen_domains_are_averaged_and_a_single_unseen_one_is_its_own_line():
    rows = made_up(0.02, tests=("T", "U", "V"), spread=0.05)
    table = comparison(rows, [("adam", "sam")]).set_index("test_domain")
    assert table.loc["seen", "mean"] == pytest.approx(table.loc[["T", "U"], "mean"].mean())
    assert "unseen" not in table.index  # V alone
    assert table.loc["seen", ["p", "p_holm", "d_z", "rank_biserial"]].isna().all()


def test_leave_one_out_is_averaged_over_its_trainings():
    parts = [made_up(0.02, tests=("A", "B", "C"), train=t, spread=0.05) for t in ("B+C", "A+C", "A+B")]
    table = comparison(pd.concat(parts), [("adam", "sam")])
    each = table[table.train_domain == "each"].set_index("test_domain")
    unseen = table[[(t, d) in {("B+C", "A"), ("A+C", "B"), ("A+B", "C")} for t, d in
                    zip(table.train_domain, table.test_domain, strict=True)]]  # fmt: skip
    assert each.loc["unseen", "mean"] == pytest.approx(unseen["mean"].mean())
    assert each.loc["unseen", "low"] < each.loc["unseen", "mean"] < each.loc["unseen", "high"]


def test_a_hole_of_the_grid_is_a_line_with_its_count_and_nan():
    rows = made_up(tests=("T", "U"))
    rows = rows[~((rows.test_domain == "U") & (rows.optimizer == "sam"))]
    line = comparison(rows, [("adam", "sam")]).set_index("test_domain").loc["U"]
    assert np.isnan(line["mean"])
    assert (line.units, line.left_out) == (0, 16)  # eight pairs of two seeds


def test_a_comparison_is_differences_of_the_pairs_means():
    rows = made_up(0.02, spread=0.05)
    dice = rows.groupby(["pair", "seed", "optimizer"], as_index=False).value.mean()
    line = comparison(rows, [("adam", "sam")]).iloc[0]
    expected = difference(dice, "adam", "sam")
    assert (line["mean"], line.low, line.p, line.d_z) == pytest.approx(
        (expected.mean, expected.low, expected.p, expected.d_z)
    )


def test_every_metric_has_lines_with_its_unit_and_units_are_not_averaged():
    rows = made_up(0.02, tests=("T", "U"), spread=0.05)
    distances = rows.assign(metric="hd95", unit=rows.test_domain.map({"T": "mm", "U": "voxel"}))
    table = comparison(pd.concat([rows, distances]), [("adam", "sam")], metrics=("dice", "hd95", "tre"))
    assert table.groupby("metric").test_domain.agg(list).to_dict() == {"dice": ["T", "U", "seen"], "hd95": ["T", "U"]}
    assert table[table.metric == "hd95"].unit.tolist() == ["mm", "voxel"]


def note(found, *words):
    return [line for line in found if all(word in line for word in words)]


def test_gaps_says_what_is_missing_twice_or_nan():
    rows = made_up(tests=("T", "U"))
    assert gaps(rows) == []
    assert note(gaps(pd.concat([rows, rows.head(1)])), "1 values are there twice", "listed twice?")
    broken = rows.copy()
    broken.loc[broken.optimizer == "sam", "value"] = np.nan
    assert note(gaps(broken), "dice of sam: 64 values are NaN")
    hole = rows[~((rows.test_domain == "U") & (rows.optimizer == "sam") & (rows.seed == 1))]
    assert gaps(hole) == ["no result of sam, seed 1, trained on T+U, tested on U"]
    assert note(gaps(rows[rows.seed != 1]), "one seed only")
    unlabelled = rows.assign(metric=rows.metric.where(rows.test_domain == "T", "tre"))
    assert gaps(unlabelled) == ["U has no labels: no Dice, no distances"]


def test_gaps_counts_missing_structures_by_where_they_are_missing():
    rows = made_up()
    for where, words in (("fixed", "is not in the fixed label of 1 pairs"), ("warped", "Dice 0, no distance")):
        more = rows.head(1).assign(metric=f"missing_in_{where}", value=1.0)
        assert note(gaps(pd.concat([rows, more])), "T: x", words)
