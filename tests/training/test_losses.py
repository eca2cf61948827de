import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform
from fmsam_lib.training.losses import (
    Batch,
    gaussian_blur,
    gradicon_penalty,
    jittered_points,
    lncc,
    lncc2_loss,
    lncc_loss,
    mind_loss,
    mind_ssc,
    objective,
)

SIMILARITIES = (lncc_loss, lncc2_loss, mind_loss)


@pytest.mark.parametrize("shape", [(20, 31), (12, 25, 17)])
@pytest.mark.parametrize("sigma", [1.5, 5.0])
def test_blur_agrees_with_scipy(shape, sigma):
    x = torch.rand(1, 2, 1, *shape, dtype=torch.float64)
    radius = int(2 * sigma)
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    expected = x.numpy()
    for axis in range(3, x.dim()):
        expected = correlate1d(expected, (window / window.sum()).numpy(), axis=axis, mode="constant")
    torch.testing.assert_close(gaussian_blur(x, sigma), torch.from_numpy(expected))


def test_lncc_knows_alike_opposite_and_unrelated():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 1, 48, 48, dtype=torch.float64)
    assert lncc(a, 3 * a).item() == pytest.approx(1, abs=2e-3)
    assert lncc(a, -a).item() == pytest.approx(-1, abs=2e-3)
    assert abs(lncc(a, b).item()) < 0.1
    assert lncc(a, b).item() == pytest.approx(lncc(b, a).item())


def lncc_by_scipy(a: np.ndarray, b: np.ndarray, sigma: float) -> np.ndarray:
    offsets = np.arange(-int(2 * sigma), int(2 * sigma) + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)

    def mean(x):
        for axis in range(2, x.ndim):
            x = correlate1d(x, window / window.sum(), axis=axis, mode="constant")
        return x

    variances = [np.maximum(mean(x * x) - mean(x) ** 2, 0) + 1e-5 for x in (a, b)]
    return (mean(a * b) - mean(a) * mean(b)) / np.sqrt(variances[0] * variances[1])


def mind_by_loops(image: np.ndarray, radius: int = 2, dilation: int = 2) -> np.ndarray:
    """(K, *S) of one image (*S), sample by sample and pair by pair, as the paper tells it."""

    def at(x):  # the border repeats
        return tuple(np.clip(x, 0, np.array(image.shape) - 1))

    steps = [sign * dilation * e for e in np.eye(image.ndim, dtype=int) for sign in (-1, 1)]
    pairs = [(p, q) for p, q in itertools.combinations(steps, 2) if ((p - q) ** 2).sum() == 2 * dilation**2]
    patch = [np.array(w) for w in itertools.product(range(-radius, radius + 1), repeat=image.ndim)]
    square = {
        x: np.array([(image[at(x + p)] - image[at(x + q)]) ** 2 for p, q in pairs]) for x in np.ndindex(image.shape)
    }
    ssd = np.zeros((len(pairs), *image.shape))
    for x in np.ndindex(image.shape):
        ssd[(slice(None), *x)] = np.mean([square[at(x + w)] for w in patch], 0)
    distance = ssd - ssd.min(0)
    variance = distance.mean(0)
    return np.exp(-distance / np.clip(variance, 0.001 * variance.mean(), 1000 * variance.mean()))


def mean_inside(values: np.ndarray, mask: np.ndarray) -> float:
    return np.mean([v[np.broadcast_to(m != 0, v.shape)].mean() for v, m in zip(values, mask, strict=True)])


