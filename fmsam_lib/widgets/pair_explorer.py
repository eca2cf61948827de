"""An image pair and its registration, explored by hand: views, planes, slices, strength."""

import html
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.widgets.sliders import ROW, Sliders, shown

SIDE_BY_SIDE, CHECKERBOARD, OVERLAY, DIFFERENCE = "side by side", "checkerboard", "overlay", "difference"
GRID, JACOBIAN = "deformation grid", "Jacobian"
HINTS = {
    SIDE_BY_SIDE: "",
    CHECKERBOARD: "edges should run on from square to square",
    OVERLAY: "green: fixed alone; magenta: {warped} alone; grey: both",
    DIFFERENCE: "{warped} minus fixed: orange is too bright, purple too dark",
    GRID: "a square grid on the moving image, seen through the transform",
    JACOBIAN: "volume of a piece of the fixed image in the moving one; black is folded",
}


def explore(
    pair: Pair, phi: Transform | Tensor | None = None, *, title: str = "", interactive: bool | None = None
) -> "Explorer | None":
    """Show a pair as a still picture, then an explorer: views, planes, slices, and phi from nothing to full strength.

    phi: a `Transform`, its map `(1, D, *S)`, or None for the images alone.
    interactive: whether there is an explorer; unless given, as `sliders.in_a_notebook` decides.
    Raises ValueError when phi is not on the pair's grid.

    >>> explorer = explore(pair, phi)     # doctest: +SKIP
    >>> explorer.strength.value = 0.5     # doctest: +SKIP
    """
    phi_map = phi.map if isinstance(phi, Transform) else phi
    phi_map = None if phi_map is None else slices.check_map(pair, phi_map)
    return shown(slices.registration(pair, phi_map), lambda: Explorer(pair, phi_map, title), interactive)


class Explorer(Sliders):
    """The controls `view`, `plane`, `index`, `strength`, `squares`, `labels`, and what they draw.

    `drawn` is the `slices.Cut` in the figure, `images` and `contours` are its artists.
    """

    def __init__(self, pair: Pair, phi_map: Tensor | None, title: str = ""):
        self.pair, self.phi_map, solid = pair, phi_map, pair.fixed.dim() == 4
        views = list(HINTS) if phi_map is not None else [SIDE_BY_SIDE, CHECKERBOARD, OVERLAY, DIFFERENCE]
        self.view = widgets.Dropdown(options=views, description="view")
        planes = [(name, axis) for axis, name in reversed(list(enumerate(slices.PLANES)))]
        self.plane = widgets.Dropdown(options=planes, value=2, description="plane")
        self.index = widgets.IntSlider(description="slice", min=0)
        self.strength = widgets.FloatSlider(value=1, min=0, max=1, step=0.05, description="strength")
        self.squares = widgets.IntSlider(value=8, min=2, max=24, description="squares")
        self.labels = widgets.Checkbox(value=True, description="labels", indent=False, layout={"width": "auto"})
        self.hint = widgets.HTML()
        _show(self.plane, solid)
        _show(self.index, solid)
        _show(self.strength, phi_map is not None)
        _show(self.labels, pair.fixed_label is not None or pair.moving_label is not None)
        if solid:
            self._middle()
            self.plane.observe(self._middle, "value")  # before the observer that draws
        names = ("view", "plane", "labels", "index", "strength", "squares")
        super().__init__(self._picture, {name: getattr(self, name) for name in names})
        heading = widgets.HTML(f"<b>{html.escape(title or pair.title)}</b>")
        controls = [[self.view, self.plane, self.labels], [self.index, self.strength, self.squares]]
        rows = [widgets.HBox(row, layout=ROW) for row in controls]
        self.widget = widgets.VBox([heading, *rows, self.hint, self.image])

    def _middle(self, change: Any = None) -> None:
        samples = self.pair.fixed.shape[1 + self.plane.value]
        with self.index.hold_trait_notifications():  # its range and its value are one change
            self.index.max, self.index.value = samples - 1, samples // 2

    def _picture(self, view: str, plane: int, labels: bool, index: int, strength: float, squares: int) -> Figure:
        place = {"axis": plane, "index": index} if self.pair.fixed.dim() == 4 else {}
        self.drawn = cut = slices.cut(self.pair, self.phi_map, strength=strength, **place)
        warped = "moving" if self.phi_map is None else "warped"
        _show(self.squares, view == CHECKERBOARD)
        self.hint.value = HINTS[view].format(warped=warped)
        pictures = {
            SIDE_BY_SIDE: [cut.fixed, cut.moving] + ([] if self.phi_map is None else [cut.warped]),
            CHECKERBOARD: [slices.checkerboard(cut.fixed, cut.warped, squares)],
            OVERLAY: [np.stack([cut.warped, cut.fixed, cut.warped], -1).clip(0, 1)],
            DIFFERENCE: [cut.warped - cut.fixed],
            GRID: [cut.warped],
            JACOBIAN: [cut.jacobian],
        }[view]
        wide = 9 if len(pictures) > 1 else 5.5
        tall = (cut.size[1] + cut.step[1]) / (cut.size[0] + cut.step[0])
        bar = 1.0 if view in (DIFFERENCE, JACOBIAN) else 0.0  # inches beside the picture
        high = min(wide / len(pictures) * tall, 6) + 0.6
        figure = slices.Picture(figsize=(wide + bar, high), layout="constrained")
        self.caption = figure.suptitle(cut.name, fontsize=10)
        axes = figure.subplots(1, len(pictures), squeeze=False)[0]
        how = {JACOBIAN: slices.jacobian_look(), DIFFERENCE: {"cmap": colormaps["PuOr_r"], "vmin": -1, "vmax": 1}}
        self.images = [
            slices.show(ax, cut, picture, **how.get(view, {})) for ax, picture in zip(axes, pictures, strict=True)
        ]
        if view == SIDE_BY_SIDE:
            for ax, name in zip(axes, ("fixed", "moving", "warped"), strict=False):
                ax.set_title(name, fontsize=10)
        elif view == JACOBIAN:
            slices.jacobian_bar(figure, self.images[0], axes[0])
        elif view == DIFFERENCE:
            figure.colorbar(self.images[0], ax=axes[0], label="intensity", shrink=0.8, pad=0.02)
        self.contours = slices.deformed_grid(axes[0], cut) if view == GRID else []
        if self.labels.layout.display != "none":
            both = view == SIDE_BY_SIDE and self.phi_map is not None
            slices.contour_legend(figure, "moving and warped" if both else warped)
        if labels:
            self.contours += slices.outline(axes[0], cut, cut.fixed_label, slices.FIXED_LINE)
            if len(axes) == 3:
                self.contours += slices.outline(axes[2], cut, cut.fixed_label, slices.FIXED_LINE)
                self.contours += slices.outline(axes[1], cut, cut.moving_label, slices.WARPED_LINE)
            self.contours += slices.outline(axes[-1], cut, cut.warped_label, slices.WARPED_LINE)
        return figure


def _show(widget: widgets.Widget, visible: bool) -> None:
    widget.layout.display = None if visible else "none"
