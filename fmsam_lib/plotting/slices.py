"""One plane of an image pair as pictures: what `registration` prints and `widgets.pair_explorer` moves through.

Pictures stand as a reader of medical images expects them: the first axis to the right, up is superior or
anterior, the patient's sides at the borders, true proportions.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from torch import Tensor

from fmsam_lib.metrics import percent
from fmsam_lib.model.spatial import identity_map, jacobian_determinant, warp, warp_label
from fmsam_lib.pair import Pair
from fmsam_lib.records import written_whole

WIDTH, MOST_HIGH, DPI = 9.0, 6.9, 130  # inches, dots an inch: 1,200 x 900 pixels at most; 900 wide in a README
FIXED_LINE: dict[str, Any] = {"colors": "#56B4E9", "linestyles": "solid", "linewidths": 1.3}
WARPED_LINE: dict[str, Any] = {"colors": "#E69F00", "linestyles": "dashed", "linewidths": 1.3}
GRID_LINE: dict[str, Any] = {"colors": "#F0E442", "linestyles": "solid", "linewidths": 0.9}
PLANES = ("sagittal", "coronal", "axial")  # across axis 0, 1, 2 of a canonical volume


class Picture(Figure):
    """A figure that a notebook can show although pyplot has never heard of it."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, *, compression: int = 6) -> bytes:
    """The figure as a PNG's bytes, 100 dpi; compression 1 is quick, 9 small."""
    buffer = io.BytesIO()
    how: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": compression}}
    figure.savefig(buffer, format="png", dpi=100, **how)
    return buffer.getvalue()


def fitting(figure: Figure) -> float:
    """The dots an inch with which a figure fills 1,200 x 900 pixels at most."""
    wide, high = figure.get_size_inches()
    return float(min(DPI, 1200 / wide, 900 / high))


