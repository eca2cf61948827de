"""Figures of results and trainings, from tidy tables (`results.csv`, a training history) or from an image pair.

Each function returns a matplotlib `Figure` that pyplot does not know of: it is garbage once nobody holds
it, and shows itself at the end of a notebook's cell. What they share stands in `looks`; the loss landscape's figures
in `landscape_plots`.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from fmsam_lib.evaluation.corruptions import CORRUPTIONS
from fmsam_lib.evaluation.statistics import LESS_IS_BETTER, Interval, difference, mean_interval, per_pair, seen
from fmsam_lib.plotting import style as looks
from fmsam_lib.plotting.slices import WIDTH, registration, save
from fmsam_lib.plotting.style import METRICS, UNTRAINED

__all__ = [
    "correlation", "flatness_against_dice", "matrix", "paired_difference", "radii", "registration", "robustness",
    "save", "training_curves",
]  # fmt: skip


RESULTS = "train_domain test_domain optimizer seed pair label metric value unit"


ROBUSTNESS = "train_domain test_domain optimizer seed pair corruption severity metric value unit"


CORRELATION = "measure rho term test_domain performance tau low high p n"


KINDS = ("seen", "unseen")


FILLS = ("full", "none", "left", "top", "right", "bottom")  # of markers, one a training domain


def _untrained_once(rows: pd.DataFrame) -> pd.DataFrame:
    """Methods without a network belong to no training domain, whatever stands there."""
    return rows.assign(train_domain=rows.train_domain.where(~rows.optimizer.isin(UNTRAINED), ""))


def matrix(results: pd.DataFrame, *, metric: str = "dice") -> Figure:
    """Trained on (rows) by tested on (columns), one panel per optimizer, above them the methods without training.

    A cell is the mean over pairs and seeds of the mean over labels, below it the 95 % interval of
    `compare.mean_interval`, a bootstrap over seeds and pairs. A frame says that the domain was trained on.
    """
    rows = _untrained_once(looks.select(results, RESULTS, metric=metric))
    _, decimals = METRICS.get(metric, (metric, 3))
    more_is_better = metric not in LESS_IS_BETTER
    values = per_pair(rows, metric)
    keys = ["optimizer", "train_domain", "test_domain"]
    cells = {key: mean_interval(mine) for key, mine in values.groupby(keys)}
    tests, trains = list(rows.test_domain.unique()), list(rows.train_domain[rows.train_domain != ""].unique())
    everyone = looks.optimizers_of(rows)
    alone = ["none", *(o for o in everyone if o in UNTRAINED[1:])]
    optimizers = [o for o in everyone if o not in UNTRAINED] or alone[:1]
    labels = [*map(looks.wrapped, map(looks.name_of, alone)), *map(looks.wrapped, trains)]
    most = 2 if len(tests) <= 4 and len(optimizers) > 1 else 1
    line_height = max(0.44, *(0.17 * (label.count("\n") + 1) for label in labels))
    figure, panels = looks.panels(len(optimizers), most, line_height * len(labels) + 0.9, sharex=True, sharey=True)
    means = [cell.mean for cell in cells.values()]
    norm = colors.Normalize(np.nanmin(means), np.nanmax(means)) if np.isfinite(means).any() else colors.Normalize(0, 1)
    cmap = colormaps["cividis" if more_is_better else "cividis_r"]  # the brighter, the better
    size = np.clip(72 * (WIDTH - 2.6) / most / len(tests) / 8, 6, 9)  # an interval is 7 to 8 sizes wide
    for ax, optimizer in zip(panels, optimizers, strict=True):
        shown = np.full((len(labels), len(tests)), np.nan)
        for row, (method, train) in enumerate([*((o, "") for o in alone), *((optimizer, t) for t in trains)]):
            for column, test in enumerate(tests):
                cell = cells.get((method, train, test), Interval(np.nan, np.nan, np.nan, 0, 0))
                shown[row, column] = cell.mean
                if np.isnan(cell.mean):
                    looks.hole(ax, (column - 0.5, row - 0.5), ax.transData)
                    continue
                text = f"{cell.mean:.{decimals}f}"
                if not np.isnan(cell.low):
                    text += f"\n[{cell.low:.{decimals}f}, {cell.high:.{decimals}f}]"
                dark = np.dot(cmap(norm(cell.mean))[:3], (0.3, 0.59, 0.11)) < 0.5
                ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
                if seen(train, test):
                    frame = {"fill": False, "edgecolor": "black", "linewidth": 2}
                    ax.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, **frame))
        image = ax.imshow(shown, cmap=cmap, norm=norm, aspect="auto")
        ax.axhline(len(alone) - 0.5, color="white", linewidth=5, zorder=1)
        colour = looks.look(optimizer, optimizers)["color"]
        ax.set_title(looks.name_of(optimizer), fontsize=11, color=colour, fontweight="bold")
        ax.set_xticks(range(len(tests)), tests, rotation=30, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_xlabel("tested on" if ax in panels[-most:] else "")
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    for ax in panels[::most]:
        ax.set_ylabel("trained on")
    better = f"\n{'higher' if more_is_better else 'lower'} is better" if metric in METRICS else ""
    figure.colorbar(image, ax=panels, label=looks.metric_name(rows, metric) + better, aspect=30, pad=0.02)
    handles = [Patch(fill=False, edgecolor="black", linewidth=2, label=_of_interval(cells, values))]
    figure.legend(handles=handles, loc="outside lower right", frameon=False, fontsize=9)
    return figure


def _of_interval(cells: dict[tuple, Interval], values: pd.DataFrame) -> str:
    """What the cells' intervals are over, and how many values are in none of them."""
    trained = [cell for (_, train, _), cell in cells.items() if train and cell.seeds]
    seeds = sorted({cell.seeds for cell in trained})
    if not any(np.isfinite(cell.low) for cell in cells.values()):
        over = "mean"
    elif seeds in ([], [1]):
        over = "mean, 95 % interval over test pairs only" + (" (one seed)" if seeds else "")
    else:
        over = f"mean, 95 % interval over {' to '.join(map(str, (*seeds[:1], *seeds[1:][-1:])))} seeds and test pairs"
    lost = int(values.value.isna().sum())
    return f"{over}; framed: trained on this domain" + (f"; left out for NaN: {lost}" if lost else "")


