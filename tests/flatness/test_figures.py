"""What the figures of notebooks 04, 05, 30 and 35 say, read back from their artists: their cells, on tiny tables."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from scipy import integrate

from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Landscape
from fmsam_lib.plotting import style as looks
from fmsam_lib.plotting.slices import png
from tests.conftest import PROJECT

DOMAINS = ("training", "heart-mr")


def cells(name, /, *tags, **given):
    """The names that a notebook's cells with one of these tags leave behind, begun with those that are given."""
    notebook = json.loads(next((PROJECT / "notebooks").glob(f"{name}_*.ipynb")).read_text())
    for cell in notebook["cells"]:
        if set(tags) & set(cell["metadata"].get("tags", [])):
            exec("".join(cell["source"]), given)
    return given


def texts(axes):
    return [text.get_text() for text in axes.texts]


def marked(axes, optimizer):
    """The lines in an optimizer's marker and colour."""
    look = looks.LOOKS[optimizer]
    lines = [line for line in axes.lines if line.get_marker() == look["marker"]]
    return [line for line in lines if to_hex(line.get_color()).upper() == look["color"]]


def bars(axes):
    """Vertical lines: whiskers, barriers."""
    return [segment for c in axes.collections if hasattr(c, "get_segments") for segment in c.get_segments()]


# --- 30: around the weights of one network


def landscape_rows(scale=1.0):
    rows, ends = [], np.linspace(-1, 1, 5)
    for k, where in enumerate(DOMAINS, start=1):
        k *= scale
        for direction, alpha in itertools.product((1, 2, 3), ends):
            value = 1 + k * direction * alpha**2
            rows.append({"kind": "line", "direction": direction, "alpha": alpha, "value": value, "test_domain": where})
        for alpha, beta in itertools.product(ends, ends):
            value = 1 + k * (alpha**2 + beta**2)
            rows.append({"kind": "plane", "alpha": alpha, "beta": beta, "value": value, "test_domain": where})
        for probe, (node, weight) in itertools.product((0, 1), [(-k, 0.1), (0.0, 0.6), (50 * k, 0.3)]):
            rows.append({"kind": "spectrum", "direction": probe, "alpha": node + probe, "value": weight})
            rows[-1]["test_domain"] = where
    rows = [row | {"term": "total"} for row in rows] + [row | {"term": "similarity", "value": -99.0} for row in rows]
    cosine = {"kind": "cosine", "direction": 0, "alpha": 1, "value": -0.02, "test_domain": "training"}
    return pd.DataFrame([*rows, cosine])


PLAIN = ["sam_rise", "ascent_rise", "noise_rise"]
ADAPTIVE = ["asam_rise", "adaptive_ascent_rise", "adaptive_noise_rise"]
RADII = [0.02, 0.2, 2.0]  # none of the defaults


def flat_rows(where="training"):
    rows = [
        {"measure": measure, "rho": rho, "term": term, "value": 2 * rho if term == "total" else -99.0}
        | {"low": -rho, "high": 5 * rho, "test_domain": where}
        for measure, rho, term in itertools.product([*PLAIN, *ADAPTIVE], RADII, ("total", "similarity"))
    ]
    return pd.DataFrame(rows)


def around(*tags, table=None, flat=None, **settings):
    """The names behind the tagged cells of notebook 30."""
    return cells(
        "30",
        "lines",
        *tags,
        pd=pd,
        table=landscape_rows() if table is None else table,
        flat=flat_rows() if flat is None else flat,
        about={"train_domain": "brain-mr", "optimizer": "sam", "seed": 0},
        batches=dict.fromkeys(DOMAINS),
        settings=Landscape(rhos=RADII, **settings),
    )


def test_lines_are_means_and_bands_the_range_over_directions(capsys):
    figure = around()["figure"]
    assert [ax.get_title() for ax in figure.axes] == ["measured on training images", "tested on heart-mr"]
    (mean,) = marked(figure.axes[0], "sam")
    assert np.allclose(mean.get_ydata(), 1 + 2 * np.linspace(-1, 1, 5) ** 2)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1, 4))
    assert figure.legends[0].get_texts()[0].get_text() == "SAM"
    assert "largest cosine between two directions: 0.0200" in capsys.readouterr().out


