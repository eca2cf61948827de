"""The study's answer, of simulated studies whose true effect is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from fmsam_lib.evaluation.anatomies import COLUMNS, NEW, THESE, answer_of, unseen

# anatomy: its sets, with how many pairs and, where these form a ring of subjects, how many subjects
DESIGN = {
    "heart": {"acdc": (20, 0), "sunny": (15, 0)},
    "chest": {"jsrt": (60, 30), "montgomery": (60, 30)},
    "spine": {"spine": (36, 18)},
    "head": {"head": (60, 30)},
    "knee": {"knee": (30, 15)},
}
GROUPS = {anatomy: [*sets, f"{anatomy}-synthetic"] for anatomy, sets in DESIGN.items()}
BOTH = ("adam-2x", "sam")


def simulated(rng, effect=0.0, seeds=5, seed_sd=0.005, on_set_sd=0.002, subject_sd=0.008, rest_sd=0.01, design=DESIGN):
    """`results` and `pairs` of a study: every set registered by the networks that have not seen its anatomy."""
    results, pairs = [], []
    every = [name for names in GROUPS.values() for name in names]
    for anatomy, sets in design.items():
        trained_on = "+".join(name for name in every if name not in GROUPS[anatomy])
        of_seed = rng.normal(0, seed_sd, seeds)
        for name, (count, ring) in sets.items():
            of_network = of_seed + rng.normal(0, on_set_sd, seeds)
            fixed = np.arange(count) % (ring or count)
            moving = (fixed + 1 + np.arange(count) // ring) % ring if ring else fixed
            of_subject = rng.normal(0, subject_sd, ring or count)
            baseline = rng.uniform(0.5, 0.9, count)
            names = [f"p{i}<-p{j}" for i, j in zip(fixed, moving, strict=True)]
            subjects = [f"s{i}|s{j}" for i, j in zip(fixed, moving, strict=True)]
            pairs += [{"test_domain": name, "pair": p, "subjects": s} for p, s in zip(names, subjects, strict=True)]
            for seed in range(seeds):
                change = effect + of_network[seed] + of_subject[fixed] + of_subject[moving]
                change = change + rng.normal(0, rest_sd, count)
                for optimizer, values in zip(BOTH, (baseline, baseline + change), strict=True):
                    about = {"train_domain": trained_on, "test_domain": name, "optimizer": optimizer, "seed": seed + 10}
                    about |= {"label": "1", "metric": "dice", "unit": ""}
                    results += [about | {"pair": p, "value": v} for p, v in zip(names, values, strict=True)]
    return pd.DataFrame(results).astype({"seed": "Int64"}), pd.DataFrame(pairs)


def answer(results, pairs, groups, methods):
    """From a study's tables to the answer, as the report goes."""
    return answer_of(unseen(results, pairs, groups, methods, "dice"), methods)


@pytest.mark.parametrize(
    ("effect", "said"), [(0.03, "helps"), (0.0, "equivalent"), (-0.03, "harms"), (0.011, "undecided")]
)
def test_the_effect_is_found_and_judged(effect, said):
    table = answer(*simulated(np.random.default_rng(0), effect), GROUPS, BOTH).set_index("anatomy")
    assert [*table.reset_index().columns] == COLUMNS
    assert [*table.index] == [*sorted(DESIGN), THESE, NEW]
    line = table.loc[THESE]
    assert line["mean"] == pytest.approx(effect, abs=0.004)
    assert line.low < line["mean"] < line.high
    assert line.verdict == said
    assert (line.seeds, line.units) == (5, 281)
    assert line["mean"] == pytest.approx(line.mean_treatment - line.mean_baseline, abs=2e-4)
    each = table["mean"][:5]
    assert line["mean"] == pytest.approx(each.mean())
    expected = stats.t.ppf(0.95, 4) * each.std() / 5**0.5
    assert table.loc[NEW, "high"] == pytest.approx(max(line["mean"] + expected, line.high))
    assert table.loc[NEW, "low"] == pytest.approx(min(line["mean"] - expected, line.low))
    assert [*(table.p < 0.1)] == [*(table.low * table.high > 0)]


def test_of_a_new_anatomy_nobody_is_surer_than_of_these():
    """Five that happen to be alike: neither the interval nor p is that of their own t test."""
    table = answer(*simulated(np.random.default_rng(9), seeds=3), GROUPS, BOTH).set_index("anatomy")
    assert stats.ttest_1samp(table["mean"][:5], 0.0).pvalue < 0.05 < table.p[THESE]
    assert [*table.loc[NEW, ["low", "high", "p"]]] == [*table.loc[THESE, ["low", "high", "p"]]]


