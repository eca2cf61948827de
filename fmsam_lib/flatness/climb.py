"""What SAM's climb does to a registration network, measured.

SAM takes its gradient at `w + eps`, `eps = rho g / |g|` (Foret et al. 2021, arXiv 2010.01412). How far that is, in
loss, is `L(w + eps) - L(w) = rho |g| + rho^2 c / 2 + ...`, `c = g^T H g / |g|^2`. Networks that are given stay as they
are: a copy climbs, in float64, so that small radii are not lost in rounding, and in training mode, as in training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fmsam_lib.flatness.weight_space import WeightSpace, terms_on, vector
from fmsam_lib.training.losses import Batch
from fmsam_lib.training.sam import dot, norm

TERMS = {"total": "total", "similarity": "similarity", "penalty": "λ × penalty"}


def climber(net: nn.Module, batch: Batch, *, lmbda: float, **settings: Any) -> WeightSpace:
    """A copy of a network that climbs, with the `TERMS` of its loss on a batch: the last two add up to the first.

    settings: those of `objective`.
    """
    of_objective = terms_on(batch, torch.float64, lmbda=lmbda, **settings)

    def terms(net: nn.Module) -> tuple[Tensor, ...]:
        total, similarity, penalty = of_objective(net)
        return total, similarity, lmbda * penalty

    return WeightSpace(net, terms, torch.float64, training=True)


def uphill(space: WeightSpace) -> list[Tensor]:
    """The total's gradient g at w, a tensor for every parameter.

    Raises ValueError where the loss or its gradient is not finite, or the latter 0.
    """
    with space.at():
        total = space.terms(space.net)[0]
        if not torch.isfinite(total):  # through NaN, torch's 2-D grid_sample crashes going back
            raise ValueError(f"expected a finite loss to climb, got {float(total.detach())}")
        gradient = list(torch.autograd.grad(total, space.params))
    if not 0 < norm(gradient) < np.inf:
        raise ValueError(f"expected a gradient to climb along, got one of length {norm(gradient)}")
    return gradient


def slope_and_curvature(value: Tensor, params: Sequence[Tensor], direction: list[Tensor]) -> tuple[float, float]:
    """`d . g` and `d^T H d` of a scalar, exactly: backward through `d . g` gives `H d` (Pearlmutter 1994)."""
    first = torch.autograd.grad(value, params, create_graph=True, retain_graph=True, materialize_grads=True)
    slope = sum(((g * d).sum() for g, d in zip(first, direction, strict=True)), start=value.new_zeros(()))
    if not slope.requires_grad:  # a linear value
        return float(slope), 0.0
    second = torch.autograd.grad(slope, params, retain_graph=True, materialize_grads=True)
    return float(slope.detach()), dot(list(second), direction)


def at_weights(net: nn.Module, batch: Batch, **settings: Any) -> pd.Series:
    """What decides on a radius, at these weights.

    loss; |w|; |g|; of the steps' last layers: |w last|, their part of all weights and of `|eps|^2`; slope and
    curvature c of the total and its two terms along g, exactly; rho*: `2 |g| / c`, where the second-order part of the
    rise is as large as the first (nan unless c > 0). settings: those of `objective`.
    """
    space = climber(net, batch, **settings)
    g = uphill(space)
    length, weights = norm(g), [p.detach() for p in space.params]
    direction = [part / length for part in g]
    last = [i for i, (name, _) in enumerate(space.net.named_parameters()) if ".last." in name]
    with space.at():
        terms = space.terms(space.net)
        parts = [slope_and_curvature(term, space.params, direction) for term in terms[1:]]
    facts = {"loss": float(terms[0].detach()), "|w|": norm(weights), "|g|": length}
    facts["|w last|"] = norm([weights[i] for i in last])
    facts["last, of the weights"] = sum(weights[i].numel() for i in last) / len(space.w)
    facts["last, of |eps|^2"] = norm([direction[i] for i in last]) ** 2
    for name, (slope, curvature) in zip(TERMS, [np.sum(parts, 0), *parts], strict=True):
        facts |= {f"slope {name}": slope, f"c {name}": curvature}
    facts["rho*"] = 2 * length / facts["c total"] if facts["c total"] > 0 else np.nan
    return pd.Series(facts)


def climb(net: nn.Module, batch: Batch, rhos: Sequence[float] | np.ndarray, **settings: Any) -> pd.DataFrame:
    """The rise at `w + eps` beside its predictions: rows rho, term, rise, back, first, second, cosine.

    term: of `TERMS`. rise: `L(w + eps) - L(w)`; back: the same at `w - eps`. first: `rho d . g` of the term, d the
    total's direction; second: with `rho^2 c / 2`. cosine: between the total's gradients at `w + eps` and at w.
    Raises ValueError for a radius that is not above 0, and as `uphill`.
    """
    if min(rhos, default=0) <= 0:
        raise ValueError(f"expected radii above 0, got {list(rhos)}")
    here = at_weights(net, batch, **settings)
    space = climber(net, batch, **settings)
    g = vector(uphill(space))
    at_w, rows = space.values(), []
    for rho in rhos:
        eps = rho / here["|g|"] * g
        rises, backs = space.values(eps) - at_w, space.values(-eps) - at_w
        _, there = space.gradient(0, eps)
        cosine = float(there @ g / (there.norm() * g.norm()))
        for name, rise, back in zip(TERMS, rises.tolist(), backs.tolist(), strict=True):
            first = rho * here[f"slope {name}"]
            second = first + rho**2 * here[f"c {name}"] / 2
            rows.append((rho, name, rise, back, first, second, cosine))
    return pd.DataFrame(rows, columns=["rho", "term", "rise", "back", "first", "second", "cosine"])


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