def images(*shape, n=2, dtype=torch.float64, seed=0):
    """Two batches of images, and masks that leave another part of every sample out."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, n, 1, *shape, generator=generator, dtype=dtype)
    mask = torch.ones(n, 1, *shape, dtype=dtype)
    for i in range(n):
        mask[i, :, : 3 + 2 * i] = 0
    return a, b, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 31), (12, 15, 17)])
def test_lncc_agrees_with_scipy(shape, dtype):
    a, b, mask = images(*shape, dtype=dtype)
    expected = lncc_by_scipy(a.double().numpy(), b.double().numpy(), 2.5)
    close = {"rel": 1e-10 if dtype == torch.float64 else 1e-4}
    assert lncc(a, b, sigma=2.5).dtype == dtype
    assert lncc(a, b, sigma=2.5).item() == pytest.approx(expected.mean(), **close)
    assert lncc_loss(a, b, sigma=2.5).item() == pytest.approx(1 - expected.mean(), **close)
    assert lncc2_loss(a, b, sigma=2.5).item() == pytest.approx(1 - (expected**2).mean(), **close)
    inside = mean_inside(expected, mask.numpy())
    assert lncc(a, b, sigma=2.5, mask=mask).item() == pytest.approx(inside, **close)
    assert lncc_loss(a, b, sigma=2.5, mask=mask).item() == pytest.approx(1 - inside, **close)
    inside = mean_inside(expected**2, mask.numpy())
    assert lncc2_loss(a, b, sigma=2.5, mask=mask > 0).item() == pytest.approx(1 - inside, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "pairs"), [((13, 16), 4), ((6, 7, 8), 12)])
def test_mind_agrees_with_loops(shape, pairs, dtype):
    a, b, mask = images(*shape, n=1, dtype=dtype)
    a[..., :7] /= 1e3  # a background whose variance is bounded
    expected = [mind_by_loops(x[0, 0].double().numpy()) for x in (a, b)]
    close = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for x, descriptors in zip((a, b), expected, strict=True):
        ours = mind_ssc(x)
        assert ours.shape == (pairs, 1, 1, *shape)
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.sort(ours[:, 0, 0].double(), 0), np.sort(descriptors, 0), **close)
    squares = (expected[0] - expected[1]) ** 2
    assert mind_loss(a, b).item() == pytest.approx(squares.mean(), rel=1e-4)
    inside = mean_inside(squares[None], mask.numpy())
    assert mind_loss(a, b, mask=mask).item() == pytest.approx(inside, rel=1e-4)


def test_lncc_is_the_same_inside_a_users_autocast():
    """A bright image with small contrast: in bfloat16 nothing would be left of its variance."""
    a, b = 0.9 + 0.05 * torch.rand(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = lncc(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lncc(a, b), expected)


def test_mind_takes_other_radii_and_dilations():
    a = images(11, 14)[0][:1]
    for radius, dilation in ((1, 1), (1, 3), (3, 1)):
        ours = mind_ssc(a, radius=radius, dilation=dilation)[:, 0, 0].numpy()
        expected = mind_by_loops(a[0, 0].numpy(), radius, dilation)
        np.testing.assert_allclose(np.sort(ours, 0), np.sort(expected, 0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("measure", SIMILARITIES)
@pytest.mark.parametrize("shape", [(24, 31), (14, 16, 18)])
def test_alike_images_cost_nothing_and_others_do(measure, shape):
    a, b, _ = images(*shape)
    assert measure(a, a).item() == pytest.approx(0, abs=1e-3)  # LNCC's variances have a floor
    assert measure(a, b).item() > 0.05


def test_inverted_contrast():
    """MIND compares patches of one image, so it takes any linear change; LNCC's square does not know the sign."""
    a, b, mask = images(24, 31)
    alike = pytest.approx(mind_loss(a, b, mask=mask).item(), rel=1e-8)
    assert mind_loss(1 - a, b, mask=mask).item() == alike
    assert mind_loss(0.7 - 0.5 * a, b, mask=mask).item() == alike
    assert lncc2_loss(-a, b, mask=mask).item() == pytest.approx(lncc2_loss(a, b, mask=mask).item(), rel=1e-8)
    assert lncc_loss(-a, a).item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_a_mask_of_ones_is_no_mask(measure):
    a, b, mask = images(18, 21, 19)
    for ones in (torch.ones_like(mask), torch.full_like(mask, 7), torch.ones_like(mask, dtype=torch.bool)):
        assert measure(a, b, mask=ones).item() == pytest.approx(measure(a, b).item(), rel=1e-12)


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_what_lies_outside_the_mask_beyond_the_window_does_not_count(measure):
    a, b, mask = images(40, 24)
    mask[:, :, :20] = 0
    options = {"mask": mask} if measure is mind_loss else {"mask": mask, "sigma": 2.0}  # both reach 4 samples
    other = a.clone()
    other[:, :, :16] = torch.rand(2, 1, 16, 24, dtype=a.dtype)
    assert measure(other, b, **options).item() == pytest.approx(measure(a, b, **options).item(), rel=1e-12)
    other[:, :, :22] = torch.rand(2, 1, 22, 24, dtype=a.dtype)
    assert measure(other, b, **options).item() != pytest.approx(measure(a, b, **options).item(), rel=1e-4)


