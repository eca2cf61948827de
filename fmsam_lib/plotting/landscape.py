"""Figures of the loss landscape: around the weights of each network, and between those of two.

From the tables `landscape.csv`, `flatness.csv` and `between.csv`. Losses that are not finite, or that a log scale
cannot show, are counted in their panel and hatched on planes.
"""

import math

import numpy as np
import pandas as pd
from matplotlib import cm, colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from fmsam_lib.flatness.mode_connectivity import barrier
from fmsam_lib.plotting import style as looks
from fmsam_lib.plotting.slices import WIDTH, Picture

__all__ = ["loss_lines", "loss_planes", "paths", "sharpness", "solutions_plane", "spectrum", "surfaces"]


LANDSCAPE = "train_domain test_domain optimizer seed kind value"


FLATNESS = "train_domain test_domain optimizer seed measure rho term value"


BETWEEN = "train_domain test_domain baseline treatment seed kind statistics optimizer step alpha beta term value"


CELL = ["train_domain", "test_domain"]


STATISTICS = {"re-estimated": "-", "interpolated": (0, (4, 2))}  # BatchNorm's, between two networks


MARK = {"marker": "P", "color": "white", "markeredgecolor": "black", "markersize": 10, "linestyle": ""}


RISES = [
    "sam_rise", "ascent_rise", "noise_rise",
    "asam_rise", "adaptive_ascent_rise", "adaptive_noise_rise",
]  # fmt: skip


RADII = ["radius ρ", "radius ρ, relative to each weight"]


def _total(table: pd.DataFrame, columns: str, **where) -> pd.DataFrame:
    """The rows of the total loss; infinite values become NaN, so that axes stay finite."""
    rows = looks.select(table, columns, **where)
    rows = looks.select(rows, columns, term="total") if "term" in rows and rows.term.notna().any() else rows
    return rows.assign(value=rows.value.astype(float).replace([np.inf, -np.inf], np.nan))


def _wide(values: pd.Series) -> bool:
    """Whether positive values range so far that only a log scale shows them all."""
    return values.min() > 0 and values.max() / values.min() > 50


def loss_lines(landscape: pd.DataFrame) -> Figure:
    """The loss along random directions from the trained weights; lines are means, bands the smallest to the largest.

    landscape: rows of kind "line" with alpha, how far along the direction, 1 being as long as the weights (filter
    by filter, Li et al. 2018, arXiv 1712.09913).
    """
    rows = _total(landscape, f"{LANDSCAPE} alpha", kind="line")
    groups, optimizers = list(rows.groupby(CELL, sort=False)), looks.optimizers_of(rows)
    figure, axes = looks.panels(len(groups), 3, 2.9, "total loss", sharex=True, sharey=True)
    for ax, ((train, test), mine) in zip(axes, groups, strict=True):
        for optimizer in looks.optimizers_of(mine):
            looks.curve(
                ax, mine[mine.optimizer == optimizer].set_index("alpha").value, looks.look(optimizer, optimizers)
            )
        ax.set_title(
            f"trained on {looks.wrapped(train, 26)}\n{looks.measured_on(test)}{looks.missing(mine, optimizers)}",
            fontsize=9,
        )
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yscale("log" if _wide(rows.value) else "linear")
        looks.note(ax, looks.not_finite(mine.value))
        looks.open_up(ax)
    figure.supxlabel("distance along a filter-normalised random direction (relative to the weights)", fontsize=10)
    looks.legend(figure, optimizers)
    return figure


def _planes(landscape: pd.DataFrame) -> tuple[list[str], list]:
    """All optimizers, and for every cell its rows by optimizer: the first seed's first plane."""
    rows = _total(landscape, f"{LANDSCAPE} alpha beta", kind="plane")
    groups = []
    for cell, mine in rows.groupby(CELL, sort=False):
        first = {}
        for optimizer in looks.optimizers_of(mine):
            run = mine[mine.optimizer == optimizer]
            for column in ("seed", "direction"):
                if column in run:
                    run = run[run[column].isna() | (run[column] == run[column].min())]
            first[optimizer] = run
        groups.append((cell, first))
    return looks.optimizers_of(rows), groups


def _scale(values: pd.Series) -> tuple[np.ndarray, colors.Normalize, ticker.Locator]:
    """Contour levels, colours and ticks that all these values share; ValueError where none is finite."""
    if values.notna().sum() == 0:
        raise ValueError(f"expected losses on a plane, got {len(values)} values of which none is finite")
    ends = (values.min(), max(values.max(), values.min() + 1e-12))
    if _wide(values):
        return np.geomspace(*ends, 13), colors.LogNorm(*ends), ticker.LogLocator(subs=(1, 2, 5))
    return np.linspace(*ends, 13), colors.Normalize(*ends), ticker.MaxNLocator(6)


