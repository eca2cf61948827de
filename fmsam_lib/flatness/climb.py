"""What SAM's climb does to a registration network, measured.

SAM takes its gradient at `w + eps`, `eps = rho g / |g|` (Foret et al. 2021, arXiv 2010.01412). How far that is, in
loss, is `L(w + eps) - L(w) = rho |g| + rho^2 c / 2 + ...`, `c = g^T H g / |g|^2`. Networks that are given stay as they
are: a copy climbs, in float64, so that small radii are not lost in rounding, and in training mode, as in training.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fmsam_lib.metrics import folding_percent
from fmsam_lib.model.spatial import jacobian_determinant, voxels
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.plotting.style import LOOKS
from fmsam_lib.training.losses import Batch, objective
from fmsam_lib.training.sam import SAM, dot, norm

TERMS = {"total": "total", "similarity": "similarity", "penalty": "λ × penalty"}


class Climb:
    """A copy of a network on one batch, with its gradient: inside `with climb.at(rho)` it stands at `w + rho g/|g|`.

    settings: those of `objective`. Raises ValueError where the loss or its gradient is not finite, or the latter 0.
    """

    def __init__(self, net: nn.Module, batch: Batch, **settings):
        self.net = copy.deepcopy(net).double().train().requires_grad_(True)
        self.batch = Batch(*(None if t is None else t.double() for t in batch))
        self.settings = settings
        self.params = list(self.net.parameters())
        total = self.loss()[0]
        if not torch.isfinite(total):
            raise ValueError(f"expected a finite loss to climb, got {float(total.detach())}")
        self.gradient = torch.autograd.grad(total, self.params)
        self.length = norm(self.gradient)
        if not 0 < self.length < np.inf:
            raise ValueError(f"expected a gradient to climb along, got one of length {self.length}")
        self.sam = SAM(self.params, 0.0, net=self.net)

    def loss(self) -> Tensor:
        """The `TERMS`, `(3,)`: the last two add up to the first."""
        total, similarity, penalty = objective(self.net, self.batch, **self.settings)
        return torch.stack([total, similarity, self.settings["lmbda"] * penalty])

    @contextmanager
    def at(self, rho: float) -> Iterator[nn.Module]:
        """The network at `w + rho g/|g|`; a rho below 0 goes downhill."""
        self.sam.groups[0]["rho"] = abs(rho)
        for p, g in zip(self.params, self.gradient, strict=True):
            p.grad = g.clone() if rho >= 0 else -g
        with self.sam.perturbed():
            yield self.net


def slope_and_curvature(value: Tensor, params: list[Tensor], direction: list[Tensor]) -> tuple[float, float]:
    """`d . g` and `d^T H d` of a scalar, exactly: backward through `d . g` gives `H d` (Pearlmutter 1994)."""
    how = {"retain_graph": True, "materialize_grads": True}
    first = torch.autograd.grad(value, params, create_graph=True, **how)
    slope = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
    if not slope.requires_grad:  # a linear value
        return float(slope), 0.0
    return float(slope.detach()), dot(list(torch.autograd.grad(slope, params, **how)), direction)


def at_weights(net: nn.Module, batch: Batch, **settings) -> pd.Series:
    """What decides on a radius, at these weights.

    loss; |w|; |g|; of the steps' last layers: |w last|, their part of all weights and of `|eps|^2`; slope and
    curvature c of the total and its two terms along g, exactly; rho*: `2 |g| / c`, where the second-order part of the
    rise is as large as the first (nan unless c > 0).
    """
    climb = Climb(net, batch, **settings)
    direction = [g / climb.length for g in climb.gradient]
    last = [i for i, (name, _) in enumerate(climb.net.named_parameters()) if ".last." in name]
    terms = climb.loss()
    facts = {"loss": float(terms[0].detach()), "|w|": norm(climb.params), "|g|": climb.length}
    facts["|w last|"] = norm([climb.params[i] for i in last])
    facts["last, of the weights"] = sum(climb.params[i].numel() for i in last) / sum(p.numel() for p in climb.params)
    facts["last, of |eps|^2"] = norm([direction[i] for i in last]) ** 2
    parts = [slope_and_curvature(term, climb.params, direction) for term in terms[1:]]
    for name, (slope, curvature) in zip(TERMS, [np.sum(parts, 0), *parts], strict=True):
        facts |= {f"slope {name}": slope, f"c {name}": curvature}
    facts["rho*"] = 2 * climb.length / facts["c total"] if facts["c total"] > 0 else np.nan
    return pd.Series(facts)


def climb(net: nn.Module, batch: Batch, rhos, **settings) -> pd.DataFrame:
    """The rise at `w + eps` beside its predictions: rows rho, term, rise, back, first, second, cosine.

    term: of `TERMS`. rise: `L(w + eps) - L(w)`; back: the same at `w - eps`. first: `rho d . g` of the term, d the
    total's direction; second: with `rho^2 c / 2`. cosine: between the total's gradients at `w + eps` and at w.
    Raises ValueError for a radius that is not above 0.
    """
    if min(rhos, default=0) <= 0:
        raise ValueError(f"expected radii above 0, got {list(rhos)}")
    here = at_weights(net, batch, **settings)
    climber = Climb(net, batch, **settings)
    at_w, rows = climber.loss().detach(), []
    for rho in rhos:
        with climber.at(rho):
            loss = climber.loss()
            # through NaN, torch's 2-D grid_sample crashes going back
            finite = bool(torch.isfinite(loss[0]))
            there = torch.autograd.grad(loss[0], climber.params) if finite else None
        with climber.at(-rho), torch.no_grad():
            back = climber.loss() - at_w
        cosine = dot(there, climber.gradient) / (norm(there) * climber.length) if finite else np.nan
        for name, rise, other in zip(TERMS, (loss.detach() - at_w).tolist(), back.tolist(), strict=True):
            first = rho * here[f"slope {name}"]
            second = first + rho**2 * here[f"c {name}"] / 2
            rows.append(
                {
                    "rho": rho,
                    "term": name,
                    "rise": rise,
                    "back": other,
                    "first": first,
                    "second": second,
                    "cosine": cosine,
                }
            )
    return pd.DataFrame(rows)


def holds_up_to(table: pd.DataFrame) -> float:
    """The measured rho*: where the total's rise first differs from its first order by as much as that is itself.

    On a quadratic, `2 |g| / c`. Between the table's radii it is interpolated; 0: from the smallest on; inf: never.
    """
    rows = table[table.term == "total"].sort_values("rho")
    wrong, rho = np.nan_to_num(np.abs(rows.rise / rows["first"] - 1), nan=1e9, posinf=1e9), rows.rho.to_numpy()
    if not (wrong >= 1).any():
        return np.inf
    i = int(np.argmax(wrong >= 1))
    between = slice(max(i - 1, 0), i + 1)
    return float(np.exp(np.interp(0, np.log(wrong[between]), np.log(rho[between])))) if i else 0.0


def climbed(climber: Climb, rho: float) -> tuple[Tensor, Tensor]:
    """The map of the batch's first pair at `w + rho g/|g|`, `(1, D, *S)`, and the loss's `TERMS` there, `(3,)`."""
    batch = climber.batch
    with climber.at(rho) as net, torch.no_grad():
        phi = net(torch.cat([batch.moving, batch.fixed]), torch.cat([batch.fixed, batch.moving]))
        return phi[:1].map, climber.loss()


def climb_curves(table: pd.DataFrame) -> Figure:
    """The rise against rho, log-log, a row for every stage and a column for every term, all on one scale.

    table: `climb`'s rows with a column stage. Hollow markers: the loss falls by this much instead.
    """
    stages = list(table.stage.unique())
    figure = slices.Picture(figsize=(slices.WIDTH, 2.5 * len(stages) + 0.4), layout="constrained")
    panels = figure.subplots(len(stages), len(TERMS), sharex=True, sharey=True, squeeze=False)
    colours = [LOOKS["sam"]["color"], LOOKS["adam"]["color"], LOOKS["asam"]["color"]]
    for line, stage in zip(panels, stages, strict=True):
        for ax, (term, name), colour in zip(line, TERMS.items(), colours, strict=True):
            rows = table[(table.stage == stage) & (table.term == term)]
            ax.plot(rows.rho, rows["first"], "--", color="#808080", label="first order, ρ |g|")
            ax.plot(rows.rho, rows.second, ":", color="black", label="second order, ρ |g| + ½ ρ² c")
            ax.plot(rows.rho, rows.rise.abs(), color=colour, linewidth=1)
            for up, face in ((True, colour), (False, "white")):
                some = rows[(rows.rise > 0) == up]
                ax.plot(some.rho, some.rise.abs(), "o", color=colour, markerfacecolor=face, markersize=5)
            ax.set(xscale="log", yscale="log", title=name if stage == stages[0] else "")
            ax.grid(alpha=0.3)
        line[0].set_ylabel(f"{stage}\nrise of the loss")
    panels[0][0].set_ylim(1e-7, 1e4)
    panels[0][0].plot([], [], "o", color="black", label="measured")
    panels[0][0].plot([], [], "o", color="black", markerfacecolor="white", label="measured: it falls")
    figure.supxlabel("radius ρ of the climb", fontsize=10)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def climb_pictures(climber: Climb, pair: Pair, rhos) -> Figure:
    """One pair registered at `w + eps`, a panel for every radius: the warped image, the grid, and what the loss says.

    pair: the first of the climber's batch (of a volume, the middle plane is shown). "moved by": how far points lie from
    where w sends them, root mean square. The loss is similarity + λ penalty, of the whole batch.
    """
    wide = min(slices.WIDTH, 3.6 * len(rhos))
    figure = slices.Picture(figsize=(wide, wide / len(rhos) + 0.85), layout="constrained")
    at_w, _ = climbed(climber, 0.0)
    for ax, rho in zip(figure.subplots(1, len(rhos), squeeze=False)[0], rhos, strict=True):
        phi_map, loss = climbed(climber, rho)
        plane = slices.cut(pair, phi_map.float())
        slices.show(ax, plane, plane.warped)
        slices.outline(ax, plane, plane.fixed_label, slices.FIXED_LINE)
        slices.deformed_grid(ax, plane)
        total, similarity, penalty = loss.tolist()
        moved = float(voxels(phi_map - at_w, pair.fixed.shape[1:]).square().sum(1).mean().sqrt())
        folded = folding_percent(jacobian_determinant(phi_map))
        ax.set_title(f"ρ = {rho:.3g}", fontsize=10)
        parts = f"loss {total:.3g} = {similarity:.3g} + {penalty:.3g}"
        ax.set_xlabel(f"{parts}\nmoved by {moved:.2g} samples\n{folded:.2g} % folded", fontsize=9)
    return figure
