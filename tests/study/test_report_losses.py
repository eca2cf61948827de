"""What the report's figures of the loss say, read back from their artists; the pictures themselves are for eyes."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from scipy import integrate

from fmsam_lib.plotting import style as looks
from tests.study.report import run

TRAIN = "brain-mr"
RISES = [measure for measures in run().RISES.values() for measure in measures]


def loss_lines(landscape):
    return run("losses", landscape=landscape).figures["loss_lines"]


def loss_planes(landscape):
    return run("planes", landscape=landscape).figures["loss_planes"]


def sharpness(flatness):
    return run("sharpness", flatness=flatness).figures["sharpness"]


def spectrum(landscape):
    return run("spectrum", landscape=landscape).figures["spectrum"]


def paths(between):
    return run("paths", between=between).figures["paths"]


def solutions_plane(between):
    return run("solutions_plane", between=between).figures["solutions_plane"]


def toy_landscape(tests=("brain-mr", "heart-mr"), optimizers=("adam", "sam"), scale=1.0):
    rows = []
    ends = np.linspace(-1, 1, 5)
    for test, optimizer in itertools.product(tests, optimizers):
        k = scale * (2 if optimizer == "adam" else 1)
        who = {"train_domain": TRAIN, "test_domain": test, "optimizer": optimizer, "seed": 0, "term": "total"}
        for direction, alpha in itertools.product((1, 2, 3), ends):
            rows.append(
                who | {"kind": "line", "direction": direction, "alpha": alpha, "value": 1 + k * direction * alpha**2}
            )
        for alpha, beta in itertools.product(ends, ends):
            rows.append(who | {"kind": "plane", "alpha": alpha, "beta": beta, "value": 1 + k * (alpha**2 + beta**2)})
        for probe, (node, weight) in itertools.product((0, 1), [(-k, 0.1), (0.0, 0.6), (50 * k, 0.3)]):
            rows.append(who | {"kind": "spectrum", "direction": probe, "alpha": node + probe, "value": weight})
    rows += [row | {"term": "similarity", "value": -99.0} for row in rows]
    return pd.DataFrame(rows)


def toy_flatness(measures=tuple(RISES), trains=(TRAIN, "heart-mr"), seeds=(0, 1)):
    rows = [
        {"train_domain": train, "test_domain": "training", "optimizer": o, "seed": seed, "measure": measure, "rho": rho}
        | {"term": term, "value": (2 if o == "adam" else 1) * (1 + seed) * rho if term == "total" else -99.0}
        | {"low": 0.9 * rho, "high": 5 * rho, "n": 8}
        for train, o, seed, measure, rho, term in itertools.product(
            trains, ("adam", "sam"), seeds, measures, (0.01, 0.1, 1.0), ("total", "similarity")
        )
    ]
    return pd.DataFrame(rows)


def toy_between(tests=("training", "heart-mr"), seeds=(0, 1), bump=1.0):
    rows = []
    for test, seed in itertools.product(tests, seeds):
        who = {"train_domain": TRAIN, "test_domain": test, "baseline": "adam", "treatment": "sam", "seed": seed}
        who |= {"statistics": None, "optimizer": None, "step": None, "alpha": None, "beta": None, "term": "total"}
        for statistics, alpha in itertools.product(("interpolated", "re-estimated"), np.linspace(-0.25, 1.25, 13)):
            height = (seed + 1) * bump * (3 if statistics == "interpolated" else 1)
            value = 2 - alpha + height * 4 * alpha * (1 - alpha)  # the chord from 2 to 1, and a bump of that height
            rows.append(who | {"kind": "path", "statistics": statistics, "alpha": alpha, "value": value})
        for alpha, beta in itertools.product(np.linspace(-0.5, 1.5, 5), repeat=2):
            rows.append(who | {"kind": "plane", "alpha": alpha, "beta": beta, "value": 1 + alpha**2 + beta**2 + seed})
        for optimizer, step in itertools.product(("adam", "sam"), (0, 10, 20)):
            along = {"adam": (step / 20, 0.0), "sam": (step / 40, step / 20)}[optimizer]
            where = {"optimizer": optimizer, "step": step, "alpha": along[0], "beta": along[1]}
            outside = 0.3 if step == 10 else 0.0
            rows.append(who | where | {"kind": "trajectory", "value": outside, "term": None, "test_domain": None})
    rows += [row | {"term": "similarity", "value": -99.0} for row in rows if row["term"]]
    return pd.DataFrame(rows)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title().startswith(title))


def hatched(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]


def marked(axes, optimizer):
    """The lines in an optimizer's marker and colour."""
    look = looks.LOOKS[optimizer]
    return [
        line for line in axes.lines
        if line.get_marker() == look["marker"] and to_hex(line.get_color()).upper() == look["color"]
    ]  # fmt: skip


