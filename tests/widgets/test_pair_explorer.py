"""The explorer, driven through its controls."""

import itertools

import numpy as np
import pytest
import torch

from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.widgets import pair_explorer as view
from fmsam_lib.widgets import sliders


def toy_pair(shape, labels=True):
    images = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    inside = (identity_map(shape)[0] - 0.5).square().sum(0)[None] < 0.1
    label = inside.to(torch.uint8) if labels else None
    return Pair("toy", images[0], images[1], label, label, {1: "ball"}, (1.0, 2.0, 3.0)[: len(shape)])


def shrunk(shape):
    return identity_map(shape) * 0.5 + 0.25


@pytest.fixture(autouse=True)
def displayed(monkeypatch):
    """What a notebook would have shown, in order."""
    things = []
    monkeypatch.setattr(sliders, "display", things.append)
    return things


@pytest.fixture
def explorer():
    return view.explore(toy_pair((6, 7, 8)), shrunk((6, 7, 8)), interactive=True)


def changes(explorer, control, value):
    before = bytes(explorer.image.value)
    control.value = value
    assert bytes(explorer.image.value).startswith(b"\x89PNG")
    return bytes(explorer.image.value) != before


def test_the_still_picture_comes_first_then_the_widget(displayed, explorer):
    assert isinstance(displayed[0], slices.Picture)
    assert displayed[1] is explorer.widget


def test_without_a_notebook_there_is_only_the_still_picture(displayed):
    assert view.explore(toy_pair((6, 7))) is None
    assert len(displayed) == 1


@pytest.mark.parametrize(("headless", "live"), [("", True), ("1", False)])
def test_the_environment_can_ask_for_still_pictures(monkeypatch, headless, live):
    monkeypatch.setenv("FMSAM_HEADLESS", headless)
    monkeypatch.setattr(sliders, "get_ipython", lambda: type("Shell", (), {"kernel": None})())
    assert (view.explore(toy_pair((6, 7))) is not None) == live


@pytest.mark.parametrize(
    ("shape", "labels", "with_phi"), list(itertools.product([(6, 7), (6, 7, 8)], [True, False], [True, False]))
)
def test_every_view_of_every_plane_is_drawn(shape, labels, with_phi):
    explorer = view.explore(toy_pair(shape, labels), shrunk(shape) if with_phi else None, interactive=True)
    assert (view.JACOBIAN in explorer.view.options) == with_phi
    for name in explorer.view.options:
        explorer.view.value = name
        for axis in (2, 1, 0) if len(shape) == 3 else ():
            explorer.plane.value = axis
            assert explorer.index.max == shape[axis] - 1
            assert np.array_equal(explorer.drawn.fixed.shape, np.delete(shape, axis)[::-1])
        assert bytes(explorer.image.value).startswith(b"\x89PNG")


def test_the_sliders_show_what_they_say(explorer):
    for axis in (0, 1, 2):
        explorer.plane.value = axis
        assert changes(explorer, explorer.index, 1)
        expected = explorer.pair.fixed[0].select(axis, 1).T.numpy()
        assert np.array_equal(explorer.images[0].get_array(), expected)
        assert f"{slices.PLANES[axis]} slice 1" in explorer.caption.get_text()


def test_strength_goes_from_the_moving_image_to_the_warped_one(explorer):
    assert changes(explorer, explorer.strength, 0)
    assert np.allclose(explorer.images[2].get_array(), explorer.drawn.moving, atol=1e-5)
    assert changes(explorer, explorer.strength, 1)
    whole = slices.cut(explorer.pair, shrunk((6, 7, 8)))
    assert np.allclose(explorer.images[2].get_array(), whole.warped)


def test_the_colours_stay_while_the_strength_moves(explorer):
    explorer.view.value = view.JACOBIAN
    limits = explorer.images[0].get_clim()
    assert changes(explorer, explorer.strength, 0.3)
    assert explorer.images[0].get_clim() == limits


def test_squares_and_labels_redraw(explorer):
    assert explorer.squares.layout.display == "none"
    assert changes(explorer, explorer.labels, False)
    assert not explorer.contours
    explorer.view.value = view.CHECKERBOARD
    assert explorer.squares.layout.display is None
    assert changes(explorer, explorer.squares, 3)


def test_magenta_and_green_make_grey(explorer):
    explorer.view.value = view.OVERLAY
    red, green, blue = np.moveaxis(np.asarray(explorer.images[0].get_array()), -1, 0)
    assert np.array_equal(red, blue)
    assert np.allclose(green, explorer.drawn.fixed)


def test_controls_without_a_use_are_hidden():
    explorer = view.explore(toy_pair((6, 7), labels=False), interactive=True)
    hidden = [explorer.plane, explorer.index, explorer.strength, explorer.labels, explorer.squares]
    assert {control.layout.display for control in hidden} == {"none"}


def test_a_transform_is_as_good_as_its_map():
    displacement = shrunk((6, 7)) - identity_map((6, 7))
    one = view.explore(toy_pair((6, 7)), Transform((6, 7), (displacement.requires_grad_(),)), interactive=True)
    two = view.explore(toy_pair((6, 7)), shrunk((6, 7)), interactive=True)
    assert np.allclose(one.drawn.warped, two.drawn.warped)


def test_a_map_of_another_grid_is_refused(displayed):
    with pytest.raises(ValueError, match=r"expected a map \(1, 2, 6, 7\).*got \(1, 2, 5, 5\).*give"):
        view.explore(toy_pair((6, 7)), identity_map((5, 5)))
    assert not displayed


def test_titles_are_text_not_markup():
    explorer = view.explore(toy_pair((6, 7)), title="a <b> c", interactive=True)
    assert "a &lt;b&gt; c" in explorer.widget.children[0].value
