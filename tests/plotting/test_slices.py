"""Pictures of a pair and its registration, read back from their artists."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from fmsam_lib.model.spatial import identity_map, jacobian_determinant
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.plotting.slices import overview, registration


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


def mirrored(shape):
    """A map that turns the second axis round: every cell is folded."""
    return 1 - identity_map(shape) * torch.tensor([1, -1]).view(1, 2, 1, 1)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title().startswith(title))


def shown(figure, title):
    return np.asarray(panel(figure, title).images[0].get_array())


def contours(axes):
    """The colours of the labels' outlines in a panel."""
    return {to_hex(c.get_edgecolor()[0]).upper() for c in axes.collections if len(c.get_edgecolor())}


FIXED, WARPED = slices.FIXED_LINE["colors"], slices.WARPED_LINE["colors"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_plane_shown_is_the_one_asked_for(axis):
    pair = toy_pair((6, 7, 8))
    figure = registration(pair, axis=axis, index=3)
    assert np.array_equal(shown(figure, "fixed"), pair.fixed[0].select(axis, 3).T.numpy())
    assert np.array_equal(shown(figure, "moving"), pair.moving[0].select(axis, 3).T.numpy())
    assert f"{slices.PLANES[axis]} slice 3" in figure.get_suptitle()


def test_patients_axes_point_right_and_up_and_voxels_keep_their_aspect():
    figure = registration(toy_pair((6, 7, 8)), axis=1)
    axes = panel(figure, "fixed")
    assert texts(axes)[:4] == ["L", "R", "I", "S"]
    assert axes.images[0].origin == "lower"
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left, top - bottom) == pytest.approx((6 * 1.0, 8 * 3.0))


def test_a_flipped_axis_says_so():
    pair = toy_pair((6, 7))
    pair.affine[0, 0] = -1
    assert texts(panel(registration(pair), "fixed"))[:4] == ["R", "L", "P", "A"]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 8)])
def test_the_identity_shows_the_moving_image_and_no_change(shape):
    pair = toy_pair(shape)
    figure = registration(pair, identity_map(shape))
    assert np.allclose(shown(figure, "warped"), shown(figure, "moving"), atol=1e-5)
    assert np.allclose(shown(figure, "Jacobian"), 1, atol=1e-4)
    assert panel(figure, "Jacobian").get_title() == "Jacobian determinant, 0 % folded"


@pytest.mark.parametrize(("shape", "axis"), [((6, 7), None), ((6, 7, 8), 0), ((6, 7, 8), 1), ((6, 7, 8), 2)])
def test_the_jacobian_of_a_plane_is_the_volumes(shape, axis):
    phi_map = shrunk(shape) + 0.01 * torch.randn(1, len(shape), *shape, generator=torch.Generator().manual_seed(1))
    index = None if axis is None else 3
    expected = jacobian_determinant(phi_map)[0]
    expected = expected.T if axis is None else expected.select(axis, 3).T
    assert np.allclose(slices.cut(toy_pair(shape), phi_map, axis=axis, index=index).jacobian, expected, atol=1e-5)


def test_a_cut_shows_what_the_map_does():
    pair = toy_pair((6, 7, 8))
    nothing, shrinks = (slices.cut(pair, phi) for phi in (None, shrunk((6, 7, 8))))
    assert np.allclose(nothing.warped, nothing.moving, atol=1e-5)
    assert np.allclose(nothing.jacobian, 1, atol=1e-4)
    assert np.allclose(shrinks.jacobian, 1 / 8, atol=1e-4)


def test_folds_are_counted_and_written_without_powers_of_ten():
    everything = panel(registration(toy_pair((6, 7)), mirrored((6, 7))), "Jacobian")
    assert everything.get_title() == "Jacobian determinant, 100 % folded"
    few = identity_map((41, 51)).clone()
    few[0, 0, 20, 25] += 2 / 40  # one sample beyond its next neighbour
    plane = slices.cut(toy_pair((41, 51)), few)
    assert 0 < (plane.jacobian <= 0).sum() < 5
    title = panel(registration(toy_pair((41, 51)), few), "Jacobian").get_title()
    assert title == f"Jacobian determinant, {(plane.jacobian <= 0).sum() / 20:.1g} % folded"


def test_labels_are_outlined_in_their_images_line():
    figure = registration(toy_pair((12, 14)), shrunk((12, 14)))
    assert contours(panel(figure, "fixed")) == {FIXED}
    assert contours(panel(figure, "moving")) == {WARPED}
    assert contours(panel(figure, "warped")) == {FIXED, WARPED}


@pytest.mark.parametrize(("unit", "written"), [("mm", " mm"), ("voxel", " voxels")])
def test_the_scale_bar_says_millimetres_only_where_they_are_known(unit, written):
    figure = registration(dataclasses.replace(toy_pair((16, 18)), unit=unit))
    assert any(text.get_text().endswith(written) for text in figure.axes[0].texts)