def save(figure: Figure, path_without_suffix: str | Path) -> None:
    """Write `<path>.png` (at most 1,200 x 900) and `<path>.pdf`, whole or not at all; the same bytes every time."""
    path = Path(path_without_suffix)
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        with written_whole(path.with_name(f"{path.name}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=fitting(figure), metadata=metadata)


@dataclass(frozen=True)
class Cut:
    """One plane of a pair as pictures `(rows, columns)`, the first row at the bottom, for `origin="lower"`.

    phi: `(2, rows, columns)`, where the plane's points lie in the moving image, horizontally and vertically, mm.
    jacobian: `(rows - 1, columns - 1)`. size: millimetres between the first and the last sample's centres.
    step: spacing, mm. ends: the patient's sides at the picture's left, right, bottom, top.
    """

    name: str
    fixed: np.ndarray
    moving: np.ndarray
    warped: np.ndarray
    fixed_label: np.ndarray | None
    moving_label: np.ndarray | None
    warped_label: np.ndarray | None
    phi: np.ndarray
    jacobian: np.ndarray
    size: tuple[float, float]
    step: tuple[float, float]
    ends: str

    @property
    def tall(self) -> float:
        """Height over width of the picture, whose outermost samples count whole."""
        return (self.size[1] + self.step[1]) / (self.size[0] + self.step[0])


def check_map(pair: Pair, phi_map: Tensor) -> Tensor:
    """`phi_map` on the CPU; ValueError unless it is `(1, D, *S)` on the pair's grid."""
    phi_map, shape = torch.as_tensor(phi_map), tuple(pair.fixed.shape[1:])
    if tuple(phi_map.shape) != (1, len(shape), *shape):
        expected = f"a map {(1, len(shape), *shape)} on the grid of pair {pair.name!r}"
        raise ValueError(f"expected {expected}, got {tuple(phi_map.shape)}; give the phi.map made from these images")
    return phi_map.detach().to("cpu", torch.float32)


def cut(pair: Pair, phi_map: Tensor | None = None, *, axis: int | None = None, index: int | None = None) -> Cut:
    """The plane across `axis` (the last one unless given) at `index` (the middle); a 2-D pair is its own plane.

    phi_map: `(1, D, *S)` in unit coordinates, the identity unless given. Only the plane is warped.
    """
    shape = tuple(pair.fixed.shape[1:])
    dim = len(shape)
    if dim == 2 and (axis, index) != (None, None):
        raise ValueError(f"expected no axis and no index for the 2-D pair {pair.name!r}, got {axis}, {index}")
    axis = 2 if axis is None else axis
    if axis not in (0, 1, 2):
        raise ValueError(f"expected axis 0, 1 or 2, got {axis}; they are the {', '.join(PLANES)} planes")
    depth = shape[axis] if dim == 3 else 1
    at = depth // 2 if index is None else index
    if not 0 <= at < depth:
        raise ValueError(f"expected an index from 0 to {depth - 1} along axis {axis}, got {index}")
    phi_map = identity_map(shape) if phi_map is None else check_map(pair, phi_map)

    def slab(volume: Tensor, width: int = 1) -> Tensor:  # (..., *S), `width` samples thick
        return volume if dim == 2 else volume.narrow(axis - 3, min(at, depth - width), width)

    def picture(volume: Tensor) -> np.ndarray:  # of a slab: up is superior or anterior
        return (volume if dim == 2 else volume.squeeze(axis - 3)).transpose(-1, -2).numpy()

    points, thick = slab(phi_map), slab(phi_map, 2)
    # jacobian_determinant takes the slab for the whole grid, so its unit along `axis` is too short
    jacobian = jacobian_determinant(thick)[0] * (1 if dim == 2 else depth - 1)
    across = x, y = tuple(a for a in range(dim) if dim == 2 or a != axis)
    spacing = [float(s) for s in pair.spacing] or [1.0] * dim
    size = np.array([(shape[a] - 1) * spacing[a] for a in across])
    return Cut(
        name=pair.title if dim == 2 else f"{pair.title}, {PLANES[axis]} slice {at} (0 to {depth - 1})",
        fixed=picture(slab(pair.fixed[0])),
        moving=picture(slab(pair.moving[0])),
        warped=picture(warp(pair.moving[None], points)[0, 0]),
        fixed_label=None if pair.fixed_label is None else picture(slab(pair.fixed_label[0])),
        moving_label=None if pair.moving_label is None else picture(slab(pair.moving_label[0])),
        warped_label=None if pair.moving_label is None else picture(warp_label(pair.moving_label[None], points)[0, 0]),
        phi=picture(points[0, list(across)]) * size[:, None, None],
        jacobian=picture(jacobian),
        size=tuple(size.tolist()),
        step=(spacing[x], spacing[y]),
        ends=ends_of(pair.affine, x) + ends_of(pair.affine, y),
    )


def ends_of(affine: Tensor | None, axis: int) -> str:
    """Which side of the patient the first and the last sample of a grid's axis are: "LR", "PA" or "IS"."""
    if affine is None:
        return "  "
    direction = np.asarray(affine)[:3, axis]
    main = int(np.abs(direction).argmax())
    return ("LR", "PA", "IS")[main][:: int(np.sign(direction[main]))]


def show(axes: Axes, plane: Cut, picture: np.ndarray, **how: Any) -> AxesImage:
    """Draw a picture of the plane, grey from 0 to 1 unless told how, with the patient's sides at its borders."""
    samples = (np.array(picture.shape[1::-1]) - 1) * plane.step
    left, bottom = (np.array(plane.size) - samples) / 2 - np.array(plane.step) / 2  # cells lie between the samples
    extent = (left, left + samples[0] + plane.step[0], bottom, bottom + samples[1] + plane.step[1])
    if "norm" not in how:
        how = {"cmap": "gray", "vmin": 0, "vmax": 1} | how
    image = axes.imshow(picture, origin="lower", extent=extent, **how)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    places = [(0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center")]
    places += [(0.5, 0.015, "center", "bottom"), (0.5, 0.985, "center", "top")]
    box = {"facecolor": "black", "alpha": 0.55, "pad": 1, "linewidth": 0}
    for end, (x, y, ha, va) in zip(plane.ends.strip(), places, strict=False):
        axes.text(x, y, end, transform=axes.transAxes, ha=ha, va=va, color="white", fontsize=8, bbox=box)
    return image


def outline(axes: Axes, plane: Cut, label: np.ndarray | None, line: dict[str, Any]) -> list[Any]:
    """The contours of every structure in `label` (None: nothing), shared borders once; returns the artists."""
    if label is None:
        return []
    return [axes.contour(s, [0.5], extent=(0, plane.size[0], 0, plane.size[1]), **line) for s in structures(label)]


def structures(label: np.ndarray) -> list[np.ma.MaskedArray]:
    """Every structure as a picture of 0 and 1, without the ground of those before it."""
    return [np.ma.array(label == n, mask=(label != 0) & (label < n)) for n in np.setdiff1d(label, [0])]


def deformed_grid(axes: Axes, plane: Cut) -> list[Any]:
    """A square grid drawn on the moving image, seen through the map; returns the artists."""
    return [axes.contour(*c, extent=(0, plane.size[0], 0, plane.size[1]), **GRID_LINE) for c in grid_levels(plane)]


def grid_levels(plane: Cut) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both components of the map, and the values whose contours are the lines of a square grid."""
    apart = max(plane.size) / 20
    return [(part, np.arange(-size, 2 * size, apart)) for part, size in zip(plane.phi, plane.size, strict=True)]


def checkerboard(first: np.ndarray, second: np.ndarray, squares: int = 8) -> np.ndarray:
    """Both pictures in squares, `squares` of them along the longer side."""
    side = max(1, math.ceil(max(first.shape) / squares))
    rows, columns = np.indices(first.shape) // side
    return np.where((rows + columns) % 2 == 0, first, second)


def jacobian_look() -> dict[str, Any]:
    """Orange grows, purple shrinks, on a log scale where 1/2 is as far from 1 as 2; black is folded."""
    return {"cmap": colormaps["PuOr_r"].with_extremes(bad="black"), "norm": colors.LogNorm(1 / 3, 3)}


def jacobian_bar(figure: Figure, image: AxesImage, axes: Axes) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=[1 / 3, 1 / 2, 1, 2, 3], extend="both", shrink=0.8, pad=0.02)
    bar.ax.set_yticklabels(["⅓", "½", "1", "2", "3"])
    bar.ax.minorticks_off()


def contour_legend(figure: Figure, other: str) -> None:
    """Below the panels: which contours are the fixed image's labels, which the `other` one's."""
    lines = {"fixed labels": FIXED_LINE, f"{other} labels": WARPED_LINE}
    handles = [Line2D([], [], color=look["colors"], ls=look["linestyles"], lw=2, label=n) for n, look in lines.items()]
    figure.legend(handles=handles, frameon=False, ncols=2, fontsize=9, loc="outside lower center")


def registration(pair: Pair, phi_map: Tensor | None = None, *, axis: int | None = None, index=None) -> Figure:
    """Fixed and moving image; with `phi_map` `(1, D, *S)` also what it does: warped, checkerboard, grid, Jacobian.

    3-D: the plane across `axis` (0 sagittal, 1 coronal, 2 axial: the default) at `index` (the middle).
    """
    plane = cut(pair, phi_map, axis=axis, index=index)
    columns, rows = (2, 1) if phi_map is None else (3, 2)
    high = rows * ((WIDTH - 0.5) / columns * min(plane.tall, 1.4) + 0.3) + 0.5
    figure = Picture(figsize=(WIDTH, min(high, MOST_HIGH)), layout="constrained")
    figure.suptitle(plane.name, fontsize=11, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    titles = ["fixed", "moving", "warped", "checkerboard of fixed and warped", "deformation grid"]
    pictures = [plane.fixed, plane.moving, plane.warped, checkerboard(plane.fixed, plane.warped), plane.warped]
    for ax, title, picture in zip(axes, titles, pictures, strict=False):
        show(ax, plane, picture)
        ax.set_title(title, fontsize=10)
    outline(axes[0], plane, plane.fixed_label, FIXED_LINE)
    outline(axes[1], plane, plane.moving_label, WARPED_LINE)
    _scale_bar(axes[0], plane, pair.unit if pair.spacing else "sample")
    if phi_map is not None:
        outline(axes[2], plane, plane.fixed_label, FIXED_LINE)
        outline(axes[2], plane, plane.warped_label, WARPED_LINE)
        deformed_grid(axes[4], plane)
        jacobian_bar(figure, show(axes[5], plane, plane.jacobian, **jacobian_look()), axes[5])
        folded = percent(100 * (~(plane.jacobian > 0)).mean())
        axes[5].set_title(f"Jacobian determinant, {folded} folded", fontsize=10)
    if pair.fixed_label is not None or pair.moving_label is not None:
        contour_legend(figure, "moving" if phi_map is None else "moving and warped")
    return figure


def overview(pair: Pair, phi_map: Tensor, said: str = "") -> Figure:
    """A pair's mid planes, a row each: fixed, moving, warped, and both images as an overlay before and after.

    phi_map: `(1, D, *S)`. In the overlays the fixed image alone is green, the other alone magenta, both together grey.
    said: a line under the name. A plane less than a quarter as high as it is wide is stretched to that.
    """
    planes = [cut(pair, phi_map, axis=axis) for axis in ((None,) if pair.fixed.dim() == 3 else (2, 1, 0))]
    rows = [max(p.tall, 0.25) for p in planes]
    high = min(WIDTH / 5 * sum(rows) + 0.15 * len(rows) + 0.7, MOST_HIGH)
    figure = Picture(figsize=(WIDTH, high), layout="constrained")
    figure.suptitle("\n".join([pair.title, *textwrap.wrap(said, 120)]), fontsize=11, parse_math=False)
    axes = figure.subplots(len(planes), 5, squeeze=False, gridspec_kw={"height_ratios": rows})
    for ax, title in zip(axes[0], ("fixed", "moving", "warped", "overlay before", "overlay after"), strict=True):
        ax.set_title(title, fontsize=10)
    for line, p, row in zip(axes, planes, rows, strict=True):
        overlays = [np.stack([other, p.fixed, other], -1).clip(0, 1) for other in (p.moving, p.warped)]
        for ax, picture in zip(line, (p.fixed, p.moving, p.warped, *overlays), strict=True):
            show(ax, p, picture, aspect=row / p.tall)
        labels = (p.fixed_label, p.moving_label, p.fixed_label, p.warped_label)
        for ax, label, look in zip(line[[0, 1, 2, 2]], labels, (FIXED_LINE, WARPED_LINE) * 2, strict=True):
            outline(ax, p, label, look | {"linewidths": 0.9})
        line[0].set_ylabel(p.name.removeprefix(pair.title)[2:].partition(" (")[0].replace(" ", "\n", 1), fontsize=9)
    if pair.fixed_label is not None or pair.moving_label is not None:
        contour_legend(figure, "moving and warped")
    return figure


def _scale_bar(axes: Axes, plane: Cut, unit: str) -> None:
    x, y, longest = plane.size[0] * 0.04, plane.size[1] * 0.05, plane.size[0] / 3
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(m * power for m in (1, 2, 5) if m * power <= longest)
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    text = f"{length:g} {unit}" + ("" if unit == "mm" else "s")
    axes.text(x, y + plane.size[1] * 0.015, text, color="white", fontsize=8, va="bottom")
