import pytest
import torch

from fmsam_lib.network import GradICON, Transform, load, unigradicon
from fmsam_lib.spatial import identity_map, sample


def small(dim, **settings):
    torch.manual_seed(0)
    net = GradICON(dim, **({"down": (4, 8), "levels": 2, "last_step": False} | settings))
    for unet in net.steps:
        torch.nn.init.normal_(unet.last.weight, std=0.02)
    return net.eval()


def images(*shape, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, *shape, generator=generator), torch.rand(n, 1, *shape, generator=generator)


@pytest.mark.parametrize("shape", [(32, 32), (17, 24), (16, 18, 21)])
def test_an_untrained_network_is_the_identity(shape):
    net = GradICON(len(shape), down=(4, 8), levels=2)
    torch.testing.assert_close(net(*images(*shape)).map, identity_map(shape).expand(2, -1, *[-1] * len(shape)))


@pytest.mark.parametrize(
    "settings", [{"levels": 1}, {"levels": 3, "last_step": True}, {"down": (4, 6, 8), "up": (3, 9, 2)}]
)
@pytest.mark.parametrize("shape", [(33, 28), (20, 17, 24)])
def test_widths_depths_and_levels_are_free(settings, shape):
    phi = small(len(shape), **settings)(*images(*shape))
    assert phi.map.shape == (2, len(shape), *shape)
    assert (phi.map - identity_map(shape)).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(33, 28), (20, 17, 24)])
def test_calling_the_transform_on_the_grid_gives_its_map(shape):
    phi = small(len(shape), last_step=True)(*images(*shape))
    points = identity_map(shape).expand(2, -1, *[-1] * len(shape))
    torch.testing.assert_close(phi(points), phi.map, atol=1e-6, rtol=0)


def test_a_transform_adds_the_newest_step_first():
    older, newer = torch.rand(1, 2, 4, 4) * 0.1, torch.rand(1, 2, 8, 8) * 0.1
    x = torch.rand(1, 2, 5, 1)
    y = x + sample(newer, x)
    torch.testing.assert_close(Transform((8, 8), (older, newer))(x), y + sample(older, y))


def test_pairs_of_a_batch_do_not_mix_in_eval_mode():
    net, (moving, fixed) = small(2), images(24, 24)
    torch.testing.assert_close(net(moving, fixed)[1:].map, net(moving[1:], fixed[1:]).map)


def test_unigradicon_has_its_papers_size():
    assert sum(p.numel() for p in unigradicon().parameters()) == pytest.approx(70.7e6, rel=2e-3)


def test_saved_and_loaded_weights_give_the_same_map(tmp_path):
    net, pair = small(2, up=(5, 6)), images(24, 24)
    net.save(tmp_path / "weights.pt")
    assert torch.equal(load(tmp_path / "weights.pt")(*pair).map, net(*pair).map)


def test_unigradicon_refuses_weights_of_another_architecture(tmp_path):
    small(2).save(tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"expected weights of .*'down': \[16, 32, 64, 256, 512\].*got those of"):
        unigradicon(tmp_path / "small.pt", dim=2)


def test_damaged_and_missing_weights_are_named(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match=r"weights\.pt.*No such file"):
        load(path)
    small(2).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.pt"):
        load(path)


@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        ((1, 1, 32, 32), (1, 1, 32, 30), r"one shape.*\(1, 1, 32, 32\) and \(1, 1, 32, 30\)"),
        ((1, 1, 32, 32, 32), (1, 1, 32, 32, 32), r"\(N, 1, X, Y\)"),
        ((1, 2, 32, 32), (1, 2, 32, 32), r"\(N, 1, X, Y\)"),
        ((1, 1, 32, 12), (1, 1, 32, 12), "at least 16 samples a side.*resample or pad"),
    ],
)
def test_wrong_shapes_say_what_was_expected(moving, fixed, message):
    with pytest.raises(ValueError, match=message):
        small(2)(torch.rand(moving), torch.rand(fixed))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="dim 2 or 3, got 4"):
        GradICON(4)
    with pytest.raises(ValueError, match="as many `up` as `down`"):
        GradICON(2, down=(4, 8), up=(4,))
