"""The recorded effects on Dice never seen follow from what the networks measured; studies/effects.py."""

import itertools

import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

import fmsam_lib as fm
from tests.conftest import PROJECT, as_module

FIGURES = PROJECT / "figures"


@pytest.fixture(scope="module")
def script():
    return as_module("studies/effects.py")


def test_the_recorded_effects_are_those_of_the_recorded_networks(script):
    names = ("networks", "helps", "corrupted", "effects")
    networks, helps, spoilt, effects = (pd.read_csv(FIGURES / f"{name}.csv") for name in names)
    found = script.effects(networks, helps.query("study == 'unseen'"), spoilt).reset_index(drop=True)
    pd.testing.assert_frame_equal(found, effects, rtol=1e-3, atol=2e-5)
    again = script.shown(found)
    table = pd.read_csv(FIGURES / "table_effects.csv", keep_default_na=False, dtype=str)
    pd.testing.assert_frame_equal(again.astype(str), table)


def networks_of(values):
    """Rows of `networks.csv`: (study, optimizer, training, seed, test domain, seen, Dice)."""
    names = ["study", "optimizer", "train_domain", "seed", "test_domain", "seen", "dice"]
    table = pd.DataFrame(values, columns=names)
    return table.assign(
        subjects=0, gradients=8000, pairs=3, worst=table.dice - 0.1, hd95=1.0, sdlogj=0.1, folding_percent=0
    )


def test_an_effect_is_paired_and_every_anatomy_counts_once(script):
    values = []
    for seed, shift in ((1, 0.0), (2, 0.02)):
        for name, training, gain in (
            ("CardiacACDC", "all but heart", 0.03),
            ("CardiacSunnybrook2D", "all but heart", 0.01),
            ("SpineMR2D", "all but spine", -0.02),
        ):
            values.append(("unseen", "adam-2x", training, seed, name, False, 0.7 + shift))
            values.append(("unseen", "sam", training, seed, name, False, 0.7 + shift + gain))
    values.append(("unseen", "sam", "all but heart", 1, "SpineMR2D", True, 0.99))  # it saw the spine
    values.append(("unseen", "sam", "all but spine", 3, "SpineMR2D", False, 0.99))  # no Adam with this seed
    rows = [("adam-2x", 1, "SpineMR2D", "nothing", 0, 0.7), ("sam", 1, "SpineMR2D", "io", 50, 0.9)]
    rows += [("adam-2x", 1, "SpineMR2D", "io", n, 0.7 + n / 1000) for n in (10, 50)]
    for optimizer in ("adam", "sam"):
        rows += [("adam-2x", 1, "SpineMR2D", f"fine-tuned, {optimizer}", n, 0.75) for n in (2, 5, 20)]
    rows += [("sam", 1, "SpineMR2D", "fine-tuned, adam", 5, 0.75)]
    helps = pd.DataFrame(rows, columns=["training", "seed", "test_domain", "means", "amount", "dice"])

    names = ["train_domain", "optimizer", "seed", "test_domain", "seen", "corruption", "dice"]
    rows = [("MR", "adam-2x", 1, "SpineMR2D", False, kind, 0.5) for kind in ("noise", "blur")]
    rows += [("MR", "sam", 1, "SpineMR2D", False, "noise", 0.7), ("MR", "sam", 1, "SpineMR2D", False, "blur", 0.4)]
    rows += [("no MR", name, 1, "SpineMR2D", True, "blur", dice) for name, dice in (("adam-2x", 0.1), ("sam", 0.9))]
    spoilt = pd.DataFrame(rows, columns=names)
    values += [("unseen", "adam-2x", "all but heart", seed, "SpineMR2D", True, 0.9) for seed in (1, 2)]

    table = script.effects(networks_of(values), helps, spoilt).set_index(["effect", "anatomy", "seed"]).difference
    tuned = table["as tuned (rho 0.001), 8,000 gradients"]
    assert tuned.to_dict() == pytest.approx(
        {("heart", 1): 0.02, ("heart", 2): 0.02, ("spine", 1): -0.02, ("spine", 2): -0.02}
    )
    assert table["anatomies trained on, 8,000 gradients"].to_dict() == pytest.approx({("spine", 1): 0.09})
    assert table["corrupted images, mean of seven kinds"].to_dict() == pytest.approx({("spine", 1): 0.05})
    assert table["10 steps of instance optimisation"].to_dict() == pytest.approx({("spine", 1): 0.01})
    assert table["both after 50 steps of instance optimisation"].to_dict() == pytest.approx({("spine", 1): 0.15})
    assert "rho 0.01" not in table.index  # of which there is no run
    line = script.shown(table.reset_index().assign(kind="")).set_index("of").loc[script.PRIMARY[0]]
    assert line["change [90 %]"] == "+0.000"  # two anatomies, alike in weight; two seeds have no interval
    assert (line["lowest anatomy"], line["highest anatomy"]) == ("-0.020 (spine)", "+0.020 (heart)")


