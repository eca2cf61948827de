"""What the figures say, read back from their artists; the pictures themselves are for eyes."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from fmsam_lib import plots, slices
from fmsam_lib.evaluate import per_pair, table
from fmsam_lib.spatial import identity_map, jacobian_determinant
from fmsam_lib.synthetic import Pair

BOTH = "brain-mr+lung-ct"
TERMS = ["total", "similarity", "regulariser"]


def toy_pair(shape, labels=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, *shape, generator=generator)
    inside = (identity_map(shape)[0] - 0.5).square().sum(0)[None] < 0.1
    label = inside.to(torch.uint8) * 3 if labels else None
    spacing = (1.0, 2.0, 3.0)[: len(shape)]
    affine = torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))]))
    return Pair("toy", images[0], images[1], label, label, {3: "ball"}, spacing, affine)


def shrunk(shape):
    """A map that halves the fixed grid towards the moving image's centre."""
    return identity_map(shape) * 0.5 + 0.25


def toy_results(trains=("brain-mr", BOTH), tests=("brain-mr", "heart-mr"), seeds=(0, 1)):
    rng = np.random.default_rng(0)
    rows = [("", test, "none", None, f"p{p}", "a", "dice", rng.random(), "1") for test in tests for p in range(3)]
    for train, test, optimizer, seed, p in itertools.product(trains, tests, ("adam", "sam"), seeds, range(3)):
        rows += [(train, test, optimizer, seed, f"p{p}", label, "dice", rng.random(), "1") for label in "ab"]
        rows.append((train, test, optimizer, seed, f"p{p}", "", "tre", rng.random(), "mm"))
    return pd.DataFrame(rows, columns=plots.RESULTS.split())


def toy_landscape(tests=("brain-mr", "heart-mr"), optimizers=("adam", "sam"), scale=1.0):
    rows = []
    ends = np.linspace(-1, 1, 5)
    for test, optimizer in itertools.product(tests, optimizers):
        k = scale * (2 if optimizer == "adam" else 1)
        who = {"train_domain": "brain-mr", "test_domain": test, "optimizer": optimizer, "seed": 0, "term": "total"}
        for direction, alpha in itertools.product((1, 2, 3), ends):
            rows.append(
                who | {"kind": "line", "direction": direction, "alpha": alpha, "value": 1 + k * direction * alpha**2}
            )
        for alpha, beta in itertools.product(ends, ends):
            rows.append(who | {"kind": "plane", "alpha": alpha, "beta": beta, "value": 1 + k * (alpha**2 + beta**2)})
        rows += [who | {"kind": "rise", "rho": rho, "value": k * rho} for rho in (0.01, 0.1, 1.0)]
    rows += [row | {"term": "similarity", "value": -99.0} for row in rows]
    return pd.DataFrame(rows)


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


def shown(figure, title):
    return np.asarray(panel(figure, title).images[0].get_array())


def hatched(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]


# --- pairs


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_plane_shown_is_the_one_asked_for(axis):
    pair = toy_pair((6, 7, 8))
    figure = plots.registration(pair, axis=axis, index=3)
    assert np.array_equal(shown(figure, "fixed"), pair.fixed[0].select(axis, 3).T.numpy())
    assert np.array_equal(shown(figure, "moving"), pair.moving[0].select(axis, 3).T.numpy())
    assert f"{slices.PLANES[axis]} slice 3" in figure.get_suptitle()


def test_patients_axes_point_right_and_up_and_voxels_keep_their_aspect():
    figure = plots.registration(toy_pair((6, 7, 8)), axis=1)
    axes = panel(figure, "fixed")
    assert texts(axes)[:4] == ["L", "R", "I", "S"]
    assert axes.images[0].origin == "lower"
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left, top - bottom) == pytest.approx((6 * 1.0, 8 * 3.0))


def test_a_flipped_axis_says_so():
    pair = toy_pair((6, 7))
    pair.affine[0, 0] = -1
    assert texts(panel(plots.registration(pair), "fixed"))[:4] == ["R", "L", "P", "A"]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 8)])
