import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fmsam_lib.evaluation.statistics import difference, mean_interval, per_pair, seen, unit_of


def rows(values, *, seeds=None, pairs=None, **columns):
    """A table of values `(seeds, pairs)`."""
    values = np.asarray(values, float)
    seeds = range(values.shape[0]) if seeds is None else seeds
    pairs = [f"p{i}" for i in range(values.shape[1])] if pairs is None else pairs
    table = pd.DataFrame(
        [(seed, pair, values[s, p]) for s, seed in enumerate(seeds) for p, pair in enumerate(pairs)],
        columns=["seed", "pair", "value"],
    )
    return table.assign(**columns)


def two(baseline, treatment, **columns):
    return pd.concat([rows(baseline, optimizer="adam", **columns), rows(treatment, optimizer="sam", **columns)])


def test_one_seeds_interval_is_scipys_bootstrap_over_pairs():
    values = np.random.default_rng(0).gamma(2, size=(1, 25))
    found = mean_interval(rows(values))
    theirs = stats.bootstrap((values[0],), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert (found.seeds, found.units) == (1, 25)


def test_what_every_seed_finds_hard_is_one_pair_not_several():
    """Seeds that agree add no information about pairs, so the interval stays that of one seed."""
    values = np.random.default_rng(0).normal(size=(1, 12))
    one, five = mean_interval(rows(values)), mean_interval(rows(np.repeat(values, 5, 0)))
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval_however_many_pairs_there_are():
    of_seeds = np.array([[0.0], [1.0], [2.0], [3.0]])
    found = mean_interval(rows(of_seeds + np.zeros((4, 200))))
    theirs = stats.bootstrap((of_seeds[:, 0],), np.mean, method="percentile", n_resamples=20000, rng=1)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Pairs and seeds both random; the percentile bootstrap of eight seeds is known to be somewhat short."""
    rng, covered, trials = np.random.default_rng(0), 0, 120
    for _ in range(trials):
        values = rng.normal(0, 0.5, (8, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 0.5, (8, 30))
        found = mean_interval(rows(values))
        covered += found.low <= 0 <= found.high
    assert 0.85 <= covered / trials <= 0.99


def test_two_seeds_are_too_few_as_the_documentation_says():
    rng, covered, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        values = rng.normal(0, 1, (2, 1)) + rng.normal(0, 1, (1, 20)) + rng.normal(0, 0.5, (2, 20))
        found = mean_interval(rows(values))
        covered += found.low <= 0 <= found.high
    assert 0.6 <= covered / trials <= 0.8


def test_a_pair_and_its_mirror_image_are_one_unit():
    values = np.random.default_rng(0).normal(size=(1, 10))
    alone = mean_interval(rows(values, pairs=[f"{i}<-{i + 10}" for i in range(10)]))
    names = [f"{i}<-{i + 10}" for i in range(10)] + [f"{i + 10}<-{i}" for i in range(10)]
    both = mean_interval(rows(np.hstack([values, values]), pairs=names))
    assert both.units == 10
    assert (both.low, both.high) == pytest.approx((alone.low, alone.high))


def test_the_slices_of_a_subject_are_one_unit():
    assert unit_of("SC-1_slice03_ED<-SC-1_slice03_ES") == unit_of("SC-1_slice07_ED<-SC-1_slice07_ES") == "SC-1"


def test_every_domain_weighs_the_same_whatever_its_number_of_pairs():
    few, many = rows([[0.0, 0.0]], test_domain="few"), rows(np.ones((1, 98)), test_domain="many")
    found = mean_interval(pd.concat([few, many]))
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_one_seed_is_one_draw_in_all_trainings():
    """The same first weights and order of batches: four trainings that seeds shift alike are no surer than one."""
    values = np.repeat([[0.0], [1.0], [2.0], [3.0]], 50, 1)
    one = mean_interval(rows(values, train_domain="a", test_domain="x"))
    four = mean_interval(pd.concat([rows(values, train_domain=name, test_domain="x") for name in "abcd"]))
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=0.3)
    assert four.high - four.low > 1


def test_a_single_pair_and_no_pair_have_no_interval():
    found = mean_interval(rows([[0.4], [0.6]]))
    assert found.mean == 0.5
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(mean_interval(rows([[np.nan]])).mean)


def test_holes_of_the_grid_do_not_move_the_mean():
    table = rows([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]).query("not (seed == 1 and pair == 'p2')")
    found = mean_interval(table)
    assert found.mean == pytest.approx(9 / 5)
    assert found.low <= found.mean <= found.high


def test_a_constant_gain_is_found_exactly():
    base = np.random.default_rng(0).uniform(0.4, 0.6, (2, 6))
    found = difference(two(base, base + 0.1), "adam", "sam")
    assert [found.mean, found.low, found.high] == pytest.approx([0.1] * 3)
    assert found.rank_biserial == 1
    assert found.p == pytest.approx(stats.wilcoxon(np.full(6, 0.1)).pvalue)
    assert (found.seeds, found.units, found.pairs, found.left_out) == (2, 6, 6, 0)


def test_test_and_effect_sizes_are_those_of_the_pairs_means_over_seeds():
    rng = np.random.default_rng(1)
    base, gain = rng.uniform(size=(3, 15)), rng.normal(0.05, 0.1, (3, 15))
    found, of_pairs = difference(two(base, base + gain), "adam", "sam"), gain.mean(0)
    assert found.mean == pytest.approx(gain.mean())
    assert found.p == pytest.approx(stats.wilcoxon(of_pairs).pvalue)
    assert found.d_z == pytest.approx(of_pairs.mean() / of_pairs.std(ddof=1))
    ranks = stats.rankdata(abs(of_pairs))
    favour = ranks[of_pairs > 0].sum() / ranks.sum()
    assert found.rank_biserial == pytest.approx(2 * favour - 1)


def test_the_worst_is_the_fifth_percentile_or_the_95th_where_less_is_better():
    base = np.arange(101.0)[None]
    found = difference(two(base, base[:, ::-1] + 1, metric="dice"), "adam", "sam")
    assert (found.worst_baseline, found.worst_treatment) == (5, 6)
    found = difference(two(base, base[:, ::-1] + 1, metric="hd95"), "adam", "sam")
    assert (found.worst_baseline, found.worst_treatment) == (95, 96)


def test_the_two_means_subtract_to_the_difference_whatever_has_no_partner():
    small = two([[0.1, 0.2, np.nan]], [[0.3, 0.4, 0.9]], test_domain="small")
    large = two(np.full((1, 30), 0.5), np.full((1, 30), 0.4), test_domain="large")
    found = difference(pd.concat([small, large]), "adam", "sam")
    assert found.mean == pytest.approx((0.2 - 0.1) / 2)
    assert found.mean_treatment - found.mean_baseline == pytest.approx(found.mean)
    assert found.mean_baseline == pytest.approx((0.15 + 0.5) / 2)


def test_no_difference_at_all_is_no_effect():
    found = difference(two(np.ones((1, 4)), np.ones((1, 4))), "adam", "sam")
    assert (found.mean, found.p, found.rank_biserial) == (0, 1, 0)
    assert np.isnan(found.d_z)


def test_what_has_no_partner_or_no_value_is_counted():
    table = two([[0.1, 0.2, 0.3, np.nan]], [[0.2, 0.3, 0.4, 0.5]])
    table = table[~((table.optimizer == "adam") & (table.pair == "p0"))]
    found = difference(table, "adam", "sam")
    assert found.mean == pytest.approx(0.1)
    assert (found.pairs, found.left_out) == (2, 3)  # p0 of sam; p3 of both


def test_nothing_in_common_and_values_twice_are_refused():
    with pytest.raises(ValueError, match="expected 'sam' and 'adam' on the same pairs and seeds, got adam"):
        difference(rows([[1.0, 2.0]], optimizer="adam"), "adam", "sam")
    table = two([[0.1, 0.2]], [[0.2, 0.3]])
    with pytest.raises(ValueError, match=r"4 twice, first .*are tables of several studies mixed\?"):
        difference(pd.concat([table, table]), "adam", "sam")


def test_seeds_may_be_missing_as_of_methods_without_training():
    table = two([[0.1, 0.2]], [[0.2, 0.3]]).assign(seed=pd.array([pd.NA] * 4, dtype="Int64"))
    assert difference(table, "adam", "sam").mean == pytest.approx(0.1)


def test_per_pair_is_the_mean_over_labels_and_nan_where_one_is():
    table = pd.DataFrame(
        [("", "t", "none", None, p, label, "dice", v) for p, label, v in
         (("a", "x", 0.2), ("a", "y", 0.4), ("b", "x", 0.5), ("b", "y", np.nan))],
        columns=["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric", "value"],
    )  # fmt: skip
    values = per_pair(table, "dice").set_index("pair").value
    assert values["a"] == pytest.approx(0.3)
    assert np.isnan(values["b"])


def test_who_loses_a_structure_does_not_get_the_shorter_distance():
    keys = ["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric", "value"]
    table = [
        ("a", "t", o, 0, p, label, "hd95", v)
        for o in ("adam", "sam")
        for p in "pq"
        for label, v in (("x", 1.0), ("y", 9.0))
    ]
    table = pd.DataFrame(table, columns=keys)
    lost = (table.optimizer == "sam") & (table.pair == "q") & (table.label == "y")
    table.loc[lost, ["metric", "value"]] = ["missing_in_warped", 1.0]
    found = difference(per_pair(table, "hd95"), "adam", "sam")
    assert (found.mean, found.pairs, found.left_out) == (0, 1, 2)


def test_seen_is_one_of_the_training_domains_whole():
    assert seen("brain-mr+lung-ct", "lung-ct")
    assert not seen("brain-mr+lung-ct", "lung")
