"""Any figure with parameters under sliders.

Figures are drawn without a screen and sent as PNG, so a redraw replaces one picture by the next without flicker.
"""

import base64
import os
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from fmsam_lib.plotting import slices

PICTURE = {"max_width": "100%", "align_self": "flex-start"}  # the layout of what is drawn, as wide as it is
ROW = {"flex_flow": "row wrap"}  # and that of the controls above


def slide(draw: Callable[..., Figure], controls: dict, *, interactive: bool | None = None) -> "Sliders | None":
    """Show `draw(name=value, ...)` with the controls' values, under controls that redraw it; without a kernel, still.

    controls: ipywidgets by the name of `draw`'s parameter. interactive: as `in_a_notebook` decides unless given.

    >>> sliders = slide(paths, {"rho": widgets.FloatLogSlider(value=0.3)})     # doctest: +SKIP
    """
    still = draw(**{name: control.value for name, control in controls.items()})
    if not in_a_notebook(interactive):
        display(still)
        return None
    made = Sliders(draw, controls, still)
    picture = base64.b64encode(made.image.value).decode()
    view = {"model_id": made.widget.model_id, "version_major": 2, "version_minor": 0}  # as ipywidgets 7 shows it, too
    display({"application/vnd.jupyter.widget-view+json": view, "image/png": picture}, raw=True)
    return made


def in_a_notebook(interactive: bool | None = None) -> bool:
    """Whether to show a widget: as asked; else in a notebook's kernel that someone sits at.

    Nobody does where the environment has FMSAM_HEADLESS, as in the workflow, or where `input` would find no one, as in
    nbconvert and papermill.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    someone = kernel is not None and getattr(kernel, "_allow_stdin", True)
    return someone and not os.environ.get("FMSAM_HEADLESS") if interactive is None else interactive


class Sliders:
    """The `controls` and the `image` they draw; setting a control's value redraws. `figure` is the one last drawn."""

    def __init__(self, draw: Callable[..., Figure], controls: dict[str, Any], first: Figure | None = None):
        self.draw, self.controls, self.image = draw, controls, widgets.Image(format="png", layout=PICTURE)
        for name, control in controls.items():
            control.description = control.description or name
            control.observe(self._draw, "value")
        self.widget = widgets.VBox([widgets.HBox(list(controls.values()), layout=ROW), self.image])
        self._draw(first=first)

    def _ipython_display_(self) -> None:
        """Nothing: the widget has been shown, and a cell that ends in it should not show it twice."""

    def _draw(self, change: Any = None, first: Figure | None = None) -> None:
        self.figure = first or self.draw(**{name: control.value for name, control in self.controls.items()})
        self.image.value = slices.png(self.figure, compression=1)
