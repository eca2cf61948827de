"""A loss of two weights with a sharp minimum and a flat one: where gradient descent and SAM go on it, drawn.

SAM takes its gradient at `w + eps`, `eps = rho g / |g|` (Foret et al. 2021, arXiv 2010.01412).
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fmsam_lib.plotting import slices
from fmsam_lib.plotting.style import LOOKS, OTHER_LOOKS
from fmsam_lib.training.sam import SAM

WELLS = {"sharp": (-0.5, 0.0), "flat": (0.5, 0.0)}  # centres; the minima are close by


START, RHO = (-0.9, 1.0), 0.35


VIEW = (-1.2, 1.1, -0.75, 1.25)  # what figures show of the plane


LINES = {"sharp": OTHER_LOOKS[0], "flat": LOOKS["asam"]}


def two_minima(w: Tensor) -> Tensor:
    """A loss of two weights with a sharp minimum and a flat one that is a little less deep; `(..., 2)` to `(...)`.

    `0.2 |w|^2 - 0.69 exp(-|w - s|^2 / (2 0.3^2)) - exp(-|w - f|^2 / (2 0.7^2))`, s and f in `WELLS`.
    """
    s, f = (((w - w.new_tensor(centre)) ** 2).sum(-1) for centre in WELLS.values())
    return 0.2 * (w**2).sum(-1) - 0.69 * torch.exp(-s / (2 * 0.3**2)) - torch.exp(-f / (2 * 0.7**2))


def minima(loss: Callable[[Tensor], Tensor] = two_minima, near: dict | None = None) -> pd.DataFrame:
    """Where the minima of `loss` are, by Newton's method from `near` (name: `(x, y)`; the wells' centres).

    Rows minimum, x, y, loss, curvature: the Hessian's largest eigenvalue. Raises ValueError where there is none.
    """
    rows = []
    for name, centre in (near or WELLS).items():
        w, step = torch.tensor(centre, dtype=torch.float64), torch.ones(2)
        for _ in range(20):
            if float(step.norm()) < 1e-9:
                break
            step = torch.linalg.lstsq(torch.autograd.functional.hessian(loss, w), gradient(loss, w)[:, None]).solution
            w = w - step[:, 0]
        curvatures = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w))
        if not (float(step.norm()) < 1e-9 and float(curvatures[0]) > 0):
            raise ValueError(f"expected a minimum near {name} {tuple(centre)}, got none; start closer to it")
        x, y = w.tolist()
        rows.append({"minimum": name, "x": x, "y": y, "loss": float(loss(w)), "curvature": float(curvatures[-1])})
    return pd.DataFrame(rows)


def rises(rhos, loss: Callable[[Tensor], Tensor] = two_minima, near: dict | None = None) -> pd.DataFrame:
    """How far the loss rises within rho of each minimum: rows minimum, rho, measured, predicted.

    measured: the largest `L(w + eps) - L(w)` on the circle `|eps| = rho`, of 720 directions. predicted: its second
    order, `rho^2 lambda_max / 2` (the gradient is 0 there).
    """
    angle = torch.linspace(0, 2 * np.pi, 721, dtype=torch.float64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    rows = []
    for well in minima(loss, near).itertuples():
        w = torch.tensor([well.x, well.y], dtype=torch.float64)
        for rho in rhos:
            measured = float(loss(w + rho * circle).max()) - well.loss
            rows.append(
                {"minimum": well.minimum, "rho": rho, "measured": measured, "predicted": rho**2 * well.curvature / 2}
            )
    return pd.DataFrame(rows)


def gradient(loss: Callable[[Tensor], Tensor], w) -> Tensor:
    """The gradient at one point `w`, `(2,)`."""
    return torch.autograd.functional.jacobian(loss, torch.as_tensor(w, dtype=torch.float64))


def descend(
    start, rho: float, *, loss: Callable[[Tensor], Tensor] = two_minima, lr: float = 0.12, steps: int = 80
) -> Tensor:
    """The path of SAM with plain gradient descent from `start`, `(steps + 1, 2)`; rho = 0 is gradient descent."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, sam = torch.optim.SGD([w], lr=lr), SAM([w], rho)
    path = [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()  # gradient at w
        with sam.perturbed():
            optimizer.zero_grad()
            loss(w).backward()  # at w + eps
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def ends_in(path: Tensor, within: float = 0.3) -> str:
    """The minimum of `two_minima` near a path's last point: "sharp", "flat" or "neither"."""
    for well in minima().itertuples():
        if float((path[-1] - path.new_tensor([well.x, well.y])).norm()) < within:
            return well.minimum
    return "neither"


def paths(rho: float = RHO, x: float = START[0], y: float = START[1]) -> Figure:
    """Where gradient descent and SAM go from `(x, y)` on `two_minima`; beside it, how both minima rise with rho."""
    figure = slices.Picture(figsize=(slices.WIDTH, 4.3), layout="constrained")
    plane, rise = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _contours(plane)
    for name, radius, look in (("gradient descent", 0.0, LOOKS["adam"]), (f"SAM, ρ = {rho:.3g}", rho, LOOKS["sam"])):
        path = descend((x, y), radius)
        plane.plot(*path.T, **look, linewidth=1.5, markersize=3.5, label=f"{name}: ends in {ends_in(path)}")
    plane.plot(x, y, "o", color="white", markeredgecolor="black", markersize=9)
    plane.annotate("start", (x, y), (8, 4), textcoords="offset points", color="white")
    plane.legend(loc="lower left", fontsize=8, framealpha=0.9)
    radii = np.linspace(0, 0.8, 33)
    for name, rows in rises(radii).groupby("minimum", sort=False):
        look = {"color": LINES[name]["color"], "marker": LINES[name]["marker"]}
        rise.plot(rows.rho, rows.measured, **look, markevery=4, label=f"{name}: measured")
        rise.plot(rows.rho, rows.predicted, ":", color=look["color"], label=f"{name}: ½ ρ² λmax")
    rise.axvline(rho, color=LOOKS["sam"]["color"], linewidth=1)
    rise.set(xlabel="radius ρ", ylabel="largest rise of the loss within ρ", xlim=(0, 0.8), ylim=(0, 1.5))
    rise.legend(fontsize=8, loc="upper left")
    rise.spines[["top", "right"]].set_visible(False)
    return figure


def one_climb(w: tuple[float, float], rho: float = RHO) -> Figure:
    """The climb from `w` to `w + eps` on `two_minima`, and downhill, `-g / |g|` (half as long), at either end."""
    figure = slices.Picture(figsize=(6.2, 4.3), layout="constrained")
    axes = figure.subplots()
    _contours(axes)
    g = gradient(two_minima, w).numpy()
    there = np.add(w, rho * g / np.linalg.norm(g))
    downs = (("adam", "downhill at w", w, g), ("sam", "downhill at w + ε", there, gradient(two_minima, there).numpy()))
    arrow = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", there, w, arrowprops=arrow | {"color": "white"})
    axes.plot([], [], color="#bbbbbb", label="the climb, ε = ρ g/|g|")
    for name, label, point, slope in downs:
        colour = LOOKS[name]["color"]
        axes.annotate(
            "", np.subtract(point, 0.5 * slope / np.linalg.norm(slope)), point, arrowprops=arrow | {"color": colour}
        )
        axes.plot(*point, "o", color="white", markeredgecolor=colour, markersize=8)
        axes.plot([], [], color=colour, label=f"{label} (|g| = {np.linalg.norm(slope):.2f})")
    axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    return figure


def _contours(axes) -> None:
    x, y = np.meshgrid(np.linspace(*VIEW[:2], 171), np.linspace(*VIEW[2:], 141))
    values = two_minima(torch.tensor(np.stack([x, y], -1))).numpy()
    filled = axes.contourf(x, y, values, np.linspace(-1.1, 0.5, 17), cmap="viridis", extend="max")
    axes.contour(filled, colors="white", linewidths=0.3)
    for well in minima().itertuples():
        look = {"marker": LINES[well.minimum]["marker"], "color": LINES[well.minimum]["color"]}
        axes.plot(well.x, well.y, markeredgecolor="white", markersize=9, zorder=5, linestyle="", **look)
        side = {"xytext": (-9, 0), "ha": "right"} if well.x < 0 else {"xytext": (9, 0), "ha": "left"}
        axes.annotate(well.minimum, (well.x, well.y), textcoords="offset points", va="center", color="white", **side)
    axes.set(xlim=VIEW[:2], ylim=VIEW[2:], aspect="equal", xlabel="first weight", ylabel="second weight")
    axes.figure.colorbar(filled, ax=axes, label="loss", shrink=0.8, pad=0.02, ticks=[-1, -0.5, 0, 0.5])