@pytest.mark.parametrize(("scale", "expected"), [(1.0, "linear"), (100.0, "log")])
def test_a_wide_range_of_losses_is_logarithmic(scale, expected):
    axes = around(table=landscape_rows(scale))["figure"].axes
    assert {ax.get_yscale() for ax in axes} == {expected}
    assert len({ax.get_ylim() for ax in axes}) == 1


@pytest.mark.parametrize(("normalisation", "says"), [("filter", "each filter's norm"), ("none", "of length 1")])
def test_distances_have_their_unit(normalisation, says):
    assert says in around(normalisation=normalisation)["figure"].get_supxlabel()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_planes_share_levels_and_mark_the_trained_weights(scale):
    one, other = around("planes", table=landscape_rows(scale))["figure"].axes[:2]
    assert np.array_equal(one.collections[0].levels, other.collections[0].levels)
    assert one.collections[0].levels[[0, -1]] == pytest.approx((1, 1 + 4 * scale))
    for ax in (one, other):
        assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines] == [(0, 0)]


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_counted_and_hatched(nothing):
    table = landscape_rows()
    table.loc[(table.test_domain == "heart-mr") & (table.term == "total") & (table.alpha == 1), "value"] = nothing
    one, other = around("planes", table=table)["figure"].axes[:2]
    assert "5 not finite" in texts(other)
    assert other.patch.get_hatch()
    assert not texts(one)
    assert np.isfinite(other.collections[0].levels).all()
    assert "3 not finite" in texts(around(table=table)["figure"].axes[1])


def test_a_network_whose_loss_is_nowhere_finite_is_drawn_as_a_hole():
    table = landscape_rows()
    table.loc[table.kind == "plane", "value"] = np.nan
    figure = around("planes", table=table)["figure"]
    assert ["25 not finite" in texts(ax) for ax in figure.axes[:2]] == [True, True]
    assert len(png(figure)) > 5_000


def test_the_minimum_of_every_plane_is_listed_and_one_that_is_not_finite_is_not():
    table = landscape_rows()
    table.loc[(table.kind == "plane") & (table.test_domain == "heart-mr"), "value"] = np.nan
    names = around("planes", table=table)
    found = names["planes"].loc[names["lowest"]]
    assert found[["test_domain", "alpha", "beta", "value"]].values.tolist() == [["training", 0, 0, 1]]


def test_rises_are_drawn_for_every_measure_and_any_radii():
    axes = around("rises")["figure"].axes
    assert [ax.get_title() for ax in axes] == [looks.MEASURES[measure] for measure in [*PLAIN, *ADAPTIVE]]
    for ax in axes:
        (line,) = marked(ax, "sam")
        assert np.allclose(line.get_xdata(), RADII)
        assert np.allclose(line.get_ydata(), 2 * np.array(RADII))
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0.02", "0.2", "2"]
    assert len({ax.get_ylim() for ax in axes[:3]}) == 1


def test_plain_and_adaptive_rises_have_a_scale_each():
    flat = flat_rows()
    flat.loc[flat.measure.isin(ADAPTIVE), "value"] *= 1000
    axes = around("rises", flat=flat)["figure"].axes
    assert [len({ax.get_ylim() for ax in row}) for row in (axes[:3], axes[3:], axes)] == [1, 1, 2]


def test_whiskers_are_the_intervals_of_rises_under_noise():
    for ax, measure in zip(around("rises")["figure"].axes, [*PLAIN, *ADAPTIVE], strict=True):
        whiskers = bars(ax)
        assert bool(whiskers) == ("noise" in measure)
        for (rho, low), (_, high) in whiskers:
            assert (low, high) == pytest.approx((2 * RADII[0], 5 * rho))  # cut at the lowest rise of all


