"""The tables of sharpness follow from what was measured on every network and set; studies/sharpness.py."""

import pandas as pd
import pytest

from tests.conftest import PROJECT, as_module

FIGURES = PROJECT / "figures"


@pytest.fixture(scope="module")
def script():
    return as_module("studies/sharpness.py")


def test_the_recorded_table_is_that_of_the_recorded_values(script):
    found = script.flatter(pd.read_csv(f"{script.OUT}.csv"))
    pd.testing.assert_frame_equal(found.astype(str), pd.read_csv(FIGURES / "table_flatter.csv", dtype=str))


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
