"""Harder and harder pairs: the moving image corrupted by degrees, and what registration makes of it.

How well a network copes with images unlike those of its training is asked here in one dimension at a time: the same
test pairs, the moving image noisier, more blurred, more turned away and so on, until little is left to see.
"""

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmsam_lib.checking import nearest
from fmsam_lib.images.domains import readable
from fmsam_lib.metrics import determinants, folding_percent, mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, warp
from fmsam_lib.pair import Pair

COLUMNS = ["test_domain", "pair", "corruption", "severity", "metric", "value", "unit"]
SHIFT_PER_DEGREE = 0.0025  # of the shortest side of the field of view, so at 40 degrees a tenth of it


class Corruption(NamedTuple):
    """One way to spoil an image: how severe, and what severity measures; 0 is the clean image."""

    severities: tuple[float, ...]  # from mild to hard
    what: str
    most: float = math.inf  # no severity is beyond


CORRUPTIONS = {
    "noise": Corruption((0.1, 0.2, 0.4, 0.6), "noise: sigma (of the range)"),
    "bias_field": Corruption((0.2, 0.4, 0.8, 1.2), "bias field: coefficients (up to)"),
    "gamma": Corruption((0.5, 1.0, 1.5, 2.0), "gamma: log2 of the exponent"),
    "inversion": Corruption((0.25, 0.5, 0.75, 1.0), "inverted (share)", most=1),
    "blur": Corruption((1.0, 2.0, 3.0, 4.0), "blur: sigma (samples)"),
    "slices": Corruption((0.125, 0.25, 0.5, 0.75), "missing slices (share)", most=1),
    "misalignment": Corruption((5.0, 10.0, 20.0, 40.0), "rotation and shift (degrees)"),
}


def corrupt(pair: Pair, kind: str, severity: float, *, seed: int = 0) -> tuple[Tensor, Callable | None]:
    """The pair's moving image `I`, `(1, *S)` in [0, 1], spoilt in one way; severity 0 is `I` itself, to the bit.

    - noise: `I + s n`, n independent standard normal numbers; the intensities range from 0 to 1.
    - bias_field: `I exp(b)`, b a sum of products of Legendre polynomials up to the third order along each axis, their
      coefficients uniform in [-s, s] (the range of MONAI's `RandBiasField`).
    - gamma: `I^(2^s)` between the image's own lowest and highest value (MONAI's `AdjustContrast`): darker.
    - inversion: `(1 - s) I + s (1 - I)`; at 0.5 there is nothing left to see.
    - blur: a Gaussian of s samples along each axis, of what lies inside the image.
    - slices: this share of the planes across the last axis (in 2-D lines), to the nearest whole one, set to 0.
    - misalignment: `I(place(x))`, place a rotation by s degrees about the centre, true in mm, and a shift of 0.25 % of
      the field of view's shortest side per degree; zeros where it looks outside.

    Noise, field, slices and direction are drawn from seed, kind and the pair's name: a greater severity is more of the
    same. The result is cut to [0, 1]. With it comes a function from points of it, `phi(x)` of a registration, to those
    of the pair's own moving image, `(N, D, *P)` in unit coordinates; None where they lie as they did.

    Raises ValueError for an unknown kind, with the known ones, or a severity that is negative, not finite or, of a
    share, above 1; for misalignment of a pair without spacing.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"expected one of {', '.join(CORRUPTIONS)}; got {kind!r}{nearest(kind, CORRUPTIONS)}")
    if not 0 <= severity <= CORRUPTIONS[kind].most or math.isinf(severity):
        bound = "1" if CORRUPTIONS[kind].most == 1 else "anything finite"
        raise ValueError(f"{kind}: expected a severity from 0 to {bound}, got {severity:g}; 0 is the clean image")
    if severity == 0:
        return pair.moving, None
    entropy = [zlib.crc32(kind.encode()), zlib.crc32(pair.name.encode()), seed]
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))  # the kind that MONAI takes
    if kind == "misalignment":
        place = misalignment(tuple(pair.moving.shape[1:]), pair.moving_spacing or pair.spacing, severity, random)
        return warp(pair.moving[None], place(identity_map(tuple(pair.moving.shape[1:]))))[0], place
    return _spoilt(pair.moving, kind, severity, random).clamp(0, 1).as_subclass(Tensor), None


def misalignment(shape: tuple[int, ...], spacing, degrees: float, random: np.random.RandomState) -> Callable:
    """`place(x) = c + (R (x - c) + shift)` in the spacing's unit, of points `(N, D, *P)` in unit coordinates.

    `R = exp(angle K)`, K a random unit rotation's generator: any axis in 3-D, either sense in 2-D.
    """
    dim = len(shape)
    if len(spacing) != dim:
        raise ValueError(f"misalignment: expected the spacing along {dim} axes, got {spacing}; give the pair one")
    side = torch.tensor([(n - 1) * length for n, length in zip(shape, spacing, strict=True)], dtype=torch.float64)
    square = torch.from_numpy(random.standard_normal((dim, dim)))
    generator = square - square.T
    generator *= math.sqrt(2) / generator.norm()
    turned = torch.matrix_exp(math.radians(degrees) * generator)
    direction = torch.from_numpy(random.standard_normal(dim))
    shift = SHIFT_PER_DEGREE * degrees * side.min() * direction / direction.norm()
    matrix = turned * side / side[:, None]  # to mm, turned, and back
    offset = 0.5 + shift / side

    def place(points: Tensor) -> Tensor:
        turned = torch.einsum("ij,nj...->ni...", matrix, points.double() - 0.5)
        return (turned + offset.view(1, -1, *[1] * (points.dim() - 2))).float()

    return place


def _spoilt(image: Tensor, kind: str, severity: float, random: np.random.RandomState) -> Any:
    """The kinds that move nothing, not yet cut to [0, 1]; a tensor of MONAI's where MONAI makes it."""
    from monai import transforms as monai  # here: it takes seconds to import

    if kind in ("noise", "bias_field"):
        noise = monai.RandGaussianNoise(prob=1, std=severity, sample_std=False)
        field = monai.RandBiasField(prob=1, degree=3, coeff_range=(-severity, severity))
        drawn = noise if kind == "noise" else field
        drawn.set_random_state(state=random)
        return drawn(image)
    if kind == "gamma":
        return monai.AdjustContrast(gamma=2**severity)(image)
    if kind == "inversion":
        return (1 - severity) * image + severity * (1 - image)
    if kind == "blur":
        smooth = monai.GaussianSmooth(sigma=severity)  # counts zeros outside, which would darken the border
        return smooth(image) / smooth(torch.ones_like(image))
    image, planes = image.clone(), image.shape[-1]
    image[..., random.permutation(planes)[: round(severity * planes)]] = 0
    return image