DRAWN = {
    loss_lines: toy_landscape,
    loss_planes: toy_landscape,
    spectrum: lambda: toy_landscape(("training",)),
    sharpness: toy_flatness,
    paths: toy_between,
    solutions_plane: toy_between,
}


@pytest.mark.parametrize("draw", DRAWN)
def test_empty_and_foreign_tables_are_explained(draw):
    with pytest.raises(ValueError, match=r"expected .*got"):
        draw(DRAWN[draw]().iloc[:0])
    with pytest.raises(ValueError, match=r"expected the columns .*got a, b"):
        draw(pd.DataFrame({"a": [1], "b": [2]}))


@pytest.mark.parametrize("draw", [d for d in DRAWN if d is not loss_planes])
def test_an_optimizer_looks_the_same_everywhere(draw):
    figure = draw(DRAWN[draw]())
    for optimizer, name in (("adam", "Adam"), ("sam", "SAM")):
        handle = next(h for h in figure.legends[0].legend_handles if h.get_label() == name)
        look = looks.LOOKS[optimizer]
        assert (to_hex(handle.get_color()).upper(), handle.get_linestyle()) == (look["color"], look["linestyle"])
        assert any(marked(ax, optimizer) for ax in figure.axes)


# --- around the weights of one network


def test_lines_are_means_and_bands_the_range_over_directions():
    axes = loss_lines(toy_landscape(("brain-mr",))).axes[0]
    (adam,) = marked(axes, "adam")
    assert np.allclose(adam.get_ydata(), 1 + 2 * 2 * np.linspace(-1, 1, 5) ** 2)
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1, 7))


@pytest.mark.parametrize(("scale", "expected"), [(1.0, "linear"), (100.0, "log")])
def test_a_wide_range_of_losses_is_logarithmic(scale, expected):
    figure = loss_lines(toy_landscape(scale=scale))
    assert {ax.get_yscale() for ax in figure.axes} == {expected}
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_planes_share_levels_and_mark_the_trained_weights(scale):
    figure = loss_planes(toy_landscape(("brain-mr",), scale=scale))
    adam, sam = panel(figure, "Adam"), panel(figure, "SAM")
    assert np.array_equal(adam.collections[0].levels, sam.collections[0].levels)
    for ax in (adam, sam):
        assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines] == [(0, 0)]


def test_the_first_seed_and_the_first_plane_are_shown():
    first = toy_landscape(("brain-mr",)).assign(seed=3)
    second = first[first.kind == "plane"].assign(seed=4, value=1e6)
    figure = loss_planes(pd.concat([second, first]))
    assert panel(figure, "Adam").collections[0].levels.max() == pytest.approx(5)


def test_planes_are_of_a_seed_that_all_optimizers_have():
    first = toy_landscape(("brain-mr",)).assign(seed=3)
    second = first[first.kind == "plane"].assign(seed=4, value=lambda rows: rows.value + 100)
    figure = loss_planes(pd.concat([second, first[first.optimizer != "adam"]]))
    assert panel(figure, "Adam").collections[0].levels.max() > 50
    assert panel(figure, "SAM").collections[0].levels.max() > 50


def test_planes_of_two_seeds_that_as_many_have_are_of_one():
    rows = toy_landscape(("brain-mr",))
    third = rows[rows.optimizer == "sam"].assign(optimizer="adam-2x")
    first, second = rows.assign(seed=3), pd.concat([rows[rows.optimizer == "adam"], third]).assign(seed=4)
    assert not panel(loss_planes(pd.concat([first, second])), "Adam, twice the steps").collections


def test_a_missing_plane_or_line_is_named():
    landscape = toy_landscape()
    landscape = landscape[(landscape.optimizer != "sam") | (landscape.test_domain != "heart-mr")]
    figure = loss_planes(landscape)
    assert [bool(hatched(ax)) for ax in figure.axes[:4]] == [False, False, False, True]
    figure = loss_lines(landscape)
    assert [ax.get_title().endswith("SAM: –") for ax in figure.axes] == [False, True]


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_counted_and_hatched(nothing):
    landscape = toy_landscape(("brain-mr",))
    broken = (landscape.optimizer == "adam") & (landscape.term == "total") & (landscape.alpha == 1)
    landscape.loc[broken, "value"] = nothing
    planes = loss_planes(landscape)
    assert "5 not finite" in texts(panel(planes, "Adam"))
    assert hatched(panel(planes, "Adam"))
    assert not hatched(panel(planes, "SAM"))
    assert np.isfinite(panel(planes, "Adam").collections[0].levels).all()
    assert "3 not finite" in texts(loss_lines(landscape).axes[0])


