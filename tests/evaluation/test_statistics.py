import itertools
import operator
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fmsam_lib.evaluation.statistics import difference, mean_interval, per_pair, seen, unit_of, with_drawn


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
    alone = mean_interval(
        pd.concat([rows(values[:1, :1], test_domain=name) for name in "ab"])
    )  # a pair a domain, one seed
    assert np.isnan([alone.low, alone.high]).all()
    one, five = mean_interval(rows(values)), mean_interval(rows(np.repeat(values, 5, 0)))
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval_however_many_pairs_there_are():
    """Of the 256 draws of four from 0, 1, 2, 3 five have a sum of 1 at most, 15 of 2: the 2.5th percentile is 2 / 4."""
    found = mean_interval(rows(np.array([[0.0], [1.0], [2.0], [3.0]]) + np.zeros((4, 200))))
    assert (found.mean, found.low, found.high) == (1.5, 0.5, 2.5)


@pytest.mark.parametrize(
    ("seeds", "pairs", "of_seeds", "covers"), [(8, 30, 0.5, 0.93), (2, 20, 1.0, 0.71)], ids=["eight", "two"]
)
def test_the_interval_covers_the_truth_as_often_as_the_documentation_says(seeds, pairs, of_seeds, covers):
    """Seeds, pairs and both together are random, pairs with deviation 1; 400 studies, so within three deviations."""
    rng, trials = np.random.default_rng(1), 400
    covered = 0
    for _ in range(trials):
        values = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, 1, (1, pairs)) + rng.normal(0, 0.5, (seeds, pairs))
        found = mean_interval(rows(values))
        covered += found.low <= 0 <= found.high
    assert covered / trials == pytest.approx(covers, abs=3 * np.sqrt(covers * (1 - covers) / trials))


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
    for found in (one, four):
        assert (found.low, found.high) == pytest.approx((0.5, 2.5), abs=0.01)  # a step of these means is 0.25


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


# --- ties that rounding breaks; the judge is exact arithmetic ---


def exact(differences):
    """Wilcoxon's p over all flips of signs, and the rank-biserial correlation, of Fractions."""
    found = [d for d in differences if d]
    sizes = [abs(d) for d in found]
    ranks = [2 * sum(s < size for s in sizes) + sizes.count(size) + 1 for size in sizes]  # twice the mean rank
    seen = sum(rank if d > 0 else -rank for rank, d in zip(ranks, found, strict=True))
    flips = [abs(sum(map(operator.mul, ranks, signs))) for signs in itertools.product((-1, 1), repeat=len(ranks))]
    return sum(flip >= abs(seen) for flip in flips) / len(flips), seen / sum(ranks) if ranks else 0


def test_shares_of_a_volume_have_the_p_of_their_counts():
    adam, sam = [2, 3, 4, 3, 1, 3, 4, 2, 7, 5], [1, 7, 7, 2, 7, 1, 7, 4, 8, 8]
    counts, voxels = np.array([adam, sam]), 40 * 48 * 40
    found = difference(two(*(100 * counts[:, None] / voxels), metric="folding_percent"), "adam", "sam")
    p, effect = exact([Fraction(b - a) for a, b in zip(adam, sam, strict=True)])
    assert p == stats.wilcoxon(counts[1] - counts[0]).pvalue == 50 / 1024
    assert found.p == pytest.approx(p, rel=1e-12)
    assert found.rank_biserial == pytest.approx(effect, rel=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 1000])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("unit", [Fraction(100, 76800), Fraction(1, 10), Fraction(7, 3), Fraction(1, 10**7)], ids=str)
