"""The loss surface between and around solutions, and the registration of every point on it, live."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from IPython.display import display
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from torch import nn

from fmsam_lib.checking import ConfigError
from fmsam_lib.flatness.landscape import batch_with, loss_of, random_direction, surface
from fmsam_lib.flatness.mode_connectivity import Solutions
from fmsam_lib.flatness.weight_space import WeightSpace, vector
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.widgets import canvas
from fmsam_lib.widgets.sliders import in_a_notebook

NAMES = ("total loss", "similarity term", "GradICON penalty")


def walk(
    nets: dict[str, GradICON], pair: Pair, *, start: GradICON | None = None, interactive: bool | None = None, **how
) -> "Walker | None":
    """The loss of one pair on a plane of weights, and live the registration of the point that is dragged over it.

    nets: one or two networks by name. Of two, whose trainings began at `start`, the plane goes through all three;
    of one, along two random directions. how: as `Walk` has it. interactive: as `sliders.in_a_notebook` decides; where
    there is no widget, two pictures are shown. Raises ValueError for other numbers of networks, and as `Solutions`.

    >>> walker = walk({"Adam": adam, "SAM": sam}, pair, start=start, lmbda=1.5, sigma=5.0)     # doctest: +SKIP
    >>> walker.point = [0.1, 0.2]                                                              # doctest: +SKIP
    """
    ground = Walk(nets, pair, start, **how)
    if in_a_notebook(interactive):
        return Walker(ground)
    display(ground.picture()[0], slices.registration(pair, ground.at(*ground.end)[0]))
    return None


class Walk:
    """A plane of weights, and at its points the pair's loss and registration.

    radius, seed, normalisation: of one network's random directions, as notebook 30 has them. points: of a side of the
    surface. loss: settings of `objective`. places: where the networks are.
    """

    def __init__(self, nets, pair, start=None, *, radius=0.5, seed=0, normalisation: str = "filter", points=21, **loss):
        self.pair, self.loss = pair, loss_of(batch_with([pair]), **loss)
        self.weights: Callable[[float, float], AbstractContextManager[nn.Module]]
        if len(nets) != (1 if start is None else 2):
            given = f"{len(nets)} with{'out' * (start is None)} a start"
            raise ConfigError(f"expected one network, or two and the start of their trainings, got {given}: give these")
        if start is None:
            ((name, net),) = nets.items()
            space = WeightSpace(net)
            along, across = (vector(random_direction(net, seed=seed + i, normalisation=normalisation)) for i in (0, 1))
            self.weights = lambda alpha, beta: space.at(along, alpha, origin=space.w + beta * across)
            self.places, centre = {name: (0.0, 0.0)}, np.zeros(2)
        else:
            plane = Solutions(start, *nets.values())
            self.weights, self.places = plane.at, dict(zip(["the start", *nets], plane.places, strict=True))
            corners = np.array(plane.places)
            centre, radius = (corners.min(0) + corners.max(0)) / 2, 0.7 * np.ptp(corners, axis=0).max()
        self.end = [*self.places.values()][-1]
        self.alphas, self.betas = (np.linspace(middle - radius, middle + radius, points) for middle in centre)
        rows = surface(self.weights, self.loss, self.alphas, self.betas)
        self.losses = rows[rows.term == "total"].value.to_numpy().reshape(points, points)

    def at(self, alpha: float, beta: float) -> tuple[torch.Tensor, dict[str, float]]:
        """The pair's map `(1, D, *S)` by the weights at a point, and the loss's terms and Dice by name."""
        with self.weights(alpha, beta) as net, torch.no_grad():
            terms = self.loss(net)
            phi = net(self.pair.moving[None], self.pair.fixed[None]).map.nan_to_num()
        return phi, dict(zip(NAMES, terms.tolist(), strict=True)) | {"mean Dice": mean_dice(self.pair, phi)}

    def picture(self) -> tuple[slices.Picture, Axes]:
        """The surface as contours up to 50 times its lowest loss, logarithmic from 10 times on; figure and axes."""
        figure = slices.Picture(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        finite = np.ma.masked_invalid(self.losses)
        low, high = float(finite.min()), max(float(finite.max()), float(finite.min()) + 1e-12)
        high = min(high, 50 * low) if low > 0 else high  # beyond, the barrier between two solutions would drown
        levels, norm = (np.geomspace, colors.LogNorm) if 0 < 10 * low < high else (np.linspace, colors.Normalize)
        steps = levels(low, high, 15)
        filled = axes.contourf(self.alphas, self.betas, finite, steps, norm=norm(low, high), extend="max")
        axes.contour(filled, colors="white", linewidths=0.4)
        for name, place in self.places.items():
            axes.plot(*place, "P", color="white", markeredgecolor="black", markersize=10)
            left = place[0] > self.alphas.mean()  # of the cross, where the right border is near
            how: dict[str, Any] = {"color": "white", "fontsize": 10, "ha": "right" if left else "left"}
            text = axes.annotate(name, place, (-7 if left else 7, 7), textcoords="offset points", **how)
            text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="black")])
        axes.set(aspect="equal", xlabel="α, along the first direction", ylabel="β, along the second")
        axes.set_title("total loss of this pair", fontsize=10)
        figure.colorbar(filled, ax=axes, format="%.3g", shrink=0.85)
        return figure, axes


class Walker(canvas.Surface):
    """The surface with a point to drag; setting `point` (alpha, beta) moves it too. `answered`: the point shown."""

    def __init__(self, ground: Walk):
        self.ground = ground
        super().__init__(*ground.picture(), self._tells, ground.end, places=ground.places)

    def _tells(self, alpha: float, beta: float) -> tuple[list, dict]:
        phi, facts = self.ground.at(alpha, beta)
        told = {name: f"{value:.4f}" for name, value in facts.items()} | {"(α, β)": f"({alpha:.3g}, {beta:.3g})"}
        return canvas.registered(slices.cut(self.ground.pair, phi)), told