@pytest.mark.parametrize("lacks", ["an anatomy", "a set", "a training", "pairs", "everything that others have"])
def test_a_seed_that_lacks_what_others_have_waits(script, lacks, capsys):
    study, name = "unseen", script.PRIMARY[0]
    sets = [("all but heart", "CardiacACDC"), ("all but heart", "CardiacSunnybrook2D"), ("all but knee", "KneeCT2D")]
    if lacks == "a training":  # of several that did not see the same set
        study, name, sets = "shifts", "another modality, other anatomies", [("no MR", "SpineMR2D"), ("MR", "SpineMR2D")]
    cells = itertools.product(("adam-2x", "sam"), (10, 11), sets)
    table = networks_of([(study, arm, training, seed, test, False, 0.8) for arm, seed, (training, test) in cells])
    one = (table.seed == 11) & (table.optimizer == "sam")
    gone = {"an anatomy": table.test_domain == "KneeCT2D", "pairs": table.test_domain == "CardiacACDC"}
    gone |= {"a set": table.test_domain == "CardiacACDC", "a training": table.train_domain == "no MR"}
    if lacks == "pairs":
        table.loc[one & gone[lacks], "pairs"] = 2
    elif lacks in gone:
        table = table[~(one & gone[lacks])]
    else:
        heart = table.train_domain == "all but heart"
        table = table[heart & (table.seed == 10) | ~heart & (table.seed == 11)]
    spoilt = pd.DataFrame(columns=[*script.ABOUT, "dice"])
    found = script.effects(table, pd.read_csv(FIGURES / "helps.csv"), spoilt).set_index("effect")
    left = [] if lacks == "everything that others have" else [10]
    assert sorted({*found.seed[found.index == name]}) == left
    assert ("no seed of both arms" in capsys.readouterr().out) is (not left)


def test_p_is_corrected_over_all_that_sam_changes_but_the_primary_contrast(script):
    values = {"as tuned (rho 0.001), 8,000 gradients": 1, "rho 0.01": 2, "climb by layer": 8}
    rows = [
        (kind, name, "heart", seed, shift + scale * seed)
        for kind, shift in ((script.BY_SAM, 0), (script.OTHER, 1))
        for name, scale in values.items()
        for seed in (1, 2, 4)
    ]
    rows[3] = (*rows[3][:-1], 7.0)  # one of rho 0.01, which scale alone does not change
    table = script.shown(pd.DataFrame(rows, columns=["kind", "effect", "anatomy", "seed", "difference"]))
    each = [ttest_1samp(seeds, 0).pvalue for seeds in ([7.0, 4.0, 8.0], [8.0, 16.0, 32.0])]
    low, high = sorted(each)
    told = {low: f"{min(1, 2 * low):.3f}", high: f"{max(2 * low, high):.3f}"}
    assert table["p, Holm"].tolist() == ["", *(told[p] for p in each), "", "", ""]


def test_more_training_anatomies_are_compared_by_their_means(script):
    helps = pd.read_csv(FIGURES / "helps.csv")
    values = [("alone", "adam-2x", name, 10, "SpineMR2D", False, dice) for name, dice in (("A", 0.5), ("B", 0.7))]
    values += [("domains", "adam", name, 10, "SpineMR2D", False, 0.8) for name in ("A+B", "A+C")]
    values += [("domains", "adam", "A+SpineMR2D", 10, "SpineMR2D", True, 0.99)]
    values += [("domains", "adam", "all but spine", 10, "SpineMR2D", False, 0.85)]
    values += [("domains", "adam", "all but heart", 10, "CardiacACDC", False, 0.9)]  # no network alone was tested on it
    spoilt = pd.DataFrame(columns=[*script.ABOUT, "dice"])
    table = script.effects(networks_of(values), helps, spoilt).set_index(["effect", "anatomy"]).difference
    assert table["trained on two anatomies, not one"].to_dict() == pytest.approx({"spine": 0.2})
    assert table["trained on four anatomies, not one"].to_dict() == pytest.approx({"spine": 0.25})
    assert "trained on four and synthetic ones, not one" not in table.index


