import dataclasses
import sys

import numpy as np
import pytest
import torch

from fmsam_lib.checking import ConfigError
from fmsam_lib.evaluation import baselines
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import map_error, mean_dice, measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, inverse_error, voxels
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Train
from fmsam_lib.training.losses import Batch, jittered_points, objective

SETTINGS = {"validation": 0} | {
    "out": "run",
    "train_domain": "brain-mr",
    "optimizer": "sam",
    "seed": 5,
    "shape": [32, 32],
    "data": "",
    "down": [8, 8],
    "levels": 2,
    "last_step": True,
    "steps": 1,
    "batch": 1,
    "lr": 0.001,
    "rho": 0.01,
    "sigma": 3.0,
    "lmbda": 1.0,
    "threads": 1,
}
RUN = Train(**SETTINGS)


def inverse_of(pair, maps):
    return next(row["value"] for row in measure(pair, *maps) if row["metric"] == "inverse_error")


# --- instance optimisation ---


@pytest.fixture(scope="module")
def easy():
    """A pair of brains whose true map is known."""
    return open_domain("brain-mr", shape=(32, 32)).test_pair(0)


def test_the_untrained_network_is_the_identity_whatever_the_training_was(tmp_path):
    net = baselines.untrained(RUN)
    assert not net.training
    pair = open_domain("brain-mr", shape=(32, 32)).test_pair(0)
    with torch.no_grad():
        found = net(pair.moving[None], pair.fixed[None]).map
    torch.testing.assert_close(found, identity_map((32, 32)), rtol=0, atol=1e-6)
    GradICON(2, down=(4, 8), levels=2, last_step=True).save(tmp_path / "a.pt")  # of a run that was fine-tuned
    other = baselines.untrained(Train(**SETTINGS | {"seed": 6, "weights": str(tmp_path / "a.pt")}))
    assert other.settings == GradICON(2, down=(4, 8), levels=2, last_step=True).settings
    other = baselines.untrained(Train(**SETTINGS | {"seed": 6}))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_optimisation_alone_registers_a_pair(easy):
    maps = baselines.instance_optimised(baselines.untrained(RUN), easy, RUN, steps=60, lr=0.003)
    identity = identity_map((32, 32))
    assert mean_dice(easy, maps[0]) > mean_dice(easy, identity) + 0.05
    assert inverse_of(easy, maps) < 0.5 * map_error(easy, None)
    assert not torch.equal(maps[0], maps[1])


def test_optimisation_leaves_the_network_and_is_the_same_twice(easy):
    net = baselines.untrained(RUN)
    before = [p.clone() for p in net.parameters()]
    first, second = (baselines.instance_optimised(net, easy, RUN, steps=3, lr=0.003) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_optimisation_goes_on_from_the_network_by_its_trainings_loss(easy, monkeypatch):
    """The best iterate counts, so that the training's own loss never rises."""
    seen, original = {}, baselines.optimise

    def watched(*arguments, **options):
        found = original(*arguments, **options)
        seen.update(options, losses=found[1], best=found[2])
        return found

    monkeypatch.setattr(baselines, "optimise", watched)
    trained = GradICON(2, down=(8, 8), levels=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.02 * torch.randn_like(p))
    baselines.instance_optimised(trained.eval(), easy, RUN, steps=15, lr=0.003)
    assert {name: seen[name] for name in RUN.loss()} == RUN.loss()
    assert len(seen["losses"]) == 16
    assert seen["losses"][seen["best"]] == min(seen["losses"]) < seen["losses"][0]


def test_optimisation_looks_within_the_masks(easy, monkeypatch):
    """The loss it starts with is the masked one, of both images; one mask alone counts for nothing."""
    found, original = [], baselines.optimise
    monkeypatch.setattr(baselines, "optimise", lambda *a, **o: found.append(original(*a, **o)) or found[-1])
    net, (moving, fixed) = baselines.untrained(RUN), (easy.moving > 0.2, easy.fixed > 0.2)
    for masks in ({"moving_mask": moving, "fixed_mask": fixed}, {"fixed_mask": fixed}, {}):
        baselines.instance_optimised(net, dataclasses.replace(easy, **masks), RUN, steps=1, lr=0.003)
    first, one, none = (losses[0] for _, losses, *_ in found)
    points = jittered_points((32, 32), torch.Generator().manual_seed(0))
    batch = Batch(easy.moving[None], easy.fixed[None], points, moving[None], fixed[None])
    assert first == pytest.approx(objective(net, batch, **RUN.loss()).total.item(), rel=1e-6)
    assert first != none == one


def test_a_network_of_nan_is_a_value_error(easy):
    broken = baselines.untrained(RUN)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="expected a finite loss before instance optimisation"):
        baselines.instance_optimised(broken, easy, RUN, steps=2, lr=0.003)


