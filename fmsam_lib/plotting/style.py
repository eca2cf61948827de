"""What all figures share: an optimizer's colour, marker and line style, names for people, panels.

An optimizer looks the same in every figure; what is compared shares its scale; what is missing is counted in its panel.
"""

import math
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fmsam_lib.plotting.slices import MOST_HIGH, WIDTH, Picture

# Okabe and Ito's colours, and two dark ones, for colour-blind readers; marker and line do without colour.
LOOKS: dict[str, dict[str, Any]] = {
    "none": {"color": "#808080", "marker": "x", "linestyle": ":"},
    "io": {"color": "#882255", "marker": "p", "linestyle": (0, (1, 2))},
    "ants-syn": {"color": "#7A7A00", "marker": "X", "linestyle": (0, (2, 1))},
    "adam": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "sam": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "asam": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "adam-2x": {"color": "#56B4E9", "marker": "v", "linestyle": (0, (1, 1))},
    "sam-every": {"color": "#E69F00", "marker": "P", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "looksam": {"color": "#CC79A7", "marker": "D", "linestyle": (0, (5, 1))},
    "random": {"color": "#000000", "marker": "*", "linestyle": (0, (8, 2))},
}
OTHERS = ("looksam", "adam-2x", "sam-every", "random", "asam")  # whose looks those have that are not in LOOKS
AFTER = ("+io", "+ema", "+tail", "+bn")  # what was done to the trained network
REFINED: dict[str, Any] = {"markerfacecolor": "white", "linestyle": (0, (7, 1, 1, 1, 1, 1))}
NAMES = {
    "none": "before registration", "adam": "Adam", "adam-2x": "Adam, twice the steps", "sam": "SAM", "asam": "ASAM",
    "sam-every": "SAM now and then", "looksam": "LookSAM", "random": "random direction", "sgd": "SGD", "adamw": "AdamW",
    "io": "instance optimisation alone", "ants-syn": "ANTs SyN",
}  # fmt: skip
MEASURES = {
    "loss": "loss", "weight_norm": "length of the weights", "trace": "trace of the Hessian",
    "eigenvalue_1": "largest eigenvalue of the Hessian", "eigenvalue_2": "second largest eigenvalue",
    "gradient_norm": "length of the gradient", "adaptive_gradient_norm": "length of the gradient, adaptive",
    "sam_rise": "rise at SAM's step", "asam_rise": "rise at ASAM's step",
    "ascent_rise": "rise after ascent", "adaptive_ascent_rise": "rise after ascent, adaptive",
    "noise_rise": "mean rise under noise", "adaptive_noise_rise": "mean rise under noise, adaptive",
    "gradient_curvature": "curvature along the gradient",
}  # fmt: skip


def select(table: pd.DataFrame, columns: str | list[str], **where) -> pd.DataFrame:
    """The rows where columns have these values; ValueError for a missing column or when no row is left."""
    names = columns.split() if isinstance(columns, str) else columns
    if not {*names} <= {*table.columns}:
        raise ValueError(f"expected the columns {', '.join(names)}, got {', '.join(map(str, table.columns))}")
    rows = table
    for column, value in where.items():
        left = rows[rows[column] == value]
        if left.empty:
            there = ", ".join(map(str, rows[column].dropna().unique())) or "no rows at all"
            raise ValueError(f"expected rows with {column} {value!r}, got {there}; choose one or add such rows")
        rows = left
    if rows.empty:
        raise ValueError(f"expected rows of {', '.join(names)}, got an empty table; run the study first")
    return rows.assign(train_domain=rows.train_domain.fillna("")) if "train_domain" in rows else rows


def optimizers_of(rows: pd.DataFrame) -> list[str]:
    """Those in the table, the known ones first and in their order, each before what `AFTER` made of it."""
    known = [f"{base}{after}" for base in LOOKS for after in ("", *AFTER)]
    there = set(rows.optimizer)
    return [name for name in known if name in there] + sorted(there - set(known))


def look(optimizer: str, optimizers: list[str]) -> dict[str, Any]:
    """Colour, marker and line style; `optimizers`, all in the figure, tells apart those that are not in LOOKS."""
    base, names = optimizer.partition("+")[0], {name.partition("+")[0] for name in optimizers}
    free, others = [LOOKS[n] for n in OTHERS if n not in names] or [*LOOKS.values()], sorted(names - set(LOOKS))
    turn, place = divmod(others.index(base), len(free)) if base in others else (0, 0)
    found = LOOKS.get(base) or free[place] | {"marker": free[(place + turn) % len(free)]["marker"]}
    return found if base == optimizer else found | REFINED


def name_of(optimizer: str) -> str:
    """The optimizer's name for people."""
    base = optimizer.partition("+")[0]
    return NAMES.get(base, base) + optimizer[len(base) :].upper().replace("+", " + ")


def measure_name(measure: str, rho: float | None = None) -> str:
    """A measure of flatness for people.

    >>> measure_name("sam_rise", 0.01), measure_name("eigenvalue_2")
    ("rise at SAM's step, ρ = 0.01", 'second largest eigenvalue')
    """
    name = MEASURES.get(measure, measure.replace("_", " "))
    return name if rho is None or math.isnan(rho) else f"{name}, ρ = {rho:g}"


def wrapped(domains: str, width: int = 20) -> str:
    """Domains such as `a+b+c` over several lines."""
    return textwrap.fill(domains.replace("+", " + "), width, break_on_hyphens=False)


def measured_on(test_domain: str) -> str:
    """Where something was measured; "training" is the batch of training images."""
    return "measured on training images" if test_domain == "training" else f"tested on {test_domain}"


def panels(number: int, most: int, height: float, ylabel: str = "", **share) -> tuple[Figure, list[Axes]]:
    """A figure of `number` panels, at most so many beside each other, `height` inches each; lower where many rows."""
    columns = min(number, most)
    rows = math.ceil(number / columns)
    figure = Picture(figsize=(WIDTH, min(rows * height + 0.4, MOST_HIGH)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number:columns]:
        ax.set_ylabel(ylabel)
    for ax in axes[max(0, number - columns) : number]:
        ax.tick_params(labelbottom=True)  # where the panel below has just been removed
    return figure, axes[:number]


def open_up(axes: Axes) -> None:
    """A light grid, and no frame above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def legend(figure: Figure, optimizers: list[str], more: list[Line2D] | None = None) -> None:
    """The optimizers, and more handles after them, above the figure."""
    handles = [Line2D([], [], label=name_of(o), linewidth=2, **look(o, optimizers)) for o in optimizers] + (more or [])
    columns = 5 if sum(len(str(h.get_label())) + 8 for h in handles[:5]) < 100 else 3
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.5)


def curve(axes: Axes, values: pd.Series, style: dict, **more) -> None:
    """The mean of the values at each place of their index, which may come often, and their range as a band."""
    line = values.groupby(level=0).agg(["mean", "min", "max"])
    axes.fill_between(line.index, line["min"], line["max"], color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(line.index, line["mean"], **{"markevery": max(1, len(line) // 8), "markersize": 5} | style | more)


def note(axes: Axes, *lines: str) -> None:
    """Small print at the panel's upper left; empty lines are left out."""
    if text := "\n".join(line for line in lines if line):
        box = {"facecolor": "white", "linewidth": 0, "pad": 1, "alpha": 0.7}
        axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=8, bbox=box, zorder=5)


def not_finite(values: pd.Series) -> str:
    """How many values no axis can show."""
    count = int((~np.isfinite(values.astype(float))).sum())
    return f"{count} not finite" if count else ""


def missing(rows: pd.DataFrame, optimizers: list[str]) -> str:
    """What a panel's title says about the optimizers without a line."""
    return "".join(f"\n{name_of(o)}: –" for o in optimizers if o not in set(rows.optimizer))