def test_rises_that_a_log_scale_cannot_show_are_counted():
    flat = flat_rows()
    total = (flat.measure == "sam_rise") & (flat.term == "total")
    flat.loc[total & (flat.rho == RADII[0]), "value"] = -1e-6
    flat.loc[total & (flat.rho == RADII[1]), "value"] = np.inf
    assert "1 not above 0\n1 not finite" in texts(around("rises", flat=flat)["figure"].axes[0])


def test_flatness_measured_elsewhere_than_on_training_images_is_shown():
    names = around("rises", "spectrum", flat=flat_rows("heart-mr"))
    assert "tested on heart-mr" in names["figure"].axes[0].get_xlabel()
    assert names["ends"].tolist() == [-2, 101]


def test_the_spectrums_density_integrates_to_one_and_peaks_at_its_nodes():
    names = around("rises", "spectrum")
    (axes,), linear = names["figure"].axes, 1e-3 * 51
    curve = next(line for line in axes.lines if len(line.get_xdata()) > 3)
    place, density = np.arcsinh(curve.get_xdata() / linear), curve.get_ydata()
    assert integrate.trapezoid(density, place) == pytest.approx(1, abs=1e-3)
    near = np.abs(place - np.arcsinh(50 / linear)) < 1
    assert integrate.trapezoid(density[near], place[near]) == pytest.approx(0.3, abs=1e-2)
    assert (axes.get_xscale(), axes.get_yscale()) == ("asinh", "log")
    (ends,) = marked(axes, "sam")
    assert tuple(ends.get_xdata()) == (-1, 51)
    assert axes.get_title() == "eigenvalues from −1 to 51"


def test_nodes_that_are_not_finite_are_counted():
    table = landscape_rows()
    where = (table.kind == "spectrum") & (table.term == "total") & (table.test_domain == "training")
    table.loc[table.index[where][0], "alpha"] = np.inf
    assert "1 not finite" in texts(around("rises", "spectrum", table=table)["figure"].axes[0])


def test_a_hessian_of_zeros_is_drawn():
    table = landscape_rows()
    table.loc[table.kind == "spectrum", "alpha"] = 0.0
    (axes,) = around("rises", "spectrum", table=table)["figure"].axes
    assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()


@pytest.mark.parametrize("left", ["none", "not finite"])
def test_without_a_spectrum_there_is_no_figure_of_it(left):
    table = landscape_rows()
    table.loc[table.kind == "spectrum", "alpha"] = np.nan
    names = around("rises", "spectrum", table=table[table.kind != "spectrum"] if left == "none" else table)
    assert len(names["figure"].axes) == 6  # of the rises


# --- 35: between two networks


def between_rows(bump=1.0):
    rows = []
    for i, where in enumerate(DOMAINS):
        for statistics, alpha in itertools.product(("interpolated", "re-estimated"), np.linspace(-0.25, 1.25, 13)):
            height = bump * (3 if statistics == "interpolated" else 1)
            value = 2 - alpha + height * 4 * alpha * (1 - alpha)  # the chord from 2 to 1, and a bump of that height
            rows.append({"kind": "path", "statistics": statistics, "alpha": alpha, "value": value})
            rows[-1]["test_domain"] = where
        for alpha, beta in itertools.product(np.linspace(-0.5, 1.5, 5), repeat=2):
            value = 1 + alpha**2 + beta**2 + 10 * i
            rows.append({"kind": "plane", "alpha": alpha, "beta": beta, "value": value, "test_domain": where})
    rows = [row | {"term": "total"} for row in rows] + [row | {"term": "similarity", "value": -99.0} for row in rows]
    for optimizer, step in itertools.product(("adam", "sam"), (0, 10, 20)):
        alpha, beta = {"adam": (step / 20, 0.0), "sam": (step / 40, step / 20)}[optimizer]
        way = {"kind": "trajectory", "optimizer": optimizer, "step": step, "alpha": alpha, "beta": beta}
        rows.append(way | {"value": 0.3 if step == 10 else 0.0})
    return pd.DataFrame(rows).assign(train_domain="brain-mr", baseline="adam", treatment="sam", seed=0)


