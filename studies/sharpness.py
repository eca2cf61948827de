"""Is a network flatter on the very domains where it registers better? Of every run of a study, on every test domain.

    FMSAM_DATA=... python studies/sharpness.py runs/unseen      # a few seconds a run; goes on where it stopped
    python studies/sharpness.py --draw                          # the figure and the table, from the recorded values

Sharpness is the relative rise of the total loss at SAM's step, `(L(w + rho g / |g|) - L(w)) / L(w)`, with g the
gradient of that domain alone, on its first 12 test pairs, in float64 and in eval mode (`flatness/sharpness.py`).
Writes figures/sharpness_by_domain.csv, a row a run and test domain, and figures/sharpness_by_domain.png.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch

from fmsam_lib.evaluation.statistics import CELL, per_pair, seen
from fmsam_lib.flatness.landscape import batches_of
from fmsam_lib.flatness.weight_space import WeightSpace, terms_on
from fmsam_lib.model.weights import load
from fmsam_lib.plotting import slices, style
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.training.checkpoint import trained_with

OUT = PROJECT / "figures" / "sharpness_by_domain"
RHOS = (0.001, 0.01)
PAIRS = 12
BASELINE = "adam-2x"
RUN = ["train_domain", "optimizer", "seed"]


def measured(folder: Path) -> list[dict]:
    """One run's sharpness and Dice on every domain that it was tested on."""
    run, net = trained_with(folder), load(folder / "weights.pt")
    dice = per_pair(pd.read_csv(folder / "results.csv"), "dice")
    dice = dice[~dice.optimizer.str.contains("+", regex=False)].groupby("test_domain").value.mean()
    rows = []
    for domain, batch in batches_of(run, list(dice.index), pairs=PAIRS).items():
        space = WeightSpace(net, terms_on(batch, torch.float64, **run.loss()), torch.float64)
        loss, g = space.gradient(0)
        rises = {f"rise {rho:g}": (space.values(rho / g.norm() * g)[0] - loss) / loss for rho in RHOS}
        about = {"train_domain": run.train_domain, "optimizer": folder.parent.name, "seed": run.seed}
        about |= {"test_domain": domain, "dice": dice.get(domain, np.nan), "loss": loss, "gradient": float(g.norm())}
        rows.append(about | rises)
    return rows


def measure(study: Path) -> None:
    table = pd.read_csv(f"{OUT}.csv") if Path(f"{OUT}.csv").exists() else pd.DataFrame(columns=RUN)
    there = set(table[RUN].itertuples(index=False, name=None))
    made = provenance()
    for results in sorted(study.glob("*/*/seed*/results.csv")):
        folder = results.parent
        run = trained_with(folder)
        if (run.train_domain, folder.parent.name, run.seed) not in there:
            rows = pd.DataFrame(measured(folder)).assign(commit=made["commit"], cpu=made["cpu"])
            table = pd.concat([table, rows], ignore_index=True)
            write_csv(table, f"{OUT}.csv", float_format="%.6g")
            print(folder.relative_to(study), flush=True)


def differences(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Treatment against `BASELINE` on the same seed, training and test domain: log2 of the rises' ratio, and Dice."""
    keys = [*CELL, "seed"]
    both = [table[table.optimizer == name].set_index(keys) for name in (BASELINE, treatment)]
    a, b = (of.loc[both[0].index.intersection(both[1].index)] for of in both)
    flatter = {f"log2 {rho:g}": np.log2(b[f"rise {rho:g}"] / a[f"rise {rho:g}"]) for rho in RHOS}
    rows = pd.DataFrame(flatter | {"dice": b.dice - a.dice}).dropna().reset_index()
    return rows.assign(kind=seen(rows))


def told(rows: pd.DataFrame, column: str) -> dict:
    """Mean over cells, and over the seeds' means its 90 % t interval; Kendall's tau of flatness and Dice, by seed."""
    line = {}
    for name in (column, "dice"):
        seeds = rows.groupby("seed")[name].mean()
        low, high = (
            scipy.stats.t.interval(0.9, len(seeds) - 1, seeds.mean(), seeds.sem()) if len(seeds) > 1 else (np.nan,) * 2
        )
        line |= {name: seeds.mean(), f"{name} low": low, f"{name} high": high}
    taus = [scipy.stats.kendalltau(-of[column], of.dice).statistic for _, of in rows.groupby("seed")]
    return line | {"tau": np.mean(taus), "tau of seeds": " ".join(f"{tau:+.2f}" for tau in taus), "cells": len(rows)}


def draw(table: pd.DataFrame) -> None:
    treatments = [name for name in style.optimizers_of(table) if name not in ("adam", BASELINE)]
    picture, panels = style.panels(2, 2, 3.6, sharex=True, sharey=True)
    lines = []
    for ax, kind in zip(panels, ("seen", "unseen"), strict=True):
        for name in treatments:
            rows = differences(table, name).query("kind == @kind")
            ax.plot(
                2.0 ** rows["log2 0.01"], rows.dice, **style.look(name, treatments) | {"linestyle": ""}, markersize=5
            )
            lines.append({"optimizer": name, "domains": kind, **told(rows, "log2 0.01")})
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{kind} domains", fontsize=10)
        ax.set_xscale("log", base=2)
        style.open_up(ax)
    panels[0].set_ylabel(f"Dice, minus {style.name_of(BASELINE)}")
    picture.supxlabel(
        f"sharpness of the domain, as a multiple of {style.name_of(BASELINE)}'s  (← flatter)", fontsize=10
    )
    style.legend(picture, treatments)
    slices.save(picture, OUT)
    Path(f"{OUT}.pdf").unlink()
    print(pd.DataFrame(lines).to_string(index=False))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("study", nargs="?", type=Path, help="folder of a study")
    arguments.add_argument("--draw", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    if given.study:
        measure(given.study)
    if given.draw:
        draw(pd.read_csv(f"{OUT}.csv"))


if __name__ == "__main__":
    main()
