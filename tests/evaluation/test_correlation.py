import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fmsam_lib.evaluation.correlation import COLUMNS, correlation, kendall, performance
from fmsam_lib.evaluation.evaluate import COLUMNS as RESULTS
from tests.study.report import run


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_scipys(ties):
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    if ties:
        x, y = np.round(x), np.round(y * 2)
    assert kendall(x, y, np.zeros(20)) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_only_runs_of_one_training_domain_are_compared():
    """Within each group the order is reversed; across groups it would look the same."""
    x = np.array([1, 2, 3, 11, 12, 13.0])
    y = np.array([3, 2, 1, 13, 12, 11.0])
    assert stats.kendalltau(x, y).statistic > 0
    assert kendall(x, y, np.array(list("aaabbb"))) == -1


def test_constants_and_single_runs_have_no_tau():
    assert kendall(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), np.zeros(3)) == 1
    assert np.isnan(kendall(np.ones(8), np.arange(8.0), np.zeros(8)))
    assert np.isnan(kendall(np.ones(1), np.ones(1), np.zeros(1)))


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
    assert not {"low", "high", "p"} & set(table.columns)  # these took runs for independent
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
    flat, results = study()
    runs = run("runs", flatness=flat, results=results).runs.set_index("seed")
    assert runs.loc[4, "sam_rise 0.01"] == pytest.approx(0.2)
    assert runs.loc[4, "weight_norm"] == 14
    assert runs.loc[4, "unseen"] == pytest.approx(0.54)