def paths(table):
    return cells("35", "paths", table=table)["figure"].axes


def test_paths_have_a_style_for_either_statistics_and_one_scale():
    axes = paths(between_rows())
    assert len({ax.get_ylim() for ax in axes}) == 1
    for ax in axes:
        curves = {line.get_linestyle() == "-": line for line in ax.lines if len(line.get_xdata()) == 13}
        for anew, height in ((False, 3), (True, 1)):
            alpha, loss = curves[anew].get_data()
            assert np.allclose(loss, 2 - alpha + height * 4 * alpha * (1 - alpha))
        for optimizer, place in (("adam", (0, 2)), ("sam", (1, 1))):
            assert {tuple(*line.get_xydata()) for line in marked(ax, optimizer)} == {place}


def test_the_barrier_is_written_and_drawn_from_the_chord():
    axes = paths(between_rows())[0]
    assert axes.get_title().endswith("barrier, re-estimated: 1\nbarrier, interpolated: 3")
    assert np.allclose(bars(axes), [[(0.5, 1.5), (0.5, 1.5 + height)] for height in (1, 3)])


def test_a_path_that_stays_below_its_chord_has_no_barrier():
    axes = paths(between_rows(bump=-0.2))[0]
    assert "barrier, re-estimated: 0\n" in axes.get_title()
    assert not bars(axes)


def test_a_barrier_over_a_loss_that_is_not_finite_is_not_a_number():
    table = between_rows()
    table.loc[(table.statistics == "interpolated") & (table.alpha == 0.5) & (table.term == "total"), "value"] = np.inf
    axes = paths(table)[0]
    assert "barrier, interpolated: nan" in axes.get_title()
    assert "1 not finite" in texts(axes)


def test_ways_begin_together_and_end_at_the_solutions_on_one_scale():
    axes = cells("35", "paths", "plane", table=between_rows())["figure"].axes[:2]
    for ax in axes:
        for optimizer, end in (("adam", (1, 0)), ("sam", (0.5, 1))):
            way, solution = marked(ax, optimizer)
            assert way.get_xydata()[-1] == pytest.approx(end)
            assert way.get_xydata().shape == (3, 2)
            assert solution.get_xydata()[0] == pytest.approx(end)
        assert np.allclose([line.get_xydata() for line in ax.lines if line.get_marker() == "P"], 0)
        assert ax.get_title().endswith("Adam: up to 30 % outside the plane\nSAM: up to 30 % outside the plane")
        assert ax.get_aspect() == 1
        assert ax.collections[0].levels[[0, -1]] == pytest.approx((1, 1 + 2 * 1.5**2 + 10))


# --- 04 and 05: the climb


@pytest.fixture(scope="module")
def toy():
    return SimpleNamespace(**cells("04", "toy"))


def test_both_minima_are_about_as_deep_and_one_is_sharper(toy):
    sharp, flat = (float(toy.two_minima(toy.minima[name])) for name in ("sharp", "flat"))
    assert sharp < flat < sharp + 0.15
    assert toy.curvature["sharp"] > 3 * toy.curvature["flat"]
    for w in toy.minima.values():
        assert torch.autograd.functional.jacobian(toy.two_minima, w).norm() < 1e-8


@pytest.mark.parametrize(("rho", "ends"), [(0.0, "sharp"), (0.001, "sharp"), (0.1, "sharp"), (0.35, "flat")])
def test_sam_leaves_the_sharp_minimum_once_its_radius_is_large_enough(toy, rho, ends):
    assert toy.ends_in(toy.descend((-0.9, 1.0), rho)) == ends


def test_far_from_any_minimum_is_neither(toy):
    assert toy.ends_in(torch.tensor([[-1.0, 1.0]], dtype=torch.float64)) == "neither"