def test_the_identity_shows_the_moving_image_and_no_change(shape):
    pair = toy_pair(shape)
    figure = plots.registration(pair, identity_map(shape))
    assert np.allclose(shown(figure, "warped"), shown(figure, "moving"), atol=1e-5)
    assert np.allclose(shown(figure, "Jacobian"), 1, atol=1e-4)
    assert "0 % folded" in panel(figure, "Jacobian").get_title()


@pytest.mark.parametrize(("shape", "axis"), [((6, 7), None), ((6, 7, 8), 0), ((6, 7, 8), 1), ((6, 7, 8), 2)])
def test_the_jacobian_of_a_plane_is_the_volumes(shape, axis):
    phi_map = shrunk(shape) + 0.01 * torch.randn(1, len(shape), *shape, generator=torch.Generator().manual_seed(1))
    index = None if axis is None else 3
    expected = jacobian_determinant(phi_map)[0]
    expected = expected.T if axis is None else expected.select(axis, 3).T
    assert np.allclose(slices.cut(toy_pair(shape), phi_map, axis=axis, index=index).jacobian, expected, atol=1e-5)


def test_strength_morphs_from_the_identity_to_the_map():
    pair = toy_pair((6, 7, 8))
    nothing, half, all_of_it = (slices.cut(pair, shrunk((6, 7, 8)), strength=s) for s in (0.0, 0.5, 1.0))
    assert np.allclose(nothing.warped, nothing.moving, atol=1e-5)
    assert np.allclose(half.phi, (nothing.phi + all_of_it.phi) / 2, atol=1e-4)
    assert np.allclose(all_of_it.jacobian, 1 / 8, atol=1e-4)


def test_folds_are_counted():
    title = panel(
        plots.registration(toy_pair((6, 7)), 1 - identity_map((6, 7)) * torch.tensor([1, -1]).view(1, 2, 1, 1)),
        "Jacobian",
    )
    assert "100 % folded" in title.get_title() or "1e+02 % folded" in title.get_title()


@pytest.mark.parametrize(("unit", "written"), [("mm", " mm"), ("voxel", " voxels")])
def test_the_scale_bar_says_millimetres_only_where_they_are_known(unit, written):
    figure = plots.registration(dataclasses.replace(toy_pair((16, 18)), unit=unit))
    assert any(text.get_text().endswith(written) for text in figure.axes[0].texts)


def test_a_checkerboard_is_of_both():
    board = slices.checkerboard(np.zeros((8, 6)), np.ones((8, 6)), squares=4)
    assert board[:2, :2].sum() == 0
    assert board[:2, 2:4].min() == 1
    assert board.mean() == pytest.approx(0.5)


def test_a_pair_without_labels_spacing_or_affine_is_shown():
    bare = Pair("bare", torch.rand(1, 6, 7), torch.rand(1, 6, 7))
    figure = plots.registration(bare, identity_map((6, 7)))
    assert not figure.legends
    assert any("samples" in text for text in texts(panel(figure, "fixed")))


@pytest.mark.parametrize(
    ("phi_map", "where", "message"),
    [
        (identity_map((5, 5, 5)), {}, r"expected a map \(1, 3, 6, 7, 8\).*got \(1, 3, 5, 5, 5\)"),
        (None, {"axis": 3}, "expected axis 0, 1 or 2, got 3"),
        (None, {"axis": 0, "index": 6}, "expected an index from 0 to 5 along axis 0, got 6"),
    ],
)
def test_wrong_maps_and_planes_are_explained(phi_map, where, message):
    with pytest.raises(ValueError, match=message):
        plots.registration(toy_pair((6, 7, 8)), phi_map, **where)


# --- tables


