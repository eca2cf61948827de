import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fmsam_lib.evaluation.correlation import COLUMNS, correlation, kendall, performance, with_measures
from fmsam_lib.evaluation.evaluate import COLUMNS as RESULTS


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_scipys_and_p_near_it(ties):
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    if ties:
        x, y = np.round(x), np.round(y * 2)
    found, theirs = kendall(x, y, np.zeros(20)), stats.kendalltau(x, y)
    assert found["tau"] == pytest.approx(theirs.statistic)
    assert found["p"] == pytest.approx(theirs.pvalue, abs=0.01)
    assert found["low"] < found["tau"] < found["high"]


def test_the_interval_is_scipys_bootstrap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    theirs = stats.bootstrap((x, y), lambda a, b: stats.kendalltau(a, b).statistic, paired=True, vectorized=False,
                             method="percentile", n_resamples=1500, rng=1).confidence_interval  # fmt: skip
    found = kendall(x, y, np.zeros(25))
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_only_runs_of_one_training_domain_are_compared():
    """Within each group the order is reversed; across groups it would look the same."""
    x = np.array([1, 2, 3, 11, 12, 13.0])
    y = np.array([3, 2, 1, 13, 12, 11.0])
    assert stats.kendalltau(x, y).statistic > 0
    found = kendall(x, y, np.array(list("aaabbb")))
    assert found["tau"] == -1
    assert found["p"] > 2 / 36 - 0.03  # of 36 orders within the groups two are as extreme


def test_chance_alone_is_seldom_significant():
    rng = np.random.default_rng(0)
    ps = [kendall(rng.normal(size=10), rng.normal(size=10), np.zeros(10))["p"] for _ in range(60)]
    assert np.mean(np.array(ps) < 0.05) < 0.15


def test_too_few_runs_and_constants_have_no_interval():
    found = kendall(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), np.zeros(3))
    assert found["tau"] == 1
    assert np.isnan([found["low"], found["p"]]).all()
    assert np.isnan(kendall(np.ones(8), np.arange(8.0), np.zeros(8))["tau"])
    assert np.isnan(kendall(np.ones(1), np.ones(1), np.zeros(1))["tau"])


def study():
    """Ten runs whose sharpness falls as Dice on the unseen domain rises, and has nothing to do with the seen ones."""
    rng = np.random.default_rng(0)
    results, flat = [], []
    for seed in range(10):
        for test, value in (("a", rng.uniform()), ("b", rng.uniform()), ("c", 0.5 + seed / 100)):
            results += [["a+b", test, "sam", seed, pair, "x", "dice", value, "1"] for pair in "pq"]
            results += [["a+b", test, "sam+io", seed, pair, "x", "dice", 0.9, "1"] for pair in "pq"]
        for where in ("training", "c"):
            row = {"train_domain": "a+b", "test_domain": where, "optimizer": "sam", "seed": seed}
            flat.append(row | {"measure": "sam_rise", "rho": 0.01, "term": "total", "value": 1 / (1 + seed)})
            flat.append(row | {"measure": "weight_norm", "rho": np.nan, "term": "", "value": 10.0 + seed})
    results = pd.DataFrame(results, columns=RESULTS)
    return pd.DataFrame(flat), results


def test_performance_is_a_line_per_run_without_instance_optimisation():
    runs = performance(study()[1])
    assert len(runs) == 10
    assert runs.unseen.tolist() == pytest.approx([0.5 + seed / 100 for seed in range(10)])
    assert runs.seen.between(0, 1).all()


def test_a_run_that_was_not_tested_everywhere_is_not_ranked_with_the_others():
    _, results = study()
    runs = performance(results[~((results.seed == 3) & (results.test_domain == "b"))]).set_index("seed")
    assert np.isnan(runs.seen[3])
    assert runs.unseen.notna().all()
    assert runs.seen.drop(3).notna().all()


def test_every_measure_meets_every_performance():
    table = correlation(*study())
    assert list(table.columns) == COLUMNS
    assert len(table) == 2 * 2 * 2  # measures, places, performances
    found = table.set_index(["measure", "test_domain", "performance"]).tau
    assert found["sam_rise", "training", "unseen"] == -1
    assert found["weight_norm", "c", "unseen"] == 1
    assert abs(found["sam_rise", "training", "seen"]) < 0.6
    assert (table.n == 10).all()


def test_runs_without_a_measure_or_with_nan_are_counted_out():
    flat, results = study()
    flat.loc[flat.seed == 3, "value"] = np.nan
    assert (correlation(flat[flat.seed != 4], results).n == 8).all()


def test_a_study_without_unseen_domains_has_no_such_lines():
    flat, results = study()
    assert set(correlation(flat, results[results.test_domain != "c"]).performance) == {"seen"}


def test_measures_stand_beside_the_dice_of_their_run():
    runs = with_measures(*study(), test_domain="training", term="total").set_index("seed")
    assert runs.loc[4, "sam_rise 0.01"] == pytest.approx(0.2)
    assert runs.loc[4, "weight_norm"] == 14
    assert runs.loc[4, "unseen"] == pytest.approx(0.54)
