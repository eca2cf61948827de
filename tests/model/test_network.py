import weakref

import pytest
import torch

from fmsam_lib.model import network
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, sample
from fmsam_lib.model.transform import Transform


def small(dim, **settings):
    torch.manual_seed(0)
    net = GradICON(dim, **({"down": (4, 8), "levels": 2, "last_step": False} | settings))
    for unet in net.steps:
        torch.nn.init.normal_(unet.last.weight, std=0.02)
    return net.eval()


def images(*shape, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, *shape, generator=generator), torch.rand(n, 1, *shape, generator=generator)


@pytest.mark.parametrize("shape", [(16, 16), (16, 18, 16)])
def test_a_training_step_leaves_no_tensor_behind(monkeypatch, shape):
    """A hook that holds its own tensor is never freed: 24 MB a step at 40x48x40."""
    kept, original = [], network.keep_layout
    monkeypatch.setattr(network, "keep_layout", lambda x: kept.append(weakref.ref(x)) or original(x))
    net = small(len(shape)).train()
    net(*images(*shape)).map.sum().backward()
    assert kept
    assert not [ref for ref in kept if ref() is not None]


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


@pytest.mark.parametrize("shape", [(37, 30), (70, 18, 21)])
def test_slabs_give_the_same(shape, monkeypatch):
    """Without gradients the finest depth is computed slab by slab."""
    net, pair = small(len(shape), last_step=True), images(*shape)
    whole = net(*pair).map
    for planes in (1, 3, 8, 100):
        monkeypatch.setattr(network, "SLAB", planes)
        with torch.no_grad():
            torch.testing.assert_close(net(*pair).map, whole, atol=1e-6, rtol=0)


def test_saving_memory_changes_neither_gradients_nor_statistics():
    pair = images(33, 24)
    results = []
    for save_memory in (False, True):
        net = small(2, levels=3, last_step=True).train()
        net.save_memory = save_memory
        (net(*pair).map ** 2).sum().backward()
        results.append([*(p.grad for p in net.parameters()), *net.buffers()])
    assert all(map(torch.equal, *results))


def test_saving_memory_allows_going_backward_twice():
    net = small(2, last_step=True).train()
    net.save_memory = True
    loss = (net(*images(33, 24)).map ** 2).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for p, gradient in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


def test_saving_memory_keeps_fewer_activations():
    kept = []
    for save_memory in (False, True):
        net, sizes = small(2, levels=3, last_step=True).train(), []
        net.save_memory = save_memory
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            net(*images(64, 64))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_the_last_convolution_is_torchs_own():
    """`finish` computes it in another order."""
    unet = small(3).steps[0]
    x, skip = torch.rand(2, unet.up[0].in_channels, 5, 6, 4), torch.rand(2, 2, 9, 12, 8)
    torch.nn.init.normal_(unet.last.bias)
    expected = unet.last(unet.ascend(0, x, skip)) / 10
    torch.testing.assert_close(unet.finish(x, skip), expected, atol=1e-6, rtol=0)


def test_deep_networks_take_small_images():
    assert small(3, down=(4, 4, 4, 4, 4), levels=3)(*images(16, 17, 16, n=1)).map.shape == (1, 3, 16, 17, 16)


def test_displacement_is_exact_where_subtraction_is_not():
    phi = Transform((8, 8)).then(torch.full((1, 2, 8, 8), 1e-9)).then(torch.full((1, 2, 4, 4), 2e-9))
    torch.testing.assert_close(phi.displacement(torch.rand(1, 2, 5, 5)), torch.full((1, 2, 5, 5), 3e-9))


def test_no_step_is_the_identity_and_expanding_repeats_a_pair():
    x = torch.rand(1, 2, 5, 5)
    assert torch.equal(Transform((8, 8))(x), x)
    torch.testing.assert_close(Transform((8, 8)).map, identity_map((8, 8)))
    phi = Transform((8, 8)).then(torch.rand(1, 2, 8, 8) * 0.1)
    assert torch.equal(phi.expand(3)(x.expand(3, -1, -1, -1)), phi(x).expand(3, -1, -1, -1))
    assert len(phi.expand(3)) == 3


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
        GradICON(4, down=(4,))
    with pytest.raises(ValueError, match="as many `up` as `down`"):
        GradICON(2, down=(4, 8), up=(4,))


def test_images_in_hounsfield_units_are_told(recwarn):
    net, (moving, fixed) = small(2).eval(), images(24, 24)
    network.warn_once.cache_clear()  # some other test may have had it
    net(moving, fixed)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"a network expects images in \[0, 1\]"):
        net(2000 * moving - 1000, fixed)


def test_images_of_another_type_are_told_what_to_do():
    net, (moving, fixed) = small(2), images(24, 24)
    with pytest.raises(ValueError, match=r"try moving.float\(\) and fixed.float\(\)"):
        net(moving.double(), fixed.double())
    with pytest.raises(ValueError, match=r"try net.float\(\)"):
        net.double()(moving, fixed)