def test_p_and_effect_are_those_of_exact_arithmetic(unit, seeds, offset):
    """Multiples of a unit that binary fractions do not have, as distances on a grid and shares are; some are equal."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts = rng.integers(0, 6, (2, seeds, 9))
        adam, sam = np.vectorize(lambda n: float(offset + int(n) * unit))(counts)
        found = difference(two(adam, sam), "adam", "sam")
        p, effect = exact([Fraction(int(n), seeds) * unit for n in (counts[1] - counts[0]).sum(0)])
        assert (found.p, found.rank_biserial) == pytest.approx((p, effect), rel=1e-12)


def test_one_difference_that_all_pairs_share_has_no_spread():
    base = np.random.default_rng(0).uniform(0.4, 0.6, (1, 7))
    found = difference(two(base, base + 0.1), "adam", "sam")
    assert np.isnan(found.d_z)
    assert (found.p, found.rank_biserial) == (pytest.approx(2 / 2**7, rel=1e-12), 1)


def test_rounding_alone_is_no_difference():
    base = np.random.default_rng(0).uniform(0.4, 0.6, (1, 8))
    found = difference(two(base, base * (1 + 2**-51)), "adam", "sam")
    assert (found.p, found.rank_biserial) == (1, 0)
    assert np.isnan(found.d_z)


def test_differences_are_told_apart_where_rounding_is_finer():
    """As exact dice of large structures: 1e-9 apart; and one pair that failed takes nothing from the others."""
    gain = 1e-9 * np.array([[2.5, -3.5, 7.5, -0.5, 5.5, -4.5, 6.5, 3.5, 4.5]])
    for gains in (gain, np.append(gain[:, 1:], [[1e9]], 1)):
        found = difference(two(np.full((1, 9), 0.75), 0.75 + gains), "adam", "sam")
        p, effect = exact([round(g * 1e10) for g in gains[0]])
        assert (found.p, found.rank_biserial) == pytest.approx((p, effect), rel=1e-12)


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
    with pytest.raises(ValueError, match=r"4 twice, first .*are several studies mixed\?"):
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
    cells = pd.DataFrame({"train_domain": ["brain-mr+lung-ct"] * 2, "test_domain": ["lung-ct", "lung"]}, index=[7, 3])
    assert seen(cells).to_dict() == {7: "seen", 3: "unseen"}
    assert seen(cells.iloc[:0]).empty


# --- subjects that a manifest names ---


def named(subjects, pairs=None):
    pairs = [f"image{i}<-image{i + 100}" for i in range(len(subjects))] if pairs is None else pairs
    return pd.DataFrame({"test_domain": "t", "pair": pairs, "subjects": subjects})


def test_pairs_of_the_same_subjects_are_drawn_as_one_whatever_their_files_names():
    """Four subjects with ten images each: ten pairs of two subjects say hardly more than one."""
    values = np.random.default_rng(0).normal(size=(1, 4)).repeat(10, 1)
    of_pairs = named(["s1|s2"] * 10 + ["s2|s3"] * 10 + ["s3|s4"] * 10 + ["s4|s1"] * 10)
    table = rows(values, pairs=list(of_pairs.pair), test_domain="t")
    by_name, by_subject = mean_interval(table), mean_interval(with_drawn(table, of_pairs))
    assert (by_name.units, by_subject.units) == (40, 4)
    alone = mean_interval(rows(values[:, ::10], test_domain="t"))
    assert (by_subject.low, by_subject.high) == pytest.approx((alone.low, alone.high))
    assert by_subject.high - by_subject.low > 2 * (by_name.high - by_name.low)


def test_the_paired_difference_and_its_test_are_over_these_units_too():
    gain = np.repeat([[0.1, 0.3, -0.05]], 4, 0).reshape(1, 12)
    table = two(np.zeros((1, 12)), gain, pairs=[f"x{i}" for i in range(12)], test_domain="t", train_domain="a")
    found = difference(with_drawn(table, named(["p", "q", "r"] * 4, [f"x{i}" for i in range(12)])), "adam", "sam")
    assert (found.units, found.pairs) == (3, 12)
    assert found.p == pytest.approx(stats.wilcoxon([0.1, 0.3, -0.05]).pvalue)


def test_units_are_kept_by_the_mean_over_labels():
    table = pd.DataFrame(
        [("", "t", "none", None, pair, label, "dice", v) for pair, label, v in
         (("a", "x", 0.2), ("a", "y", 0.4), ("b", "x", 0.5))],
        columns=["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric", "value"],
    )  # fmt: skip
    assert per_pair(with_drawn(table, named(["s", "s"], ["a", "b"])), "dice").drawn.tolist() == ["s", "s"]


def test_the_order_of_a_pairs_subjects_does_not_matter_and_names_tell_where_no_manifest_does():
    table = pd.DataFrame({"test_domain": ["t", "t", "t", "u"], "pair": ["a", "b", "c_slice1<-d", "a"]})
    found = with_drawn(table, named(["s2|s1", "s1|s2", ""], ["a", "b", "c_slice1<-d"]))
    assert found.drawn.tolist() == ["s1|s2", "s1|s2", "c|d", "a"]
    assert "drawn" not in with_drawn(table, named([], []))