def test_a_plane_without_any_finite_loss_is_an_error():
    landscape = toy_landscape(("brain-mr",)).assign(value=np.nan)
    with pytest.raises(ValueError, match="expected losses on a plane, got 50 values of which none is finite"):
        loss_planes(landscape)


def test_sharpness_is_the_mean_and_range_of_seeds_for_each_measure():
    figure = sharpness(toy_flatness())
    assert [ax.get_title() for ax in figure.axes] == [looks.MEASURES[measure] for measure in RISES] * 2
    for ax in figure.axes:
        (adam,), (sam,) = (marked(ax, optimizer) for optimizer in ("adam", "sam"))
        assert np.allclose(adam.get_ydata(), 3 * adam.get_xdata())
        assert np.allclose(sam.get_ydata(), 1.5 * sam.get_xdata())
        band = ax.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.02, 4))
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_plain_and_adaptive_radii_have_a_scale_of_their_own_that_trainings_share():
    table = toy_flatness()
    adaptive = table.measure.isin(RISES[3:])
    table.loc[adaptive, "rho"] *= 100
    axes = np.array(sharpness(table).axes).reshape(4, 3)
    limits = [[(ax.get_xlim(), ax.get_ylim()) for ax in row] for row in axes]
    assert limits[0] == limits[2]
    assert limits[1] == limits[3]
    assert len({limit[0] for row in limits for limit in row}) == 2
    table.loc[(table.train_domain == "heart-mr") & ~adaptive, "value"] *= 1000
    axes = np.array(sharpness(table).axes).reshape(4, 3)
    assert len({ax.get_ylim() for row in axes[::2] for ax in row}) == 1
    assert len({ax.get_ylim() for row in axes for ax in row}) == 2


def test_whiskers_are_the_intervals_of_rises_under_noise():
    figure = sharpness(toy_flatness(trains=(TRAIN,)))
    for ax, measure in zip(figure.axes, RISES, strict=True):
        whiskers = [c for c in ax.collections if hasattr(c, "get_segments")]
        assert bool(whiskers) == ("noise" in measure)
        for of_optimizer in whiskers:
            for (rho, low), (_, high) in of_optimizer.get_segments():
                assert (low, high) == pytest.approx((max(0.9 * rho, 0.01), 5 * rho))  # 0.01: the lowest rise in it


def test_rises_that_a_log_scale_cannot_show_are_counted():
    table = toy_flatness(("sam_rise",), trains=(TRAIN,))
    table.loc[(table.rho == 0.01) & (table.term == "total"), "value"] = -1e-6
    table.loc[(table.rho == 0.1) & (table.term == "total") & (table.seed == 1), "value"] = np.nan
    figure = sharpness(table)
    assert len(figure.axes) == 3  # no adaptive measure, no second row
    assert "4 not above 0\n2 not finite" in texts(figure.axes[0])
    assert figure.axes[1].get_title().endswith("Adam: –\nSAM: –")


def test_sharpness_without_a_rise_says_which_measures_it_takes():
    with pytest.raises(ValueError, match=r"expected rows with one of the measures sam_rise.*got none"):
        sharpness(toy_flatness(("trace",)))
    with pytest.raises(ValueError, match="expected rows with test_domain 'training', got nowhere"):
        sharpness(toy_flatness().assign(test_domain="nowhere"))


def test_the_spectrums_density_integrates_to_one_and_peaks_at_its_nodes():
    axes = spectrum(toy_landscape(("training",))).axes[0]
    linear = 1e-3 * 101
    curves = [line for line in axes.lines if len(line.get_xdata()) > 3]
    assert len(curves) == 2
    for line, k in zip(curves, (2, 1), strict=True):
        place, density = np.arcsinh(line.get_xdata() / linear), line.get_ydata()
        assert integrate.trapezoid(density, place) == pytest.approx(1, abs=1e-3)
        near = np.abs(place - np.arcsinh(50 * k / linear)) < 1
        assert integrate.trapezoid(density[near], place[near]) == pytest.approx(0.3, abs=1e-2)
    assert (axes.get_xscale(), axes.get_yscale()) == ("asinh", "log")


def test_the_spectrums_ends_are_marked_and_written():
    axes = spectrum(toy_landscape(("training",))).axes[0]
    for optimizer, ends in (("adam", (-2, 101)), ("sam", (-1, 51))):
        (marks,) = marked(axes, optimizer)
        assert tuple(marks.get_xdata()) == ends
    assert "Adam: −2 to 101\nSAM: −1 to 51" in axes.get_title()


