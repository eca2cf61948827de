import re

import pytest
import torch

from fmsam_lib.checking import ConfigError
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import folding_percent, mean_dice
from fmsam_lib.model import weights
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, jacobian_determinant
from fmsam_lib.model.weights import from_icon, load, to_icon, unigradicon
from fmsam_lib.training.loop import train
from tests.conftest import PROJECT
from tests.model.test_network import images, small


def test_unigradicon_has_its_papers_size():
    assert sum(p.numel() for p in unigradicon().parameters()) == pytest.approx(70.7e6, rel=2e-3)


def test_saved_and_loaded_weights_give_the_same_map(tmp_path):
    net, pair = small(2, up=(5, 6)), images(24, 24)
    net.save(tmp_path / "weights.pt")
    assert torch.equal(load(tmp_path / "weights.pt")(*pair).map, net(*pair).map)


def test_weights_that_somebody_trained_on_no_longer_say_what_others_saw(tmp_path):
    net = small(2).eval()
    net.shape = (24, 24)
    net.about = {"seen": {"there": [0.0]}} | weights.signed(net)
    net.save(tmp_path / "first.pt")
    load(tmp_path / "first.pt").save(tmp_path / "copy.pt")
    assert weights.check(tmp_path / "copy.pt")["fine"]
    assert load(tmp_path / "copy.pt").about["seen"] == net.about["seen"]
    own, statistics = load(tmp_path / "first.pt").train(), load(tmp_path / "first.pt").train()
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-3)
    own(*images(24, 24)).map.square().mean().backward()
    optimizer.step()
    statistics(*images(24, 24))
    trained, _ = train(open_domain("brain-mr", shape=(24, 24)), down=[4], levels=1, steps=1, batch=1, sigma=3.0)
    assert "golden" in trained.about
    next(trained.parameters()).data += 0.01
    for net in (own, statistics, trained):
        net.save(tmp_path / "own.pt")
        assert not {"seen", "golden"} & load(tmp_path / "own.pt").about.keys()
        assert weights.check(tmp_path / "own.pt")["fine"] is None


def test_unigradicon_refuses_weights_of_another_architecture(tmp_path):
    small(2).save(tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"expected weights of .*'down': \[16, 32, 64, 256, 512\].*got those of"):
        unigradicon(tmp_path / "small.pt", dim=2)


def test_damaged_and_missing_weights_are_named(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match=r"weights\.pt.*No such file"):
        load(path)
    with pytest.raises(ValueError, match=r"in 2D, got: No such file, and none of .* 3d-sam \(did you mean 2d\?\);"):
        load("2D")
    small(2).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.pt"):
        load(path)


def test_a_bit_that_changed_in_the_file_is_found(tmp_path):
    """torch reads such a file without a word, to other numbers."""
    net, path = small(2), tmp_path / "weights.pt"
    net.save(path)
    content = bytearray(path.read_bytes())
    content[content.index(net.steps[0].last.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"in .*weights\.pt, got: .*/data/\d+, which is not as it was written; check"):
        load(path)


def test_the_training_grid_is_kept(tmp_path):
    net = small(2)
    net.shape = (64, 48)
    net.save(tmp_path / "weights.pt")
    assert load(tmp_path / "weights.pt").shape == (64, 48)


@pytest.mark.parametrize("settings", [{}, {"levels": 1}, {"levels": 3, "last_step": True}, {"up": (5, 3)}])
@pytest.mark.parametrize("dim", [2, 3])
def test_icon_registrations_keys_both_ways(dim, settings):
    net = small(dim, **settings)
    again = from_icon({f"regis_net.{key}": value for key, value in to_icon(net).items()})
    assert again.settings == net.settings
    assert all(map(torch.equal, again.state_dict().values(), net.state_dict().values()))


def something(**change):
    """A state dict of icon-registration's with something wrong in it."""
    state = to_icon(GradICON(2, down=(4, 8), levels=2))
    return {key: value for key, value in (state | change).items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "something other than a state dict"),
        ({"encoder.weight": torch.zeros(3)}, "keys that no network of uniGradICON's kind has, such as encoder.weight"),
        (something(**{"netPsi.net.dense.weight": torch.zeros(2)}), "the key netPsi.net.dense.weight"),
        (something(**{"netPsi.net.lastConv.bias": None}), "Error.* in loading state_dict"),
        (something(**{"netPsi.net.lastConv.bias": torch.zeros(7)}), "Error.* in loading state_dict"),
        ({"settings": {"dim": 5}, "weights": {}}, "down"),
    ],
)
def test_other_files_are_refused_with_the_reason(content, message, tmp_path):
    torch.save(content, tmp_path / "other.trch")
    with pytest.raises(ValueError, match=rf"weights saved by fmsam or by icon-registration in .*other.trch.*{message}"):
        load(tmp_path / "other.trch")


