"""What the report's figures of results say, read back from their artists; the pictures themselves are for eyes."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from fmsam_lib.evaluation.correlation import COLUMNS as TAUS
from fmsam_lib.evaluation.corruptions import CORRUPTIONS
from fmsam_lib.evaluation.evaluate import COLUMNS
from fmsam_lib.evaluation.statistics import difference, mean_interval, per_pair
from fmsam_lib.plotting import style as looks
from tests.study.report import run

BOTH = "brain-mr+lung-ct"
TERMS = ["total", "similarity", "regulariser"]


def matrix(results, **given):
    return run("matrix", results=results, **given).figures["matrix"]


def paired_difference(results, baselines=("adam",)):
    against = [(baseline, "sam") for baseline in baselines]
    return run("paired_difference", results=results, against=against).figures["paired_difference"]


def training_curves(history):
    return run("training", history=history).figures["training"]


def robustness(table):
    return run("robustness", robustness=table, against=[]).figures["robustness"]


def correlation(taus):
    return run("correlation_figure", taus=taus).figures["correlation"]


def flatness_against_dice(runs):
    return run("flatness_against_dice", runs=runs).figures["flatness_against_dice"]


def radii(table):
    return run("radii_figure", radii=table).figures.get("radii")


def toy_results(trains=("brain-mr", BOTH), tests=("brain-mr", "heart-mr"), seeds=(0, 1)):
    rng = np.random.default_rng(0)
    rows = [("", test, "none", None, f"p{p}", "a", "dice", rng.random(), "1") for test in tests for p in range(3)]
    for train, test, optimizer, seed, p in itertools.product(trains, tests, ("adam", "sam"), seeds, range(3)):
        rows += [(train, test, optimizer, seed, f"p{p}", label, "dice", rng.random(), "1") for label in "ab"]
        rows.append((train, test, optimizer, seed, f"p{p}", "", "tre", rng.random(), "mm"))
    return pd.DataFrame(rows, columns=COLUMNS)


def toy_history(optimizers=("adam", "sam")):
    rows = [
        ("brain-mr", optimizer, seed, step, 1 / (step + 1), 0.9 / (step + 1), 1e-3 * step)
        for optimizer, seed, step in itertools.product(optimizers, (0, 1), range(0, 50, 5))
    ]
    return pd.DataFrame(rows, columns=["train_domain", "optimizer", "seed", "step", *TERMS])


def texts(axes):
    return [text.get_text() for text in axes.texts]


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title().startswith(title))


def hatched(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]


def toy_robustness(trains=("brain-mr", BOTH), tests=("brain-mr", "heart-mr"), kinds=("noise", "blur"), seeds=(0, 1)):
    rows = []
    for test, kind, pair in itertools.product(tests, kinds, "pq"):
        for i, severity in enumerate((0.0, *CORRUPTIONS[kind].severities)):
            about = (test, pair, kind, severity, "dice", "1")
            easy = 0.5 + 0.1 * (pair == "q") + 0.2 * (test == "brain-mr")
            rows.append(("", "none", None, easy, *about))
            rows += [
                (train, optimizer, seed, easy + 0.1 * seed - i * (0.02 if optimizer == "sam" else 0.04), *about)
                for train, optimizer, seed in itertools.product(trains, ("adam", "sam"), seeds)
            ]
    names = "train_domain optimizer seed value test_domain pair corruption severity metric unit"
    return pd.DataFrame(rows, columns=names.split())


def toy_correlation():
    rows = [
        ("weight_norm", None, "", "training", "seen", 0.4, 12),
        ("weight_norm", None, "", "training", "unseen", np.nan, 12),
        ("sam_rise", 0.01, "total", "training", "seen", -0.5, 12),
        ("sam_rise", 0.01, "total", "training", "unseen", 0.1, 10),
        ("sam_rise", 0.01, "similarity", "training", "seen", 0.9, 12),
        ("sam_rise", 0.01, "total", "heart-mr", "seen", 0.9, 12),
    ]
    return pd.DataFrame(rows, columns=TAUS)


def toy_runs():
    rows = [
        {"train_domain": train, "optimizer": optimizer, "seed": seed, "seen": 0.7 + 0.01 * seed, "unseen": 0.5}
        | {"sam_rise 0.01": 10.0**-seed, "trace": -1.0 - seed}
        for train, optimizer, seed in itertools.product(("brain-mr", BOTH), ("adam", "sam"), (0, 1))
    ]
    return pd.DataFrame(rows)


def interval(results, optimizer, train, test, metric="dice"):
    values = per_pair(results, metric)
    mine = (values.optimizer == optimizer) & (values.train_domain == train) & (values.test_domain == test)
    return mean_interval(values[mine])


def marked(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_cells_are_the_means_of_the_results_with_their_intervals():
    results = toy_results()
    figure = matrix(results)
    tests = ("brain-mr", "heart-mr")
    lines = {"without training": [("none", "")]}
    lines |= {name: [(name.lower(), "brain-mr"), (name.lower(), BOTH)] for name in ("Adam", "SAM")}
    for name, rows in lines.items():
        found = [interval(results, *row, test) for row, test in itertools.product(rows, tests)]
        expected = [f"{cell.mean:.3f}\n[{cell.low:.3f}, {cell.high:.3f}]" for cell in found]
        assert texts(panel(figure, name)) == expected


def test_the_legend_says_what_the_intervals_are_over():
    said = [matrix(toy_results(seeds=seeds)).legends[0].get_texts()[0].get_text() for seeds in ((0, 1), (0,))]
    assert said[0].startswith("mean, 95 % interval over 2 seeds and test pairs")
    assert said[1].startswith("mean, 95 % interval over test pairs only (one seed)")
    fewer = toy_results()
    fewer = fewer[(fewer.optimizer != "sam") | (fewer.seed == 0)]
    assert "over 1 to 2 seeds" in matrix(fewer).legends[0].get_texts()[0].get_text()


def test_values_that_are_nan_are_counted_below_the_matrix():
    results = toy_results()
    results.loc[results.index[results.optimizer == "sam"][:2], "value"] = np.nan  # both labels of one pair
    assert matrix(results).legends[0].get_texts()[0].get_text().endswith("left out for NaN: 1")


def test_methods_without_a_network_have_a_panel_of_their_own():
    results = toy_results()
    alone = results[results.optimizer == "none"]
    others = [alone.assign(optimizer=name, value=alone.value + 0.1) for name in ("io", "ants-syn")]
    figure = matrix(pd.concat([results, *others]))
    first = panel(figure, "without training")
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == ["before registration", "instance optimisation alone", "ANTs SyN"]
    cells = [text.partition("\n")[0] for text in texts(first)]
    assert cells[:2] != cells[2:4] == cells[4:6]
    assert [ax.get_title() for ax in figure.axes[:3]] == ["without training", "Adam", "SAM"]


def test_panels_of_the_matrix_share_their_colours():
    adam, sam = (panel(matrix(toy_results()), name).images[0] for name in ("Adam", "SAM"))
    assert adam.get_clim() == sam.get_clim()
    assert adam.get_cmap() == sam.get_cmap()


def test_the_domains_trained_on_are_framed():
    frames = [p for p in panel(matrix(toy_results()), "SAM").patches if not p.get_fill()]
    assert sorted((round(f.get_x() + 0.46), round(f.get_y() + 0.42)) for f in frames) == [(0, 0), (0, 1)]


def test_a_missing_cell_is_a_hole():
    results = toy_results()
    gone = (results.optimizer == "sam") & (results.test_domain == "heart-mr") & (results.train_domain == BOTH)
    figure = matrix(results[~gone])
    assert len(hatched(panel(figure, "SAM"))) == 1
    assert texts(panel(figure, "SAM")).count("–") == 1
    assert not hatched(panel(figure, "Adam"))
    assert len(hatched(panel(paired_difference(results[~gone]), "trained on brain-mr +"))) == 1


def test_a_metric_without_a_before_has_holes_there():
    assert len(hatched(panel(matrix(toy_results(), metric="tre"), "without training"))) == 2


def test_one_seed_one_domain_and_a_lone_none_are_enough():
    one = toy_results(("brain-mr",), ("brain-mr",), (0,))
    lone = one[one.pair == "p0"]
    assert "[" not in "".join(texts(panel(matrix(lone), "Adam")))  # one pair has no interval
    assert paired_difference(one).axes
    assert len(marked(paired_difference(lone).axes[0], "D")) == 1
    assert len(panel(matrix(one[one.optimizer == "none"]), "without training").texts) == 1


def test_the_difference_and_its_interval_are_the_tables():
    results = toy_results()
    axes = panel(paired_difference(results), "trained on brain-mr +")
    means = [line.get_xdata()[0] for line in marked(axes, "D") if line.get_markerfacecolor() != "white"]
    dice = per_pair(results, "dice").query("train_domain == @BOTH")
    found = [difference(dice[dice.test_domain == test], "adam", "sam") for test in ("brain-mr", "heart-mr")]
    assert np.allclose(means, [difference.mean for difference in found])
    bars = [c.get_segments()[0][:, 0] for c in axes.collections if hasattr(c, "get_segments")]
    assert np.allclose(bars, [(difference.low, difference.high) for difference in found])
    assert texts(axes) == ["n = 6", "n = 6"]


def test_every_pair_and_each_seeds_mean_are_drawn():
    results = toy_results(("brain-mr",), ("brain-mr",))
    axes = paired_difference(results).axes[0]
    wide = per_pair(results, "dice").pivot(index=["seed", "pair"], columns="optimizer", values="value").dropna(
        subset=["adam", "sam"]
    )  # fmt: skip
    points = wide.sam - wide.adam
    assert np.allclose(axes.collections[0].get_offsets()[:, 0], points)
    (seeds,) = [line for line in marked(axes, "D") if line.get_markerfacecolor() == "white"]
    assert np.allclose(seeds.get_xdata(), points.groupby("seed").mean())
    only = paired_difference(results[results.seed != 1]).axes[0]
    assert all(line.get_markerfacecolor() != "white" for line in marked(only, "D"))


def test_each_baseline_has_its_interval_in_its_own_look():
    results = toy_results()
    twice = results[results.optimizer == "adam"].assign(optimizer="adam-2x")
    twice = twice.assign(value=twice.value + 0.05)
    results = pd.concat([results, twice[twice.test_domain == "brain-mr"]])
    figure = paired_difference(results, ["adam", "adam-2x"])
    axes = panel(figure, "trained on brain-mr +")
    dice = per_pair(results, "dice")
    mine = dice[(dice.train_domain == BOTH) & (dice.test_domain == "brain-mr")]
    for name in ("adam", "adam-2x"):
        look = looks.LOOKS[name]
        bold = [line for line in marked(axes, look["marker"]) if line.get_markerfacecolor() == look["color"]]
        found = difference(mine, name, "sam")
        assert bold[0].get_xdata()[0] == pytest.approx(found.mean)
        bars = [c.get_segments()[0][:, 0] for c in axes.collections if hasattr(c, "get_segments")]
        assert any(np.allclose(bar, (found.low, found.high)) for bar in bars)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert f"minus {looks.name_of(name)}: mean, 95 % interval" in labels
    assert texts(axes) == ["n = 6", "n = 6", "n = 6", "–"]
    assert not hatched(axes)
    assert len([c for c in axes.collections if len(c.get_offsets()) == 6]) == 2  # faint points of the first alone


def test_values_without_a_partner_are_counted():
    results = toy_results()
    gone = results.query("optimizer == 'adam' and test_domain == 'heart-mr' and train_domain == 'brain-mr'")
    results = results.drop(index=gone.index[(gone.pair == "p0") & (gone.seed == 0)])
    axes = panel(paired_difference(results), "trained on brain-mr")
    assert texts(axes) == ["n = 6", "n = 5, 1 unpaired"]


def test_nothing_in_common_is_an_error():
    results = toy_results()
    results = results[(results.optimizer != "sam") | (results.seed == 1)]
    results = results[(results.optimizer != "adam") | (results.seed == 0)]
    with pytest.raises(ValueError, match="got sam and adam with none in common"):
        paired_difference(results)


def test_one_optimizer_alone_is_explained():
    results = toy_results()
    with pytest.raises(ValueError, match="expected two optimizers on the same pairs and seeds, got sam with none"):
        paired_difference(results[results.optimizer.isin(["none", "sam"])], baselines=[])


def test_an_optimizer_looks_the_same_everywhere():
    figures = [training_curves(toy_history()), robustness(toy_robustness())]
    figures.append(flatness_against_dice(toy_runs()))
    for figure, (optimizer, name) in itertools.product(figures, (("adam", "Adam"), ("sam", "SAM"))):
        look = looks.LOOKS[optimizer]
        handle = next(h for h in figure.legends[0].legend_handles if h.get_label() == name)
        lines = [line for ax in figure.axes for line in ax.lines if line.get_marker() == look["marker"]]
        assert lines
        assert (to_hex(handle.get_color()).upper(), handle.get_linestyle()) == (look["color"], look["linestyle"])
        assert {to_hex(line.get_color()).upper() for line in lines} == {look["color"]}


def test_losses_that_are_not_finite_are_counted_beside_the_curves():
    history = toy_history()
    history.loc[3, "total"] = np.nan
    figure = training_curves(history)
    assert [texts(ax) for ax in figure.axes] == [["1 not finite"], [], []]


def test_robustness_is_the_mean_over_pairs_domains_and_seeds_of_either_group():
    figure = robustness(toy_robustness())
    axes = np.array(figure.axes).reshape(2, 2)  # seen and unseen; two corruptions
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["seen domains", "unseen domains"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    for (line, easy), kind in itertools.product(zip(axes, (0.75, 0.55), strict=True), (0, 1)):
        (adam,), (sam,), (none,) = (marked(line[kind], marker) for marker in "osx")
        assert np.allclose(adam.get_ydata(), easy + 0.05 - 0.04 * np.arange(5))
        assert np.allclose(sam.get_ydata(), easy + 0.05 - 0.02 * np.arange(5))
        assert np.allclose(none.get_ydata(), easy)
        assert np.allclose(sam.get_xdata(), (0, *CORRUPTIONS[("noise", "blur")[kind]].severities))


def test_robustness_counts_every_training_alike():
    table = toy_robustness(("brain-mr", BOTH), ("brain-mr", "heart-mr"), ("noise",))
    mine = (table.train_domain == "brain-mr") & (table.test_domain == "heart-mr") & (table.pair == "p")
    figure = robustness(table[~mine])  # one pair less: its training still counts as much as the other one
    (adam,) = marked(figure.axes[1], "o")
    mean = (0.55 + 0.05 + 0.60 + 0.05) / 2  # 0.5 and 0.6 are the two pairs, 0.05 the mean of the seeds
    assert np.allclose(adam.get_ydata(), mean - 0.04 * np.arange(5))


def test_bands_of_robustness_are_the_range_of_seeds():
    axes = robustness(toy_robustness(("brain-mr",), ("brain-mr",), ("noise",))).axes[0]
    bands = [c.get_paths()[0].vertices[:, 1] for c in axes.collections]
    assert [(band.min(), band.max()) for band in bands] == [
        pytest.approx(ends) for ends in ((0.75, 0.75), (0.75 - 0.16, 0.85), (0.75 - 0.08, 0.85))
    ]


def test_corruptions_are_named_in_words_and_go_on_below():
    table = toy_robustness(("brain-mr",), ("brain-mr",), tuple(CORRUPTIONS), seeds=(0,))
    figure = robustness(table)
    assert len(figure.axes) == len(CORRUPTIONS)
    for ax, corruption in zip(figure.axes, CORRUPTIONS.values(), strict=True):
        assert ax.get_xlabel().replace("\n", " ") == corruption.what


def test_values_that_robustness_lacks_are_counted():
    table = toy_robustness(("brain-mr",), ("brain-mr",), ("noise", "blur"))
    of = (table.optimizer == "sam") & (table.corruption == "noise")
    table.loc[table.index[of & (table.severity == 0)][:1], "value"] = np.nan
    table = table.drop(table.index[of & (table.severity == 0.1)][:1])
    table = table[(table.optimizer != "adam") | (table.corruption != "blur")]
    noise, blur = robustness(table).axes
    assert noise.get_title() == "SAM: 2 of 20 missing"
    assert blur.get_title() == "Adam: –"


def test_robustness_of_no_network_is_an_error():
    table = toy_robustness()
    with pytest.raises(ValueError, match="expected rows of trained networks, got none alone"):
        robustness(table[table.optimizer == "none"])


def test_correlations_are_points_of_the_total_loss_and_of_what_has_no_term():
    figure = correlation(toy_correlation())
    seen, unseen = figure.axes
    assert [label.get_text() for label in seen.get_yticklabels()] == [
        "length of the weights", "rise at SAM's step, ρ = 0.01",
    ]  # fmt: skip
    assert [dot.get_xdata()[0] for dot in marked(seen, "o")] == [0.4, -0.5]
    assert [dot.get_xdata()[0] for dot in marked(unseen, "o")] == [0.1]
    sticks = [tuple(line.get_xdata()) for line in seen.lines if len(line.get_xdata()) == 2]
    assert {(0, 0.4), (0, -0.5)} <= set(sticks)
    assert len(hatched(unseen)) == 1  # the weights' correlation is not defined there
    assert seen.get_title().endswith("12 networks")
    assert unseen.get_title().endswith("10 to 12 networks")
    assert len({ax.get_xlim() for ax in figure.axes}) == 1


def test_every_network_is_a_point_in_its_optimizers_look():
    runs = toy_runs()
    figure = flatness_against_dice(runs)
    assert [ax.get_xscale() for ax in figure.axes] == ["log", "log", "linear", "linear"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    for ax, (measure, kind) in zip(
        figure.axes, itertools.product(["sam_rise 0.01", "trace"], ["seen", "unseen"]), strict=True
    ):
        for optimizer in ("adam", "sam"):
            points = np.array([line.get_xydata()[0] for line in marked(ax, looks.LOOKS[optimizer]["marker"])])
            assert np.allclose(points, runs[runs.optimizer == optimizer][[measure, kind]])
    assert figure.axes[0].get_xlabel() == "rise at SAM's step, ρ = 0.01"
    fills = {line.get_fillstyle() for line in figure.axes[0].lines}
    assert len(fills) == 2  # two training domains


def test_networks_without_a_value_are_counted():
    runs = toy_runs()
    runs.loc[0, "sam_rise 0.01"] = np.inf
    runs.loc[1, "unseen"] = np.nan
    figure = flatness_against_dice(runs)
    assert [texts(ax) for ax in figure.axes[:2]] == [[f"{n} of 8 networks without a value"] for n in (1, 2)]
    assert [texts(ax) for ax in figure.axes[2:]] == [[], ["1 of 8 networks without a value"]]  # their traces are there


DRAWN = {
    matrix: toy_results,
    paired_difference: toy_results,
    training_curves: toy_history,
    robustness: toy_robustness,
    correlation: toy_correlation,
}


@pytest.mark.parametrize("draw", DRAWN)
def test_empty_and_foreign_tables_are_explained(draw):
    with pytest.raises(ValueError, match=r"expected .*got"):
        draw(DRAWN[draw]().iloc[:0])
    if draw not in (matrix, paired_difference):  # results have their columns, or were not gathered
        with pytest.raises(ValueError, match=r"expected the columns .*got a, b"):
            draw(pd.DataFrame({"a": [1], "b": [2]}))


def test_radii_beside_dice_are_the_middle_ones_that_were_measured():
    """With radii 0.1, 0.2 and 0.5 there was no figure of any rise: only those of 0.01 were looked for."""
    runs = toy_runs().drop(columns="sam_rise 0.01")
    runs = runs.assign(**{f"sam_rise {rho}": 1.0 + runs.seed for rho in ("0.5", "0.1", "0.2")}, weight_norm=3.0)
    figure = flatness_against_dice(runs)
    names = ["rise at SAM's step, ρ = 0.2", "trace of the Hessian", "length of the weights"]
    assert [ax.get_xlabel() for ax in figure.axes[::2]] == names


def test_runs_without_any_measure_are_an_error():
    with pytest.raises(ValueError, match="expected a measure of flatness, got train_domain"):
        flatness_against_dice(toy_runs().drop(columns=["sam_rise 0.01", "trace"]))


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected rows with metric 'nope', got dice, tre"):
        matrix(toy_results(), metric="nope")


def toy_radii():
    runs = [("adam", 0.01), ("adam-2x", 0.01), *(("sam", rho) for rho in (0.01, 0.1, 1.0))]
    rows = [
        {"train_domain": BOTH, "optimizer": o, "seed": seed, "lr": 1e-3, "rho": rho, "loss": rho + seed, "domains": d}
        for (o, rho), seed, d in itertools.product(runs, (0, 1), ("seen", "unseen"))
    ]
    slow = [row | {"lr": 1e-4} for row in rows[:2]]
    heavy = [row | {"rest": "another penalty", "loss": 9.0} for row in rows[-2:]]
    table = pd.DataFrame(rows + slow + heavy).fillna({"rest": "as most"})
    return table.assign(dice=table.rho / 2 + table.seed / 10 + (table.domains == "seen") / 5)


def test_radii_are_the_means_of_seeds_against_rho():
    figure = radii(toy_radii())
    loss, seen, unseen = figure.axes
    assert [ax.get_xscale() for ax in figure.axes] == ["log"] * 3
    curve = next(line for line in loss.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(curve.get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(curve.get_ydata(), [0.51, 0.6, 1.5])
    for ax, more in ((seen, 0.2), (unseen, 0.0)):
        curve = next(line for line in ax.lines if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(curve.get_ydata(), np.array([0.005, 0.05, 0.5]) + 0.05 + more)
        assert len([line for line in ax.lines if len(line.get_xdata()) == 2]) == 2  # Adam's level lines
    assert seen.get_ylim() == unseen.get_ylim()


def test_one_radius_is_nothing_to_compare():
    rows = toy_radii()
    assert radii(rows[rows.rho == 0.01]) is None


@pytest.mark.parametrize("values", [[0.0164, 0.0181], [0.00041, 0.00049], [9.6, 10.4], [1.0, 25.0], [1e-6, 1e3]])
def test_ticks_of_a_log_axis_are_there_and_do_not_overlap(values):
    """Half the figure's width, as beside Dice; a range of ten per cent had ten labels that overlapped."""
    figure, (ax, _) = looks.panels(2, 2, 2.5)
    ax.set_xscale("log")
    ax.plot(values, [0, 1])
    run().log_ticks(ax.xaxis, pd.Series(values))
    figure.savefig(io.BytesIO(), format="png")
    low, high = ax.get_xlim()
    boxes = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]
    assert len(boxes) >= 2
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
