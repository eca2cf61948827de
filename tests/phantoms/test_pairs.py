import dataclasses
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch

from fmsam_lib.model.spatial import jacobian_determinant, sample, warp_label
from fmsam_lib.phantoms.anatomies import DOMAINS
from fmsam_lib.phantoms.pairs import make_pair

SHAPES = [(64, 64), (32, 32, 32)]
NAMES = sorted(DOMAINS)


def dice(a, b, labels):
    """Mean over the labels."""
    return np.mean([(2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum())).item() for k in labels])


def tensors(pair):
    return {k: v for k, v in vars(pair).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("shape", [*SHAPES, (40, 24), (24, 32, 16)])
@pytest.mark.parametrize("domain", NAMES)
def test_a_pair_keeps_its_promises(domain, shape):
    pair = make_pair(domain, seed=1, index=2, shape=shape)
    assert pair.name == f"{domain}-1-2"
    for image in (pair.moving, pair.fixed):
        assert image.shape == (1, *shape)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < 0.05  # a NaN fails too
        assert 0.5 < image.max() <= 1
    for label in (pair.moving_label, pair.fixed_label):
        assert label.shape == (1, *shape)
        assert label.dtype == torch.uint8
        assert set(label.unique().tolist()) <= {0, *pair.labels}
    assert pair.true_map.shape == (len(shape), *shape)
    assert all(value.isfinite().all() for value in tensors(pair).values())
    assert len(pair.spacing) == len(shape)
    assert torch.allclose(pair.affine[:3, : len(shape)].norm(dim=0), torch.tensor(pair.spacing, dtype=torch.float64))
    assert pair.fixed_landmarks.shape == pair.moving_landmarks.shape
    assert len(pair.fixed_landmarks) >= 8
    for landmarks in (pair.fixed_landmarks, pair.moving_landmarks):
        assert ((landmarks > 0) & (landmarks < 1)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_call_gives_the_same_bits_and_leaves_random_state_alone(shape):
    torch.manual_seed(0)
    np.random.seed(0)
    first = make_pair("lung-ct", seed=3, index=4, shape=shape)
    here = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert here == (torch.rand(1).item(), np.random.rand())
    make_pair("knee-mr", seed=3, index=4, shape=shape)  # nothing carries over from another call
    second = make_pair("lung-ct", seed=3, index=4, shape=shape)
    assert all(torch.equal(value, tensors(second)[key]) for key, value in tensors(first).items())


@pytest.mark.parametrize("shape", [(17, 19), (64, 64), (20, 24, 40), (32, 32, 32)])
@pytest.mark.parametrize("domain", NAMES)
def test_pairs_are_the_same_whatever_the_number_of_threads(domain, shape, monkeypatch):
    make_pair(domain, seed=0, index=0, shape=(16, 16))  # starts the thread that makes them
    made = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "set_num_threads", lambda n: pytest.fail("changed the process's number of threads"))
            made.append(tensors(make_pair(domain, seed=3, index=4, shape=shape)))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(value, other[name]) for other in made[1:] for name, value in made[0].items())


def test_the_first_pair_leaves_the_number_of_threads_to_everyone():
    """In a process of its own, whose pairs' thread is not there yet; a thread that begins afterwards, too."""
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor as Pool; torch.set_num_threads(3)\n"
        "from fmsam_lib.phantoms.pairs import make_pair; make_pair('brain-mr', seed=0, index=0, shape=(16, 16))\n"
        "print(torch.get_num_threads(), Pool(1).submit(torch.get_num_threads).result())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "3"]


def test_the_first_pair_is_the_same_whatever_the_number_of_threads():
    """In a process of its own: once torch has begun in the pairs' thread, no number set elsewhere reaches it."""
    code = (
        "import hashlib, torch; torch.set_num_threads(2); from fmsam_lib.phantoms.pairs import make_pair\n"
        "pair = make_pair('brain-mr', seed=1, index=0, shape=(48, 40))\n"
        "print(hashlib.sha256(pair.true_map.numpy().tobytes()).hexdigest())"
    )
    made = [
        subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout
        for said in (code, code.replace("threads(2)", "threads(1)"))
    ]
    assert made[0] == made[1] != ""