def test_cells_are_the_means_of_the_results():
    results = toy_results()
    figure = plots.matrix(results)
    trained = per_pair(results, "dice").groupby(["optimizer", "train_domain", "test_domain"]).value.mean()
    by_seed = per_pair(results, "dice").groupby(["train_domain", "test_domain", "optimizer", "seed"]).value.mean()
    for optimizer, name in (("adam", "Adam"), ("sam", "SAM")):
        said = texts(panel(figure, name))
        expected = [f"{trained['none', '', test]:.3f}" for test in ("brain-mr", "heart-mr")]
        for train, test in itertools.product(("brain-mr", BOTH), ("brain-mr", "heart-mr")):
            spread = by_seed[train, test, optimizer].std()
            expected.append(f"{trained[optimizer, train, test]:.3f}\n±{spread:.3f}")
        assert said == expected


def test_panels_of_the_matrix_share_their_colours():
    adam, sam = (panel(plots.matrix(toy_results()), name).images[0] for name in ("Adam", "SAM"))
    assert adam.get_clim() == sam.get_clim()
    assert adam.get_cmap() == sam.get_cmap()


def test_the_domains_trained_on_are_framed():
    frames = [p for p in panel(plots.matrix(toy_results()), "SAM").patches if not p.get_fill()]
    assert sorted((round(f.get_x() + 0.46), round(f.get_y() + 0.42)) for f in frames) == [(0, 1), (0, 2)]


def test_a_missing_cell_is_a_hole():
    results = toy_results()
    gone = (results.optimizer == "sam") & (results.test_domain == "heart-mr") & (results.train_domain == BOTH)
    figure = plots.matrix(results[~gone])
    assert len(hatched(panel(figure, "SAM"))) == 1
    assert texts(panel(figure, "SAM")).count("–") == 1
    assert not hatched(panel(figure, "Adam"))
    assert len(hatched(panel(plots.paired_difference(results[~gone]), "trained on brain-mr +"))) == 1


def test_a_metric_without_a_before_has_holes_there():
    assert len(hatched(panel(plots.matrix(toy_results(), metric="tre"), "Adam"))) == 2


def test_one_seed_one_domain_and_a_lone_none_are_enough():
    one = toy_results(("brain-mr",), ("brain-mr",), (0,))
    assert "±" not in "".join(texts(panel(plots.matrix(one), "Adam")))
    assert plots.paired_difference(one).axes
    assert len(panel(plots.matrix(one[one.optimizer == "none"]), "before").texts) == 1


def test_the_difference_is_the_tables():
    results = toy_results()
    axes = panel(plots.paired_difference(results), "trained on brain-mr +")
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    expected = table(results).query("train_domain == @BOTH").set_index("test_domain")["sam - adam"]
    assert np.allclose(means, expected[["brain-mr", "heart-mr"]])
    assert texts(axes) == ["n = 6", "n = 6"]


def test_values_without_a_partner_are_counted():
    results = toy_results().drop(
        index=toy_results().query("optimizer == 'adam' and test_domain == 'heart-mr'").index[0]
    )
    assert "n = 6\n1 unpaired" in texts(panel(plots.paired_difference(results, metric="dice"), "trained on brain-mr"))


def test_an_optimizer_looks_the_same_everywhere():
    landscape, history = toy_landscape(), toy_history()
    figures = [plots.training_curves(history), plots.loss_lines(landscape), plots.flatness(landscape)]
    for figure, (optimizer, name) in itertools.product(figures, (("adam", "Adam"), ("sam", "SAM"))):
        look = plots.LOOKS[optimizer]
        handle = next(h for h in figure.legends[0].legend_handles if h.get_label() == name)
        marked = [line for ax in figure.axes for line in ax.lines if line.get_marker() == look["marker"]]
        assert marked
        for line in (handle, *marked):
            assert (to_hex(line.get_color()).upper(), line.get_linestyle()) == (look["color"], look["linestyle"])


def test_unknown_optimizers_get_looks_of_their_own():
    names = ["adam", "sam", "zoo", "bar"]
    assert len({plots._look(name, names)["color"] for name in names}) == 4


def test_lines_are_means_and_bands_the_range_over_directions():
    axes = plots.loss_lines(toy_landscape(("brain-mr",))).axes[0]
    adam = next(line for line in axes.lines if line.get_marker() == "o")
    assert np.allclose(adam.get_ydata(), 1 + 2 * 2 * np.linspace(-1, 1, 5) ** 2)
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1, 7))