def test_samples_count_alike_however_much_their_masks_leave():
    a, b, mask = images(24, 24)
    alone = [lncc(a[i : i + 1], b[i : i + 1], mask=mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(lncc(a, b, mask=mask), (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_an_empty_or_misshapen_mask_is_refused(measure):
    a, b, mask = images(20, 20)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"empty ones for samples \[1\]"):
        measure(a, b, mask=mask)
    with pytest.raises(ValueError, match=r"expected a mask \(2, 1, 20, 20\), got \(1, 1, 20, 20\)"):
        measure(a, b, mask=mask[:1])


@pytest.mark.parametrize("measure", SIMILARITIES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_are_finite(measure, value):
    """The value, and the gradient, of a constant against a constant and against an image."""
    for b in (torch.full((1, 1, 20, 20), value), torch.rand(1, 1, 20, 20)):
        a = torch.full((1, 1, 20, 20), value, requires_grad=True)
        loss = measure(a, b)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_images_of_different_shapes_are_refused(measure):
    with pytest.raises(ValueError, match="one shape"):
        measure(torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21))


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 4)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("measure", SIMILARITIES)
def test_similarities_have_the_gradient_of_their_value(measure, masked, shape):
    a, b, mask = images(*shape, n=2)
    mask[:, :, 0] = 0
    mask[:, :, -1] = 1
    options = {"mask": mask if masked else None} | ({} if measure is mind_loss else {"sigma": 1.0})
    assert torch.autograd.gradcheck(lambda x, y: measure(x, y, **options), (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_similarities_have_second_derivatives(measure):
    """The landscape's curvature needs them."""
    a, b, mask = images(6, 7, n=1)
    options = {} if measure is mind_loss else {"sigma": 1.0}
    assert torch.autograd.gradgradcheck(lambda x: measure(x, b, mask=mask, **options), (a.requires_grad_(),))


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("measure", SIMILARITIES)
def test_similarities_run_where_their_images_are(measure, device):
    """On "meta" nothing is computed, but a tensor that stays behind on the CPU is found."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a, b, mask = images(14, 16, 18, dtype=torch.float32)
    there = measure(a.to(device), b.to(device), mask=mask.to(device))
    assert there.device.type == device
    if device == "cuda":
        torch.testing.assert_close(there.cpu(), measure(a, b, mask=mask), rtol=1e-4, atol=1e-6)


def affine(matrix):
    """The map x -> matrix x as a transform, by its displacement."""
    x = identity_map((9, 9), torch.float64)
    return Transform((9, 9), (torch.einsum("ij,nj...->ni...", matrix, x) - x,))


def test_penalty_of_affine_maps_is_the_distance_from_inverse():
    """For phi_ab = A x and phi_ba = B x it is |A B - 1|_F^2, wherever it is measured."""
    generator = torch.Generator().manual_seed(0)
    a = torch.eye(2, dtype=torch.float64) - 0.05 * torch.rand(2, 2, generator=generator, dtype=torch.float64)
    points = 0.3 + 0.3 * torch.rand(1, 2, 6, 5, generator=generator, dtype=torch.float64)
    inverse = gradicon_penalty(affine(a), affine(torch.linalg.inv(a)), points)
    assert inverse.item() == pytest.approx(0, abs=1e-12)
    expected = (a @ a - torch.eye(2)).pow(2).sum() / 2  # a mean over the two components
    assert gradicon_penalty(affine(a), affine(a), points).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("shape", [(33, 28), (18, 20, 17)])
def test_penalty_agrees_with_one_look_up_at_a_time(shape):
    torch.manual_seed(0)
    dim, delta = len(shape), 1e-3
    ab, ba = (Transform(shape, (torch.rand(2, dim, *shape, dtype=torch.float64) * 0.1,)) for _ in range(2))
    points = jittered_points(shape, torch.Generator().manual_seed(0)).double()
    x = points.expand(2, *[-1] * (dim + 1))
    error = x - ab(ba(x))
    expected = 0
    for axis in range(dim):
        y = x.clone()
        y[:, axis] += delta
        expected += (((error - (y - ab(ba(y)))) / delta) ** 2).mean()
    torch.testing.assert_close(gradicon_penalty(ab, ba, points), expected)


def test_jittered_points_are_every_second_one_moved_a_little():
    points = jittered_points((33, 40), torch.Generator().manual_seed(0))
    assert points.shape == (1, 2, 17, 20)
    noise = points - identity_map((33, 40))[..., ::2, ::2]
    assert noise.std().item() == pytest.approx(2 / 40, rel=0.1)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)])
def test_the_penalty_has_the_gradient_of_its_value(shape):
    torch.manual_seed(0)
    ab, ba = (0.05 * torch.rand(1, len(shape), *shape, dtype=torch.float64) for _ in range(2))
    points = 0.2 + 0.5 * torch.rand(1, len(shape), *[2] * len(shape), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda u, v: gradicon_penalty(Transform(shape, (u,)), Transform(shape, (v,)), points),
        (ab.requires_grad_(), ba.requires_grad_()),
    )


def test_identical_images_cost_nothing_but_the_window_floor():
    image = torch.rand(1, 1, 32, 32)
    batch = Batch(image, image, jittered_points((32, 32), torch.Generator()))
    loss = objective(GradICON(2, down=(4, 8), levels=2), batch, lmbda=1.5, sigma=3)
    assert loss.regulariser.item() == pytest.approx(0, abs=1e-5)
    assert loss.similarity.item() == pytest.approx(0, abs=5e-3)
    torch.testing.assert_close(loss.total, loss.similarity + 1.5 * loss.regulariser)


def test_the_loss_treats_both_directions_alike():
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 1, 32, 32)
    net = GradICON(2, down=(4, 8), levels=2).eval()
    torch.nn.init.normal_(net.steps[0].last.weight, std=0.02)
    points = jittered_points((32, 32), torch.Generator())
    there, back = (objective(net, Batch(*pair, points), lmbda=1.0, sigma=3) for pair in ((a, b), (b, a)))
    torch.testing.assert_close(there.similarity, back.similarity)


def bent_net(dim=2, seed=0, dtype=torch.float64):
    """A small network away from the untrained identity."""
    torch.manual_seed(seed)
    net = GradICON(dim, down=(4, 8), levels=2)
    for step in net.steps:
        torch.nn.init.normal_(step.last.weight, std=0.02)
    return net.to(dtype)


def masked_batch(*shape, n=2, dtype=torch.float64):
    a, b, mask_a = images(*shape, n=n, dtype=dtype)
    points = jittered_points(shape, torch.Generator().manual_seed(0)).to(dtype)
    return Batch(a, b, points, mask_a, mask_a.flip(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
def test_the_objective_is_its_equation(similarity, masked):
    """sim(A o phi_AB, B, mask_B) + sim(B o phi_BA, A, mask_A) + lmbda * penalty, by torch's own look-up."""
    net = bent_net().eval()
    batch = masked_batch(20, 24)
    batch.fixed[..., :10] /= 1e3  # the bounds of MIND's variance differ between the directions
    batch = batch if masked else batch._replace(moving_mask=None, fixed_mask=None)
    loss = objective(net, batch, lmbda=0.7, sigma=2.0, similarity=similarity)

    def seen(image, phi_map):
        grid = (2 * phi_map - 1).flip(1).movedim(1, -1)
        return torch.nn.functional.grid_sample(image, grid, padding_mode="zeros", align_corners=True)

    A, B, points, mask_A, mask_B = batch
    phi_ab, phi_ba = net(A, B), net(B, A)
    measure = {"lncc": lncc_loss, "lncc2": lncc2_loss, "mind": mind_loss}[similarity]
    window = {} if similarity == "mind" else {"sigma": 2.0}
    there = measure(seen(A, phi_ab.map), B, mask=mask_B, **window)
    back = measure(seen(B, phi_ba.map), A, mask=mask_A, **window)
    expected = gradicon_penalty(phi_ab, phi_ba, points)
    assert expected > 0
    torch.testing.assert_close(loss.similarity, there + back)
    torch.testing.assert_close(loss.regulariser, expected)
    torch.testing.assert_close(loss.total, there + back + 0.7 * expected)


@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
@pytest.mark.parametrize("shape", [(20, 24), (16, 18, 16)])
def test_one_direction_after_the_other_costs_the_same(shape, similarity):
    net, batch = bent_net(len(shape), dtype=torch.float32).eval(), masked_batch(*shape, dtype=torch.float32)
    how = {"lmbda": 1.5, "sigma": 2.0, "similarity": similarity}
    both, one = (objective(net, batch, joint=joint, **how) for joint in (True, False))
    torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-6)


def test_in_training_mode_each_direction_has_its_own_batch_statistics():
    nets = [bent_net().train()]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    batch = masked_batch(20, 24)
    for net, joint in zip(nets, (True, False), strict=False):
        objective(net, batch, lmbda=1.5, sigma=2.0, joint=joint)
    nets[2](batch.moving, batch.fixed)
    nets[2](batch.fixed, batch.moving)
    both, one, by_hand = (torch.cat([b.double().flatten() for b in net.buffers()]) for net in nets)
    assert not torch.allclose(both, one)
    assert torch.equal(one, by_hand)  # moved once by each direction
    assert [nets[i].steps[0].norm[0].num_batches_tracked.item() for i in (0, 1)] == [1, 2]


def test_an_unknown_name_and_half_a_pair_of_masks_are_refused():
    net, batch = bent_net(), masked_batch(20, 24)
    weights = {"lmbda": 1.5, "sigma": 2.0}
    with pytest.raises(ValueError, match="similarity to be one of lncc, lncc2, mind, got 'ssd'"):
        objective(net, batch, **weights, similarity="ssd")
    for missing in ("moving_mask", "fixed_mask"):
        with pytest.raises(ValueError, match="both images or for neither"):
            objective(net, batch._replace(**{missing: None}), **weights)


def test_inference_mode_does_not_spoil_later_training():
    a, b = torch.rand(2, 1, 1, 23, 29, requires_grad=True)
    with torch.inference_mode():
        for measure in (lncc_loss, mind_loss):
            measure(a, b)
        identity_map((23, 29))
    (lncc_loss(a, b) + mind_loss(a, b)).backward()
    (identity_map((23, 29)) * a.mean()).sum().backward()