def robustness(
    net: GradICON | None, dataset, kinds: Sequence[str], *, pairs: int, progress: bool = True
) -> tuple[pd.DataFrame, list[str]]:
    """How registration by `net` (None: none at all) of the first test pairs suffers from each kind of corruption.

    Returns rows `test_domain, pair, corruption, severity, metric, value, unit` and the problems. Each kind starts at
    severity 0, the clean pair. dice: the mean over the structures of the pair's own labels, looked up once, through the
    whole map from the fixed to the original moving image; no row without labels. folding_percent: of the network's map.
    A pair that cannot be read, or severities at which a map is not finite, are named in the problems and left out.
    """
    net = net and copy.deepcopy(net).eval()  # the caller's own stays in the mode it is in
    rows: list[dict] = []
    problems: list[str] = []
    bar = tqdm(range(min(pairs, dataset.test_count)), disable=not progress, desc=dataset.name, unit="pair")
    for pair in readable(dataset, bar, problems):
        clean = _registered(net, pair, pair.moving)
        not_finite = [] if clean else ["clean"]
        for kind in kinds:
            for severity in (0.0, *CORRUPTIONS[kind].severities):
                found = _registered(net, pair, *corrupt(pair, kind, severity)) if severity else clean
                if severity and not found:
                    not_finite.append(f"{kind} {severity:g}")
                about = {"test_domain": dataset.name, "pair": pair.name, "corruption": kind, "severity": severity}
                rows += [about | row for row in found if not math.isnan(row["value"])]
        if not_finite:
            problems.append(f"{dataset.name}, {pair.name}: a map is not finite ({', '.join(not_finite)}); left out")
    return pd.DataFrame(rows, columns=COLUMNS), problems


def _registered(net: GradICON | None, pair: Pair, moving: Tensor, place: Callable | None = None) -> list[dict]:
    """What is measured of one registration, Dice NaN without labels; [] when its map is not finite."""
    phi_map, folding = identity_map(tuple(pair.fixed.shape[1:])), []
    if net is not None:
        phi_map = net.map_of(moving, pair.fixed)
        if not phi_map.isfinite().all():
            return []
        folding = [{"metric": "folding_percent", "value": folding_percent(determinants(pair, phi_map)), "unit": "%"}]
    whole = place(phi_map) if place else phi_map
    return [{"metric": "dice", "value": mean_dice(pair, whole), "unit": "1"}, *folding]
