"""Pictures that the browser draws: pixels and lines go there as numbers, in milliseconds where a PNG takes tenths."""

import base64
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import contourpy
import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmsam_lib.plotting import slices


class Canvas(anywidget.AnyWidget):
    """`panels` beside each other (see `panel`), and below them `facts`, text by name."""

    _esm = Path(__file__).with_name("canvas.js")
    panels: traitlets.List[dict] = traitlets.List().tag(sync=True)
    facts = traitlets.Dict().tag(sync=True)


class Surface(Canvas):
    """A figure with a point to drag, beside the panels and facts that `tells` finds for the point, `answered` last.

    axes: where the point moves. more: `places`, points by name, a button each; `points`, where the point may only be
    at these, (x, y, number) with numbers from 0: arrow keys go from one to the next.
    """

    surface = traitlets.Dict().tag(sync=True)
    point: traitlets.List[float] = traitlets.List().tag(sync=True)
    answered: traitlets.List[float] = traitlets.List().tag(sync=True)

    def __init__(self, figure: Figure, axes: Axes, tells: Callable, point: Sequence[float], **more: Any):
        more["picture"] = slices.png(figure)  # which lays the axes out
        left, bottom, width, height = axes.get_position().bounds
        more["box"] = [left, 1 - bottom - height, width, height]
        more["extent"] = [*map(float, (*axes.get_xlim(), *axes.get_ylim()))]
        self.tells = tells
        super().__init__(surface=more, point=[*point])
        self.observe(self._move, "point")
        self._move()

    def _move(self, change: Any = None) -> None:
        panels, facts = list[dict](), {"no picture": "this was interrupted: move again"}
        try:
            panels, facts = self.tells(*self.point)
        finally:  # the browser waits for an answer before it asks again
            with self.hold_sync():
                self.panels, self.facts, self.answered = panels, facts, self.point

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and its figure for whoever has no kernel to show it."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"image/png": base64.b64encode(self.surface["picture"]).decode()}, metadata


def panel(title: str, lines: Iterable[dict], *, grey: np.ndarray | None = None, tall=1.0, texts=()) -> dict[str, Any]:
    """A picture `tall` times as high as it is wide: a grey one, its first row at the bottom, or none, and lines on it.

    grey: `(rows, columns)` from 0 to 1. texts: x, y and text of each, as `line` has its places.
    """
    made = {"title": title, "lines": list(lines), "tall": tall, "texts": list(texts), "pixels": b"", "columns": 0}
    if grey is not None:
        values = (np.nan_to_num(grey[::-1]).clip(0, 1) * 255).astype(np.uint8)
        rgba = np.dstack([values, values, values, np.full_like(values, 255)])
        made |= {"pixels": rgba.tobytes(), "columns": grey.shape[1]}
    return made


def line(points: np.ndarray, look: dict[str, Any]) -> dict[str, Any]:
    """A line through points `(n, 2)`, 0 to 1 to the right and up, broken at NaN. look: of `slices`."""
    drawn = {"color": look["colors"], "width": look["linewidths"], "dashed": look["linestyles"] == "dashed"}
    return {"points": points.astype("<f4").tobytes()} | drawn


def registered(cut: slices.Cut) -> list[dict[str, Any]]:
    """Two panels of a plane: the warped image with the outlines of both labels, and with the deformation grid."""
    looks = ((cut.fixed_label, slices.FIXED_LINE), (cut.warped_label, slices.WARPED_LINE))
    known = [(slices.structures(label), look) for label, look in looks if label is not None]
    outlines = [line(_contours((part, [0.5]) for part in parts), look) for parts, look in known]
    lines = {"warped image; labels: fixed blue, warped orange": outlines}
    lines["deformation grid"] = [line(_contours(slices.grid_levels(cut)), slices.GRID_LINE)]
    return [panel(title, drawn, grey=cut.warped, tall=cut.tall) for title, drawn in lines.items()]


def _contours(pictures: Iterable[tuple[np.ndarray, Iterable[float]]]) -> np.ndarray:
    """The contours of every picture at its levels as one line, as `line` takes it."""
    parts: list[Any] = [np.empty((0, 2))]
    for picture, levels in pictures:
        y, x = ((np.arange(n) + 0.5) / n for n in picture.shape)
        generator = contourpy.contour_generator(x, y, picture)
        for part in (part for level in levels for part in generator.lines(level)):
            parts += [np.asarray(part), [[np.nan, np.nan]]]
    return np.concatenate(parts)