def test_nodes_that_are_not_finite_are_counted():
    landscape = toy_landscape(("training",))
    where = (landscape.kind == "spectrum") & (landscape.term == "total")
    landscape.loc[landscape.index[where][0], "alpha"] = np.nan
    assert "1 not finite" in texts(spectrum(landscape).axes[0])
    landscape.loc[where, "alpha"] = np.nan
    with pytest.raises(ValueError, match="expected nodes of a spectrum, got 12 of which none is finite"):
        spectrum(landscape)


def test_a_hessian_of_zeros_is_drawn():
    landscape = toy_landscape(("training",))
    landscape.loc[landscape.kind == "spectrum", "alpha"] = 0.0
    axes = spectrum(landscape).axes[0]
    assert np.isfinite(axes.get_xlim()).all()
    assert np.isfinite(axes.get_ylim()).all()


# --- between two networks


def dashes(line):
    return "re-estimated" if line.get_linestyle() == "-" else "interpolated"


def test_paths_are_means_of_seeds_in_a_style_for_either_statistics():
    figure = paths(toy_between())
    assert len(figure.axes) == 2
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    for ax in figure.axes:
        curves = {dashes(line): line for line in ax.lines if len(line.get_xdata()) == 13}
        for statistics, height in (("interpolated", 4.5), ("re-estimated", 1.5)):
            alpha, loss = curves[statistics].get_data()
            assert np.allclose(loss, 2 - alpha + height * 4 * alpha * (1 - alpha))
        band = ax.collections[0].get_paths()[0].vertices  # re-estimated: seeds' bumps of 1 and 2
        assert band[:, 1].max() == pytest.approx(1.5 + 2)


def test_the_barrier_is_the_mean_of_seeds_and_is_drawn_from_the_chord():
    axes = paths(toy_between()).axes[0]
    assert "barrier, re-estimated: 1.5 (1 to 2)\nbarrier, interpolated: 4.5 (3 to 6)" in axes.get_title()
    bars = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
    assert np.allclose(bars, [[(0.5, 1.5), (0.5, 1.5 + height)] for height in (1.5, 4.5)])


def test_a_path_that_stays_below_its_chord_has_no_barrier():
    axes = paths(toy_between(bump=-0.2, seeds=(0,))).axes[0]
    assert "barrier, re-estimated: 0\n" in axes.get_title()
    assert not [c for c in axes.collections if hasattr(c, "get_segments")]


def test_a_barrier_over_a_loss_that_is_not_finite_is_not_a_number():
    between = toy_between(("training",), seeds=(0,))
    broken = (between.kind == "path") & (between.statistics == "interpolated") & (between.alpha == 0.5)
    between.loc[broken & (between.term == "total"), "value"] = np.inf
    axes = paths(between).axes[0]
    assert "barrier, interpolated: nan" in axes.get_title()
    assert "1 not finite" in texts(axes)
    axes = paths(between[between.statistics != "interpolated"]).axes[0]
    assert axes.get_title().endswith("interpolated: –")


def test_ways_end_at_the_solutions_and_start_together():
    figure = solutions_plane(toy_between())
    for ax in figure.axes[:2]:
        for optimizer, end in (("adam", (1, 0)), ("sam", (0.5, 1))):
            way, solution = marked(ax, optimizer)
            assert way.get_xydata()[-1] == pytest.approx(end)
            assert way.get_xydata().shape == (3, 2)
            assert solution.get_xydata()[0] == pytest.approx(end)
        starts = [line.get_xydata() for line in ax.lines if line.get_marker() == "P"]
        assert np.allclose(starts, 0)
        assert ax.get_title().endswith("Adam: up to 30 % outside the plane\nSAM: up to 30 % outside the plane")
        assert ax.get_aspect() == 1


def test_the_first_seeds_plane_is_shown_on_one_scale():
    between = toy_between()
    between.loc[(between.test_domain == "heart-mr") & (between.kind == "plane"), "value"] += 10
    one, other = solutions_plane(between).axes[:2]
    assert np.array_equal(one.collections[0].levels, other.collections[0].levels)
    assert one.collections[0].levels[[0, -1]] == pytest.approx((1, 1 + 2 * 1.5**2 + 10))


def test_a_plane_without_a_way_says_so():
    between = toy_between(("training",))
    between = between[(between.kind != "trajectory") | (between.optimizer != "sam")]
    axes = solutions_plane(between).axes[0]
    assert axes.get_title().endswith("SAM: no trajectory")
    assert not marked(axes, "sam")
