"""The tables of sharpness follow from what was measured on every network and set; studies/sharpness.py."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from tests.conftest import PROJECT, as_module

FIGURES = PROJECT / "figures"


@pytest.fixture(scope="module")
def script():
    return as_module("studies/sharpness.py")


def test_the_recorded_table_is_that_of_the_recorded_values(script):
    for make in (script.flatter, script.within):
        found = make(pd.read_csv(f"{script.OUT}.csv")).astype(str)
        pd.testing.assert_frame_equal(found, pd.read_csv(FIGURES / f"table_{make.__name__}.csv", dtype=str))


def test_tau_is_over_the_arms_of_a_training_set_and_seed(script):
    """Flatter is better among five arms. How good a set or a seed is counts for nothing, nor do four arms."""
    rows = [
        ("A", f"arm {i}", seed, name, 0.1 * i + shift, 1.0 + i, 5.0 - i, 1.0)
        for seed, name, shift, arms in ((1, "B", 0, 5), (2, "B", 3, 5), (1, "A", 0, 5), (1, "C", 0, 4))
        for i in range(arms)
    ]
    names = ["train_domain", "optimizer", "seed", "test_domain", "dice", "loss", script.RISE, script.SMALL_RISE]
    table = script.flatter(pd.DataFrame(rows, columns=names)).set_index("domains")
    assert table["trainings and sets"].to_dict() == {"seen": 1, "unseen": 2}
    assert set(table["tau of sharpness at rho 0.01"]) == {"-1.00"}
    assert set(table["tau of loss"]) == {"+1.00"}


def test_within_an_optimizer_tau_is_over_its_networks_on_a_set(script):
    """Three networks of each seed, the flatter the better on both sets, though one set is harder and flatter."""
    random = np.random.default_rng(1)
    rows = [
        (train, "adam", seed, name, level + 0.1 * i + 0.01 * seed, 1.0, sharp - i - 0.1 * seed, random.normal())
        for seed in range(script.SEEDS)
        for i, train in enumerate("ABC")
        for name, level, sharp in (("D", 0.3, 5.0), ("E", 0.2, 9.0))
    ]
    rows += [(*row[:1], "sam", *row[2:]) for row in rows if row[2] > 0]  # a seed too few
    adam = pd.DataFrame([(row[2], row[3], row[4], row[7]) for row in rows if row[1] == "adam"])

    def tau(seeds):
        of = adam[adam[0].isin(seeds)].groupby(1)
        return np.mean([scipy.stats.kendalltau(cell[2], cell[3]).statistic for _, cell in of])

    names = ["train_domain", "optimizer", "seed", "test_domain", "dice", "loss", script.RISE, script.SMALL_RISE]
    (line,) = script.within(pd.DataFrame(rows, columns=names)).to_dict("records")
    assert (line["networks of"], line["domains"], line["networks a set"], line["sets"]) == ("Adam", "unseen", 15, 2)
    assert line["tau of sharpness at rho 0.01 [90 %]"].startswith("-1.00 ")
    every = range(script.SEEDS)
    left = np.array([tau({*every} - {seed}) for seed in every])
    half = 2.132 * np.sqrt(4 / 5 * ((left - left.mean()) ** 2).sum())  # the jackknife's error by its textbook formula
    whole = tau(every)
    told = f"{whole:+.2f} [{whole - half:+.2f}, {whole + half:+.2f}]"
    assert line["tau of sharpness at rho 0.001 [90 %]"] == told
    assert half > 0.01


def test_sharpness_on_the_training_images_is_a_line_of_its_own_without_dice(script):
    rows = [
        ("A", optimizer, seed, name, dice, 1.0, sharp, sharp)
        for seed in (1, 2, 3)
        for optimizer, factor in (("adam-2x", 1.0), ("sam", 2.0 ** (seed - 1)))
        for name, dice, sharp in (("training", None, factor), ("A", 0.8, 0.3), ("B", 0.7, 0.3))
    ]
    names = ["train_domain", "optimizer", "seed", "test_domain", "dice", "loss", script.RISE, script.SMALL_RISE]
    found = script.differences(pd.DataFrame(rows, columns=names).astype({"dice": float}), "adam-2x", "sam")
    assert sorted(found.kind.unique()) == ["seen", "training images", "unseen"]
    own = script.line(found[found.kind == script.OWN])
    assert own["sharpness, ratio [90 %]"].startswith("2.00 [0.")
    assert (own["Dice, difference [90 %]"], own["tau of each seed"], own["networks and domains"]) == ("", "", 3)
    assert script.line(found[found.kind == "seen"])["at rho 0.001"].startswith("1.00 ")


def test_a_seed_that_lacks_a_set_waits(script):
    rows = [(seed, "A", test, "unseen", float(seed), 0.0, 0.0) for seed in (1, 2) for test in ("B", "C")]
    names = ["seed", "train_domain", "test_domain", "kind", "ratio", "small", "dice"]
    line = script.line(pd.DataFrame([*rows, (3, "A", "B", "unseen", 9.0, 0.0, 0.0)], columns=names))
    assert line["sharpness, ratio [90 %]"].startswith("2.83 [")  # 2 ** 1.5
    assert line["networks and domains"] == 4


def test_an_arm_without_a_name_and_a_control_is_refused(script):
    with pytest.raises(ValueError, match=r"expected a name in FORMS, .* for {'new'}"):
        script.draw(pd.DataFrame({"optimizer": ["adam-2x", "sam", "new"]}))
