import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from fmsam_lib.model.spatial import (
    identity_map,
    inverse_error,
    jacobian_determinant,
    sample,
    warp,
    warp_label,
)

SHAPES = [(7, 9), (6, 5, 8)]


def smooth_map(shape, size=0.03, seed=0):
    """Identity plus a few slow sine waves."""
    x = identity_map(shape, torch.float64)
    phase = torch.rand(len(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6
    waves = torch.stack([torch.sin(3 * x[0].sum(0) + p) for p in phase])
    return x + size * waves[None]


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_at_the_identity_returns_the_image(shape):
    image = torch.rand(2, 3, *shape, dtype=torch.float64)
    points = identity_map(shape, torch.float64).expand(2, *[-1] * (len(shape) + 1))
    torch.testing.assert_close(sample(image, points), image)
    torch.testing.assert_close(sample(image, points, mode="nearest"), image)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_agrees_with_scipy(shape):
    image = torch.rand(1, 1, *shape, dtype=torch.float64)
    points = torch.rand(1, len(shape), 40, *[1] * (len(shape) - 1), dtype=torch.float64)
    coordinates = points[0].flatten(1).numpy() * (np.array(shape)[:, None] - 1)
    expected = map_coordinates(image[0, 0].numpy(), coordinates, order=1)
    np.testing.assert_allclose(sample(image, points).flatten().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_by_one_sample_moves_the_image_and_fills_with_zeros(shape):
    image = torch.rand(1, 1, *shape, dtype=torch.float64) + 1
    shift = torch.zeros(1, len(shape), *[1] * len(shape), dtype=torch.float64)
    shift[0, 0] = 1 / (shape[0] - 1)
    moved = warp(image, identity_map(shape, torch.float64) + shift)
    torch.testing.assert_close(moved[:, :, :-1], image[:, :, 1:])
    assert moved[:, :, -1].abs().max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian_of_an_affine_map_is_its_determinant_in_voxels(shape):
    dim = len(shape)
    matrix = torch.eye(dim, dtype=torch.float64) + 0.2 * torch.rand(dim, dim, dtype=torch.float64)
    x = identity_map(shape, torch.float64)
    phi = torch.einsum("ij,nj...->ni...", matrix, x)
    determinant = jacobian_determinant(phi)
    assert determinant.shape == (1, *(n - 1 for n in shape))
    # the scales of the axes cancel in a determinant
    torch.testing.assert_close(determinant, torch.full_like(determinant, torch.linalg.det(matrix).item()))


def test_a_flipped_axis_is_folded_everywhere():
    assert (
        jacobian_determinant(1 - identity_map((6, 7))[:, [0, 1]] * torch.tensor([1, -1]).view(1, 2, 1, 1)) < 0
    ).all()


@pytest.mark.parametrize("shape", [(33, 40), (24, 20, 28)])
def test_the_inverse_undoes_the_map(shape):
    phi, x = smooth_map(shape), identity_map(shape, torch.float64)
    inverse = x
    for _ in range(20):  # its fixed point is the inverse (Chen et al. 2008), as the displacement's slope is below 1
        inverse = x - sample(phi - x, inverse)
    inside = (..., *[slice(2, -2)] * len(shape))
    assert inverse_error(phi, inverse)[inside].abs().max() < 2e-4
    torch.testing.assert_close(inverse_error(phi, x), phi - x)


def test_labels_keep_their_numbers_and_dtype():
    label = torch.randint(0, 200, (1, 1, 9, 8), dtype=torch.uint8)
    warped = warp_label(label, smooth_map((9, 8)).float())
    assert warped.dtype == torch.uint8
    assert set(warped.unique().tolist()) <= {0, *label.unique().tolist()}


def test_labels_of_sixteen_bits_without_a_sign_go_where_others_go():
    label = torch.randint(0, 60_000, (1, 1, 9, 8), generator=torch.Generator().manual_seed(0))
    phi_map = smooth_map((9, 8)).float()
    moved = warp_label(label.to(torch.uint16), phi_map)
    assert moved.dtype == torch.uint16
    assert torch.equal(moved.long(), warp_label(label, phi_map))


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_of_any_integer_go_where_small_ones_go(shape):
    """float32 holds no odd number above 2^24, float64 none above 2^53."""
    numbers = torch.tensor([0, -3, 614454277, 3_000_000_001, 2**53 + 1, -(2**62) - 1, 2**63 - 1])
    codes = torch.randint(0, len(numbers), (2, 1, *shape), generator=torch.Generator().manual_seed(0))
    phi = torch.cat([smooth_map(shape, 0.1), smooth_map(shape, 0.1, seed=1)]).float()
    small = warp_label(codes.to(torch.uint8), phi)
    assert torch.equal(warp_label(codes, phi), small.long())
    assert torch.equal(warp_label(numbers[codes], phi), numbers[small.long()])
    all_of_one = torch.full((1, 1, *shape), -(2**40) - 1)
    moved = warp_label(all_of_one, identity_map(shape) + 0.7)
    assert moved.unique().tolist() == [-(2**40) - 1, 0]  # outside is background, though no sample is
