"""Every figure, from tidy tables (`results.csv`, a training history, a landscape) or from an image pair.

Each function returns a matplotlib `Figure` that pyplot does not know of: it is garbage once nobody holds
it, and shows itself at the end of a notebook's cell. An optimizer has one colour, marker and line style in
all of them; what is compared shares its scale; what is missing shows as a hatched hole with a dash.
"""

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib import colormaps, colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from fmsam_lib.evaluate import paired_difference as paired_difference_of
from fmsam_lib.evaluate import per_pair
from fmsam_lib.slices import WIDTH, Picture, registration, save

__all__ = [
    "flatness", "loss_lines", "loss_planes", "matrix", "paired_difference", "radii", "registration", "save",
    "training_curves",
]  # fmt: skip

# Okabe and Ito's colours: told apart by colour-blind readers, and by marker and line in black and white.
LOOKS = {
    "none": {"color": "#808080", "marker": "x", "linestyle": ":"},
    "adam": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "sam": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "asam": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "adam-2x": {"color": "#56B4E9", "marker": "v", "linestyle": (0, (1, 1))},
    "sam-every": {"color": "#E69F00", "marker": "P", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "looksam": {"color": "#CC79A7", "marker": "D", "linestyle": (0, (5, 1))},
    "random": {"color": "#000000", "marker": "*", "linestyle": (0, (8, 2))},
}
OTHER_LOOKS = [LOOKS[name] for name in ("looksam", "adam-2x", "sam-every", "random")]
NAMES = {
    "none": "before registration", "adam": "Adam", "adam-2x": "Adam, twice the steps", "sam": "SAM", "asam": "ASAM",
    "sam-every": "SAM now and then", "looksam": "LookSAM", "random": "random direction", "sgd": "SGD", "adamw": "AdamW",
}  # fmt: skip

# a metric's name, decimals, and whether more of it is better
METRICS = {
    "dice": ("Dice", 3, True),
    "hd95": ("HD95", 1, False),
    "tre": ("target registration error", 2, False),
    "folding_percent": ("folded volume", 2, False),
    "sdlogj": ("SD of the log-Jacobian", 3, False),
}


def _select(table: pd.DataFrame, columns: str, **where) -> pd.DataFrame:
    """The rows where columns have these values; ValueError for a missing column or when no row is left."""
    names = columns.split()
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"expected the columns {', '.join(names)}, got {', '.join(map(str, table.columns))}")
    rows = table
    for column, value in where.items():
        left = rows[rows[column] == value]
        if left.empty:
            there = ", ".join(map(str, rows[column].dropna().unique())) or "no rows at all"
            raise ValueError(
                f"expected rows with {column} {value!r}, got {there}; choose one of these or add such rows"
            )
        rows = left
    if rows.empty:
        raise ValueError(f"expected rows of {', '.join(names)}, got an empty table; run the study first")
    return rows.assign(train_domain=rows.train_domain.fillna(""))


RESULTS = "train_domain test_domain optimizer seed pair label metric value unit"


def _optimizers(rows: pd.DataFrame) -> list[str]:
    """Those in the table, the known ones first and in their order."""
    there = set(rows.optimizer)
    return [name for name in LOOKS if name in there] + sorted(there - set(LOOKS))


def _look(optimizer: str, optimizers: list[str]) -> dict:
    others = [name for name in optimizers if name not in LOOKS]
    return LOOKS.get(optimizer) or OTHER_LOOKS[others.index(optimizer) % len(OTHER_LOOKS)]


def _name(optimizer: str) -> str:
    return NAMES.get(optimizer, optimizer)


def _wrap(domains: str, width: int = 20) -> str:
    return textwrap.fill(domains.replace("+", " + "), width, break_on_hyphens=False)


def _metric_name(rows: pd.DataFrame, metric: str) -> str:
    units = [str(unit) for unit in rows.unit.dropna().unique() if str(unit) not in ("", "1")]
    name = METRICS.get(metric, (metric,))[0]
    return f"{name} ({units[0]})" if units else name


def _panels(number: int, most: int, height: float, ylabel: str = "", **share) -> tuple[Figure, list[Axes]]:
    """A figure of `number` panels, at most so many beside each other, `height` inches each."""
    columns = min(number, most)
    rows = math.ceil(number / columns)
    figure = Picture(figsize=(WIDTH, rows * height + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number:columns]:
        ax.set_ylabel(ylabel)
    for ax in axes[max(0, number - columns) : number]:
        ax.tick_params(labelbottom=True)  # where the panel below has just been removed
    return figure, axes[:number]


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, optimizers: list[str]) -> None:
    handles = [Line2D([], [], label=_name(o), linewidth=2, **_look(o, optimizers)) for o in optimizers]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, handlelength=3.5)


