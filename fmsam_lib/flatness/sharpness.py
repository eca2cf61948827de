"""How sharp the loss is around trained weights: gradients, climbs, noise.

Everything is measured in float64 and in eval mode (see `WeightSpace`), so that small rises are not lost in rounding and
BatchNorm's statistics stand still. A term of the loss is measured along its own gradient. Sharpness in absolute
distances changes with the weights' scale while the function stays the same (Dinh et al. 2017, arXiv 1703.04933): each
measure has an adaptive twin, whose distances are relative to each weight (as in ASAM, Kwon et al. 2021, arXiv
2102.11600). Curvature: `hessian`.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

from fmsam_lib.flatness.weight_space import TERMS, TermsOf, WeightSpace
from fmsam_lib.parameters import Landscape

COLUMNS = ["measure", "rho", "term", "value", "low", "high", "n"]


def sharpness(net: nn.Module, terms: TermsOf, settings: Landscape) -> pd.DataFrame:
    """The loss's slope and rises around a network's weights w, of n parameters; rows of `COLUMNS`.

    For each of the TERMS L, g its gradient at w; in brackets the adaptive twin, where `s = |w|` instead of 1:

    - loss: `L(w)`; weight_norm: `|w|`; gradient_norm [adaptive_gradient_norm]: `|s g|`
    - sam_rise [asam_rise]: `L(w + rho s^2 g / |s g|) - L(w)`, at SAM's step (Foret et al. 2021, arXiv 2010.01412)
    - ascent_rise [adaptive_ascent_rise]: the highest `L(w + eps) - L(w)` within `|eps / s| <= rho` that `ascent_steps`
      of projected gradient ascent from SAM's step find: a lower bound of the worst one, at least sam_rise. Adaptive: a
      weight that is 0 stays.
    - noise_rise [adaptive_noise_rise]: the mean of `L(w + eps) - L(w)`, `eps = rho s z / sqrt(n)`, z normal: |eps / s|
      is about rho (cf. Andriushchenko et al. 2023, arXiv 2302.07011). low, high: its 95 % t-interval over `draws`
      pairs z and -z, the column n. For small rho it nears `rho^2 trace(H) / (2 n)`
    - gradient_curvature: `(L(w + rho d) - 2 L(w) + L(w - rho d)) / rho^2`, `d = g / |g|`

    At a gradient of 0 there is no way up: rises are 0, and gradient_curvature is NaN. What meets a loss that is not
    finite is NaN.
    """
    space = WeightSpace(net, terms, torch.float64)
    at_w = space.values()
    rows = [row("weight_norm", float(space.w.norm()), "")]
    scales = {"": torch.ones_like(space.w), "adaptive_": space.w.abs()}
    for i, term in enumerate(tqdm(TERMS, desc="climbs", unit="term", leave=False)):
        rows.append(row("loss", at_w[i], term))
        _, g = space.gradient(i)
        for prefix, scale in scales.items():
            slope = float((scale * g).norm())
            rows.append(row(f"{prefix}gradient_norm", slope, term))
            for rho in settings.rhos:
                rise, higher = _climb(space, i, at_w[i], scale, scale * g, rho, settings.ascent_steps)
                rows.append(row("asam_rise" if prefix else "sam_rise", rise, term, rho))
                rows.append(row(f"{prefix}ascent_rise", higher, term, rho))
                if not prefix:
                    fall = space.values(-rho / slope * g)[i] - at_w[i] if slope else math.nan
                    rows.append(row("gradient_curvature", (rise + fall) / rho**2, term, rho))
    return pd.DataFrame(rows + _noise(space, at_w, scales, settings), columns=COLUMNS)


def _climb(
    space: WeightSpace, term: int, at_w: float, scale: Tensor, slope: Tensor, rho: float, steps: int
) -> tuple[float, float]:
    """The rise at SAM's step, and the highest of an ascent from there; eps is `scale * v`, `|v| <= rho`.

    slope: the gradient with respect to v, at w. An ascent's steps are as long as rho: between creeping along the ball's
    boundary and power iterations, which leap. Of 0.1 to 2 times rho this found the highest losses around a trained
    network within 10 steps, for radii up to 0.05 (adaptive: 1).
    """
    length = float(slope.norm())
    if length == 0:
        return 0.0, 0.0
    v = rho / length * slope
    first = best = space.values(scale * v)[term] - at_w
    for step in range(steps):
        value, g = space.gradient(term, scale * v)
        best = np.maximum(best, value - at_w)  # which keeps a NaN
        slope = scale * g
        length = float(slope.norm())
        if not 0 < length < math.inf:
            break
        v = v + rho / length * slope
        v = v * min(1.0, rho / float(v.norm()))
        if step == steps - 1:
            best = np.maximum(best, space.values(scale * v)[term] - at_w)
    return float(first), float(best)


def _noise(space: WeightSpace, at_w: np.ndarray, scales: dict[str, Tensor], settings: Landscape) -> list[dict]:
    """The same draws for every radius, adaptive or not, and term."""
    generator = torch.Generator().manual_seed(settings.direction_seed)
    kinds, rises = [(prefix, rho) for prefix in scales for rho in settings.rhos], []
    for _ in trange(settings.draws, desc="noise", leave=False):  # drawn on the CPU: the same on every device
        z = torch.randn(len(space.w), generator=generator, dtype=torch.float64).to(space.w.device) / len(space.w) ** 0.5
        around = [rho * scales[prefix] * z for prefix, rho in kinds]
        rises.append([(space.values(eps) + space.values(-eps)) / 2 - at_w for eps in around])
    rows, samples = [], np.array(rises)  # (draws, kinds, TERMS)
    for i, (prefix, rho) in enumerate(kinds):
        for k, term in enumerate(TERMS):
            mean, low, high = mean_interval(samples[:, i, k])
            rows.append(row(f"{prefix}noise_rise", mean, term, rho, low, high, settings.draws))
    return rows


def mean_interval(samples: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t-interval of independent samples; the ends are NaN for a single one.

    >>> [round(value, 2) for value in mean_interval([1.0, 3.0])]
    [2.0, -10.71, 14.71]
    """
    mean, n = float(np.mean(samples)), len(samples)
    half = float(stdtrit(n - 1, 0.975) * np.std(samples, ddof=1) / n**0.5) if n > 1 else math.nan
    return mean, mean - half, mean + half


def row(measure: str, value: float, term: str = "", rho=math.nan, low=math.nan, high=math.nan, n=math.nan) -> dict:
    return dict(zip(COLUMNS, (measure, rho, term, value, low, high, n), strict=True))