def paired_difference(
    results: pd.DataFrame, *, metric: str = "dice", baseline: str | list[str] = "adam", treatment: str = "sam"
) -> Figure:
    """Treatment minus baseline on the same pair and seed: every one, each seed's mean, the mean, its 95 % interval.

    Mean and interval are those of `compare.difference`: a bootstrap over seeds and pairs. baseline: one or several,
    such as `["adam", "adam-2x"]`, equal steps and equal compute; single pairs and seeds are drawn of the first one
    only. n counts pairs and seeds; "unpaired" counts values that only one of the two optimizers has, or that are NaN.

    Raises ValueError where the treatment has nothing in common with one of the baselines.
    """
    baselines = [baseline] if isinstance(baseline, str) else list(baseline)
    rows = _untrained_once(looks.select(results, RESULTS, metric=metric))
    for optimizer in (*baselines, treatment):
        looks.select(rows, RESULTS, optimizer=optimizer)
    values = per_pair(rows, metric).assign(metric=metric)
    values = values.assign(seed=values.seed.astype(object).where(values.seed.notna(), -1))
    trains, tests = list(rows.train_domain[rows.train_domain != ""].unique()), list(rows.test_domain.unique())
    keys = ["train_domain", "test_domain", "seed", "pair"]
    wide = values.pivot(index=keys, columns="optimizer", values="value")
    for name in baselines:
        if wide[[name, treatment]].dropna().empty:
            raise ValueError(f"expected {treatment!r} and {name!r} on the same pairs and seeds, got none in common")
    style = {treatment: {"color": looks.look(treatment, [treatment, *baselines])["color"], "marker": "D"}}
    style |= {name: looks.look(name, [*baselines, treatment]) for name in baselines}
    styles = [style[treatment]] if len(baselines) == 1 else [style[name] for name in baselines]
    height = 0.3 + 0.17 * len(baselines)
    figure, panels = looks.panels(len(trains), 3, height * len(tests) + 1.0, "tested on", sharex=True, sharey=True)
    for ax, train in zip(panels, trains, strict=True):
        ax.axvline(0, color="black", linewidth=1)
        for y, test in enumerate(tests):
            mine = values[(values.train_domain == train) & (values.test_domain == test)]
            if seen(train, test):
                ax.axhspan(y - 0.5, y + 0.5, color="#eeeeee", linewidth=0)
            if mine.empty or not any(_draw_differences(ax, y, mine, baselines, treatment, styles)):
                looks.hole(ax, (0, y - 0.5), ax.get_yaxis_transform())
        ax.set_title(f"trained on {looks.wrapped(train, 24)}", fontsize=10)
        ax.set_yticks(range(len(tests)), tests)
        ax.set_ylim(len(tests) - 0.5, -0.5)
        looks.open_up(ax)
        ax.grid(visible=False, axis="y")
    better = ""
    if metric in METRICS:
        better = f"  ({'←' if metric in LESS_IS_BETTER else '→'} {looks.name_of(treatment)} better)"
    names = looks.name_of(baselines[0]) if len(baselines) == 1 else "the baseline"
    figure.supxlabel(
        f"{looks.metric_name(rows, metric)}: {looks.name_of(treatment)} minus {names}{better}", fontsize=10
    )
    handles = [Line2D([], [], color="#808080", marker=".", linestyle="", label="a pair and seed")]
    if wide[[baselines[0], treatment]].dropna().reset_index().seed.nunique() > 1:
        handles.append(Line2D([], [], linestyle="", label="a seed's mean", **_open_marker(styles[0])))
    for name, of in zip(baselines, styles, strict=True):
        label = "mean, 95 % interval" if len(baselines) == 1 else f"minus {looks.name_of(name)}: mean, 95 % interval"
        handles.append(Line2D([], [], markersize=5, linewidth=2.5, label=label, **of | {"linestyle": "-"}))
    handles.append(Patch(color="#eeeeee", label="trained on this domain"))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=4 if len(handles) < 5 else 3, frameon=False, fontsize=9
    )
    return figure


