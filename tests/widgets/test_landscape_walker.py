"""The landscape walker: what a point shows is what its weights give."""

import itertools
import json

import numpy as np
import pytest
import torch
import walk as animation
from matplotlib import colors
from PIL import Image, ImageSequence

from fmsam_lib.checking import ConfigError
from fmsam_lib.flatness.landscape import batch_with
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import pretrained
from fmsam_lib.plotting.slices import Picture, registration
from fmsam_lib.records import PROJECT
from fmsam_lib.training.losses import objective
from fmsam_lib.widgets import landscape_walker
from fmsam_lib.widgets.landscape_walker import NAMES, walk

LOSS = {"similarity": "lncc", "sigma": 3.0, "lmbda": 1.5}
DOMAIN = open_domain("brain-mr", shape=(32, 32))


def network(seed):
    """Weights and statistics of their own, none of them zero."""
    torch.manual_seed(seed)
    net = GradICON(2, down=(4, 8), levels=2)
    for tensor in [p for p in net.parameters() if not p.any()]:
        torch.nn.init.normal_(tensor, std=0.05)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer += torch.rand(buffer.shape)
    return net.eval()


@pytest.fixture(scope="module")
def pair():
    return DOMAIN.test_pair(0)


def between_two(pair, **how):
    nets = {"Adam": network(1), "SAM": network(2)}
    return nets, walk(nets, pair, start=network(0), interactive=True, points=5, **how, **LOSS)


@pytest.mark.parametrize("name", ["Adam", "SAM"])
def test_at_a_solution_it_shows_the_networks_own_registration(pair, name):
    nets, walker = between_two(pair)
    walker.point = [*walker.ground.places[name]]
    with torch.no_grad():
        terms = objective(nets[name], batch_with([pair]), **LOSS)
        phi = nets[name](pair.moving[None], pair.fixed[None]).map
    shown = [float(walker.facts[term]) for term in NAMES]
    assert shown == pytest.approx([term.item() for term in terms], abs=1e-4)
    assert float(walker.facts["mean Dice"]) == pytest.approx(mean_dice(pair, phi), abs=1e-4)
    grey = np.frombuffer(walker.panels[0]["pixels"], np.uint8).reshape(32, 32, 4)[::-1, :, 0] / 255
    warped = registration(pair, phi).axes[2].images[0].get_array()
    assert np.abs(grey - np.asarray(warped).clip(0, 1)).max() < 0.01
    assert walker.answered == walker.point


def test_halfway_weights_and_statistics_are_means(pair):
    nets, walker = between_two(pair)
    middle = network(1)
    adam, sam = (net.state_dict() for net in nets.values())
    middle.load_state_dict({k: (adam[k] + sam[k]) / 2 if adam[k].is_floating_point() else adam[k] for k in adam})
    walker.point = np.mean([walker.ground.places["Adam"], walker.ground.places["SAM"]], 0).tolist()
    with torch.no_grad():
        terms = objective(middle, batch_with([pair]), **LOSS)
    assert [float(walker.facts[term]) for term in NAMES] == pytest.approx([t.item() for t in terms], abs=1e-4)


def test_the_surface_is_the_loss_that_a_walk_over_it_shows(pair):
    _, walker = between_two(pair)
    ground = walker.ground
    assert {"the start", "Adam", "SAM"} == ground.places.keys()
    for row, column in ((0, 0), (2, 3), (4, 1)):
        walker.point = [float(ground.alphas[column]), float(ground.betas[row])]
        assert float(walker.facts["total loss"]) == pytest.approx(ground.losses[row, column], abs=1e-4)
    low, high, bottom, top = walker.surface["extent"]
    for alpha, beta in ground.places.values():
        assert low < alpha < high
        assert bottom < beta < top