def test_patients_who_are_fixed_once_and_moving_once_have_an_answer():
    """In a ring of pairs the fixed patient tells the moving one: two such effects had no fit, in a study of ten."""
    design = {anatomy: dict.fromkeys([*sets][:1], (20, 20)) for anatomy, sets in DESIGN.items()}
    for seed in (3, 8, 12):
        table = answer(*simulated(np.random.default_rng(seed), design=design), GROUPS, BOTH).set_index("anatomy")
        assert np.isfinite(table.loc[THESE, ["low", "high"]].astype(float)).all()


def test_networks_that_saw_the_anatomy_do_not_count():
    results, pairs = simulated(np.random.default_rng(0))
    expected = answer(results, pairs, GROUPS, BOTH)
    all_others = "+".join(name for names in GROUPS.values() for name in names)
    saw = results.assign(train_domain=all_others, value=0.0)
    sibling = results.assign(train_domain=results.test_domain.map(lambda name: f"brain+{name}"), value=0.0)
    pd.testing.assert_frame_equal(answer(pd.concat([results, saw, sibling]), pairs, GROUPS, BOTH), expected)


def test_sets_of_one_anatomy_are_averaged_and_slices_of_one_patient_too():
    results, pairs = simulated(np.random.default_rng(0), seeds=2)
    rows = unseen(results, pairs, GROUPS, BOTH, "dice")
    table = answer(results, pairs, GROUPS, BOTH).set_index("anatomy")
    by_set = rows.groupby(["anatomy", "test_domain"]).difference.mean()
    assert table.loc["chest", "mean"] == pytest.approx(by_set["chest"].mean(), abs=1e-4)
    more = results[results.test_domain == "sunny"]
    again = pd.concat([results, *(more.assign(pair=more.pair + f"_{i}") for i in range(9))])
    named = pd.concat([pairs, *(pairs.assign(pair=pairs.pair + f"_{i}") for i in range(9))])
    pd.testing.assert_frame_equal(answer(again, named, GROUPS, BOTH), table.reset_index(), rtol=1e-6)


def test_names_that_would_run_together_stay_apart():
    """Patient s1 of set 1x, and patient s11 of set x."""
    results, pairs = simulated(np.random.default_rng(0), seeds=3)
    expected = answer(results, pairs, GROUPS, BOTH)
    names = {"jsrt": "x", "montgomery": "1x"}
    groups = {anatomy: [names.get(name, name) for name in sets] for anatomy, sets in GROUPS.items()}
    trained_on = results.train_domain.replace(names, regex=True)
    results, pairs = (table.assign(test_domain=table.test_domain.replace(names)) for table in (results, pairs))
    found = answer(results.assign(train_domain=trained_on), pairs, groups, BOTH)
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)


def test_the_same_values_differ_by_nothing():
    results, pairs = simulated(np.random.default_rng(0), seeds=2)
    results["value"] = 0.5
    table = answer(results, pairs, GROUPS, BOTH)
    assert set(table["mean"]) == {0.0}
    assert table.verdict.iloc[0] == "equivalent"


def test_gains_that_are_the_same_within_every_set_are_known_exactly():
    results, pairs = simulated(np.random.default_rng(0), seeds=2)
    columns = [*results.columns.drop(["optimizer", "value"])]
    values = results.pivot_table("value", columns, "optimizer").reset_index()
    gains = {anatomy: 0.02 + 0.01 * i for i, anatomy in enumerate(sorted(GROUPS))}
    of_set = values.test_domain.map({name: gains[anatomy] for anatomy, sets in GROUPS.items() for name in sets})
    values["sam"] = values["adam-2x"] + of_set  # each rounded
    table = answer(values.melt(columns, var_name="optimizer", value_name="value"), pairs, GROUPS, BOTH)
    for end in ("mean", "low", "high"):
        assert table[end][:6].to_numpy() == pytest.approx([*gains.values(), 0.04])
    assert [*table.verdict[:6]] == ["helps"] * 6


