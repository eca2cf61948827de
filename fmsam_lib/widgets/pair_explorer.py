"""An image pair and its registration, explored by hand: views, planes, slices, strength."""

import html
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from matplotlib import colormaps
from torch import Tensor

from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.widgets.sliders import PICTURE, ROW, in_a_notebook

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
    display(slices.registration(pair, phi_map))
    if not in_a_notebook(interactive):
        return None
    explorer = Explorer(pair, phi_map, title)
    display(explorer.widget)
    return explorer


class Explorer:
    """The controls (`view`, `plane`, `index`, `strength`, `squares`, `labels`) and the `image` they draw.

    Setting a control's value redraws. `figure` is the figure last drawn, `drawn` the `slices.Cut` in it.
    """

    def __init__(self, pair: Pair, phi_map: Tensor | None, title: str = ""):
        self.pair, self.phi_map = pair, phi_map
        self.warped = "moving" if phi_map is None else "warped"
        dim = pair.fixed.dim() - 1
        views = list(HINTS) if phi_map is not None else [SIDE_BY_SIDE, CHECKERBOARD, OVERLAY, DIFFERENCE]
        self.view = widgets.Dropdown(options=views, description="view")
        planes = [(name, axis) for axis, name in reversed(list(enumerate(slices.PLANES)))]
        self.plane = widgets.Dropdown(options=planes, value=2, description="plane")
        self.index = widgets.IntSlider(description="slice", min=0)
        self.strength = widgets.FloatSlider(value=1, min=0, max=1, step=0.05, description="strength")
        self.squares = widgets.IntSlider(value=8, min=2, max=24, description="squares")
        self.labels = widgets.Checkbox(value=True, description="labels", indent=False, layout={"width": "auto"})
        self.image = widgets.Image(format="png", layout=PICTURE)
        self.hint = widgets.HTML()

        _show(self.plane, dim == 3)
        _show(self.index, dim == 3)
        _show(self.strength, phi_map is not None)
        _show(self.labels, pair.fixed_label is not None or pair.moving_label is not None)
        heading = widgets.HTML(f"<b>{html.escape(title or pair.name)}</b>")
        controls = [[self.view, self.plane, self.labels], [self.index, self.strength, self.squares]]
        rows = [widgets.HBox(row, layout=ROW) for row in controls]
        self.widget = widgets.VBox([heading, *rows, self.hint, self.image])

        self._middle()
        self._build()
        self.view.observe(self._build, "value")
        self.plane.observe(self._turn, "value")
        for control in (self.index, self.strength, self.squares, self.labels):
            control.observe(self._draw, "value")

    def _ipython_display_(self) -> None:
        """Nothing: `explore` has shown the widget, and a cell that ends in it should not show it twice."""

    def _middle(self) -> None:
        if self.pair.fixed.dim() == 4:
            samples = self.pair.fixed.shape[1 + self.plane.value]
            self.index.max, self.index.value = samples - 1, samples // 2

    def _turn(self, change: Any = None) -> None:
        self.index.unobserve(self._draw, "value")  # its range and its value are one change
        self._middle()
        self.index.observe(self._draw, "value")
        self._build()

    def _cut(self) -> slices.Cut:
        place = {} if self.pair.fixed.dim() == 3 else {"axis": self.plane.value, "index": self.index.value}
        return slices.cut(self.pair, self.phi_map, strength=self.strength.value, **place)

    def _pictures(self, cut: slices.Cut) -> dict[str, np.ndarray]:
        """What the view shows of the plane, by title."""
        view = self.view.value
        if view == SIDE_BY_SIDE:
            pictures = {"fixed": cut.fixed, "moving": cut.moving, "warped": cut.warped}
            return pictures if self.phi_map is not None else {name: pictures[name] for name in ("fixed", "moving")}
        single = {
            CHECKERBOARD: lambda: slices.checkerboard(cut.fixed, cut.warped, self.squares.value),
            OVERLAY: lambda: np.stack([cut.warped, cut.fixed, cut.warped], -1).clip(0, 1),
            DIFFERENCE: lambda: cut.warped - cut.fixed,
            GRID: lambda: cut.warped,
            JACOBIAN: lambda: cut.jacobian,
        }
        return {view: single[view]()}

    def _build(self, change: Any = None) -> None:
        """A new figure: the axes depend on the view and the plane, so they stay while sliders move."""
        view = self.view.value
        _show(self.squares, view == CHECKERBOARD)
        self.hint.value = HINTS[view].format(warped=self.warped)
        cut = self._cut()
        pictures = self._pictures(cut)
        wide = 9 if len(pictures) > 1 else 5.5
        tall = (cut.size[1] + cut.step[1]) / (cut.size[0] + cut.step[0])
        bar = 1.0 if view in (DIFFERENCE, JACOBIAN) else 0.0  # inches beside the picture
        high = min(wide / len(pictures) * tall, 6) + 0.6
        self.figure = slices.Picture(figsize=(wide + bar, high), layout="constrained")
        self.caption = self.figure.suptitle(cut.name, fontsize=10)
        self.axes = self.figure.subplots(1, len(pictures), squeeze=False)[0]
        how = {JACOBIAN: slices.jacobian_look(), DIFFERENCE: {"cmap": colormaps["PuOr_r"], "vmin": -1, "vmax": 1}}
        self.images = [
            slices.show(ax, cut, picture, **how.get(view, {}))
            for ax, picture in zip(self.axes, pictures.values(), strict=True)
        ]
        for ax, name in zip(self.axes, pictures, strict=True):
            ax.set_title(name if len(pictures) > 1 else "", fontsize=10)
        if view == JACOBIAN:
            slices.jacobian_bar(self.figure, self.images[0], self.axes[0])
        elif view == DIFFERENCE:
            self.figure.colorbar(self.images[0], ax=self.axes[0], label="intensity", shrink=0.8, pad=0.02)
        if self.labels.layout.display != "none":
            both = view == SIDE_BY_SIDE and self.phi_map is not None
            slices.contour_legend(self.figure, "moving and warped" if both else self.warped)
        self.contours: list[Any] = []
        self._draw()
        self.figure.set_layout_engine("none")  # one layout for all slices: nothing jumps, and it is quicker

    def _draw(self, change: Any = None) -> None:
        """The current plane into the figure's images, and the figure to the browser."""
        self.drawn = cut = self._cut()
        self.caption.set_text(cut.name)
        for image, picture in zip(self.images, self._pictures(cut).values(), strict=True):
            image.set_data(picture)
        for contour in self.contours:
            contour.remove()
        self.contours = self._contours(cut)
        self.image.value = slices.png(self.figure, compression=1)

    def _contours(self, cut: slices.Cut) -> list[Any]:
        lines = slices.deformed_grid(self.axes[0], cut) if self.view.value == GRID else []
        if not self.labels.value:
            return lines
        first, last = self.axes[0], self.axes[-1]
        lines += slices.outline(first, cut, cut.fixed_label, slices.FIXED_LINE)
        if first is not last and self.phi_map is not None:
            lines += slices.outline(last, cut, cut.fixed_label, slices.FIXED_LINE)
            lines += slices.outline(self.axes[1], cut, cut.moving_label, slices.WARPED_LINE)
        return lines + slices.outline(last, cut, cut.warped_label, slices.WARPED_LINE)


def _show(widget: widgets.Widget, visible: bool) -> None:
    widget.layout.display = None if visible else "none"
