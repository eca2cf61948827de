"""How good one registration is: overlap, surface distance, landmark error, regularity.

The rows of `measure`; those with a structure's name as their `label` come once a structure, the others once a pair:

    metric              unit   label      what
    dice                1      structure  overlap of the fixed and the warped structure, 0 where registration lost it
    hd95                mm     structure  95 % of either surface lies no further than this from the other
    surface_distance    mm     structure  mean distance between the surfaces
    missing_in_fixed    count  structure  1: the fixed label lacks the structure; no dice, no distances
    missing_in_moving   count  structure  1: the moving label lacks it; likewise
    missing_in_warped   count  structure  1: both had it and registration lost it; dice 0, no distances
    tre                 mm                mean landmark error, where there are landmarks
    map_error           mm                mean distance from the true map, where that is known
    folding_percent     %                 cells that phi turns inside out
    jacobian_min        1                 smallest determinant of a cell
    sdlogj              1                 spread of the logarithm of the determinant
    sdlogj_learn2reg    1                 the same as Learn2Reg computes it; no row below 5 samples a side
    inverse_error       mm                mean |phi(inverse(x)) - x|, where the inverse is given

mm stands for the pair's unit. The last five describe a map, so they need one; where the pair
has a fixed mask, the first four of them describe the map there. Conventions are those of Learn2Reg's evaluation (Hering
et al. 2023, IEEE TMI 42(3)), but distances are in the pair's spacing, not in voxels.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor

from fmsam_lib.model.spatial import identity_map, inverse_error, jacobian_determinant, sample, voxels, warp_label
from fmsam_lib.pair import Pair


@torch.no_grad()
def measure(pair: Pair, phi_map: Tensor | None, inverse: Tensor | None = None) -> list[dict]:
    """All metrics of one pair: rows with `label`, `metric`, `value`, `unit`, see the table above.

    phi_map: `(1, D, *S)`, or None for no registration. inverse: the map of the swapped pair, `(1, D, *S)`.
    Raises ValueError for a map of another shape or one that is not finite, for an inverse without a map,
    for a spacing that does not fit the images.
    """
    _check(pair, phi_map, inverse)
    rows, unit = [], pair.unit
    for name, fixed, moving, warped in _structures(pair, phi_map):
        absent = [where for where, mask in (("fixed", fixed), ("moving", moving)) if not mask.any()]
        if not absent:
            rows.append(_row("dice", dice(warped, fixed), "1", name))
            absent = [] if warped.any() else ["warped"]
        if absent:
            rows += [_row(f"missing_in_{where}", 1.0, "count", name) for where in absent]
            continue
        robust, mean = surface_distances(warped, fixed, pair.spacing)
        rows += [_row("hd95", robust, unit, name), _row("surface_distance", mean, unit, name)]
    if pair.fixed_landmarks is not None and len(pair.fixed_landmarks):
        rows.append(_row("tre", landmark_error(pair, phi_map), unit))
    if pair.true_map is not None:
        rows.append(_row("map_error", map_error(pair, phi_map), unit))
    if phi_map is not None:
        determinant = determinants(pair, phi_map)
        rows.append(_row("folding_percent", folding_percent(determinant), "%"))
        rows.append(_row("jacobian_min", float(determinant.min()), "1"))
        rows.append(_row("sdlogj", sdlogj(determinant), "1"))
        if min(phi_map.shape[2:]) > 4:
            rows.append(_row("sdlogj_learn2reg", sdlogj_learn2reg(phi_map, pair.fixed_mask), "1"))
        if inverse is not None:
            rows.append(_row("inverse_error", _mean_length(inverse_error(phi_map, inverse), pair), unit))
    return rows


def _row(metric: str, value: float, unit: str, label: str = "") -> dict:
    return {"label": label, "metric": metric, "value": value, "unit": unit}


def _check(pair: Pair, phi_map: Tensor | None, inverse: Tensor | None) -> None:
    shape = tuple(pair.fixed.shape[1:])
    if len(pair.spacing) != len(shape) or not all(0 < step < math.inf for step in pair.spacing):
        raise ValueError(f"{pair.name}: expected a spacing above 0 for each of {len(shape)} axes, got {pair.spacing}")
    for name in ("moving", "moving_label", "fixed_label", "fixed_mask"):
        if (image := getattr(pair, name)) is not None and image.shape != pair.fixed.shape:
            told = f"{name} of the shape of fixed, {tuple(pair.fixed.shape)}"
            raise ValueError(f"{pair.name}: expected {told}, got {tuple(image.shape)}")
    if phi_map is None and inverse is not None:
        raise ValueError(f"{pair.name}: got an inverse, but no map that it is the inverse of; give both")
    expected, maps = (1, len(shape), *shape), {"phi_map": phi_map, "inverse": inverse}
    for name, given in ((name, given) for name, given in maps.items() if given is not None):
        if tuple(given.shape) != expected:
            got = f"{tuple(given.shape)}; give one pair's tensor, as phi.map is"
            raise ValueError(f"{pair.name}: expected {name} of shape {expected}, on the images' grid, got {got}")
        if not given.isfinite().all():
            raise ValueError(f"{pair.name}: expected a finite {name}, got NaN or infinity; leave the pair out")


def _structures(pair: Pair, phi_map: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, and the masks `S` in the fixed, the moving and the warped label, of every structure with a name."""
    if pair.moving_label is None or pair.fixed_label is None:
        return
    fixed, moving = pair.fixed_label[0].long(), pair.moving_label[0].long()  # 257 is 1 for a uint8
    warped = moving
    if phi_map is not None:  # as Learn2Reg, background once phi(x) leaves the grid: up to 0.03 of Dice (lungs, 48^3)
        inside = ((phi_map >= 0) & (phi_map <= 1)).all(dim=1)
        warped = (warp_label(moving[None, None], phi_map) * inside)[0, 0]
    for number, name in pair.labels.items():
        yield name, fixed == number, moving == number, warped == number


