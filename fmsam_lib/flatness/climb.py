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

from fmsam_lib.flatness.hessian import hessian
from fmsam_lib.flatness.weight_space import WeightSpace, terms_on, vector
from fmsam_lib.training.losses import Batch

TERMS = {"total": "total", "similarity": "similarity", "penalty": "λ × penalty"}


def climber(net: nn.Module, batch: Batch, *, lmbda: float, **settings: Any) -> WeightSpace:
    """A copy of a network that climbs, with the `TERMS` of its loss on a batch: the last two add up to the first.

    settings: those of `objective`.
    """
    of_objective = terms_on(batch.to(next(net.parameters()).device), torch.float64, lmbda=lmbda, **settings)

    def terms(net: nn.Module) -> tuple[Tensor, ...]:
        total, similarity, penalty = of_objective(net)
        return total, similarity, lmbda * penalty

    return WeightSpace(net, terms, torch.float64, training=True)


def uphill(space: WeightSpace) -> Tensor:
    """The total's gradient g at w, `(n,)`. Raises ValueError where it, or a term, is not finite, or it is 0."""
    _, gradient = space.gradient(0)
    if not 0 < gradient.norm() < np.inf:
        raise ValueError(f"expected a gradient to climb along, got one of length {float(gradient.norm())}")
    return gradient


def at_weights(net: nn.Module, batch: Batch, **settings: Any) -> pd.Series:
    """What decides on a radius, at these weights.

    loss; |w|; |g|; of the steps' last layers: |w last|, their part of all weights and of `|eps|^2`; slope and
    curvature c of the total and its two terms along g, exactly; rho*: `2 |g| / c`, where the second-order part of the
    rise is as large as the first (nan unless c > 0). settings: those of `objective`.
    """
    space = climber(net, batch, **settings)
    g = uphill(space)
    length, d = float(g.norm()), g / g.norm()
    along = d.numpy(force=True)
    last = vector([torch.full_like(p, ".last." in name) for name, p in space.net.named_parameters()]) > 0
    facts = {"loss": float(space.values()[0]), "|w|": float(space.w.norm()), "|g|": length}
    facts |= {"|w last|": float(space.w[last].norm()), "last, of the weights": float(last.double().mean())}
    facts["last, of |eps|^2"] = float(d[last].square().sum())
    parts = [(float(space.gradient(i)[1] @ d), float(hessian(space, i)(along) @ along)) for i in (1, 2)]
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
    g = uphill(space)
    at_w, rows = space.values(), []
    for rho in rhos:
        eps = rho / here["|g|"] * g
        rises, backs = space.values(eps) - at_w, space.values(-eps) - at_w
        _, there = space.gradient(0, eps)
        cosine = float(there @ g / (there.norm() * g.norm()))
        for name, rise, back in zip(TERMS, rises.tolist(), backs.tolist(), strict=True):
            first = rho * here[f"slope {name}"]
            rows.append((rho, name, rise, back, first, first + rho**2 * here[f"c {name}"] / 2, cosine))
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
