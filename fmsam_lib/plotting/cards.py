"""What a thing looks like at the end of a notebook's cell: its facts beside a small picture, as HTML."""

import base64
import html
from collections.abc import Mapping

import numpy as np
import torch
from IPython import get_ipython
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from fmsam_lib.metrics import folding_percent, percent, sdlogj
from fmsam_lib.model.spatial import identity_map, jacobian_determinant, voxels
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices


def show_themselves() -> None:
    """In a notebook, pairs and transforms show their cards; their own rooms know nothing of pictures."""
    if shell := get_ipython():
        for kind, card_of in ((Pair, of_pair), (Transform, of_transform)):
            shell.display_formatter.formatters["text/html"].for_type(kind, card_of)


def card(title: str, facts: Mapping[str, object], picture: Figure | None = None, more: str = "") -> str:
    """Facts that are empty are left out. more: HTML below the facts."""
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{html.escape(name)}</th>"
        f"<td style='text-align:left;white-space:normal'>{html.escape(str(fact))}</td></tr>"
        for name, fact in facts.items()
        if fact
    )
    drawn = "" if picture is None else base64.b64encode(slices.png(picture)).decode()
    image = drawn and f"<img alt='' style='max-width:min(100%,520px)' src='data:image/png;base64,{drawn}'>"
    words = f"<div style='max-width:560px'><b>{html.escape(title)}</b><table>{rows}</table>{more}</div>"
    return f"<div style='display:flex;flex-wrap:wrap;gap:16px;align-items:center'>{image}{words}</div>"


def of_pair(pair: Pair) -> str:
    """Both images in the middle plane, with their labels; shape, spacing, structures, what else is known."""
    cut = slices.cut(pair)
    figure, (left, right) = _two(cut, fixed=cut.fixed, moving=cut.moving)
    slices.outline(left.axes, cut, cut.fixed_label, slices.FIXED_LINE)
    slices.outline(right.axes, cut, cut.moving_label, slices.WARPED_LINE)
    known = ("true_map", "fixed_landmarks", "fixed_mask", "moving_mask")
    facts = {
        "shape": " × ".join(map(str, pair.fixed.shape[1:])),
        "spacing": pair.spacing and " × ".join(f"{s:.3g}" for s in pair.spacing) + f" {pair.unit}",
        "labels": ", ".join(pair.labels.values()),
        "known": ", ".join(name.replace("_", " ") for name in known if getattr(pair, name) is not None),
    }
    return card(pair.title, facts, figure)


def of_transform(transform: Transform) -> str:
    """The middle plane's deformation grid and Jacobian; of a batch the first pair's, and its numbers."""
    phi_map, blank = transform.map.detach().float().cpu(), torch.zeros(1, *transform.shape)
    cut = slices.cut(Pair("", blank, blank), phi_map[:1])
    figure, (grid, jacobian) = _two(cut, **{"deformation grid": cut.warped, "Jacobian determinant": cut.jacobian})
    slices.deformed_grid(grid.axes, cut)
    jacobian.set(**slices.jacobian_look())
    slices.jacobian_bar(figure, jacobian, jacobian.axes)
    facts = {"pairs": f"{len(phi_map)}, this is the first" if len(phi_map) > 1 else ""}
    facts |= {"shape": " × ".join(map(str, transform.shape)), "steps": str(len(transform.fields))}
    return card("Transform", facts | regularity(phi_map[:1]), figure)


def regularity(phi_map: Tensor) -> dict[str, str]:
    """How far a map `(1, D, *S)` moves things, and how smoothly."""
    shape = tuple(phi_map.shape[2:])
    moved = voxels(phi_map - identity_map(shape), shape).square().sum(1).sqrt()
    determinant = jacobian_determinant(phi_map)
    return {
        "displacement": f"{moved.mean():.2f} samples on average, {moved.max():.2f} at most",
        "folded": percent(folding_percent(determinant)),
        "SDlogJ": f"{sdlogj(determinant):.3f}",
    }


def _two(cut: slices.Cut, **pictures: np.ndarray) -> tuple[Figure, list[AxesImage]]:
    figure = slices.Picture(figsize=(5.2, min(2.5 * cut.tall, 5) + 0.3), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, title in zip(axes, pictures, strict=True):
        ax.set_title(title, fontsize=9)
    return figure, [slices.show(ax, cut, picture) for ax, picture in zip(axes, pictures.values(), strict=True)]