def _open_marker(style: dict) -> dict:
    return {
        "color": style["color"], "marker": style["marker"], "markerfacecolor": "white", "markersize": 4
    }  # fmt: skip


def _draw_differences(
    ax: Axes, y: float, mine: pd.DataFrame, baselines: list[str], treatment: str, styles: list[dict]
) -> list[bool]:
    """A row of `paired_difference`; says of each baseline whether there was anything to draw."""
    drawn = []
    wide = mine.pivot(index=["seed", "pair"], columns="optimizer", values="value")
    wide = wide.reindex(columns=[*baselines, treatment])
    for i, (name, style) in enumerate(zip(baselines, styles, strict=True)):
        points = (wide[treatment] - wide[name]).dropna()
        place = y + 0.3 * (i - (len(baselines) - 1) / 2)
        drawn.append(not points.empty)
        if points.empty:
            ax.text(1.02, place, "–", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=style["color"])
            continue
        if i == 0:
            jitter = np.random.default_rng(0).uniform(-0.32, 0.32, len(points))
            ax.scatter(points, y + jitter, s=9, color="#808080", alpha=0.45, linewidth=0)
        found = difference(mine, name, treatment)
        seeds = points.groupby("seed").mean()
        if len(seeds) > 1:
            ax.plot(seeds, np.full(len(seeds), place - 0.13), linestyle="", zorder=2.5, **_open_marker(style))
        if not np.isnan(found.low):
            xerr = [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]]
            ax.errorbar(
                found.mean, place, xerr=xerr, color=style["color"], linewidth=2.5, capsize=5, capthick=2, zorder=3
            )
        ax.plot(found.mean, place, markersize=6, zorder=4, **style | {"linestyle": ""})
        count = f"n = {len(points)}" + (f"\n{found.left_out} unpaired" if found.left_out else "")
        colour = "black" if len(baselines) == 1 else style["color"]
        count = count if len(baselines) == 1 else count.replace("\n", ", ")
        ax.text(1.02, place, count, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=colour)
    return drawn


