"""The loss of two weights: what the notebook's story about it rests on."""

import numpy as np
import pytest
import torch

from fmsam_lib.plotting import slices, toy

BOWL = torch.tensor([[9.0, 2.0], [2.0, 1.0]], dtype=torch.float64)


def bowl(w):
    return ((w @ BOWL) * w).sum(-1) / 2


def test_both_minima_are_about_as_deep_and_one_is_sharper():
    sharp, flat = toy.minima().itertuples()
    assert sharp.loss < flat.loss < sharp.loss + 0.15
    assert sharp.curvature > 3 * flat.curvature
    for well in (sharp, flat):
        assert toy.gradient(toy.two_minima, (well.x, well.y)).norm() < 1e-8


@pytest.mark.parametrize(("rho", "ends"), [(0.0, "sharp"), (0.001, "sharp"), (0.1, "sharp"), (toy.RHO, "flat")])
def test_sam_leaves_the_sharp_minimum_once_its_radius_is_large_enough(rho, ends):
    assert toy.ends_in(toy.descend(toy.START, rho)) == ends


def test_far_from_any_minimum_is_neither():
    assert toy.ends_in(torch.tensor([[-1.0, 1.0]], dtype=torch.float64)) == "neither"


def test_a_tiny_radius_goes_the_way_of_gradient_descent():
    plain = toy.descend(toy.START, 0.0)
    assert torch.equal(plain[0], torch.tensor(toy.START, dtype=torch.float64))
    assert (toy.descend(toy.START, 1e-6) - plain).abs().max() < 1e-5
    w = torch.tensor(toy.START, dtype=torch.float64)
    for place in plain[1:]:  # plain gradient descent, written out
        w = w - 0.12 * toy.gradient(toy.two_minima, w)
        assert torch.allclose(w, place, atol=1e-12)


def test_on_a_quadratic_the_rise_is_its_second_order():
    table = toy.rises([0.1, 1.0, 3.0], bowl, {"only": (0.4, -0.7)})
    largest = np.linalg.eigvalsh(BOWL.numpy())[-1]
    assert np.allclose(table.predicted, table.rho**2 * largest / 2, rtol=1e-12)
    assert np.allclose(table.measured, table.predicted, rtol=1e-4)  # 720 directions


def test_at_small_radii_the_rise_of_both_minima_is_its_second_order():
    table = toy.rises([0.01])
    assert np.allclose(table.measured, table.predicted, rtol=0.01)
    assert table.measured[0] > 3 * table.measured[1]


def test_a_place_without_a_minimum_is_named():
    with pytest.raises(ValueError, match=r"expected a minimum near top \(0.0, 0.0\)"):
        toy.minima(lambda w: -bowl(w), {"top": (0.0, 0.0)})


@pytest.mark.parametrize("draw", [toy.paths, lambda: toy.one_climb((-0.16, 0.06))])
def test_figures_are_drawn(draw):
    assert len(slices.png(draw())) > 10_000


def test_the_legend_says_where_the_paths_end():
    texts = [t.get_text() for t in toy.paths(0.01).axes[0].get_legend().get_texts()]
    assert texts == ["gradient descent: ends in sharp", "SAM, ρ = 0.01: ends in sharp"]