def _contours(axes: Axes, rows: pd.DataFrame, scale) -> None:
    levels, norm, _ = scale
    table = rows.pivot(index="beta", columns="alpha", values="value")
    if table.isna().any(axis=None):  # shows through where there is no contour
        gap = {"facecolor": "white", "edgecolor": "#999999", "hatch": "////", "linewidth": 0, "zorder": 0}
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **gap))
        looks.note(axes, looks.not_finite(rows.value))
    if table.notna().any(axis=None):
        masked = np.ma.masked_invalid(table)
        filled = axes.contourf(table.columns, table.index, masked, levels, norm=norm, cmap="viridis")
        axes.contour(filled, colors="white", linewidths=0.4)


def _colorbar(figure: Figure, axes, scale, label: str = "total loss") -> None:
    _, norm, ticks = scale
    bar = figure.colorbar(
        cm.ScalarMappable(norm, "viridis"),
        ax=list(axes),
        label=label,
        pad=0.02,
        ticks=ticks,
        format=ticker.FuncFormatter(lambda value, _: f"{value:.4g}"),
    )
    bar.ax.minorticks_off()


def loss_planes(landscape: pd.DataFrame) -> Figure:
    """The loss over a plane of two random directions, the trained weights at its centre; one scale in each row.

    landscape: rows of kind "plane" with alpha and beta; of several seeds or planes the first is shown.
    """
    optimizers, groups = _planes(landscape)
    figure = Picture(figsize=(WIDTH, 3.4 * len(groups) * (2 / max(2, len(optimizers))) + 0.5), layout="constrained")
    axes = figure.subplots(len(groups), len(optimizers), sharex=True, sharey=True, squeeze=False)
    for line, ((train, test), first) in zip(axes, groups, strict=True):
        scale = _scale(pd.concat(first.values()).value)
        for ax, optimizer in zip(line, optimizers, strict=True):
            ax.set_title(
                looks.name_of(optimizer),
                fontsize=10,
                color=looks.look(optimizer, optimizers)["color"],
                fontweight="bold",
            )
            ax.set_box_aspect(1)
            if optimizer not in first:
                looks.hole(ax, (0, 0), ax.transAxes)
                continue
            _contours(ax, first[optimizer], scale)
            ax.plot(0, 0, **MARK)
        line[0].set_ylabel(
            f"{looks.wrapped(train)}\n{looks.measured_on(test)}\nβ, along the second direction", fontsize=9
        )
        _colorbar(figure, line, scale)
    figure.supxlabel(
        "α, distance along the first filter-normalised random direction (relative to the weights)", fontsize=10
    )
    handles = [Line2D([], [], label="trained weights", **MARK)]
    figure.legend(handles=handles, loc="outside upper center", frameon=False)
    return figure