# --- ANTs' SyN ---


@pytest.fixture
def ants():
    return pytest.importorskip("ants", reason="no antspyx: pip install 'fmsam[ants]'")


@pytest.mark.parametrize(("shape", "index"), [((48, 48), 0), ((32, 32, 32), 1)], ids=["2-D", "3-D"])
def test_syn_registers_hearts_and_its_inverse_is_one(ants, shape, index):
    pair = open_domain("heart-mr", shape=shape).test_pair(index)
    maps = baselines.ants_syn(pair)
    assert [tuple(m.shape) for m in maps] == [(1, len(shape), *shape)] * 2
    assert mean_dice(pair, maps[0]) > mean_dice(pair, identity_map(shape)) + 0.05
    assert map_error(pair, maps[0]) < map_error(pair, None)
    assert voxels(inverse_error(*maps), shape).norm(dim=1).mean() < 0.1  # samples


def test_syn_is_the_same_twice(ants):
    pair = open_domain("heart-mr", shape=(32, 32)).test_pair(0)
    first, second = (baselines.ants_syn(pair) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("spacing", [(1.0, 3.0), (3.0, 1.0)])
def test_syn_finds_a_shift_in_samples_whatever_the_spacing(ants, spacing):
    """A smooth blob moved by 3 samples along the first axis and by 1 along the second."""
    x, y = np.meshgrid(np.arange(48), np.arange(40), indexing="ij")

    def blob(dx, dy):
        values = np.exp(-(((x - 22 - dx) / 7) ** 2) - ((y - 19 - dy) / 5) ** 2)
        values += 0.5 * np.exp(-(((x - 30 - dx) / 3) ** 2) - ((y - 22 - dy) / 3) ** 2)
        return torch.from_numpy((values / 1.5).astype(np.float32))[None]

    pair = Pair("shifted", moving=blob(3, 1), fixed=blob(0, 0), spacing=spacing)
    inside = (pair.fixed > 0.2).expand(2, -1, -1)
    for phi, sign in zip(baselines.ants_syn(pair), (1, -1), strict=True):
        shift = voxels(phi - identity_map((48, 40)), (48, 40))[0]
        mask = inside if sign > 0 else (pair.moving > 0.2).expand(2, -1, -1)
        found = shift[mask].view(2, -1).mean(dim=1)
        torch.testing.assert_close(found, sign * torch.tensor([3.0, 1.0]), rtol=0, atol=0.3)


def test_the_spacing_matters_to_syn(ants):
    """Its smoothing is in mm, so another ratio of spacings is another registration."""
    pair = open_domain("heart-mr", shape=(32, 32)).test_pair(0)
    stretched = Pair(pair.name, pair.moving, pair.fixed, spacing=(pair.spacing[0], 3 * pair.spacing[1]))
    assert not torch.allclose(baselines.ants_syn(pair)[0], baselines.ants_syn(stretched)[0], atol=1e-3)


def test_images_without_spacing_count_in_samples(ants):
    pair = open_domain("heart-mr", shape=(32, 32)).test_pair(0)
    bare, unit = (Pair("p", pair.moving, pair.fixed, spacing=spacing) for spacing in ((), (1.0, 1.0)))
    assert torch.equal(baselines.ants_syn(bare)[0], baselines.ants_syn(unit)[0])


def test_when_ants_gives_up_the_pair_is_named(ants, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr(ants, "registration", fails)
    pair = open_domain("heart-mr", shape=(32, 32)).test_pair(0)
    with pytest.raises(ValueError, match=f"expected ANTs to register {pair.name}, got: Registration failed"):
        baselines.ants_syn(pair)


def test_without_antspyx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    with pytest.raises(ConfigError, match=r"expected antspyx for ants-syn, got: .*; pip install 'fmsam\[ants\]'"):
        baselines.ants()