def dice(a: Tensor, b: Tensor) -> float:
    """`2 |a and b| / (|a| + |b|)` of two boolean masks of one shape, not both empty (Dice 1945).

    >>> dice(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.6666666666666666
    """
    return 2 * (a & b).sum().item() / (a.sum().item() + b.sum().item())


def mean_dice(pair: Pair, phi_map: Tensor) -> float:
    """Dice averaged over the structures in both the fixed and the moving label; NaN where there is none."""
    found = [masks for _, *masks in _structures(pair, phi_map)]
    values = [dice(warped, fixed) for fixed, moving, warped in found if fixed.any() and moving.any()]
    return sum(values) / len(values) if values else math.nan


def surface_distances(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> tuple[float, float]:
    """HD95 and mean symmetric surface distance of two boolean masks `S`, 2-D or 3-D, in `spacing`'s unit.

    As DeepMind's package `surface-distance`, which Learn2Reg measures with, has it: surfaces lie between samples, in
    elements of length or area w, and outside the image there is nothing. With d the distances of one surface's
    elements from the other surface, HD95 is the larger of the two directions' 95th percentiles of d weighted by w,
    the mean that of the two directions' `sum(w d) / sum(w)`. Raises ValueError where a mask is empty or the shapes do
    not fit.

    >>> a, b = torch.zeros(2, 8, 8, dtype=torch.bool)
    >>> a[2:5, 2:5] = b[3:6, 2:5] = True
    >>> surface_distances(a, b, (2.0, 1.0))[0]
    2.0
    """
    # Here: MONAI takes seconds to import. DeepMind's package gives the same to 1e-7 and takes up to twice as long.
    from monai.metrics.utils import get_mask_edges

    if a.shape != b.shape or a.dim() != len(spacing) or a.dim() not in (2, 3):
        got = f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(spacing)}"
        raise ValueError(f"expected two masks of one shape, 2-D or 3-D, and a spacing for each axis, got {got}")
    if not (a.any() and b.any()):
        raise ValueError("expected two masks with something in them, got an empty one; there is no distance to it")
    (around,) = find_objects((a | b).numpy().astype(np.uint8))  # the smallest box
    sides = [n for side in around[::-1] for n in (1, 1 + (side.start - side.stop) % 8)]  # torch keeps what a size needs
    a, b = (F.pad(mask[around], sides) for mask in (a, b))
    surface_a, surface_b, weight_a, weight_b = (e.numpy() for e in get_mask_edges(a, b, crop=False, spacing=spacing))
    one = distance_transform_edt(~surface_b, sampling=spacing)[surface_a]
    other = distance_transform_edt(~surface_a, sampling=spacing)[surface_b]
    directed = [(one, weight_a[surface_a].astype(np.float64)), (other, weight_b[surface_b].astype(np.float64))]
    means = [float(np.average(distance, weights=weight)) for distance, weight in directed]
    robust = [float(np.quantile(d, 0.95, weights=w, method="inverted_cdf")) for d, w in directed]
    return max(robust), sum(means) / 2


def _mean_length(displacement: Tensor, pair: Pair) -> float:
    """Mean length of displacements `(1, D, *P)` in the moving image, in the pair's unit."""
    samples = voxels(displacement.double(), tuple(pair.fixed.shape[1:]))
    spacing = torch.tensor(pair.moving_spacing or pair.spacing, dtype=samples.dtype)
    return float((samples * spacing.view(1, -1, *[1] * (samples.dim() - 2))).square().sum(dim=1).sqrt().mean())


