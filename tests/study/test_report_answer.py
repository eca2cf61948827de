"""The report's first screen: the answer in a sentence and a picture, of simulated studies."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from fmsam_lib.evaluation.anatomies import BAND, NEW, THESE
from fmsam_lib.evaluation.comparison import comparison
from fmsam_lib.parameters import Compare
from tests.evaluation.test_anatomies import BOTH, DESIGN, GROUPS, answer, simulated
from tests.evaluation.test_comparison import made_up
from tests.study.report import STUDY, run

ANATOMIES = STUDY.model_copy(update={"groups": GROUPS, "leave_one_out": list(DESIGN)})
NONE = comparison(made_up().head(0), [])
SPENT = pd.DataFrame({"optimizer": ["adam", "adam-2x", "sam"], "step": [4, 8, 4], "gradient_evaluations": [4, 8, 8]})
SECTIONS = ("contrasts", "sentence", "forest")


def answered(results, pairs, against=(BOTH,), study=ANATOMIES, differences=NONE, **given):
    study = study.model_copy(update={"train_domains": sorted(results.train_domain.unique())})
    given |= {"results": results, "pairs": pairs, "study": study, "differences": differences}
    given.setdefault("history", SPENT)
    return run(*SECTIONS, against=list(against), **given)


def said(value, sign=""):
    return f"{value:{sign}.3f}".replace("-", "−")


def interval(line):
    return f"{said(line['mean'], '+')} [{said(line.low)}, {said(line.high)}]"


@pytest.fixture(scope="module")
def both():
    """A study with Adam at equal steps, too, worse by 0.02."""
    results, pairs = simulated(np.random.default_rng(0))
    adam = results[results.optimizer == "adam-2x"].assign(optimizer="adam")
    noise = np.random.default_rng(1).normal(0.02, 0.01, len(adam))
    return pd.concat([results, adam.assign(value=adam.value - noise)], ignore_index=True), pairs


@pytest.fixture(scope="module")
def done(both):
    return answered(*both, against=[("adam", "sam"), BOTH])


def test_the_sentences_numbers_are_the_answers(both, done):
    line = answer(*both, GROUPS, BOTH).set_index("anatomy")
    these, new = line.loc[THESE], line.loc[NEW]
    assert done.sentence == (
        f"On 5 anatomies, each unseen by the networks tested on it, SAM changes Dice by {interval(these)} against Adam "
        f"at equal compute (90 % interval, 5 seeds, 281 patients or pairs of patients): {these.verdict} within ±0.01. "
        f"A new anatomy: {interval(new)}: {new.verdict}. In relative terms "
        f"{100 * these['mean'] / these.mean_baseline:+.1f} %."
    ).replace("-", "−")
    assert these.verdict == "equivalent"


def test_the_table_of_answers_has_every_contrast_and_corrects_the_secondary_ones(both, done):
    table = done.tables["answer"]
    primary = table[table.role == "primary"]
    assert primary["mean"].tolist() == answer(*both, GROUPS, BOTH)["mean"].tolist()
    assert primary.p_holm.isna().all()
    assert set(primary.baseline) == {"adam-2x"}
    second = table[(table.role == "secondary") & (table.anatomy == THESE)]
    assert second[["on", "metric", "baseline"]].values.tolist() == [["unseen", "dice", "adam"]]  # the others: no rows
    assert second.p_holm.tolist() == multipletests(second.p, method="holm")[1].tolist()
    assert second["mean"].item() == pytest.approx(primary["mean"].iloc[-1] + 0.02, abs=0.002)


def test_averages_distances_and_domains_that_were_seen_are_secondary(both):
    results, pairs = both
    results = results[results.optimizer != "adam"]
    after = results.assign(optimizer=results.optimizer + "+ema", value=results.value + 0.1)
    far = results.assign(metric="hd95", value=10 * results.value, unit="mm")
    trains = sorted(set(results.train_domain))
    others = dict(zip(trains, np.roll(trains, 1), strict=True))
    seen = results.assign(train_domain=results.train_domain.map(others))  # by the networks that left out another
    seen = seen.assign(value=seen.value + 0.05)  # what it brings to have been trained on an anatomy
    done = answered(pd.concat([results, after, far, seen]), pairs, against=[BOTH, ("adam-2x+ema", "sam+ema")])
    table = done.tables["answer"]
    second = table[(table.role == "secondary") & (table.anatomy == THESE)].set_index(["on", "metric", "baseline"])
    primary = table[table.role == "primary"].set_index("anatomy").loc[THESE]
    assert [*second.index] == [
        ("unseen", "dice", "adam-2x+ema"), ("unseen", "hd95", "adam-2x"), ("seen", "dice", "adam-2x"),
    ]  # fmt: skip
    assert second["mean"].to_numpy() == pytest.approx(primary["mean"] * np.array([1, 10, 1]), rel=1e-3)
    assert second.p_holm.to_numpy() == pytest.approx(multipletests(second.p, method="holm")[1])
    share = f"{100 * primary['mean'] / 0.05:+.0f}".replace("-", "−")
    assert f" %, or {share} % of the gap of 0.050 to networks trained on them." in done.sentence


def test_the_gap_is_that_of_the_anatomies_that_were_left_out(both):
    """Of a study that leaves out some only, the others are easier here, and no part of the gap."""
    results, pairs = both
    results = results[results.optimizer != "adam"]
    trains = sorted(set(results.train_domain))
    others = dict(zip(trains, np.roll(trains, 1), strict=True))
    out = results.test_domain.isin([*DESIGN["heart"], *DESIGN["knee"]])
    seen = results.assign(train_domain=results.train_domain.map(others), value=results.value + 0.05 + 0.3 * ~out)
    done = answered(pd.concat([results[out], seen]), pairs)
    assert " % of the gap of 0.050 to networks trained on them" in done.sentence
    history = pd.DataFrame({"optimizer": ["adam-2x", "sam"], "seed": 10, "gradient_evaluations": [2, 2]})
    study = ANATOMIES.model_copy(update={"train_domains": trains})
    drawn = run("gradients", results=pd.concat([results[out], seen]), pairs=pairs, study=study, history=history)
    means = seen[out & (seen.optimizer == "adam-2x")].groupby(["test_domain"]).value.mean()
    expected = (means[[*DESIGN["heart"]]].mean() + means[[*DESIGN["knee"]]].mean()) / 2
    (line,) = (text.xy[1] for text in drawn.figures["gradients"].axes[0].texts if "trained on it" in text.get_text())
    assert line == pytest.approx(expected)


def test_on_domains_seen_only_trainings_of_both_are_compared(both):
    """Here the treatment is the baseline itself, but for a training that it lacks."""
    results, pairs = both
    trains = sorted(set(results.train_domain))
    others = dict(zip(trains, np.roll(trains, 1), strict=True))
    seen = results.assign(train_domain=results.train_domain.map(others), value=results.value - 0.1)
    alike = pd.concat([results, seen]).query("optimizer == 'adam-2x'")
    sam = alike[alike.train_domain != trains[0]].assign(optimizer="sam")
    table = answered(pd.concat([alike, sam]), pairs).answers
    seen = table[(table.on == "seen") & (table.metric == "dice")]
    assert len(seen)
    assert seen["mean"].abs().max() < 1e-9


def test_on_domains_seen_a_seed_that_lacks_a_training_waits(both):
    results, pairs = both
    trains = sorted(set(results.train_domain))
    others = dict(zip(trains, np.roll(trains, 1), strict=True))
    seen = results.assign(train_domain=results.train_domain.map(others))
    alike = pd.concat([results, seen]).query("optimizer == 'adam-2x'")
    gain = alike.train_domain.map({train: 0.01 * i for i, train in enumerate(trains)})
    sam = alike.assign(optimizer="sam", value=alike.value + gain + 0.001 * alike.seed)
    lacks = (sam.seed == 10) & (sam.train_domain == trains[-1])
    found = answered(pd.concat([alike, sam[~lacks]]), pairs).answers
    without = answered(pd.concat([alike, sam]).query("seed != 10"), pairs).answers
    found, without = (table[(table.on == "seen") & (table.metric == "dice")] for table in (found, without))
    assert set(found.seeds) == {4}
    pd.testing.assert_frame_equal(found, without)


def test_the_gradients_are_drawn_where_no_network_saw_an_anatomy(both):
    results, pairs = both
    study = ANATOMIES.model_copy(update={"train_domains": sorted(set(results.train_domain))})
    history = pd.DataFrame({"optimizer": ["adam", "adam-2x", "sam"], "seed": 10, "gradient_evaluations": [1, 2, 2]})
    done = run("gradients", results=results, pairs=pairs, study=study, history=history)
    assert "trained on it" not in "".join(text.get_text() for text in done.figures["gradients"].axes[0].texts)


def test_dice_stands_over_the_gradients_that_were_spent(both):
    results, pairs = both
    trains = sorted(set(results.train_domain))
    others = dict(zip(trains, np.roll(trains, 1), strict=True))
    seen = results.assign(train_domain=results.train_domain.map(others), value=results.value + 0.05)
    before = results[results.optimizer == "adam"].assign(train_domain="", optimizer="none", seed=pd.NA, value=0.2)
    after = results.assign(optimizer=results.optimizer + "+ema", value=results.value + 0.01)
    spent = {"adam": 4000, "adam-2x": 8000, "sam": 8000}
    history = pd.DataFrame(
        [{"optimizer": o, "seed": s, "gradient_evaluations": n} for o, n in spent.items() for s in range(10, 15)]
    )
    results = pd.concat([results, seen, before, after])
    study = ANATOMIES.model_copy(update={"train_domains": trains})
    done = run("gradients", results=results, pairs=pairs, study=study, history=history)
    (axes,) = done.figures["gradients"].axes
    table = answer(both[0], pairs, GROUPS, BOTH).set_index("anatomy").loc[THESE]
    marks = {line.get_marker(): line for line in axes.lines if line.get_markerfacecolor() != "white"}
    for marker, of, gradients in (("v", "baseline", 8000), ("s", "treatment", 8000)):
        (x,), (y,) = marks[marker].get_data()
        assert (x, y) == (gradients, pytest.approx(table[f"mean_{of}"], abs=1e-6))
    hollow = [line for line in axes.lines if line.get_marker() == "s" and line.get_markerfacecolor() == "white"]
    assert hollow[0].get_ydata()[0] == pytest.approx(table.mean_treatment + 0.01, abs=1e-6)
    texts = {text.get_text(): text.xy[1] for text in axes.texts}
    assert texts["Adam, twice the steps,\ntrained on it"] == pytest.approx(table.mean_baseline + 0.05, abs=1e-6)
    assert "EMA" in texts
    assert axes.get_xlabel().endswith("(below this picture: before registration 0.200)")
    assert "gradients" not in run("gradients", results=before, pairs=pairs, study=study, history=history).figures


def test_the_picture_shows_both_contrasts_of_every_anatomy_over_the_band(done):
    picture, table = done.figures["answer"], done.tables["answer"]
    (axes,) = picture.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*sorted(DESIGN), THESE, NEW]
    table = table[(table.on == "unseen") & (table.metric == "dice")]
    drawn = [line for line in axes.lines if line.get_marker() in ("s", "o") and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in drawn] == table["mean"].tolist()
    assert {line.get_color() for line in drawn} == {"#D55E00", "#0072B2"}
    (band,) = axes.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((-BAND, 2 * BAND))
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert labels == ["SAM minus Adam at equal compute", "SAM minus Adam at equal steps"]


def test_landmarks_have_an_answer_and_no_verdict(both):
    results, pairs = both
    done = answered(results.assign(metric="tre", unit="mm"), pairs, metric="tre")
    assert ": the rule judges Dice alone. A new anatomy: " in done.sentence
    assert not re.search(r": [.:]|\]: ?\.", done.sentence)


def test_one_seed_decides_nothing():
    results, pairs = simulated(np.random.default_rng(0), seeds=1, effect=0.05)
    done = answered(results, pairs)
    sentence = done.sentence
    assert done.tables["answer"][["low", "high", "p"]].isna().all(axis=None)  # nor of a new anatomy
    assert set(done.tables["answer"].verdict) == {"undecided"}
    units = "281 patients or pairs of patients"
    assert sentence.endswith(f"(1 seed, {units}). One seed decides nothing: another training may come out otherwise.")
    assert not re.search(r"helps|\[", sentence)


def test_an_anatomy_whose_runs_are_missing_is_counted():
    results, pairs = simulated(np.random.default_rng(0))
    knee = results.test_domain == "knee"
    sentence = answered(results[~knee], pairs).sentence
    assert sentence.startswith("On 4 of 5 anatomies, each unseen")
    fewer = results[~(knee & (results.seed == 10) & (results.optimizer == "sam"))]
    assert "(90 % interval, 4 to 5 seeds, 281 patients or pairs of patients)" in answered(fewer, pairs).sentence


def test_without_adam_at_equal_compute_the_sentence_says_equal_steps():
    results, pairs = simulated(np.random.default_rng(0))
    results = results.assign(optimizer=results.optimizer.replace("adam-2x", "adam"))
    assert " against Adam at equal steps (90 %" in answered(results, pairs, against=[("adam", "sam")]).sentence


def test_variants_are_told_by_their_optimizer_and_by_what_both_spent_alike():
    results, pairs = simulated(np.random.default_rng(0))
    results = results.assign(optimizer=results.optimizer.replace({"adam-2x": "adam-4x", "sam": "sam-2x"}))
    variants = {"adam-4x": {"optimizer": "adam", "steps": 16000}, "sam-2x": {"optimizer": "sam", "steps": 8000}}
    study = ANATOMIES.model_copy(update={"optimizers": [*variants], "variants": variants})
    settings = Compare(baseline="adam-4x", treatment="sam-2x")

    def told(steps, gradients):
        history = pd.DataFrame({"optimizer": [*variants], "step": steps, "gradient_evaluations": gradients})
        done = answered(results, pairs, [(*variants,)], study, history=history, settings=settings)
        (label,) = [text.get_text() for text in done.figures["answer"].legends[0].get_texts()]
        return re.search("SAM .*? against (.*?) \\(90 %", done.sentence)[1], label

    equal = "Adam (adam-4x) at equal compute"
    assert told([16000, 8000], [16000, 16000]) == (equal, f"SAM (sam-2x) minus {equal}")
    assert told([8000, 8000], [8000, 16000])[0] == "Adam (adam-4x) at equal steps"
    assert told([8000, 7000], [8000, 14000])[0] == "Adam (adam-4x)"


@pytest.mark.parametrize(
    ("baseline", "treatment", "spent", "told"),
    [
        ("adam-2x-lr=0.1", "sam-lr=0.1", (800, 800), "Adam (adam-2x-lr=0.1) at equal compute"),
        ("adam-2x-lr=0.1", "sam-lr=0.1", (800, 700), "Adam, twice the steps (adam-2x-lr=0.1)"),
        ("adam-2x", "sam-late=0.5", (800, 600), "Adam, twice the steps"),
        ("adam-2x", "sam", (800, 800), "Adam at equal compute"),
        ("adam-2x", "sam", None, "Adam, twice the steps"),
    ],
)
def test_the_baseline_has_its_own_name_and_histories_say_what_was_spent(baseline, treatment, spent, told):
    variants = {name: {"optimizer": name.split("-l")[0]} for name in (baseline, treatment) if "=" in name}
    history = pd.DataFrame()
    if spent:
        history = pd.DataFrame({"optimizer": [baseline, treatment], "step": (800, 400), "gradient_evaluations": spent})
    study = STUDY.model_copy(update={"variants": variants})
    assert run(history=history, study=study).versus(baseline, treatment) == told


def alone():
    """A study of single synthetic domains, each left out in turn: no groups, no patients."""
    results, pairs = simulated(np.random.default_rng(1))
    every = set(results.test_domain)
    results = results.assign(train_domain=["+".join(sorted(every - {test})) for test in results.test_domain])
    return results, pairs.assign(subjects=""), STUDY.model_copy(update={"leave_one_out": sorted(every)})


def test_domains_without_groups_and_synthetic_pairs_are_anatomies_of_their_own():
    results, pairs, study = alone()
    done = answered(results, pairs, study=study)
    assert done.sentence.startswith("On 7 anatomies, each unseen by the networks tested on it, SAM changes Dice by ")
    assert done.figures.keys() == {"answer"}


def test_where_the_model_has_no_fit_the_comparison_answers(monkeypatch):
    def fails(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr("fmsam_lib.evaluation.anatomies.answer_of", fails)
    results, pairs, study = alone()
    results = results[results.test_domain.isin(["acdc", "knee"])]
    differences = comparison(results, [BOTH])
    done = answered(results, pairs, study=study, differences=differences)
    line = differences.set_index(["train_domain", "test_domain"]).loc["each", "unseen"]
    assert done.sentence.startswith(
        f"Against Adam at equal compute, SAM changes Dice by {interval(line)} on the domains never seen (95 % interval"
    )
    assert done.sentence.endswith("There is no verdict by rule: the mixed model of the anatomies has no fit.")
    assert not done.figures


def test_runs_that_share_no_pairs_have_no_answer():
    results, pairs = simulated(np.random.default_rng(0), seeds=2)
    done = answered(results[results.optimizer == "sam"], pairs)
    assert done.sentence == "No answer: adam and sam have no test pairs and seeds in common."
    assert done.tables["answer"].empty
    assert not done.figures


def test_one_optimizer_has_no_answer():
    results, pairs = simulated(np.random.default_rng(0), seeds=2)
    only = ANATOMIES.model_copy(update={"optimizers": ["sam"]})
    settings = Compare(baseline="sam", treatment="sam")
    done = answered(results[results.optimizer == "sam"], pairs, against=[], study=only, settings=settings)
    assert done.sentence == "No answer: there is sam alone."
    assert done.tables["answer"].empty


def other(results, against=(("adam", "sam"),)):
    differences = comparison(results, list(against))
    return run(*SECTIONS, results=results, against=list(against), differences=differences, history=SPENT)


def test_another_study_answers_from_the_comparison():
    rows = made_up(0.02, tests=("T", "U", "V"), optimizers=("adam-2x", "sam"), spread=0.05)
    done = other(rows, [("adam-2x", "sam")])
    lines = done.differences.set_index("test_domain")
    seen, unseen = (interval(lines.loc[name]) for name in ("seen", "V"))
    assert done.sentence.startswith(
        f"Against Adam at equal compute, SAM changes Dice by {seen} on the domains trained on and by {unseen} on V "
        "(never seen) (95 % interval over 2 seeds and test pairs). "
    )
    table = done.tables["answer"]
    assert table[["anatomy", "on", "mean"]].values.tolist() == [
        ["seen", "seen", lines.loc["seen", "mean"]],
        ["V", "unseen", lines.loc["V", "mean"]],
    ]
    assert not done.figures


@pytest.mark.parametrize(
    ("gain", "seeds", "says"),
    [
        (0.1, (0,), "test pairs alone). One seed decides nothing"),
        (0.0, (0, 1), "No difference can be told from chance."),
        (0.1, (0, 1), "Beyond chance on T (trained on), though the interval of so few seeds is too narrow."),
        (0.1, tuple(range(5)), "Beyond chance on T (trained on)."),
    ],
)
def test_another_study_says_how_sure_it_is(gain, seeds, says):
    assert says in other(made_up(gain, seeds=seeds)).sentence


def test_what_is_missing_stands_in_one_line_with_a_link():
    found = SimpleNamespace(problems=["a: not trained", "b"], notes=["n " * 100])
    shown = []
    run("told", found=found, display=lambda told: shown.append(told.data))
    assert shown[0].startswith("**[2 problems](#missing): a: not trained** · [1 note](#missing): n n n")
    assert len(shown[0]) < 250
    run("told", found=SimpleNamespace(problems=[], notes=[]), display=lambda told: shown.append(told.data))
    assert shown[1] == "Nothing is missing."


def test_many_training_domains_have_a_short_name_that_is_spelled_out_once():
    groups = {"heart": ["h1", "h2"], "knee": ["k"]}
    trains = ["k+b", "h1+h2+b", "a+b+c", "a+b+d", "a", "a+b"]
    told = {"groups": groups, "leave_one_out": ["heart", "knee"], "always": ["b"], "train_domains": trains}
    done = run("about", study=(study := STUDY.model_copy(update=told)), results=made_up(tests=("a",), train="a"))
    names = ["all but heart", "all but knee", "3 domains", "3 domains (2)", "a", "a+b"]
    assert [study.short(train) for train in trains] == names
    assert done.briefly("a+b+c/sam/seed0: gone; h1+h2+b") == "3 domains/sam/seed0: gone; all but knee"
    two = run("none", study=STUDY.model_copy(update={"leave_one_out": ["a", "b"], "train_domains": ["a", "b"]}))
    assert two.briefly("trained on all but a, tested on a") == "trained on all but a, tested on a"
    assert f"Trained on {', '.join(names)}; tested on" in done.about
    spelled = "Heart: h1, h2. Knee: k. Trained on always: b. 3 domains: a, b, c. 3 domains (2): a, b, d."
    assert done.about.endswith(spelled)