def optimal(rows):
    """REML's estimate of the mean over the anatomies and its error, by the likelihood as the textbook has it."""
    means = np.eye(rows.test_domain.nunique())[rows.test_domain.astype("category").cat.codes]
    here = [rows.anatomy + rows.seed.astype(str), rows.test_domain + rows.seed.astype(str)]
    here += [rows.test_domain + rows[side] for side in ("fixed", "moving")]
    alike = [np.equal.outer(names.to_numpy(), names.to_numpy()) for names in here]
    y, weight = rows.difference.to_numpy() * 100, pd.crosstab(rows.test_domain, rows.anatomy).gt(0)
    weight = (weight / weight.sum()).mean(axis=1).to_numpy()

    def solved(log):
        inverse = np.linalg.inv(sum(np.exp(v) * same for v, same in zip(log, [np.eye(len(y)), *alike], strict=True)))
        covariance = np.linalg.inv(means.T @ inverse @ means)
        estimates = covariance @ means.T @ inverse @ y
        rest = y - means @ estimates
        cost = rest @ inverse @ rest - np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(covariance)[1]
        return cost, weight @ estimates / 100, (weight @ covariance @ weight) ** 0.5 / 100

    found = optimize.minimize(lambda log: solved(log)[0], np.full(5, -2.0), method="L-BFGS-B", bounds=[(-14, 5)] * 5)
    return solved(found.x)[1:]


def test_intervals_are_those_of_the_models_optimum():
    """A first fit of statsmodels says that it converged, with intervals a tenth too narrow."""
    design = {name: {of: (12, 6 if ring else 0) for of, (_, ring) in sets.items()} for name, sets in DESIGN.items()}
    results, pairs = simulated(np.random.default_rng(1), seeds=2, design=design)
    line = answer(results, pairs, GROUPS, BOTH).set_index("anatomy").loc[THESE]
    mean, error = optimal(unseen(results, pairs, GROUPS, BOTH, "dice"))
    assert line["mean"] == pytest.approx(mean, abs=1e-5)
    assert line.high - line["mean"] == pytest.approx(stats.t.ppf(0.95, 5) * error, rel=1e-3)


def test_one_seed_decides_nothing():
    table = answer(*simulated(np.random.default_rng(0), 0.05, seeds=1), GROUPS, BOTH).set_index("anatomy")
    assert table.loc[THESE, "mean"] == pytest.approx(0.05, abs=0.01)
    assert table.low[:-1].isna().all()
    assert table.loc[THESE, "verdict"] == "undecided"


def test_an_anatomy_with_one_seed_has_no_interval_nor_have_all_of_them():
    results, pairs = simulated(np.random.default_rng(0), seeds=3)
    fewer = results[(results.test_domain != "knee") | (results.seed == 10)]
    table = answer(fewer, pairs, GROUPS, BOTH).set_index("anatomy")
    assert [*table.index[table.low.isna()]] == ["knee", THESE, NEW]
    assert table.seeds.to_dict() == {"chest": 3, "head": 3, "heart": 3, "knee": 1, "spine": 3, THESE: 1, NEW: 1}
    assert table.verdict[["knee", THESE]].tolist() == ["undecided", "undecided"]


def test_nothing_paired_is_said():
    results, pairs = simulated(np.random.default_rng(0), seeds=1)
    with pytest.raises(ValueError, match="expected adam and sam on the same pairs"):
        answer(results, pairs, GROUPS, ("adam", "sam"))


@pytest.mark.parametrize("ring", [True, False])
def test_one_set_an_anatomy_and_pairs_of_one_subject_have_a_fit(ring):
    design = {name: {of: (24, 12 if ring else 0) for of in [*sets][:1]} for name, sets in DESIGN.items()}
    results, pairs = simulated(np.random.default_rng(0), 0.03, seeds=3, design=design)
    line = answer(results, pairs, GROUPS, BOTH).set_index("anatomy").loc[THESE]
    assert line.low < 0.03 < line.high
    synthetic = answer(results, pairs.assign(subjects=""), GROUPS, BOTH).set_index("anatomy").loc[THESE]
    assert synthetic["mean"] == pytest.approx(line["mean"], abs=1e-3)
    with pytest.raises(ValueError, match="never seen, got none"):
        answer(
            results.assign(train_domain="+".join(n for names in GROUPS.values() for n in names)), pairs, GROUPS, BOTH
        )


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Of 90 % intervals over 5 seeds; over the seeds' means alone, without the patients, they covered 75 %."""
    rng, held = np.random.default_rng(1), []
    for _ in range(200):
        line = answer(*simulated(rng), GROUPS, BOTH).set_index("anatomy").loc[THESE]
        held.append(line.low < 0 < line.high)
    print(f"coverage {np.mean(held):.3f}")
    assert np.mean(held) > 0.84