def training_curves(history: pd.DataFrame) -> Figure:
    """The loss, its similarity and its penalty over the steps: every logged value faint, a running mean on top.

    history: train_domain, optimizer, seed, step, total, similarity, regulariser and, where it was watched, dice on the
    validation pairs; a row of panels per train_domain.
    """
    terms = {"total": "total loss", "similarity": "similarity term", "regulariser": "GradICON penalty"}
    rows = looks.select(history, f"train_domain optimizer seed step {' '.join(terms)}")
    if "dice" in rows and rows.dice.notna().any():
        terms["dice"] = "Dice (validation)"
    trains, optimizers, n = list(rows.train_domain.unique()), looks.optimizers_of(rows), len(terms)
    figure, panels = looks.panels(n * len(trains), n, 2.5, sharex=True, sharey="col")
    for place, ax in enumerate(panels):
        train, (term, name) = trains[place // n], list(terms.items())[place % n]
        mine = rows[rows.train_domain == train]
        for (optimizer, _), run in mine.groupby(["optimizer", "seed"], dropna=False):
            run, look = run.dropna(subset=term).sort_values("step"), looks.look(optimizer, optimizers)
            smooth = run[term].rolling(max(1, len(run) // 15), center=True, min_periods=1).mean()
            ax.plot(run.step, run[term], color=look["color"], alpha=0.18, linewidth=0.8)
            ax.plot(run.step, smooth, markevery=max(1, len(run) // 6), markersize=5, linewidth=1.5, **look)
        ax.set_title((name if place < n else "") + looks.missing(mine, optimizers), fontsize=10)
        if term == "regulariser":
            ax.set_yscale("log", nonpositive="mask")
        if term != "dice":  # which is watched now and then only
            looks.note(ax, looks.not_finite(mine[term]))
        if place % n == 0:
            ax.set_ylabel(f"trained on\n{looks.wrapped(train)}", fontsize=9)
        looks.open_up(ax)
    figure.supxlabel("optimizer step", fontsize=10)
    looks.legend(figure, optimizers)
    return figure


def radii(table: pd.DataFrame) -> Figure:
    """Training loss and Dice against the radius of SAM and its like, Adam as level lines: means, and ranges of seeds.

    table: of `report.radii`. Only the learning rate of most runs is drawn. Raises ValueError where no optimizer has two
    radii.
    """
    rows = looks.select(table, "train_domain optimizer lr rho seed loss domains dice", lr=table.lr.mode()[0])
    level = rows.optimizer.isin(["adam", "adam-2x"])
    counts = rows[~level].groupby("optimizer").rho.nunique()
    if counts.max() < 2 or counts.empty:
        raise ValueError("expected an optimizer with two radii or more, got one radius each: nothing to compare")
    optimizers = looks.optimizers_of(rows)
    kinds = [kind for kind in KINDS if kind in set(rows.domains)]
    figure, panels = looks.panels(1 + len(kinds), 3, 3.0, sharex=True)
    panels[-1].sharey(panels[1])
    for ax, kind in zip(panels, ["loss", *kinds], strict=True):
        mine = rows.drop_duplicates(["optimizer", "rho", "seed"]) if kind == "loss" else rows[rows.domains == kind]
        for optimizer in optimizers:
            look, runs = looks.look(optimizer, optimizers), mine[mine.optimizer == optimizer]
            value = "loss" if kind == "loss" else "dice"
            if level[runs.index].all():
                ax.axhspan(runs[value].min(), runs[value].max(), color=look["color"], alpha=0.2, linewidth=0)
                ax.axhline(runs[value].mean(), color=look["color"], linestyle=look["linestyle"])
                continue
            looks.curve(ax, runs.set_index("rho")[value], look, markevery=1)
        names = {"loss": "training loss at the end", "seen": "Dice, seen domains", "unseen": "Dice, unseen domains"}
        ax.set_title(names[kind], fontsize=10)
        ax.set_xscale("log")
        looks.open_up(ax)
    figure.supxlabel("rho (SAM, random: length of the step; ASAM: relative to each weight)", fontsize=10)
    looks.legend(figure, optimizers)
    return figure


def robustness(table: pd.DataFrame, *, metric: str = "dice") -> Figure:
    """A metric against the severity of a corruption of the moving images, on seen and on unseen domains.

    table: `corrupt.robustness` of every network, with train_domain, optimizer and seed. Means over pairs, then domains,
    then seeds; bands are the range of seeds. Values that are NaN, or that one optimizer lacks, are counted.
    """
    rows = _untrained_once(looks.select(table, ROBUSTNESS, metric=metric))
    trains = list(rows.train_domain[rows.train_domain != ""].unique())
    if not trains:
        raise ValueError(f"expected rows of trained networks, got {', '.join(looks.optimizers_of(rows))} alone")
    corruptions, optimizers = list(rows.corruption.unique()), looks.optimizers_of(rows)
    groups = []  # a training domain, seen or unseen, and its rows
    for train in trains:
        mine = rows[rows.train_domain.isin([train, ""])]
        kinds = mine.test_domain.map(lambda test, train=train: KINDS[not seen(train, test)])
        groups += [(train, kind, mine[kinds == kind]) for kind in KINDS if (kinds == kind).any()]
    most = min(4, len(corruptions))
    blocks = [corruptions[i : i + most] for i in range(0, len(corruptions), most)]
    lines = [(block, *group) for train in trains for block in blocks for group in groups if group[0] == train]
    figure, panels = looks.panels(most * len(lines), most, 2.1, sharey=True)
    for line, (block, train, kind, mine) in enumerate(lines):
        for column, ax in enumerate(panels[most * line : most * (line + 1)]):
            if column >= len(block):
                ax.remove()
                continue
            of = mine[mine.corruption == block[column]]
            for optimizer in looks.optimizers_of(of):
                keys = ["seed", "test_domain", "severity"]
                means = of[of.optimizer == optimizer].groupby(keys, dropna=False).value.mean()
                looks.curve(ax, means.groupby(["seed", "severity"], dropna=False).mean().droplevel("seed"),
                            looks.look(optimizer, optimizers), markevery=1)  # fmt: skip
            ax.set_title(_lacking(of, optimizers), fontsize=8)
            what = CORRUPTIONS[block[column]].what if block[column] in CORRUPTIONS else block[column]
            ax.set_xlabel(textwrap.fill(what, 30), fontsize=8)
            ax.tick_params(labelsize=8)
            if column == 0:
                ax.set_ylabel(f"trained on\n{looks.wrapped(train)}\n{kind} domains", fontsize=8)
            looks.open_up(ax)
    figure.supylabel(looks.metric_name(rows, metric), fontsize=10)
    looks.legend(figure, optimizers)
    return figure


def _lacking(rows: pd.DataFrame, optimizers: list[str]) -> str:
    """The optimizers of which values are missing or NaN, beside what any of them has; a line each."""
    known = rows.dropna(subset="value")
    everything = len(known[["test_domain", "pair", "severity"]].drop_duplicates())
    lines = []
    for optimizer in optimizers:
        mine = known[known.optimizer == optimizer]
        expected = everything * max(1, rows.seed[rows.optimizer == optimizer].nunique())
        if mine.empty:
            lines.append(f"{looks.name_of(optimizer)}: –")
        elif len(mine) < expected:
            lines.append(f"{looks.name_of(optimizer)}: {expected - len(mine)} of {expected} missing")
    return "\n".join(lines)


def correlation(table: pd.DataFrame, *, term: str = "total", test_domain: str = "training") -> Figure:
    """Kendall's tau between measures of flatness and the networks' Dice, with 95 % intervals: a forest plot.

    table: `correlation.csv`; a measure that is of no term, such as the weights' length, has its row in each. A filled
    marker says that the interval excludes 0.
    """
    rows = looks.select(table, CORRELATION, test_domain=test_domain)
    of_none = rows.term.isna() | (rows.term == "")
    rows = pd.concat([rows[of_none], looks.select(rows, CORRELATION, term=term)])
    rows = rows.assign(
        name=[looks.measure_name(m, r) for m, r in zip(rows.measure, rows.rho.astype(float), strict=True)]
    )
    names, kinds = list(rows.name.unique()), [kind for kind in KINDS if kind in set(rows.performance)]
    figure, panels = looks.panels(len(kinds), 2, 0.27 * len(names) + 0.9, sharex=True, sharey=True)
    for ax, kind in zip(panels, kinds, strict=True):
        mine = rows[rows.performance == kind].set_index("name")
        ax.axvline(0, color="black", linewidth=1)
        for y, name in enumerate(names):
            if name not in mine.index or np.isnan(mine.tau[name]):
                looks.hole(ax, (-0.5, y - 0.5), ax.transData)
                continue
            tau, low, high = mine.loc[name, ["tau", "low", "high"]].astype(float)
            sure = low > 0 or high < 0
            ax.plot([low, high], [y, y], color="#0072B2", linewidth=2)  # NaN of too few networks: no line
            ax.plot(tau, y, "o", color="#0072B2", markerfacecolor="#0072B2" if sure else "white", markersize=6)
        n = sorted({int(number) for number in mine.n.dropna()})
        ax.set_title(f"Dice on {kind} domains\n{' to '.join(map(str, (*n[:1], *n[1:][-1:])))} networks", fontsize=10)
        ax.set_xlim(-1, 1)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        looks.open_up(ax)
    where = looks.measured_on(test_domain)
    figure.supxlabel(f"Kendall's τ between Dice and the measure, {where} ({term} loss)", fontsize=10)
    handles = [
        Line2D([], [], marker="o", color="#0072B2", markerfacecolor=face, label=label)
        for face, label in (
            ("#0072B2", "95 % interval without 0"),
            ("white", "with 0, or no interval: too few networks"),
        )
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def flatness_against_dice(runs: pd.DataFrame, measures: list[str]) -> Figure:
    """Dice on seen and unseen domains against measures of flatness, a point per network.

    runs: train_domain, optimizer, seed, seen, unseen, and a column for each of `measures`, such as "trace" or, with its
    radius, "sam_rise 0.01"; a row per network. Several training domains differ in how markers are filled. Positive
    measures have a log scale.
    """
    rows = looks.select(runs, ["train_domain", "optimizer", "seed", "seen", "unseen", *measures])
    optimizers, trains = looks.optimizers_of(rows), list(rows.train_domain.unique())
    figure, panels = looks.panels(2 * len(measures), 2, 2.6, sharey=True)
    for place, ax in enumerate(panels):
        measure, kind = measures[place // 2], KINDS[place % 2]
        points = rows[["train_domain", "optimizer", measure, kind]].replace([np.inf, -np.inf], np.nan)
        for _, point in points.dropna().iterrows():
            fill = FILLS[trains.index(point.train_domain) % len(FILLS)]
            look = looks.look(point.optimizer, optimizers) | {"linestyle": "", "fillstyle": fill}
            ax.plot(point[measure], point[kind], markersize=7, markerfacecoloralt="white", **look)
        lost = int(points[[measure, kind]].isna().any(axis=1).sum())
        looks.note(ax, f"{lost} of {len(points)} networks without a value" if lost else "")
        if (points[measure].dropna() > 0).all() and points[measure].notna().any():
            ax.set_xscale("log")
            looks.log_ticks(ax.xaxis, points[measure].dropna())
        name, _, rho = measure.partition(" ")
        ax.set_xlabel(looks.measure_name(name, float(rho) if rho else None), fontsize=9)
        ax.set_ylabel("Dice" if kind == "seen" else "", fontsize=9)
        ax.set_title(f"{kind} domains" if place < 2 else "", fontsize=10)
        looks.open_up(ax)
    looks.legend(figure, optimizers)
    if len(trains) > 1:
        handles = [
            Line2D([], [], linestyle="", marker="o", color="#444444", fillstyle=fill, markerfacecoloralt="white",
                   label=f"trained on {looks.wrapped(train, 60)}")
            for train, fill in zip(trains, FILLS * len(trains), strict=False)
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
