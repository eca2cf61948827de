"""What the explorer sends to the browser; what the browser makes of it is in tests/test_browser.py."""

import base64
import io

import numpy as np
import pytest
import torch
from IPython.display import Image
from matplotlib import image

from fmsam_lib.checking import ConfigError
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.widgets import sliders
from fmsam_lib.widgets.pair_explorer import OF_IMAGES, OF_MAPS, explore

SHAPES = [(6, 7), (6, 7, 8)]


def toy_pair(shape, labels=True):
    images = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    inside = (identity_map(shape)[0] - 0.5).square().sum(0)[None] < 0.1
    label = inside.to(torch.uint8) if labels else None
    return Pair("toy", images[0], images[1], label, label, {1: "ball"}, (1.0, 2.0, 3.0)[: len(shape)])


def shrunk(shape):
    return identity_map(shape) * 0.5 + 0.25


def png(data):
    return image.imread(io.BytesIO(data))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_browser_gets_the_arrays(shape):
    pair = toy_pair(shape)
    sent = explore(pair, {"a": identity_map(shape), "b": shrunk(shape)}, interactive=True)
    for name in ("fixed", "moving"):
        values = np.frombuffer(sent.volumes[name], np.uint8).reshape(1, *shape)
        assert np.allclose(values / 255, getattr(pair, name), atol=0.5 / 255 + 1e-6)
    assert not np.frombuffer(sent.volumes["0"], np.int16).any()
    steps = np.frombuffer(sent.volumes["1"], np.int16).reshape(len(shape), *shape) * sent.facts["scales"][1]
    size = np.reshape([n - 1 for n in shape], (-1, *[1] * len(shape)))
    assert np.allclose(steps, size * (shrunk(shape) - identity_map(shape))[0].numpy(), atol=1e-4)
    assert sent.facts["maps"] == ["a", "b"]
    assert sent.at == [n // 2 for n in shape]


def test_any_number_names_its_structure():
    label = torch.tensor([[-3, 0], [70000, 5]])[None]
    images = torch.zeros(1, 2, 2)
    pair = Pair("odd numbers", images, images, label.flip(1), label, {70000: "bone", -3: "air"})
    sent = explore(pair, interactive=True)
    names = np.array(sent.facts["names"])
    ranks = {
        name: np.frombuffer(sent.volumes[name], np.uint8).reshape(2, 2) for name in ("fixed_label", "moving_label")
    }
    assert names[ranks["fixed_label"]].tolist() == [["air", "background"], ["bone", "label 5"]]
    assert names[ranks["moving_label"]].tolist() == [["bone", "label 5"], ["air", "background"]]


def test_there_may_be_more_structures_than_two_bytes_count():
    label, images = torch.arange(300 * 300).view(1, 300, 300), torch.zeros(1, 300, 300)
    sent = explore(Pair("many", images, images, label), interactive=True)
    ranks = np.frombuffer(sent.volumes["moving_label"], np.uint32)
    assert [sent.facts["names"][ranks[n]] for n in (0, 65536, 70000)] == ["background", "label 65536", "label 70000"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_phi", [False, True])
def test_what_there_is_not_is_not_offered(shape, with_phi):
    sent = explore(toy_pair(shape, labels=False), shrunk(shape) if with_phi else None, interactive=True)
    assert set(sent.volumes) == {"fixed", "moving"} | ({"0"} if with_phi else set())
    assert sent.facts["views"] == ((*OF_IMAGES, *OF_MAPS) if with_phi else OF_IMAGES)


@pytest.mark.parametrize(("spacing", "unit"), [((1.0, 2.0), "mm"), ((), "voxel")])
def test_millimetres_only_where_they_are_known(spacing, unit):
    images = torch.zeros(1, 3, 4)
    assert explore(Pair("p", images, images, spacing=spacing), interactive=True).facts["unit"] == unit


def test_the_sides_of_the_patient():
    pair = toy_pair((6, 7, 8))
    turned = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    sent = explore(Pair("p", pair.fixed, pair.moving, affine=turned), interactive=True)
    assert sent.facts["ends"] == ["RL", "PA", "IS"]


def test_a_transform_is_as_good_as_its_map():
    displacement = shrunk((6, 7)) - identity_map((6, 7))
    one = explore(toy_pair((6, 7)), Transform((6, 7), (displacement.requires_grad_(),)), interactive=True)
    two = explore(toy_pair((6, 7)), shrunk((6, 7)), interactive=True)
    assert one.volumes == two.volumes


def test_a_map_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"expected a map \(1, 2, 6, 7\).*got \(1, 2, 5, 5\).*give"):
        explore(toy_pair((6, 7)), identity_map((5, 5)))


def test_what_cannot_be_shown_is_refused():
    alone, nowhere = explore(toy_pair((6, 7)), interactive=True), shrunk((6, 7))
    with pytest.raises(ConfigError, match=r"expected a view out of side by side, .*, got 'Jacobian': give maps"):
        alone.view = "Jacobian"
    for at in ([6, 2], [-1, 2], [1], [1, 2, 3]):
        with pytest.raises(ConfigError, match=r"a sample of the grid \(6, 7\), counted from 0, got"):
            alone.at = at
    assert (alone.view, alone.at) == ("side by side", [3, 3])
    nowhere[0, 0, 1, 1] = torch.nan
    with pytest.raises(ConfigError, match="map 'SAM': expected finite numbers, got nan or inf"):
        explore(toy_pair((6, 7)), {"SAM": nowhere}, interactive=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_notebook_there_is_the_still_picture(shape):
    alone = explore(toy_pair(shape), shrunk(shape))
    assert isinstance(alone, Image)
    both = explore(toy_pair(shape), {"a": shrunk(shape), "b": identity_map(shape)})
    high, wide = png(alone.data).shape[:2]
    assert png(both.data).shape[:2] == (2 * high, wide)  # one below the other


def test_the_still_picture_stands_in_for_the_widget():
    shown, _ = explore(toy_pair((6, 7)), shrunk((6, 7)), interactive=True)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    still = explore(toy_pair((6, 7)), shrunk((6, 7)), interactive=False)
    assert np.array_equal(png(base64.b64decode(shown["image/png"])), png(still.data))


@pytest.mark.parametrize(("headless", "someone", "live"), [("", True, True), ("1", True, False), ("", False, False)])
def test_still_pictures_where_nobody_sits_at_the_kernel(monkeypatch, headless, someone, live):
    kernel = type("Kernel", (), {"_allow_stdin": someone})
    monkeypatch.setenv("FMSAM_HEADLESS", headless)
    monkeypatch.setattr(sliders, "get_ipython", lambda: type("Shell", (), {"kernel": kernel})())
    assert isinstance(explore(toy_pair((6, 7))), Image) != live
