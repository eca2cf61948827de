import itertools

import pytest
import torch

from fmsam_lib.images.domains import open_domain
from fmsam_lib.training.augmentation import augment, other_scanner, transformed, turn
from fmsam_lib.training.losses import lncc


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_turn_is_the_permutation_and_flips_that_its_matrix_says():
    """torch counts a sample's coordinates from the last axis: row and column i belong to axis 2 - i."""
    n = 4
    image = torch.rand(1, n, n, n)
    for seed in range(20):
        matrix = turn(3, generator(seed))[:, :3].flip(0, 1)  # from here on in the order of the axes
        expected = torch.empty(n, n, n)
        for place in itertools.product(range(n), repeat=3):
            centred = torch.tensor(place) * 2.0 - (n - 1)
            expected[place] = image[(0, *((matrix @ centred + n - 1) / 2).int().tolist())]
        assert torch.allclose(transformed(image, turn(3, generator(seed)))[0], expected, atol=1e-5)


def test_all_turns_occur_about_equally_often():
    g = generator()
    drawn = [tuple(turn(2, g).flatten().tolist()) for _ in range(800)]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 8
    assert min(counts) > 60


def test_noise_is_five_percent_of_every_entry(monkeypatch):
    monkeypatch.setattr("fmsam_lib.training.augmentation.turn", lambda dim, generator: torch.zeros(dim, dim + 1))
    monkeypatch.setattr("fmsam_lib.training.augmentation.transformed", lambda image, affine: affine)
    g, image = generator(), torch.zeros(1, 4, 4, 4)
    drawn = torch.cat([torch.stack(augment(image, image, g)) for _ in range(1000)])
    assert torch.allclose(drawn.std(0), torch.full((3, 4), 0.05), rtol=0.1)
    assert drawn.mean(0).abs().max() < 0.005


@pytest.mark.parametrize("shape", [(24, 20), (12, 10, 14)])
def test_both_images_turn_alike_and_bend_apart(shape):
    image = torch.zeros(1, *shape)
    image[(0, *[slice(n // 4) for n in shape])] = 1.0  # one corner
    for seed in range(10):
        moving, fixed = augment(image, image, generator(seed))
        assert moving.shape == fixed.shape == image.shape
        assert not torch.equal(moving, fixed)
        turned = transformed(image, turn(len(shape), generator(seed)))
        middles = [torch.argwhere(x[0] > 0.5).float().mean(0) / torch.tensor(shape) for x in (turned, moving, fixed)]
        assert all(torch.equal(middle.round(), middles[0].round()) for middle in middles)


def test_the_same_generator_gives_the_same_pair():
    pair = torch.rand(2, 1, 9, 9)
    first, again, other = (augment(*pair, generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_warp_is_that_of_unigradicons_own_training(monkeypatch):
    peer = pytest.importorskip("unigradicon.finetuning.finetune", reason="no unigradicon: make test installs it")
    images = torch.rand(2, 1, 1, 10, 12, 14)
    drawn = [torch.randn(1, 3, 4) for _ in range(2)]
    numbers = iter(drawn)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(numbers))
    batch = dict(zip(("image_A", "image_B"), images, strict=True))
    theirs = peer.augment(batch, random_flips=False, random_axis_permutations=False)
    straight = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)
    for image, key, z in zip(images, batch, drawn, strict=True):
        assert torch.allclose(transformed(image[0], straight + 0.05 * z[0]), theirs[key][0], atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 20), (12, 10, 14)])
def test_another_scanner_shows_the_same_things_otherwise(shape):
    torch.manual_seed(0)
    image = torch.cat([torch.rand(1, *shape) * 0.9, (torch.rand(1, *shape) > 0.5).float()])
    powers, ends = [], []
    for seed in range(200):
        changed = other_scanner(image, 0.7, generator(seed))
        assert torch.equal(changed[1:], image[1:])  # the mask
        assert changed[:1].min() >= 0
        assert changed[:1].max().item() == pytest.approx(image[:1].max().item())
        ramp = other_scanner(torch.ones(1, *shape), 0.7, generator(seed)).log()  # 1 to any power is 1
        ends.append([ramp.select(axis, -1).mean() - ramp.select(axis, 0).mean() for axis in range(1, len(shape) + 1)])
        without = (changed[0] / ramp[0].exp()).flatten()
        logs = torch.stack([without.log(), image[0].flatten().log()]).cov()
        powers.append(logs[0, 1] / logs[1, 1])
    powers, ends = torch.stack(powers).log(), torch.tensor(ends)
    assert -0.7 <= powers.min() < -0.6 < 0.6 < powers.max() <= 0.7
    assert torch.allclose(ends.std(0), torch.full((len(shape),), 0.7), rtol=0.2)


def test_what_is_black_stays_black():
    assert torch.equal(other_scanner(torch.zeros(1, 5, 5), 2.0, generator()), torch.zeros(1, 5, 5))


def test_lncc_hardly_sees_another_scanner():
    x = open_domain("brain-mr", shape=(64, 64)).test_pair(0).fixed
    for seed in range(5):
        changed = other_scanner(x, 0.7, generator(seed))
        assert (changed - x).abs().mean() > 0.01
        assert lncc(x[None], changed[None]) > 0.9