def test_one_network_is_walked_along_random_directions(pair):
    net = network(1)
    before = [p.clone() for p in net.parameters()]
    walker = walk({"SAM": net}, pair, interactive=True, points=3, radius=0.2, **LOSS)
    assert walker.ground.places == {"SAM": (0.0, 0.0)}
    assert walker.surface["extent"] == pytest.approx([-0.2, 0.2, -0.2, 0.2])
    own = objective(net, batch_with([pair]), **LOSS).total.item()
    assert walker.ground.losses[1, 1] == pytest.approx(own, rel=1e-6)
    walker.point = [0.2, -0.1]
    assert float(walker.facts["total loss"]) != pytest.approx(own, abs=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(("names", "start"), [("ab", False), ("", False), ("a", True), ("abc", True)])
def test_other_numbers_of_networks_are_refused(pair, names, start):
    net = network(1)
    told = f"expected one network, or two and the start .* got {len(names)} with{'' if start else 'out'} a start: give"
    with pytest.raises(ConfigError, match=told):
        walk(dict.fromkeys(names, net), pair, start=net if start else None, **LOSS)


def test_weights_without_a_finite_loss_are_shown_as_such(pair):
    walker = walk({"SAM": network(1)}, pair, interactive=True, points=3, **LOSS)
    walker.point = [1e30, 0.0]
    assert walker.facts["total loss"] == "nan"
    assert walker.answered == [1e30, 0.0]


def test_without_a_kernel_pictures_stand_in_its_place(pair, monkeypatch):
    shown = []
    monkeypatch.setattr(landscape_walker, "display", lambda *pictures: shown.extend(pictures))
    assert walk({"SAM": network(1)}, pair, points=3, **LOSS) is None
    assert [type(picture) for picture in shown] == [Picture, Picture]


def test_the_readmes_animation_walks_from_solution_to_solution(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(animation, "FRAMES", 3)
    _, walker = between_two(pair)
    animation.animate(walker.ground, tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as recorded:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(recorded)]
    assert len(frames) == 3
    height, width, _ = frames[0].shape
    assert (width, height) == (round(9 * animation.DPI), round(3.7 * animation.DPI))
    for first, second in itertools.pairwise(frames):  # the point moves, and so does the registration
        differ = (first != second).any(2)
        assert differ[:, : width // 3].any()
        assert differ[:, width // 2 :].any()


def test_an_interrupted_answer_is_an_answer_too(pair, monkeypatch):
    _, walker = between_two(pair)
    with monkeypatch.context() as patched:
        patched.setattr(walker, "tells", lambda *point: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            walker.point = [0.1, 0.2]
    assert (walker.answered, walker.panels) == ([0.1, 0.2], [])
    assert "interrupted" in walker.facts["no picture"]
    walker.point = [0.2, 0.2]
    assert walker.facts["(α, β)"] == "(0.2, 0.2)"


@pytest.mark.parametrize(("highest", "shown", "logarithmic"), [(0.5, 0.5, False), (3.0, 3.0, True), (1e6, 5.0, True)])
def test_colours_end_where_the_barrier_would_drown(pair, highest, shown, logarithmic):
    ground = between_two(pair)[1].ground
    ground.losses = np.linspace(0.1, 0.4, 25).reshape(5, 5)
    ground.losses[2, 2] = highest
    axes = ground.picture()[1]
    filled = axes.collections[0]
    assert filled.norm.vmin == pytest.approx(0.1)
    assert filled.norm.vmax == pytest.approx(shown)
    assert isinstance(filled.norm, colors.LogNorm) == logarithmic
    assert filled.extend == "max"


def test_notebook_30_tells_what_its_first_walk_shows():
    """The networks that come with fmsam change; the numbers beside the picture have to follow."""
    cells = json.loads((PROJECT / "notebooks" / "30_loss_landscape.ipynb").read_text())["cells"]
    (told,) = [text for cell in cells if "lies a barrier" in (text := "".join(cell["source"]))]
    nets = {"Adam": pretrained("2d"), "SAM": pretrained("2d-sam")}
    torch.manual_seed(20)
    start, heart = GradICON(**nets["Adam"].settings), open_domain("heart-mr", shape=(64, 64)).test_pair(0)
    ground = walk(nets, heart, start=start, interactive=True, points=3, lmbda=1.5, sigma=5.0).ground
    adam, sam = (np.array(ground.places[name]) for name in nets)
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.linalg.norm(sam - adam) * np.stack([np.cos(turn), np.sin(turn)], axis=1)

    def loss(place):
        return ground.at(*place)[1]["total loss"]

    def rise(place, share):
        return np.mean([loss(place + share * way) for way in ring]) - loss(place)

    ends = f"{loss(adam):.2f} at Adam's end, {loss(sam):.2f} at SAM's and {loss((adam + sam) / 2):.2f} halfway"
    rises = f"risen by {rise(adam, 0.1):.2f} around Adam's and by {rise(sam, 0.1):.2f} around SAM's"
    dice = [ground.at(*place)[1]["mean Dice"] for place in (adam, sam)]
    assert ends in told
    assert rises in told
    assert f"{dice[0]:.3f} at Adam's end, {dice[1]:.3f} at SAM's" in told
    assert rise(adam, 0.3) < rise(sam, 0.3)