def landmark_error(pair: Pair, phi_map: Tensor | None) -> float:
    """Mean distance of `phi(fixed landmark)` from the moving landmark (TRE), in the moving spacing's unit.

    A landmark outside the grid, in its outermost samples' far halves, moves as the nearest point of the grid does.
    """
    assert pair.fixed_landmarks is not None
    assert pair.moving_landmarks is not None
    points = pair.fixed_landmarks.T.view(1, -1, *[1] * (pair.fixed.dim() - 2), len(pair.fixed_landmarks))
    inside = points.clamp(0, 1)
    mapped = points if phi_map is None else sample(phi_map, inside.to(phi_map)) + (points - inside)
    return _mean_length(mapped - pair.moving_landmarks.T.view_as(points), pair)


def map_error(pair: Pair, phi_map: Tensor | None) -> float:
    """Mean distance of `phi(x)` from the true map, in the spacing's unit.

    Over the x in a structure of the fixed label; over all x where there is no label, or nothing in it.
    """
    assert pair.true_map is not None
    error = (identity_map(tuple(pair.fixed.shape[1:])) if phi_map is None else phi_map) - pair.true_map[None]
    if pair.fixed_label is not None and pair.fixed_label.any():
        error = error[:, :, pair.fixed_label[0] != 0]
    return _mean_length(error, pair)


def determinants(pair: Pair, phi_map: Tensor) -> Tensor:
    """The Jacobian determinant in every cell; with a fixed mask, in those that start at a sample of it."""
    return within(jacobian_determinant(phi_map)[0], pair.fixed_mask, slice(-1))


def within(values: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """Values of this part of each axis, in a mask `(1, *S)`; all without a mask or where it is empty."""
    inside = None if mask is None else mask[0][(part,) * values.dim()] != 0
    return values if inside is None or not inside.any() else values[inside]


def folding_percent(determinant: Tensor) -> float:
    """Percentage of cells whose Jacobian determinant is 0 or below."""
    return float((determinant <= 0).double().mean() * 100)


def percent(value: float) -> str:
    """A percentage with two digits, for people: no powers of ten.

    >>> percent(100.0), percent(3.628), percent(0.0212), percent(0.0)
    ('100 %', '3.6 %', '0.021 %', '0 %')
    """
    return f"{np.format_float_positional(value, precision=2, unique=False, fractional=False, trim='-')} %"


def sdlogj(determinant: Tensor) -> float:
    """Standard deviation of the logarithm of the Jacobian determinant (clipped at 1e-9)."""
    return float(np.std(np.log(determinant.double().clamp(min=1e-9).numpy(force=True))))


def learn2reg_field(phi_map: Tensor) -> np.ndarray:
    """The displacement field that Learn2Reg wants of a map `(1, D, *S)`: `(*S, D)` float32, voxels of the fixed grid.

    Saved with the fixed image's affine as `disp_<fixed>_<moving>.nii.gz`. At sample i the moving image is seen
    at index `i + field[i]`. Raises ValueError for more than one map.
    """
    if len(phi_map) != 1:
        raise ValueError(f"expected one map (1, D, *S), got {tuple(phi_map.shape)}; export one pair at a time")
    shape = tuple(phi_map.shape[2:])
    displacement = voxels(phi_map - identity_map(shape, phi_map.dtype, phi_map.device), shape)
    return np.ascontiguousarray(displacement[0].movedim(0, -1).numpy(force=True), dtype=np.float32)


def sdlogj_learn2reg(phi_map: Tensor, mask: Tensor | None = None) -> float:
    """Learn2Reg's SDlogJ of a map `(1, D, *S)`: standard deviation of `log(det(I + du/dx) + 3)`.

    mask: `(1, *S)` bool, the samples that count. u is in voxels and has central differences; two samples of border are
    left out, `det + 3` is clipped to [1e-9, 1e9]. The 3 makes folds harmless and everything smaller than `sdlogj`: do
    not compare the two. Raises ValueError where a side has fewer than 5 samples, for then nothing is left.
    """
    u = torch.from_numpy(learn2reg_field(phi_map))  # (*S, D)
    dim = u.shape[-1]
    if min(u.shape[:-1]) < 5:
        raise ValueError(f"expected at least 5 samples a side, got {tuple(u.shape[:-1])}; use sdlogj there")
    matrix = torch.stack(torch.gradient(u, dim=list(range(dim))), dim=-1)[(slice(2, -2),) * dim]  # component, axis
    determinant = within(torch.linalg.det(matrix + torch.eye(dim, dtype=u.dtype)), mask, slice(2, -2))
    return float(np.std(np.log((determinant.double() + 3).clamp(1e-9, 1e9).numpy())))
