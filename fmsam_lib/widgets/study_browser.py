"""A study's test pairs, looked at one by one: the numbers of two optimizers, and the registrations behind them."""

from collections import namedtuple
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import ipywidgets as widgets
import pandas as pd

from fmsam_lib.evaluation.evaluate import register
from fmsam_lib.evaluation.statistics import CELL, LESS_IS_BETTER, per_pair
from fmsam_lib.images.domains import readable
from fmsam_lib.metrics import mean_dice, percent
from fmsam_lib.model.weights import load
from fmsam_lib.plotting import slices, style
from fmsam_lib.widgets import canvas
from fmsam_lib.widgets.sliders import ROW

# Two networks by their training domain, seed and optimizers, and the domain that they are tested on.
Choice = namedtuple("Choice", "train test seed baseline treatment")


class Pairs:
    """What a study's networks make of its test pairs; a registration is computed when it is first looked at.

    results: of all runs, as `read_results` has them. folder: of a run, by train domain, optimizer and seed. opened: a
    test domain, by its name. metric: to judge by; called: what people call it.
    """

    def __init__(self, results: pd.DataFrame, folder: Callable, opened: Callable, metric="dice", called="Dice"):
        trained = results[(results.train_domain != "") & ~results.optimizer.str.contains("+", regex=False)]
        folding = per_pair(trained, "folding_percent").rename(columns={"value": "folding"})
        self.values = per_pair(trained, metric).dropna(subset="value").merge(folding, how="left")
        self.order = {test: list(rows.pair.unique()) for test, rows in results.groupby("test_domain")}
        self.folder, self.metric, self.called = folder, metric, called
        self.opened, self.network, self.registered = lru_cache(2)(opened), lru_cache(2)(load), cache(self._registered)

    def table(self, choice: Choice) -> pd.DataFrame:
        """A row a pair, from the treatment's worst to its best: value and folding of both (0 and 1), and their gain."""
        here = "train_domain == @choice.train and test_domain == @choice.test and seed == @choice.seed"
        rows = self.values.query(here).set_index("pair")
        base, other = (rows.loc[rows.optimizer == name, ["value", "folding"]] for name in choice[3:])
        table = base.add_suffix("0").join(other.add_suffix("1"), how="inner")
        table["gain"] = table.value1 - table.value0
        return table.sort_values("value1", ascending=self.metric not in LESS_IS_BETTER, kind="stable")

    def _registered(self, choice: Choice, name: str) -> tuple[str, list[slices.Cut], list[float]]:
        """The pair's title, and a plane and Dice of both registrations; ValueError where a file is not there."""
        domain, at = self.opened(choice.test), self.order[choice.test].index(name)
        there = readable(domain, range(at, domain.test_count), [])  # of unread pairs there are no results
        pair = next((pair for pair in there if pair.name == name), None)
        if pair is None:
            raise ValueError(f"the images of {name} are not there")
        runs = (self.folder(choice.train, optimizer, choice.seed) for optimizer in choice[3:])
        maps = [register(self.network(run / "weights.pt"), pair, back=False)[0] for run in runs]
        return pair.title, [slices.cut(pair, phi) for phi in maps], [mean_dice(pair, phi) for phi in maps]

    def tells(self, choice: Choice, table: pd.DataFrame, number: int, what="pair") -> tuple[list, dict[str, Any]]:
        """Panels and facts of a row of the table, as a canvas has them. what: it is called there."""
        row, (base, other) = table.iloc[number], map(style.name_of, choice[3:])
        facts = {
            what: row.name,
            "place": f"{number + 1} of {len(table)} by {other}'s {self.called}, the worst first",
            self.called: f"{base} {row.value0:.3f}, {other} {row.value1:.3f}",
            "difference": f"{row.gain:+.3f}, {other} minus {base}",
            "folded": f"{base} {percent(row.folding0)}, {other} {percent(row.folding1)}",
        }
        try:
            title, cuts, dice = self.registered(choice, row.name)
        except ValueError as error:
            return [], facts | {"no picture": str(error)}
        if self.metric == "dice" and max(abs(dice[0] - row.value0), abs(dice[1] - row.value1)) > 0.001:
            facts["now"] = f"Dice {dice[0]:.3f} and {dice[1]:.3f}: of other images, or by another library?"
        panels = [canvas.registered(cut)[0] | {"title": name} for name, cut in zip((base, other), cuts, strict=True)]
        return panels, facts | {what: title}


def three_of(table: pd.DataFrame) -> dict[str, int]:
    """The rows of `Pairs.table` to look at first."""
    return {"worst": 0, "median": (len(table) - 1) // 2, "best": len(table) - 1}


class Browser(widgets.VBox):
    """Menus, the plot of the differences with the pair clicked on, and the worst, the median and the best pair.

    draw: draws a table of `Pairs` for a choice into axes, gain over the treatment's value. controls: by field of
    `Choice`; setting `plot.point` to one of `plot.surface["points"]` shows its pair.
    """

    def __init__(self, pairs: Pairs, first: Choice, draw: Callable, short: Callable[[str], str] = str):
        self.pairs, self.draw, self.controls = pairs, draw, {}
        columns = [*CELL, "seed", "optimizer", "optimizer"]
        names: tuple[Callable[[Any], str], ...] = (short, str, str, style.name_of, style.name_of)
        for field, value, column, name in zip(Choice._fields, first, columns, names, strict=True):
            options = [(name(one), one) for one in pairs.values[column].unique()]
            self.controls[field] = widgets.Dropdown(description=field, options=options, value=value)
            self.controls[field].observe(self._choose, "value")
        self.menus = widgets.HBox([*self.controls.values()], layout=ROW)
        side = {"flex": "1 1 260px", "width": "auto", "margin": "0 9px 0 0"}
        self.ends = [canvas.Canvas(layout=side) for _ in range(3)]
        super().__init__()
        self._choose()

    def _choose(self, change: Any = None) -> None:
        if old := getattr(self, "plot", None):
            old.close()
        choice = Choice(*(control.value for control in self.controls.values()))
        table = self.pairs.table(choice)
        if table.empty:
            self.children = [self.menus, widgets.Label("These two have no test pair in common.")]
            return
        figure = slices.Picture(figsize=(4.6, 4.2), layout="constrained")
        self.draw(axes := figure.subplots(), table, choice)
        points = [[*at, n] for n, at in enumerate(table[["value1", "gain"]].to_numpy().tolist())]
        places = {f"the {end}": points[n] for end, n in three_of(table).items()}
        show = partial(self.pairs.tells, choice, table)
        self.plot = canvas.Surface(figure, axes, lambda x, y, n: show(n), points[0], places=places, points=points)
        for shown, (end, n) in zip(self.ends, three_of(table).items(), strict=True):
            shown.panels, shown.facts = show(n, end)
        self.children = [self.menus, self.plot, widgets.HBox(self.ends, layout=ROW)]
