"""How good one registration is: overlap, surface distance, landmark error, regularity."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from fmsam_lib.spatial import jacobian_determinant, sample, voxels, warp_label
from fmsam_lib.synthetic import Pair


def measure(pair: Pair, phi_map: Tensor | None) -> list[dict]:
    """All metrics of one pair: rows with `label`, `metric`, `value`, `unit`.

    phi_map: `(1, D, *S)`, or None for no registration. A structure that the fixed or the warped label
    lacks gets Dice 0 and a row `missing` instead of a distance that does not exist.
    """
    identity_only = phi_map is None
    rows = []
    if pair.moving_label is not None and pair.fixed_label is not None:
        moving_label = pair.moving_label[None]
        warped = moving_label if identity_only else warp_label(moving_label, phi_map)
        for number, name in pair.labels.items():
            a, b = warped[0, 0] == number, pair.fixed_label[0] == number
            if not a.any() and not b.any():
                rows.append(_row("missing", 1.0, "count", name))
                continue
            rows.append(_row("dice", dice(a, b), "1", name))
            if a.any() and b.any():
                rows.append(_row("hd95", hd95(a, b, pair.spacing), pair.unit, name))
            else:
                rows.append(_row("missing", 1.0, "count", name))
    if pair.fixed_landmarks is not None:
        rows.append(_row("tre", landmark_error(pair, phi_map), pair.unit))
    if not identity_only:
        determinant = jacobian_determinant(phi_map)
        rows.append(_row("folding_percent", folding_percent(determinant), "%"))
        rows.append(_row("sdlogj", sdlogj(determinant), "1"))
    return rows


def _row(metric: str, value: float, unit: str, label: str = "") -> dict:
    return {"label": label, "metric": metric, "value": value, "unit": unit}


def dice(a: Tensor, b: Tensor) -> float:
    """`2 |a and b| / (|a| + |b|)` of two boolean masks of one shape, not both empty (Dice 1945).

    >>> dice(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.6666666666666666
    """
    return 2 * (a & b).sum().item() / (a.sum().item() + b.sum().item())


def mean_dice(pair: Pair, phi_map: Tensor) -> float:
    """Dice averaged over the structures in the fixed or the warped label; NaN where there is none."""
    if pair.moving_label is None or pair.fixed_label is None:
        return math.nan
    warped = warp_label(pair.moving_label[None], phi_map)[0]
    masks = [(warped == number, pair.fixed_label == number) for number in pair.labels]
    values = [dice(a, b) for a, b in masks if a.any() or b.any()]
    return sum(values) / len(values) if values else math.nan


def hd95(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> float:
    """The larger of the two directed 95th percentile surface distances of two masks `S`, in `spacing`'s unit.

    MONAI's implementation; both masks must have something in them.
    """
    from monai.metrics import compute_hausdorff_distance  # MONAI takes seconds to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about an argument that MONAI itself passes
        distance = compute_hausdorff_distance(
            a[None, None], b[None, None], include_background=True, percentile=95, spacing=list(spacing)
        )
    return float(distance)


def landmark_error(pair: Pair, phi_map: Tensor | None) -> float:
    """Mean distance of `phi(fixed landmark)` from the moving landmark (TRE), in the spacing's unit."""
    points = pair.fixed_landmarks.T.view(1, -1, *[1] * (pair.fixed.dim() - 2), len(pair.fixed_landmarks))
    mapped = points if phi_map is None else sample(phi_map, points)
    error = mapped.flatten(2)[0].T - pair.moving_landmarks  # (L, D)
    mm = voxels(error.T[None], tuple(pair.fixed.shape[1:]))[0].T * torch.tensor(pair.spacing)
    return float(mm.norm(dim=1).mean())


def folding_percent(determinant: Tensor) -> float:
    """Percentage of cells whose Jacobian determinant is 0 or below."""
    return float((determinant <= 0).double().mean() * 100)


def sdlogj(determinant: Tensor) -> float:
    """Standard deviation of the logarithm of the Jacobian determinant (clipped at 1e-9)."""
    return float(np.std(np.log(determinant.double().clamp(min=1e-9).numpy())))