def test_a_radius_of_0_is_gradient_descent_and_a_tiny_one_goes_its_way(toy):
    plain, w = toy.descend((-0.9, 1.0), 0.0), torch.tensor((-0.9, 1.0), dtype=torch.float64)
    assert len(plain) == 81
    assert torch.equal(plain[0], w)
    for place in plain[1:]:  # written out
        w = w - 0.12 * torch.autograd.functional.jacobian(toy.two_minima, w)
        assert torch.allclose(w, place, atol=1e-12)
    assert (toy.descend((-0.9, 1.0), 1e-6) - plain).abs().max() < 1e-5


def test_at_small_radii_the_rise_of_both_minima_is_its_second_order(toy):
    measured = {name: toy.rise(w, 0.01) for name, w in toy.minima.items()}
    for name, rise in measured.items():
        assert rise == pytest.approx(0.01**2 * toy.curvature[name] / 2, rel=0.01)
    assert measured["sharp"] > 3 * measured["flat"]


def test_sams_objective_prefers_the_flat_minimum_before_sam_does(toy):
    assert 0.18 < toy.crossing < 0.2
    assert toy.ends_in(toy.descend((-0.9, 1.0), 0.25)) == "sharp"
    for w in toy.minima.values():
        for rho in (0.1, 0.4, 0.8):  # within rho the loss is highest on the circle
            assert toy.worst_loss(w, rho) == pytest.approx(float(toy.two_minima(w)) + toy.rise(w, rho))


def test_the_climb_has_its_length_and_the_legend_says_where_paths_end(toy):
    assert float(toy.eps.norm()) == pytest.approx(0.35)
    figure = toy.paths(0.01, -0.9, 1.0)
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert said == ["gradient descent: ends near sharp", "SAM, ρ = 0.01: ends near sharp"]
    assert len(png(figure)) > 10_000


@pytest.fixture(scope="module")
def real():
    """The names behind the cells of the real network, a tiny one."""
    torch.manual_seed(0)
    dataset, net = open_domain("brain-mr", shape=(32, 32)), GradICON(2, down=(4, 8), levels=2, last_step=False)
    for step in net.steps:
        torch.nn.init.normal_(step.last.weight, std=0.02)
    nets, loss_settings = {"here": net, "trained": net}, {"lmbda": 1.5, "sigma": 3.0}
    given = {"nets": nets, "dataset": dataset, "loss_settings": loss_settings}
    return cells("05", "climbs", "pictures", run=SimpleNamespace(rho=0.5), torch=torch, **given)


def test_climbs_are_drawn_on_one_scale_beside_their_predictions(real):
    axes = real["figure"].axes
    assert [ax.get_title() for ax in axes[:3]] == ["total", "similarity", "λ × penalty"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    table = real["climbs"].query("stage == 'here' and term == 'total'")
    first, second, rise = (axes[0].lines[i].get_ydata() for i in range(3))
    np.testing.assert_array_equal(first, table["first"])
    np.testing.assert_array_equal(second, table.second)
    np.testing.assert_array_equal(rise, table.rise.abs())


def test_a_registration_from_w_has_not_moved_and_one_from_afar_has(real):
    first, second = (ax.get_xlabel() for ax in real["pictures"]([0.0, 0.5]).axes)
    assert "moved by 0 samples" in first
    assert "moved by 0 samples" not in second
    phi_map, terms = real["registered"](0.0)
    assert phi_map.shape == (1, 2, 32, 32)
    assert terms[0] == pytest.approx(terms[1] + terms[2])


def test_the_radius_to_judge_is_among_those_shown(real):
    assert "0.5" in [ax.get_title().removeprefix("ρ = ") for ax in real["shown"].axes]


@pytest.mark.parametrize(("share", "says"), [(99.996, "100 % folded"), (0.0412, "0.04 % folded"), (0, "\n0 % folded")])
def test_percentages_are_read_easily(real, monkeypatch, share, says):
    monkeypatch.setitem(real, "folding_percent", lambda jacobian: share)
    assert says in real["pictures"]([0.0]).axes[0].get_xlabel()