@pytest.mark.parametrize(("scale", "expected"), [(1.0, "linear"), (100.0, "log")])
def test_a_wide_range_of_losses_is_logarithmic(scale, expected):
    figure = plots.loss_lines(toy_landscape(scale=scale))
    assert {ax.get_yscale() for ax in figure.axes} == {expected}
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_planes_share_levels_and_mark_the_trained_weights(scale):
    figure = plots.loss_planes(toy_landscape(("brain-mr",), scale=scale))
    adam, sam = panel(figure, "Adam"), panel(figure, "SAM")
    assert np.array_equal(adam.collections[0].levels, sam.collections[0].levels)
    for ax in (adam, sam):
        assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines] == [(0, 0)]


def test_a_missing_plane_or_line_is_named():
    landscape = toy_landscape()
    landscape = landscape[(landscape.optimizer != "sam") | (landscape.test_domain != "heart-mr")]
    assert [bool(hatched(ax)) for ax in plots.loss_planes(landscape).axes[:4]] == [False, False, False, True]
    assert [ax.get_title().endswith("SAM: –") for ax in plots.loss_lines(landscape).axes] == [False, True]


def test_rises_that_a_log_scale_cannot_show_are_counted():
    landscape = toy_landscape(("brain-mr",))
    landscape.loc[landscape.rho == 0.01, "value"] = -1e-6
    axes = plots.flatness(landscape).axes[0]
    assert "2 not above 0" in texts(axes)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


@pytest.mark.parametrize(
    "draw",
    [plots.matrix, plots.paired_difference, plots.training_curves, plots.loss_lines, plots.loss_planes, plots.flatness],
)
def test_empty_and_foreign_tables_are_explained(draw):
    good = {plots.matrix: toy_results, plots.paired_difference: toy_results, plots.training_curves: toy_history}
    with pytest.raises(ValueError, match=r"expected .*got"):
        draw(good.get(draw, toy_landscape)().iloc[:0])
    with pytest.raises(ValueError, match=r"expected the columns .*got a, b"):
        draw(pd.DataFrame({"a": [1], "b": [2]}))


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected rows with metric 'nope', got dice, tre"):
        plots.matrix(toy_results(), metric="nope")


# --- files


def test_files_are_whole_the_same_each_time_and_alone(tmp_path):
    for folder in ("one", "two"):
        plots.save(plots.flatness(toy_landscape()), tmp_path / folder / "deep" / "v1.2")
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / folder / "deep" / f"v1.2.{suffix}").read_bytes() for folder in ("one", "two"))
        assert one == two
        assert b"CreationDate" not in one
    assert len(list((tmp_path / "one" / "deep").iterdir())) == 2


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "figure.png").write_text("old")

    class Broken(slices.Picture):
        def savefig(self, path, **how):
            path.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save(Broken(), tmp_path / "figure")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("figure.png", "old")]


def test_figures_show_themselves_and_stay_out_of_pyplot():
    figure = plots.registration(toy_pair((6, 7)))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()


def toy_radii():
    runs = [("adam", 0.01), ("adam-2x", 0.01), *(("sam", rho) for rho in (0.01, 0.1, 1.0))]
    rows = [
        {"train_domain": BOTH, "optimizer": o, "seed": seed, "lr": 1e-3, "rho": rho, "loss": rho + seed, "domains": d}
        for (o, rho), seed, d in itertools.product(runs, (0, 1), ("seen", "unseen"))
    ]
    slow = [row | {"lr": 1e-4} for row in rows[:2]]
    table = pd.DataFrame(rows + slow)
    return table.assign(dice=table.rho / 2 + table.seed / 10 + (table.domains == "seen") / 5)


def test_radii_are_the_means_of_seeds_against_rho():
    figure = plots.radii(toy_radii())
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
    with pytest.raises(ValueError, match="two radii or more"):
        plots.radii(rows[rows.rho == 0.01])