@pytest.mark.parametrize("size", [3e-6, 1.0, 4e7])
def test_the_scale_bar_fits_an_image_of_any_size(size):
    figure = registration(dataclasses.replace(toy_pair((16, 18)), spacing=(size, size)))
    (bar,) = (line for line in figure.axes[0].lines if line.get_linewidth() == 2.5)
    (width,) = np.diff(bar.get_xdata())
    assert size < width <= size * 18 / 3


def test_a_checkerboard_is_of_both():
    board = slices.checkerboard(np.zeros((16, 12)), np.ones((16, 12)))
    assert board[:2, :2].sum() == 0
    assert board[:2, 2:4].min() == 1
    assert board.mean() == pytest.approx(0.5)


def test_a_pair_without_labels_spacing_or_affine_is_shown():
    bare = Pair("bare", torch.rand(1, 6, 7), torch.rand(1, 6, 7))
    figure = registration(bare, identity_map((6, 7)))
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
        registration(toy_pair((6, 7, 8)), phi_map, **where)


def test_a_plane_has_no_planes():
    with pytest.raises(ValueError, match="expected no axis and no index for the 2-D pair 'toy', got 0, None"):
        registration(toy_pair((6, 7)), axis=0)


# --- the overview of a registration


@pytest.mark.parametrize("shape", [(12, 14), (12, 14, 10)])
def test_the_overview_has_a_row_for_each_mid_plane_with_overlays_before_and_after(shape):
    pair, phi_map = toy_pair(shape), shrunk(shape)
    figure = overview(pair, phi_map)
    planes = [slices.cut(pair, phi_map, axis=axis) for axis in ((None,) if len(shape) == 2 else (2, 1, 0))]
    rows = np.reshape([ax for ax in figure.axes if ax.images], (len(planes), 5))
    assert [ax.get_title() for ax in rows[0]] == ["fixed", "moving", "warped", "overlay before", "overlay after"]
    for row, plane in zip(rows, planes, strict=True):
        fixed, moving, warped, before, after = (np.asarray(ax.images[0].get_array()) for ax in row)
        assert np.array_equal(fixed, plane.fixed)
        assert np.array_equal(moving, plane.moving)
        assert np.array_equal(warped, plane.warped)
        for overlay, other in ((before, plane.moving), (after, plane.warped)):  # magenta and green make grey
            assert np.allclose(overlay, np.stack([other, plane.fixed, other], -1))
        assert [contours(ax) for ax in row] == [{FIXED}, {WARPED}, {FIXED, WARPED}, set(), set()]
    named = [row[0].get_ylabel() for row in rows]
    assert named == ([""] if len(shape) == 2 else ["axial\nslice 5", "coronal\nslice 7", "sagittal\nslice 6"])


def test_names_of_files_are_no_formulas():
    for title in ("a$_$ to b", "scan (1) to scan (2)"):
        pair, phi_map = dataclasses.replace(toy_pair((12, 14)), title=title), shrunk((12, 14))
        for figure in (overview(pair, phi_map), registration(pair)):
            assert slices.png(figure)
            assert figure.get_suptitle() == title
            assert not any(ax.get_ylabel() for ax in figure.axes)


# --- files


def test_a_picture_is_a_png_that_a_notebook_shows():
    figure = registration(toy_pair((12, 14)), shrunk((12, 14)))
    picture = imread(io.BytesIO(figure._repr_png_()))
    inches = figure.get_size_inches()
    assert picture.shape[:2] == pytest.approx(100 * inches[::-1], abs=1)
    for name in ("fixed", "moving", "warped", "Jacobian"):  # something is drawn in every panel
        left, bottom, right, top = panel(figure, name).get_window_extent().extents.astype(int)
        assert np.ptp(picture[-top:-bottom, left:right, :3]) > 0.5


def test_saved_figures_are_the_same_bytes_every_time(tmp_path):
    for name in "ab":
        slices.save(registration(toy_pair((12, 14)), shrunk((12, 14))), tmp_path / name / "figure")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["figure.pdf", "figure.png"]
    for kind in ("pdf", "png"):
        one, two = ((tmp_path / name / f"figure.{kind}").read_bytes() for name in "ab")
        assert one == two
    assert imread(tmp_path / "a" / "figure.png").shape[1] == slices.DPI * slices.WIDTH


@pytest.mark.parametrize("size", [(9, 3), (9, 30), (20, 9), (3, 12)])
def test_a_saved_figure_has_at_most_1200_by_900_pixels(size, tmp_path):
    slices.save(slices.Picture(figsize=size), tmp_path / "figure")
    high, wide, _ = imread(tmp_path / "figure.png").shape
    assert high <= 900
    assert wide <= 1200