def test_code_in_a_weights_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Evil(), tmp_path / "evil.trch")
    with pytest.raises(ValueError, match=r"evil\.trch, got: something other than tensors and numbers; check"):
        load(tmp_path / "evil.trch")
    assert not (tmp_path / "ran").exists()
    for content in (b"some text", b"\x1f\x8b" + bytes(300)):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.pt, got: something other than tensors and numbers; check"):
            load(tmp_path / "text.pt")


def test_official_weights_are_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    torch.save(to_icon(small(2)), tmp_path / "published.trch")
    monkeypatch.setitem(weights.OFFICIAL, "unigradicon", (tmp_path / "published.trch").as_uri())
    assert load("unigradicon").settings == small(2).settings
    (tmp_path / "published.trch").unlink()
    assert load("unigradicon").settings == small(2).settings


def test_a_download_that_was_cut_short_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    torch.save(to_icon(small(2)), tmp_path / "published.trch")
    short = tmp_path / "short.trch"
    short.write_bytes((tmp_path / "published.trch").read_bytes()[:5000])
    monkeypatch.setitem(weights.OFFICIAL, "unigradicon", short.as_uri())
    with pytest.raises(OSError, match="expected to download"):
        load("unigradicon")
    monkeypatch.setitem(weights.OFFICIAL, "unigradicon", (tmp_path / "published.trch").as_uri())
    assert load("unigradicon").settings == small(2).settings


def test_without_network_the_message_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(weights.OFFICIAL, "multigradicon", (tmp_path / "nowhere.trch").as_uri())
    with pytest.raises(OSError, match=r"download it by hand and put it at .*cache/weights/multigradicon.trch"):
        load("multigradicon")
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_shipped_networks_have_names_and_are_those_that_were_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    torch.manual_seed(0)
    net = GradICON(2, down=(4, 8), levels=2, last_step=False).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    net.shape = (32, 32)
    net.about = {"golden": weights.golden(net)}
    net.save(tmp_path / "2d.pt", half=True)
    assert weights.check(str(tmp_path / "2d.pt"))["fine"] is None  # rounded, it answers otherwise, and is not wrong
    net.save(tmp_path / "whole.pt")
    assert weights.check(str(tmp_path / "whole.pt"))["fine"]
    assert (tmp_path / "2d.pt").stat().st_size < 0.75 * (tmp_path / "whole.pt").stat().st_size
    (tmp_path / "whole.pt").unlink()
    (tmp_path / "2d.sha256").write_text(weights.sha256(tmp_path / "2d.pt") + "\n")
    images = torch.rand(2, 1, 1, 32, 32)
    with torch.no_grad():
        assert (weights.pretrained("2d")(*images).map - net(*images).map).abs().max() < 1e-3
    assert next(load("2d").parameters()).dtype == torch.float32
    assert weights.check("2d")["as downloaded"]
    with pytest.raises(ConfigError, match=r"expected one of 2d, got '2dd' \(did you mean 2d\?\)"):
        weights.pretrained("2dd")
    (tmp_path / "2d.pt").write_bytes((tmp_path / "2d.pt").read_bytes() + b"x")
    with pytest.raises(ValueError, match="got a changed file: install anew"):
        load("2d")


@pytest.mark.parametrize("name", ["2d", "2d-sam", "3d", "3d-sam"])
def test_the_networks_that_come_with_fmsam_register_at_once(name):
    assert weights.check(name)["fine"]
    net = weights.pretrained(name)
    assert net.dim == int(name[0])
    assert set(net.about["seen"]) >= {"brain-mr", "lung-ct", "knee-mr", "abdomen-ct", "heart-mr"}
    domain = open_domain("brain-mr", shape=net.shape)
    for i in range(2):  # pairs of other subjects than those of its training
        pair = domain.test_pair(i)
        with torch.no_grad():
            phi = net(pair.moving[None], pair.fixed[None]).map
        assert mean_dice(pair, phi) > mean_dice(pair, identity_map(net.shape)) + 0.05
        assert folding_percent(jacobian_determinant(phi)) < 0.1


def test_the_page_of_the_networks_names_them_all():
    page = (PROJECT / "docs/pretrained.md").read_text()
    sizes = {name: sum(p.numel() for p in weights.pretrained(name).parameters()) for name in weights.shipped()}
    rows = dict(re.findall(r"^\| `(\S+)` \|.*\| ([\d,]+) \| [\d.]+ MB \|$", page, re.MULTILINE))
    assert {name: f"{size:,}" for name, size in sizes.items()} == rows