def test_the_training_is_named_by_what_it_leaves_out(script):
    groups = script.UNSEEN.groups
    others = "+".join(name for one in groups if one != "knee" for name in groups[one])
    assert script.trained_on(f"{others}+brain-mr+abdomen-ct") == "all but knee"
    assert script.trained_on("SpineMR2D") == "SpineMR2D"
    assert script.trained_on(others.replace("SpineMR2D+", "")) != "all but knee"  # the spine is left out, too


def test_corrupted_images_are_compared_where_they_were_never_seen(script):
    names = ["corruption", "optimizer", "train_domain", "seed", "test_domain", "seen", "dice"]
    rows = []
    for name, gain in (("CardiacACDC", 0.03), ("CardiacSunnybrook2D", 0.01), ("SpineMR2D", -0.05)):
        for optimizer, dice in (("adam-2x", 0.7), ("sam", 0.7 + gain)):
            rows.append(("bias_field", optimizer, "no MR", 10, name, False, dice))
            rows.append(("bias_field", optimizer, "MR", 10, name, True, 0.9))
    table = script.by_kind(pd.DataFrame(rows, columns=names))
    assert table.values.tolist() == [["bias field", "0.700", "0.685", "-0.015", "-0.050", "+0.020"]]


def test_corrupted_dice_is_the_mean_over_severities_and_pairs(script, tmp_path, monkeypatch):
    run = type("run", (), {"train_domain": "SpineMR2D", "seed": 10})
    monkeypatch.setattr(script, "trained_with", lambda folder: run)
    folder = tmp_path / "shifts" / "SpineMR2D" / "sam" / "seed10"
    folder.mkdir(parents=True)
    rows = [("SpineMR2D", p, "noise", s, "dice", v) for p, s, v in (("a", 0, 0.9), ("a", 0.1, 0.8), ("b", 0.1, 0.6))]
    rows += [("SpineMR2D", "a", "noise", 0.1, "folding_percent", 5.0)]
    columns = ["test_domain", "pair", "corruption", "severity", "metric", "value"]
    alone = pd.DataFrame(rows, columns=columns)
    both = pd.concat([alone.assign(optimizer="sam"), alone.assign(optimizer="sam+ema", value=0.1)])
    both.to_csv(folder / "robustness.csv", index=False)
    (line,) = script.corrupted(tmp_path / "shifts").to_dict("records")
    assert line["dice"] == pytest.approx(0.7)
    assert (line["study"], line["optimizer"], line["seen"], line["corruption"]) == ("shifts", "sam", True, "noise")


def test_an_arm_as_long_lies_beside_the_line_of_the_penalties_and_nowhere_beyond_it(script):
    rows = [("lambda-3", 0.3, 0.80), ("adam-2x", 0.34, 0.82), ("lambda-0.75", 0.4, 0.82)]
    rows += [("sam", 0.32, 0.80), ("wide", 0.37, 0.83), ("smooth", 0.2, 0.8), ("rough", 0.5, 0.8), ("long", 0.34, 0.8)]
    gradients = [8000, 8000, 8000, 7999, 8000, 8000, 8000, 16000]
    rows = pd.DataFrame(rows, columns=["optimizer", "sdlogj", "dice"]).assign(gradients=gradients)
    found = script.beside_the_penalty(rows)
    expected = [0, 0, 0, -0.01, 0.01, *[float("nan")] * 3]
    assert found.beside.to_numpy() == pytest.approx(expected, nan_ok=True)


def test_a_shifted_pair_has_its_image_and_its_label_moved_alike():
    ship = as_module("studies/ship.py")
    plain = fm.open_domain("brain-mr", shape=(40, 40))
    before, after = plain.test_pair(0), ship.Shifted(plain, 0.2).test_pair(0)
    here, there = (
        torch.stack([p.nonzero()[:, 1:].double().mean(0) for p in (pair.moving_label > 0, pair.moving > 0.2)])
        for pair in (before, after)
    )
    assert (there - here).norm(dim=1).tolist() == pytest.approx([0.2 * 39] * 2, rel=0.25)
    assert torch.equal(before.fixed, after.fixed)
    zero = ship.Shifted(plain, 0.0).test_pair(0)
    assert torch.equal(zero.moving_label, before.moving_label)