def test_a_forked_process_makes_pairs_too():
    first = tensors(make_pair("brain-mr", seed=0, index=0, shape=(16, 16)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        image = pool.apply_async(fixed_of, ()).get(60)
    assert torch.equal(torch.tensor(image), first["fixed"])


def fixed_of():
    return make_pair("brain-mr", seed=0, index=0, shape=(16, 16)).fixed.tolist()


def test_domain_seed_and_index_each_make_another_pair():
    pairs = [make_pair(d, seed=s, index=i, shape=(32, 32)) for d, s, i in
             [("brain-mr", 0, 0), ("brain-mr", 0, 1), ("brain-mr", 1, 0), ("knee-mr", 0, 0)]]  # fmt: skip
    for k, a in enumerate(pairs):
        assert not torch.equal(a.moving, a.fixed)
        assert not any(torch.equal(a.fixed, b.fixed) or torch.equal(a.true_map, b.true_map) for b in pairs[:k])


def test_the_same_subject_at_another_resolution():
    coarse, fine = (make_pair("abdomen-ct", seed=0, index=0, shape=(n, n, n)) for n in (17, 33))
    assert torch.allclose(coarse.true_map, fine.true_map[:, ::2, ::2, ::2], atol=1e-4)
    assert torch.allclose(coarse.fixed_landmarks, fine.fixed_landmarks)
    assert (coarse.fixed_label != fine.fixed_label[:, ::2, ::2, ::2]).float().mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("domain", NAMES)
def test_the_true_map_is_what_registration_should_find(domain, shape):
    before, after = [], []
    for index in range(12):
        pair = make_pair(domain, seed=0, index=index, shape=shape)
        for label in (pair.moving_label, pair.fixed_label):
            assert set(label.unique().tolist()) == {0, *pair.labels}
        phi = pair.true_map[None]
        assert jacobian_determinant(phi).min() > 0.05
        points = pair.fixed_landmarks.T.reshape(1, len(shape), -1, *[1] * (len(shape) - 1))
        found = sample(phi, points).flatten(2)[0].T
        assert (found - pair.moving_landmarks).abs().max() < 0.1 / (shape[0] - 1)  # a tenth of a sample: look-up error
        before.append(dice(pair.moving_label, pair.fixed_label, pair.labels))
        after.append(dice(warp_label(pair.moving_label[None], phi)[0], pair.fixed_label, pair.labels))
    low, high = (0.47, 0.67) if DOMAINS[domain].pairing == "inter-subject" else (0.6, 0.77)
    assert low < np.mean(before) < high
    assert np.mean(after) > (0.92 if len(shape) == 2 else 0.83)
    assert np.min(np.array(after) - before) > 0.1


def test_in_the_heart_only_the_heart_moves():
    pair = make_pair("heart-mr", seed=0, index=0, shape=(64, 64))
    still = (pair.true_map - torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 64)] * 2, indexing="ij"))).abs().amax(0)
    assert still[:5].max() < 1e-3
    assert still[-5:].max() < 1e-3
    assert still.max() > 0.03
    assert (pair.moving - pair.fixed)[0, :8].abs().mean() < 0.1  # and the two images show the same chest


def test_lungs_are_denser_after_breathing_out():
    pair = make_pair("lung-ct", seed=0, index=0, shape=(64, 64))
    air = [image[label == 1].mean() for image, label in
           ((pair.moving, pair.moving_label), (pair.fixed, pair.fixed_label))]  # fmt: skip
    assert air[1] > air[0] + 0.03
    assert (pair.fixed_label == 1).sum() < (pair.moving_label == 1).sum()


def test_a_plane_has_its_own_axes():
    sagittal = make_pair("knee-mr", seed=0, index=0, shape=(32, 48))
    x, (y, z) = 0, (1, 2)
    assert sagittal.affine[[y, z], [0, 1]].tolist() == pytest.approx(list(sagittal.spacing))
    assert sagittal.affine[x, :2].tolist() == [0, 0]


def test_the_liver_is_on_the_right_and_the_spleen_on_the_left():
    pair = make_pair("abdomen-ct", seed=0, index=0, shape=(32, 32, 32))
    x = [(pair.fixed_label[0] == k).nonzero()[:, 0].float().mean() for k in (1, 2)]  # x grows towards the right
    assert x[0] > 18
    assert x[1] < 13


def test_pairs_can_be_compared_and_counted():
    pair, again = (make_pair("brain-mr", seed=0, index=0, shape=(16, 16)) for _ in range(2))
    assert pair == pair
    assert pair != again
    assert len({pair, again}) == 2


def test_domains():
    assert {name: (d.modality, d.pairing) for name, d in DOMAINS.items()} == {
        "brain-mr": ("MR", "inter-subject"),
        "lung-ct": ("CT", "intra-subject"),
        "knee-mr": ("MR", "inter-subject"),
        "abdomen-ct": ("CT", "inter-subject"),
        "heart-mr": ("MR", "intra-subject"),
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        DOMAINS["heart-mr"].variation = 0.0
