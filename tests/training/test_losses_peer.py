"""Against icon-registration, whose losses uniGradICON was trained with."""

import copy

import pytest
import torch

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.training.losses import Batch, lncc2_loss, lncc_loss, mind_loss, objective

peers = pytest.importorskip("peers")
try:
    icon = peers.icon_registration()
except ImportError:
    pytest.skip("icon-registration is not installed: make test installs it", allow_module_level=True)


def pair_and_mask(shape, n=2):
    """Images with a dim background in one sample, smooth in another, and masks that differ between the samples."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, n, 1, *shape, generator=generator)
    a[0, ..., :9] *= 1e-3
    b[0, ..., -7:] *= 1e-3
    a[-1] = torch.nn.functional.avg_pool3d(a[-1], 3, stride=1, padding=1)
    mask = (torch.rand(n, 1, *shape, generator=generator) > 0.4).float()
    mask[-1, :, : shape[0] // 2] = 0
    return a, b, mask


def value_and_gradient(measure, a, b, *mask):
    a = a.clone().requires_grad_(True)
    value = measure(a, b, *mask)
    value.backward()
    return value.detach(), a.grad


def assert_same(ours, theirs):
    """Value and gradient to 1e-5, the gradient by its norm."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert (ours[1] - theirs[1]).norm() <= 1e-5 * theirs[1].norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(24, 24, 24), (19, 26, 22)])
@pytest.mark.parametrize(
    ("measure", "peer"),
    [
        (lambda a, b, mask=None: lncc_loss(a, b, sigma=5, mask=mask), lambda: icon.LNCC(5)),
        (lambda a, b, mask=None: lncc2_loss(a, b, sigma=2, mask=mask), lambda: icon.SquaredLNCC(2)),
        (lambda a, b, mask=None: mind_loss(a, b, mask=mask), lambda: icon.MINDSSC(radius=2, dilation=2)),
    ],
    ids=["lncc", "lncc2", "mind"],
)
def test_similarity(measure, peer, shape, masked):
    a, b, mask = pair_and_mask(shape)
    given = (a, b, mask) if masked else (a, b)
    assert_same(value_and_gradient(measure, *given), value_and_gradient(peer(), *given))


@pytest.mark.parametrize("peer_mask", [torch.bool, torch.int64])
def test_masks_of_any_type(peer_mask):
    a, b, mask = pair_and_mask((20, 20, 20))
    theirs = icon.LNCC(3)(a, b, mask.to(peer_mask))
    torch.testing.assert_close(lncc_loss(a, b, sigma=3, mask=mask.to(peer_mask)), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(20, 33), (14, 17, 15)])
def test_lncc_in_2d_and_3d(shape):
    a, b = torch.rand(2, 2, 1, *shape, generator=torch.Generator().manual_seed(0))
    measures = (lambda x, y: lncc_loss(x, y, sigma=3)), icon.LNCC(3)
    assert_same(*(value_and_gradient(measure, a, b) for measure in measures))


class Ours(torch.nn.Module):
    """Our network where a peer's loss expects one of its own: its identity map is one sample for the whole batch."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a, b):
        phi = self.net(a, b)
        return lambda x: phi(x.expand(len(a), *x.shape[1:]))

    def assign_identity_map(self, *_):
        pass


def networks(dim, *, train):
    """One of ours away from the untrained identity, and its copy in a peer's hands."""
    torch.manual_seed(0)
    net = GradICON(dim, down=(4, 8), levels=2).train(train)
    for step in net.steps:
        torch.nn.init.normal_(step.last.weight, std=0.02)
    return net, Ours(copy.deepcopy(net))


def peer_loss(loss, net, shape, noise, monkeypatch, **options):
    """A peer's loss module for `shape`, that draws `noise` where it jitters the points."""
    monkeypatch.setattr(torch, "randn", lambda *_: noise)
    module = loss(net, lmbda=1.5, **options)
    module.assign_identity_map([1, 1, *shape])
    return module


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
def test_unigradicons_whole_loss(similarity, train, masked, monkeypatch):
    """Every term, the gradient of all weights, and BatchNorm's statistics afterwards."""
    shape = (16, 20, 18)
    a, b, mask = pair_and_mask(shape)
    noise = torch.randn(1, 3, *shape)
    points = (identity_map(shape) + 2 * noise / shape[-1])[:, :, ::2, ::2, ::2]
    net, copied = networks(3, train=train)
    peer = {"lncc": icon.LNCC(5), "lncc2": icon.SquaredLNCC(5), "mind": icon.MINDSSC(2, 2)}[similarity]
    unigradicon = peers.unigradicon().GradientICONSparse
    module = peer_loss(unigradicon, copied, shape, noise, monkeypatch, similarity=peer, loss_function_masking=masked)
    masks = (mask, mask.flip(2)) if masked else (None, None)
    theirs = module(a, b, mask_A=masks[0], mask_B=masks[1])
    theirs.all_loss.backward()
    batch = Batch(a, b, points, *masks)
    ours = objective(net, batch, lmbda=1.5, sigma=5, similarity=similarity, joint=False)
    ours.total.backward()
    torch.testing.assert_close(ours.similarity, theirs.similarity_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.regulariser, theirs.inverse_consistency_loss, rtol=1e-3, atol=0)  # delta = 1e-3
    torch.testing.assert_close(ours.total, theirs.all_loss, rtol=1e-4, atol=0)
    largest = max(p.grad.abs().max().item() for p in net.parameters())
    for p, q in zip(net.parameters(), copied.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * largest)
    for p, q in zip(net.buffers(), copied.net.buffers(), strict=True):
        assert torch.equal(p, q)