def _hole(axes: Axes, corner: tuple[float, float], transform) -> None:
    """A hatched unit square with a dash: nothing was measured here."""
    x, y = corner
    look = {"facecolor": "white", "edgecolor": "#999999", "hatch": "////", "linewidth": 0}
    axes.add_patch(Rectangle(corner, 1, 1, transform=transform, **look))
    box = {"facecolor": "white", "linewidth": 0, "pad": 2}
    axes.text(x + 0.5, y + 0.5, "–", transform=transform, ha="center", va="center", fontsize=14, bbox=box)


def matrix(results: pd.DataFrame, *, metric: str = "dice") -> Figure:
    """Trained on (rows) by tested on (columns), one panel per optimizer, above them all before registration.

    A cell is the mean over seeds of the mean over pairs of the mean over labels; +- is the standard
    deviation over seeds. A frame says that the domain was trained on.
    """
    rows = _select(results, RESULTS, metric=metric)
    rows = rows.assign(train_domain=rows.train_domain.where(rows.optimizer != "none", ""))
    _, decimals, more_is_better = METRICS.get(metric, (metric, 3, True))
    cell = ["optimizer", "train_domain", "test_domain"]
    pairs = rows.groupby([*cell, "seed", "pair"], dropna=False).value.mean()
    cells = pairs.groupby([*cell, "seed"], dropna=False).mean().groupby(cell).agg(["mean", "std"])
    tests = list(rows.test_domain.unique())
    trains = list(rows.train_domain[rows.optimizer != "none"].unique())
    optimizers = [o for o in _optimizers(rows) if o != "none"] or ["none"]
    labels = [NAMES["none"], *map(_wrap, trains)]
    line_height = max(0.5, *(0.17 * (label.count("\n") + 1) for label in labels))
    figure, panels = _panels(len(optimizers), 2, line_height * len(labels) + 0.9, sharex=True, sharey=True)
    norm = colors.Normalize(cells["mean"].min(), cells["mean"].max())
    cmap = colormaps["cividis" if more_is_better else "cividis_r"]  # the brighter, the better
    size = 9 if len(optimizers) == 1 or len(tests) <= 5 else 7
    for ax, optimizer in zip(panels, optimizers, strict=True):
        means = np.full((len(labels), len(tests)), np.nan)
        for (row, train), (column, test) in ((r, c) for r in enumerate(["", *trains]) for c in enumerate(tests)):
            key = (optimizer if row else "none", train, test)
            means[row, column], spread = cells.loc[key] if key in cells.index else (np.nan, np.nan)
            if np.isnan(means[row, column]):
                _hole(ax, (column - 0.5, row - 0.5), ax.transData)
                continue
            text = f"{means[row, column]:.{decimals}f}" + ("" if np.isnan(spread) else f"\n±{spread:.{decimals}f}")
            dark = np.dot(cmap(norm(means[row, column]))[:3], (0.3, 0.59, 0.11)) < 0.5
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
            if test in train.split("+"):
                frame = Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, fill=False, edgecolor="black", linewidth=2)
                ax.add_patch(frame)
        image = ax.imshow(means, cmap=cmap, norm=norm, aspect="auto")
        ax.axhline(0.5, color="white", linewidth=5, zorder=1)
        ax.set_title(_name(optimizer), fontsize=11, color=LOOKS.get(optimizer, {}).get("color"), fontweight="bold")
        ax.set_xticks(range(len(tests)), tests, rotation=30, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_xlabel("tested on")
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    panels[0].set_ylabel("trained on")
    better = f", {'higher' if more_is_better else 'lower'} is better" if metric in METRICS else ""
    figure.colorbar(image, ax=panels, label=_metric_name(rows, metric) + better, aspect=30, pad=0.02)
    note = "mean" + (" ± SD over seeds" if cells["std"].notna().any() else "")
    handles = [Patch(fill=False, edgecolor="black", linewidth=2, label=f"{note}; framed: trained on this domain")]
    figure.legend(handles=handles, loc="outside lower right", frameon=False, fontsize=9)
    return figure


def paired_difference(
    results: pd.DataFrame, *, metric: str = "dice", baseline: str = "adam", treatment: str = "sam"
) -> Figure:
    """Treatment minus baseline on the same pair, seed and labels: every one, the mean, its 95 % interval.

    Mean and interval (a bootstrap over pairs, a pair's seeds kept together) are those of the results' table.
    n counts pairs and seeds; "unpaired" counts values that only one of the two optimizers has.
    """
    rows = _select(results, RESULTS, metric=metric)
    trains, tests = list(rows.train_domain[rows.optimizer != "none"].unique()), list(rows.test_domain.unique())
    rows = pd.concat([_select(rows, RESULTS, optimizer=optimizer) for optimizer in (baseline, treatment)])
    keys = ["train_domain", "test_domain", "seed", "pair", "label"]
    matched = rows.groupby(keys, dropna=False).value.transform("count") == 2
    if not matched.any():
        raise ValueError(f"expected {treatment!r} and {baseline!r} on the same pairs and seeds, got none in common")
    pairs = per_pair(rows[matched], metric)
    colour = _look(treatment, [treatment, baseline])["color"]
    figure, panels = _panels(len(trains), 3, 0.42 * len(tests) + 1.0, "tested on", sharex=True, sharey=True)
    for ax, train in zip(panels, trains, strict=True):
        ax.axvline(0, color="black", linewidth=1)
        for y, test in enumerate(tests):
            mine = pairs[(pairs.train_domain == train) & (pairs.test_domain == test)]
            if test in train.split("+"):
                ax.axhspan(y - 0.5, y + 0.5, color="#eeeeee", linewidth=0)
            if mine.empty:
                _hole(ax, (0, y - 0.5), ax.get_yaxis_transform())
                continue
            wide = mine.pivot(index=["pair", "seed"], columns="optimizer", values="value")
            points = wide[treatment] - wide[baseline]
            jitter = np.random.default_rng(0).uniform(-0.28, 0.28, len(points))
            ax.scatter(points, y + jitter, s=9, color="#808080", alpha=0.45, linewidth=0)
            mean, low, high = paired_difference_of(mine, baseline, treatment).values()
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color=colour, linewidth=2.5, capsize=6, capthick=2)
            ax.plot(mean, y, "D", color=colour, markersize=5)
            lost = ((rows.train_domain == train) & (rows.test_domain == test) & ~matched).sum()
            count = f"n = {len(points)}" + (f"\n{lost} unpaired" if lost else "")
            ax.text(1.02, y, count, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        ax.set_title(f"trained on {_wrap(train, 24)}", fontsize=10)
        ax.set_yticks(range(len(tests)), tests)
        ax.set_ylim(len(tests) - 0.5, -0.5)
        _open(ax)
        ax.grid(visible=False, axis="y")
    better = ""
    if metric in METRICS:
        better = f"  ({'→' if METRICS[metric][2] else '←'} {_name(treatment)} better)"
    figure.supxlabel(f"{_metric_name(rows, metric)}: {_name(treatment)} minus {_name(baseline)}{better}", fontsize=10)
    handles = [
        Line2D([], [], color="#808080", marker=".", linestyle="", label="a pair and seed"),
        Line2D([], [], color=colour, marker="D", markersize=5, linewidth=2.5, label="mean, 95 % bootstrap interval"),
        Patch(color="#eeeeee", label="trained on this domain"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """The loss, its similarity and its penalty over the steps: every logged value faint, a running mean on top.

    history: train_domain, optimizer, seed, step, total, similarity, regulariser and, where it was watched, dice on the
    validation pairs; a row of panels per train_domain.
    """
    terms = {"total": "total loss", "similarity": "similarity term", "regulariser": "GradICON penalty"}
    rows = _select(history, f"train_domain optimizer seed step {' '.join(terms)}")
    if "dice" in rows and rows.dice.notna().any():
        terms["dice"] = "Dice (validation)"
    trains, optimizers, n = list(rows.train_domain.unique()), _optimizers(rows), len(terms)
    figure, panels = _panels(n * len(trains), n, 2.5, sharex=True, sharey="col")
    for place, ax in enumerate(panels):
        train, (term, name) = trains[place // n], list(terms.items())[place % n]
        mine = rows[rows.train_domain == train]
        for (optimizer, _), run in mine.groupby(["optimizer", "seed"], dropna=False):
            run, look = run.dropna(subset=term).sort_values("step"), _look(optimizer, optimizers)
            smooth = run[term].rolling(max(1, len(run) // 15), center=True, min_periods=1).mean()
            ax.plot(run.step, run[term], color=look["color"], alpha=0.18, linewidth=0.8)
            ax.plot(run.step, smooth, markevery=max(1, len(run) // 6), markersize=5, linewidth=1.5, **look)
        ax.set_title((name if place < n else "") + _missing(mine, optimizers), fontsize=10)
        if term == "regulariser":
            ax.set_yscale("log", nonpositive="mask")
        if place % n == 0:
            ax.set_ylabel(f"trained on\n{_wrap(train)}", fontsize=9)
        _open(ax)
    figure.supxlabel("optimizer step", fontsize=10)
    _legend(figure, optimizers)
    return figure


def radii(table: pd.DataFrame) -> Figure:
    """Training loss and Dice against the radius of SAM and its like, Adam as level lines: means, and ranges of seeds.

    table: of `report.radii`. Only the learning rate of most runs is drawn. Raises ValueError where no optimizer has two
    radii.
    """
    rows = _select(table, "train_domain optimizer lr rho seed loss domains dice", lr=table.lr.mode()[0])
    level = rows.optimizer.isin(["adam", "adam-2x"])
    counts = rows[~level].groupby("optimizer").rho.nunique()
    if counts.max() < 2 or counts.empty:
        raise ValueError("expected an optimizer with two radii or more, got one radius each: nothing to compare")
    optimizers = _optimizers(rows)
    kinds = [kind for kind in ("seen", "unseen") if kind in set(rows.domains)]
    figure, panels = _panels(1 + len(kinds), 3, 3.0, sharex=True)
    panels[-1].sharey(panels[1])
    for ax, kind in zip(panels, ["loss", *kinds], strict=True):
        mine = rows.drop_duplicates(["optimizer", "rho", "seed"]) if kind == "loss" else rows[rows.domains == kind]
        for optimizer in optimizers:
            look, runs = _look(optimizer, optimizers), mine[mine.optimizer == optimizer]
            value = "loss" if kind == "loss" else "dice"
            if level[runs.index].all():
                ax.axhspan(runs[value].min(), runs[value].max(), color=look["color"], alpha=0.2, linewidth=0)
                ax.axhline(runs[value].mean(), color=look["color"], linestyle=look["linestyle"])
                continue
            line = runs.groupby("rho")[value].agg(["mean", "min", "max"])
            ax.fill_between(line.index, line["min"], line["max"], color=look["color"], alpha=0.2, linewidth=0)
            ax.plot(line.index, line["mean"], markersize=5, **look)
        names = {"loss": "training loss at the end", "seen": "Dice, seen domains", "unseen": "Dice, unseen domains"}
        ax.set_title(names[kind], fontsize=10)
        ax.set_xscale("log")
        _open(ax)
    figure.supxlabel("rho (SAM, random: length of the step; ASAM: relative to each weight)", fontsize=10)
    _legend(figure, optimizers)
    return figure


def _missing(mine: pd.DataFrame, optimizers: list[str]) -> str:
    """What a panel's title says about the optimizers without a line."""
    return "".join(f"\n{_name(o)}: –" for o in optimizers if o not in set(mine.optimizer))


LANDSCAPE = "train_domain test_domain optimizer seed kind value"


def _total(landscape: pd.DataFrame, kind: str, columns: str) -> pd.DataFrame:
    rows = _select(landscape, f"{LANDSCAPE} {columns}", kind=kind)
    return _select(rows, LANDSCAPE, term="total") if "term" in rows and rows.term.notna().any() else rows


def _against(rows: pd.DataFrame, x: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """A panel per (train, test) of value against `x`: mean and range over directions and seeds."""
    groups, optimizers = list(rows.groupby(["train_domain", "test_domain"], sort=False)), _optimizers(rows)
    figure, panels = _panels(len(groups), 3, 2.9, ylabel, sharex=True, sharey=True)
    for ax, ((train, test), mine) in zip(panels, groups, strict=True):
        for optimizer in _optimizers(mine):
            look = _look(optimizer, optimizers)
            line = mine[mine.optimizer == optimizer].groupby(x).value.agg(["mean", "min", "max"])
            ax.fill_between(line.index, line["min"], line["max"], color=look["color"], alpha=0.2, linewidth=0)
            ax.plot(line.index, line["mean"], markevery=max(1, len(line) // 8), markersize=5, **look)
        ax.set_title(f"trained on {_wrap(train, 26)}\ntested on {test}{_missing(mine, optimizers)}", fontsize=9)
        _open(ax)
    _legend(figure, optimizers)
    return figure, panels


def _wide(values: pd.Series) -> bool:
    """Whether positive values range so far that only a log scale shows them all."""
    return values.min() > 0 and values.max() / values.min() > 50


def loss_lines(landscape: pd.DataFrame) -> Figure:
    """The loss along random directions from the trained weights; lines are means, bands the smallest to the largest.

    landscape: rows of kind "line" with alpha, how far along the direction, 1 being as long as the weights (filter
    by filter, Li et al. 2018, arXiv 1712.09913).
    """
    rows = _total(landscape, "line", "alpha")
    figure, panels = _against(rows, "alpha", "total loss")
    for ax in panels:
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yscale("log" if _wide(rows.value) else "linear")
    figure.supxlabel("distance along a filter-normalised random direction (relative to the weights)", fontsize=10)
    return figure


def flatness(landscape: pd.DataFrame) -> Figure:
    """How much the loss rises at the step SAM takes, against its radius: lower is flatter.

    landscape: rows of kind "rise" with rho and value, `L(w + eps(rho)) - L(w)`.
    """
    rows = _total(landscape, "rise", "rho")
    figure, panels = _against(rows, "rho", "rise of the total loss")
    for ax, ((_, _), mine) in zip(panels, rows.groupby(["train_domain", "test_domain"], sort=False), strict=True):
        ax.set_xscale("log", nonpositive="mask")
        ax.set_yscale("log", nonpositive="mask")
        below = int((mine.value <= 0).sum())
        if below:
            ax.text(0.02, 0.97, f"{below} not above 0", transform=ax.transAxes, va="top", fontsize=8)
    figure.supxlabel("radius ρ of SAM's step", fontsize=10)
    return figure


def loss_planes(landscape: pd.DataFrame) -> Figure:
    """The loss over a plane of two random directions, the trained weights at its centre; one scale in each row.

    landscape: rows of kind "plane" with alpha and beta; of several seeds or planes the first is shown.
    """
    rows = _total(landscape, "plane", "alpha beta")
    optimizers, groups = _optimizers(rows), list(rows.groupby(["train_domain", "test_domain"], sort=False))
    figure = Picture(figsize=(WIDTH, 3.4 * len(groups) * (2 / max(2, len(optimizers))) + 0.5), layout="constrained")
    panels = figure.subplots(len(groups), len(optimizers), sharex=True, sharey=True, squeeze=False)
    for line, ((train, test), mine) in zip(panels, groups, strict=True):
        first = {}
        for optimizer in _optimizers(mine):
            run = mine[mine.optimizer == optimizer]
            for column in {"seed", "direction"} & set(run):
                run = run[run[column].isna() | (run[column] == run[column].min())]
            first[optimizer] = run
        values = pd.concat(first.values()).value
        ends = (values.min(), max(values.max(), values.min() + 1e-12))
        levels = np.geomspace(*ends, 13) if _wide(values) else np.linspace(*ends, 13)
        norm = colors.LogNorm(*ends) if _wide(values) else colors.Normalize(*ends)
        for ax, optimizer in zip(line, optimizers, strict=True):
            ax.set_title(_name(optimizer), fontsize=10, color=_look(optimizer, optimizers)["color"], fontweight="bold")
            ax.set_box_aspect(1)
            if optimizer not in first:
                _hole(ax, (0, 0), ax.transAxes)
                continue
            table = first[optimizer].pivot(index="beta", columns="alpha", values="value")
            filled = ax.contourf(table.columns, table.index, table, levels, norm=norm, cmap="viridis")
            ax.contour(filled, colors="white", linewidths=0.4)
            ax.plot(0, 0, "P", color="white", markeredgecolor="black", markersize=10, label="trained weights")
        line[0].set_ylabel(f"{_wrap(train)}\n→ {test}\nβ, along the second direction", fontsize=9)
        ticks = ticker.LogLocator(subs=(1, 2, 5)) if _wide(values) else ticker.MaxNLocator(6)
        bar = figure.colorbar(filled, ax=list(line), label="total loss", pad=0.02, ticks=ticks, format="%.3g")
        bar.ax.minorticks_off()
    figure.supxlabel(
        "α, distance along the first filter-normalised random direction (relative to the weights)", fontsize=10
    )
    handles = [
        Line2D([], [], marker="P", color="white", markeredgecolor="black", markersize=10, label="trained weights")
    ]
    figure.legend(handles=handles, loc="outside upper center", frameon=False)
    return figure
