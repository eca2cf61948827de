import numpy as np
import pandas as pd
import pytest
import torch

from fmsam_lib.config import Evaluate
from fmsam_lib.data import DataError
from fmsam_lib.domains import open_domain
from fmsam_lib.evaluate import (
    COLUMNS,
    evaluate,
    evaluate_all,
    paired_difference,
    read_results,
    readable,
    table,
    write_results,
)
from fmsam_lib.network import GradICON


def net():
    torch.manual_seed(0)
    return GradICON(2, down=(4, 4), levels=2, last_step=False).eval()


def test_an_untrained_network_changes_nothing():
    dataset = open_domain("heart-mr", shape=(32, 32))
    none, identity = (evaluate(n, dataset, pairs=3, progress=False)[0] for n in (None, net()))
    for metric in ("dice", "hd95", "tre"):
        a, b = (rows[rows.metric == metric].value.to_numpy() for rows in (none, identity))
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert len(a) >= 3
    assert (identity[identity.metric == "folding_percent"].value == 0).all()


def test_results_are_read_back_as_they_were(tmp_path):
    rows, _ = evaluate(None, open_domain("brain-mr", shape=(24, 24)), pairs=2, progress=False)
    rows = rows.assign(train_domain="", optimizer="none", seed=None)
    write_results(rows, tmp_path / "results.csv")
    back = read_results(tmp_path / "results.csv")
    assert list(back.columns) == COLUMNS
    assert back.value.tolist() == rows.value.tolist()  # to the bit
    assert back.seed.isna().all()
    assert (back.train_domain == "").all()
    first = (tmp_path / "results.csv").read_bytes()
    write_results(back, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_bytes() == first


class Broken:
    """Two test pairs, of which the first cannot be read."""

    name, test_count = "broken", 2

    def test_pair(self, index):
        if index == 0:
            raise DataError("a.nii.gz: expected a NIfTI file, found 3 bytes. Copy it anew.")
        return open_domain("brain-mr", shape=(24, 24)).test_pair(index)


def test_one_bad_file_does_not_lose_the_others():
    rows, problems = evaluate(None, Broken(), pairs=2, progress=False)
    assert problems == ["a.nii.gz: expected a NIfTI file, found 3 bytes. Copy it anew."]
    assert rows.pair.nunique() == 1


def settings(**changes):
    values = {
        "run": "",
        "out": "",
        "test_domains": ["brain-mr"],
        "shape": [24, 24],
        "data": "",
        "pairs": 1,
        "threads": 1,
    }
    return Evaluate(**(values | changes))


def test_a_domain_that_is_not_there_is_a_problem_not_the_end(tmp_path):
    given = settings(test_domains=["NoSuchSet", "brain-mr"], data=str(tmp_path))
    rows, problems = evaluate_all(None, given, progress=False)
    assert set(rows.test_domain) == {"brain-mr"}
    assert len(problems) == 1
    assert "NoSuchSet" in problems[0]
    with pytest.raises(DataError, match="no test pair could be measured"):
        evaluate_all(None, settings(test_domains=["NoSuchSet"], data=str(tmp_path)), progress=False)


def made_up(gain=0.1):
    """Results of two optimizers on four pairs and two seeds, where SAM is better by `gain` each time."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in "abcd":
        for label in ("x", "y"):
            base = rng.uniform(0.4, 0.6)
            rows.append(["", "T", "none", None, pair, label, "dice", base - 0.2, "1"])
            for seed in (0, 1):
                rows.append(["T+U", "T", "adam", seed, pair, label, "dice", base, "1"])
                rows.append(["T+U", "T", "sam", seed, pair, label, "dice", base + gain, "1"])
    return pd.DataFrame(rows, columns=COLUMNS)


def test_the_table_finds_a_constant_gain_exactly():
    line = table(made_up()).iloc[0]
    assert line["sam - adam"] == pytest.approx(0.1)
    assert line["sam - adam low"] == pytest.approx(0.1)
    assert line["sam"] - line["before"] == pytest.approx(0.3)
    assert (line["seen"], line["pairs"], line["seeds"]) == ("yes", 4, 2)


def test_the_interval_contains_the_mean_and_widens_with_the_spread():
    rows = made_up().query("optimizer != 'none'").copy()
    narrow = paired_difference(rows, "adam", "sam")
    rows.loc[rows.optimizer == "sam", "value"] += np.random.default_rng(1).normal(
        0, 0.1, (rows.optimizer == "sam").sum()
    )
    wide = paired_difference(rows, "adam", "sam")
    assert wide["sam - adam low"] < wide["sam - adam"] < wide["sam - adam high"]
    assert (
        wide["sam - adam high"] - wide["sam - adam low"] > 0.02 > narrow["sam - adam high"] - narrow["sam - adam low"]
    )


def test_without_the_treatment_there_is_no_difference_but_a_table():
    summary = table(made_up().query("optimizer != 'sam'"))
    assert "adam" in summary.columns
    assert "sam - adam" not in summary.columns
    assert "adam" in readable(summary).columns


def test_the_readable_table_says_what_the_numbers_say():
    summary = table(made_up())
    line = readable(summary).iloc[0]
    assert line["sam - adam [95 %]"] == "0.100 [0.100, 0.100]"
    assert line["before"] == f"{summary.before.item():.3f}"
    assert (line["tested on"], line["pairs"]) == ("T", "4")


def test_mirrored_pairs_count_once_in_the_interval():
    rows = made_up().query("optimizer != 'none'").copy()
    sam = rows.optimizer == "sam"
    rows.loc[sam, "value"] += rows.loc[sam, "pair"].map({"a": 0.1, "b": -0.1, "c": 0.05, "d": -0.05})
    independent = paired_difference(rows, "adam", "sam")
    both_ways = pd.concat([rows.assign(pair=rows.pair + "<-z"), rows.assign(pair="z<-" + rows.pair)])
    mirrored = paired_difference(both_ways, "adam", "sam")
    assert list(mirrored.values()) == pytest.approx(list(independent.values()))


def test_a_domain_without_labels_stays_in_the_table():
    rows = made_up()
    folding = rows.query("label == 'x' and optimizer != 'none'").assign(
        test_domain="Unlabelled", metric="folding_percent", label="", value=0.5
    )
    line = table(pd.concat([rows, folding])).set_index("test_domain").loc["Unlabelled"]
    assert line["folding sam %"] == 0.5
    assert np.isnan(line["sam"])


class Nan(GradICON):
    """A network whose training went wrong."""

    def forward(self, moving, fixed):
        phi = super().forward(moving, fixed)
        return phi.then(torch.full_like(phi.displacements[-1], float("nan")))


def test_a_map_that_is_not_finite_is_a_problem_not_a_perfect_score():
    broken = Nan(2, down=(4, 4), levels=1, last_step=False).eval()
    rows, problems = evaluate(broken, open_domain("brain-mr", shape=(24, 24)), pairs=2, progress=False)
    assert rows.empty
    assert len(problems) == 2
    assert "not finite" in problems[0]
