import pytest
import torch
from scipy.ndimage import correlate1d

from fmsam_lib.losses import Batch, gaussian_blur, gradicon_penalty, jittered_points, lncc, objective
from fmsam_lib.network import GradICON, Transform
from fmsam_lib.spatial import identity_map


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


def test_lncc_of_constant_images_is_finite():
    a = torch.ones(1, 1, 20, 20, requires_grad=True)
    value = lncc(a, torch.ones(1, 1, 20, 20))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(a.grad).all()


def test_lncc_refuses_different_shapes():
    with pytest.raises(ValueError, match="one shape"):
        lncc(torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21))


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