def surfaces(landscape: pd.DataFrame) -> Figure:
    """The planes of `loss_planes` as surfaces in perspective; height and colour have one scale in each row.

    Values are read off the contours of `loss_planes`; here a far wall of the box may be hidden by a near one.
    """
    optimizers, groups = _planes(landscape)
    columns = min(3, len(optimizers))
    lines = -(-len(optimizers) // columns)
    height = 9 / columns * 0.85 * lines
    figure = Picture(figsize=(WIDTH, height * len(groups) + 0.4), layout="constrained")
    for part, ((train, test), first) in zip(figure.subfigures(len(groups), squeeze=False).flat, groups, strict=True):
        levels, norm, _ = scale = _scale(pd.concat(first.values()).value)
        logarithmic = isinstance(norm, colors.LogNorm)
        axes = part.subplots(lines, columns, squeeze=False, subplot_kw={"projection": "3d"}).flat
        part.suptitle(f"trained on {looks.wrapped(train, 60)}, {looks.measured_on(test)}", fontsize=10)
        for ax in list(axes)[len(optimizers) :]:
            ax.remove()
        for ax, optimizer in zip(part.axes, optimizers, strict=True):
            ax.set_title(
                looks.name_of(optimizer),
                fontsize=10,
                color=looks.look(optimizer, optimizers)["color"],
                fontweight="bold",
            )
            if optimizer not in first:
                ax.set(xticks=[], yticks=[], zticks=[])
                ax.text2D(0.5, 0.5, "–", transform=ax.transAxes, ha="center", fontsize=14)
                continue
            table = first[optimizer].pivot(index="beta", columns="alpha", values="value")
            heights = np.log10(table) if logarithmic else table  # mplot3d has no log axis of its own
            grid = np.meshgrid(table.columns, table.index)
            faces = cm.viridis(norm(np.ma.masked_invalid(table)))
            ax.plot_surface(*grid, heights.to_numpy(), facecolors=faces, rcount=60, ccount=60, linewidth=0, shade=False)
            ax.set_zlim(*(np.log10(levels[[0, -1]]) if logarithmic else levels[[0, -1]]))
            for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
                axis.set_major_locator(ticker.MaxNLocator(4))
            if logarithmic:
                ax.zaxis.set_major_formatter(lambda exponent, _: f"{float(f'{10**exponent:.2g}'):g}")
            ax.set_xlabel("α", fontsize=9, labelpad=-4)
            ax.set_ylabel("β", fontsize=9, labelpad=-4)
            ax.tick_params(labelsize=7, pad=-2)
            ax.text2D(0, 0.95, looks.not_finite(first[optimizer].value), transform=ax.transAxes, fontsize=8)
        _colorbar(part, part.axes, scale)
    return figure


def sharpness(table: pd.DataFrame, *, test_domain: str = "training") -> Figure:
    """How far the total loss rises around the weights, against the radius: lower is flatter.

    table: `flatness.csv`. For each training domain, above: at SAM's step, after ascent, under noise; below: their
    adaptive twins, whose radius is relative to each weight. Lines are means of seeds, bands their range; whiskers
    around the rises under noise are their 95 % intervals, averaged over seeds.
    """
    rows = _total(table, FLATNESS, test_domain=test_domain)
    rows = rows[rows.measure.isin(RISES)]
    if rows.empty:
        raise ValueError(f"expected rows with one of the measures {', '.join(RISES)}, got none; measure these")
    trains, optimizers = list(rows.train_domain.unique()), looks.optimizers_of(rows)
    kinds = [kind for kind in (0, 1) if rows.measure.isin(RISES[3 * kind : 3 * kind + 3]).any()]
    figure, axes = looks.panels(3 * len(kinds) * len(trains), 3, 2.5, sharex="row", sharey="row")
    for place, ax in enumerate(axes):
        line, column = divmod(place, 3)
        train, kind = trains[line // len(kinds)], kinds[line % len(kinds)]
        measure = RISES[3 * kind + column]
        if column == 0 and line >= len(kinds):  # one scale for all trainings
            ax.sharex(axes[3 * (line % len(kinds))])
            ax.sharey(axes[3 * (line % len(kinds))])
        mine = rows[(rows.train_domain == train) & (rows.measure == measure)]
        ax.set_title(looks.measure_name(measure) + looks.missing(mine, optimizers), fontsize=9)
        ax.set_xlabel(RADII[kind] if column == 1 else "", fontsize=9)
        ax.set_xscale("log", nonpositive="mask")
        radii = np.sort(rows.rho.dropna().unique())
        ax.xaxis.set_major_locator(ticker.FixedLocator(radii))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rho, _: f"{rho:g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_yscale("log", nonpositive="mask")
        if column == 0:
            ax.set_ylabel(
                f"trained on\n{looks.wrapped(train)}\nrise of the loss\n{looks.measured_on(test_domain)}", fontsize=8
            )
        looks.open_up(ax)
        for optimizer in looks.optimizers_of(mine):
            of, style = mine[mine.optimizer == optimizer], looks.look(optimizer, optimizers)
            looks.curve(ax, of.set_index("rho").value, style)
            if "noise" in measure and {"low", "high"} <= set(of):
                ends = of.groupby("rho")[["low", "high"]].mean().clip(lower=rows.value[rows.value > 0].min())
                ax.vlines(ends.index, ends.low, ends.high, color=style["color"], linewidth=1)
        below = int((mine.value <= 0).sum())
        looks.note(ax, f"{below} not above 0" if below else "", looks.not_finite(mine.value))
    looks.legend(figure, optimizers)
    return figure


def spectrum(landscape: pd.DataFrame, *, test_domain: str = "training") -> Figure:
    """The density of the Hessian's eigenvalues, of stochastic Lanczos quadrature (Ghorbani et al. 2019).

    landscape: rows of kind "spectrum": alpha, a node, value, its weight, direction, the probe it comes from, whose
    weights have the sum 1. Each node is a Gaussian on the axis as it is drawn, asinh of the eigenvalue, whose standard
    deviation is 1.5 % of the axis; the density is per unit of asinh. Lines are means of seeds, bands their range.
    Markers at the foot, and numbers: the smallest and the largest node.
    """
    rows = _total(landscape, f"{LANDSCAPE} alpha direction", kind="spectrum", test_domain=test_domain)
    rows = rows.assign(alpha=rows.alpha.astype(float).replace([np.inf, -np.inf], np.nan))
    known = rows.dropna(subset=["alpha", "value"])
    if known.empty:
        raise ValueError(f"expected nodes of a spectrum, got {len(rows)} of which none is finite")
    linear = 1e-3 * known.alpha.abs().max() or 1.0
    places = np.arcsinh(known.alpha / linear)
    width = 0.015 * max(places.max() - places.min(), 1.0)
    grid = np.linspace(places.min() - 5 * width, places.max() + 5 * width, 500)
    trains, optimizers = list(rows.train_domain.unique()), looks.optimizers_of(rows)
    figure, axes = looks.panels(len(trains), 2, 3.6, "density", sharex=True, sharey=True)
    peak = 0.0
    for ax, train in zip(axes, trains, strict=True):
        mine = known[known.train_domain == train]
        title = f"trained on {looks.wrapped(train, 40)}"
        for i, optimizer in enumerate(looks.optimizers_of(mine)):
            of, style, lines = mine[mine.optimizer == optimizer], looks.look(optimizer, optimizers), []
            for _, run in of.groupby("seed", dropna=False):
                bumps = np.exp(-((grid[:, None] - np.arcsinh(run.alpha.to_numpy() / linear)) ** 2) / (2 * width**2))
                density = bumps @ run.value.to_numpy() / (width * np.sqrt(2 * np.pi) * run.direction.nunique())
                lines.append(pd.Series(density, linear * np.sinh(grid)))
            looks.curve(ax, pd.concat(lines), style, marker="")
            peak = max(peak, max(density.max() for density in lines))
            ends = [of.alpha.min(), of.alpha.max()]
            foot = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 4}
            ax.plot(ends, [0.03 + 0.05 * i] * 2, **style | {"linestyle": ""}, markersize=7, **foot)
            title += f"\n{looks.name_of(optimizer)}: {ends[0]:.3g} to {ends[1]:.3g}".replace("-", "−")
        ax.set_title(title + looks.missing(mine, optimizers), fontsize=9)
        ax.set_xscale("asinh", linear_width=linear)
        most = max(known.alpha.abs().max(), linear)
        powers = 10.0 ** np.arange(math.ceil(math.log10(2 * linear)), math.log10(2 * most))
        negative = powers[powers < -2 * known.alpha.min()]
        ax.xaxis.set_major_locator(ticker.FixedLocator([*-negative, 0, *powers]))  # the scale's own crowd round 0
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_yscale("log", nonpositive="mask")
        of_train = rows[rows.train_domain == train]
        looks.note(ax, looks.not_finite(of_train.alpha + of_train.value))
        looks.open_up(ax)
    smallest = known.value[known.value > 0].min() / known.direction.nunique() / (width * np.sqrt(2 * np.pi))
    axes[0].set_ylim(max(smallest / 10, peak * 1e-8), 3 * peak)
    figure.supxlabel(
        f"eigenvalue of the total loss's Hessian, {looks.measured_on(test_domain)} (asinh axis)", fontsize=10
    )
    looks.legend(figure, optimizers)
    return figure


def paths(between: pd.DataFrame) -> Figure:
    """The loss on the straight line between the weights of two networks, and the barrier on it.

    between: rows of kind "path": alpha 0 is the baseline, 1 the treatment; BatchNorm's statistics are interpolated
    too, or re-estimated at every alpha. Lines are means of seeds, bands their range. The barrier is the loss's largest
    excess over the chord from the one end's loss to the other's (Frankle et al. 2020, arXiv 1912.05671), 0 where it
    stays below.
    """
    rows = _total(between, BETWEEN, kind="path")
    groups = list(rows.groupby([*CELL, "baseline", "treatment"], sort=False))
    figure, axes = looks.panels(len(groups), 3, 3.0, "total loss", sharex=True, sharey=True)
    for ax, ((train, test, *ends), mine) in zip(axes, groups, strict=True):
        lines = [f"trained on {looks.wrapped(train, 26)}", looks.measured_on(test)]
        for statistics, style in STATISTICS.items():
            values = mine[mine.statistics == statistics].pivot(index="alpha", columns="seed", values="value")
            if values.empty:
                lines.append(f"{statistics}: –")
                continue
            colour = looks.look(ends[1], ends)["color"] if statistics == "re-estimated" else "#666666"
            looks.curve(ax, values.stack(), {"color": colour, "linestyle": style, "linewidth": 1.8}, marker="")
            barriers = pd.Series({seed: barrier(values[seed])[0] for seed in values})
            spread = f" ({barriers.min():.3g} to {barriers.max():.3g})" if len(barriers) > 1 else ""
            lines.append(f"barrier, {statistics}: {barriers.mean():.3g}{spread}")
            mean = values.mean(axis=1)
            height, at = barrier(mean)
            chord = np.interp([0, 1], mean.index, mean)
            ax.plot([0, 1], chord, color=colour, linewidth=0.8, linestyle=":")
            if height > 0:
                foot = np.interp(at, [0, 1], chord)
                ax.vlines(at, foot, foot + height, color=colour, linewidth=3, alpha=0.6)
            for alpha, optimizer, loss in zip((0, 1), ends, chord, strict=True):
                ax.plot(alpha, loss, **looks.look(optimizer, ends) | {"linestyle": ""}, markersize=8, zorder=4)
        ax.set_title("\n".join(lines), fontsize=8)
        ax.set_yscale("log" if _wide(rows.value) else "linear")
        looks.note(ax, looks.not_finite(mine.value))
        looks.open_up(ax)
    figure.supxlabel("α, from the baseline's weights (0) to the treatment's (1)", fontsize=10)
    more = [
        Line2D([], [], color="#444444", linestyle=style, label=f"BatchNorm {name}")
        for name, style in STATISTICS.items()
    ]
    more.append(Line2D([], [], color="#444444", linewidth=3, alpha=0.6, label="barrier"))
    named = looks.optimizers_of(pd.DataFrame({"optimizer": [*rows.baseline, *rows.treatment]}))
    looks.legend(figure, named, more)
    return figure


def solutions_plane(between: pd.DataFrame) -> Figure:
    """The loss over the plane through the initial weights and both solutions, and the way each training took.

    between: rows of kind "plane" (alpha from the initial weights towards the baseline, beta at a right angle, in the
    weights' own distance) and "trajectory" (optimizer, step, alpha, beta; value: the share of the distance from the
    initial weights that lies outside the plane: so far the loss shown is not the network's). A trajectory's last
    row is its solution. Of several seeds the first is shown; all panels have one scale.
    """
    rows = _total(between, BETWEEN, kind="plane")
    rows = rows[rows.seed == rows.seed.min()]
    ways = between[(between.kind == "trajectory") & (between.seed == rows.seed.min())].sort_values("step")
    ways = ways.assign(train_domain=ways.train_domain.fillna(""))
    groups = list(rows.groupby([*CELL, "baseline", "treatment"], sort=False))
    scale = _scale(rows.value)
    wide = (rows.alpha.max() - rows.alpha.min()) / (rows.beta.max() - rows.beta.min())
    figure, axes = looks.panels(len(groups), 2, min(5.5, 1.1 + 3.4 / wide))
    for ax, ((train, test, *ends), mine) in zip(axes, groups, strict=True):
        _contours(ax, mine, scale)
        lines = [f"trained on {looks.wrapped(train, 36)}, {looks.measured_on(test)}"]
        for optimizer in ends:
            same = (ways.train_domain == train) & (ways.baseline == ends[0]) & (ways.treatment == ends[1])
            way = ways[same & (ways.optimizer == optimizer)].drop_duplicates("step")  # the same for every test domain
            if way.empty:
                lines.append(f"{looks.name_of(optimizer)}: no trajectory")
                continue
            style = looks.look(optimizer, ends) | {"markeredgecolor": "white", "markeredgewidth": 0.5}
            ax.plot(way.alpha, way.beta, **style | {"markersize": 5}, linewidth=1.5)
            ax.plot(*way[["alpha", "beta"]].iloc[-1], **style | {"markersize": 11})
            ax.plot(*way[["alpha", "beta"]].iloc[0], **MARK)
            lines.append(f"{looks.name_of(optimizer)}: up to {100 * way.value.max():.0f} % outside the plane")
        ax.set_title("\n".join(lines), fontsize=9)
        ax.set_aspect("equal")
        ax.set_xlabel(f"α, distance towards {looks.name_of(ends[0])}", fontsize=9)
        ax.set_ylabel("β, distance at a right angle", fontsize=9)
    _colorbar(figure, axes, scale)
    named = looks.optimizers_of(pd.DataFrame({"optimizer": [*rows.baseline, *rows.treatment]}))
    looks.legend(figure, named, [Line2D([], [], label="initial weights", **MARK)])
    return figure
