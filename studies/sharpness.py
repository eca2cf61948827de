"""Is a network flatter on the very domains where it registers better? Of every run of a study, on every test domain.

    FMSAM_DATA=... python studies/sharpness.py runs/unseen      # a few seconds a run; goes on where it stopped
    FMSAM_DATA=... python studies/sharpness.py runs/forms
    python studies/sharpness.py --draw                          # the figure and the table, from the recorded values

Sharpness is the relative rise of the total loss at SAM's step, `(L(w + rho g / |g|) - L(w)) / L(w)`, with g the
gradient of that domain alone, on its first 12 test pairs, in float64 and in eval mode (`flatness/sharpness.py`).
Writes figures/sharpness_by_domain.csv, a row a run and domain, and its figure; figures/table_sharpness.csv, of two arms
on the same training, set and seed; figures/table_flatter.csv, of all arms of a training and set;
figures/table_within.csv, of all networks of one arm on a set.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch

from fmsam_lib.evaluation.correlation import RUN
from fmsam_lib.evaluation.statistics import CELL, per_pair, seen, whole_seeds
from fmsam_lib.flatness.landscape import batches_of
from fmsam_lib.flatness.weight_space import WeightSpace, terms_on
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import EQUAL_COMPUTE
from fmsam_lib.plotting import slices, style
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.training.checkpoint import trained_with

OUT = PROJECT / "figures" / "sharpness_by_domain"
RHOS = (0.001, 0.01)
PAIRS = 12
ARMS = SEEDS = 5  # fewer say little about a rank
RISE, SMALL_RISE = "rise 0.01", "rise 0.001"
KINDS, OWN = ("seen", "unseen"), "training images"
FORMS = {"layer-0.0014": "SAM by layer", "part-0.0064": "SAM by part", "sam-0.01": "SAM, rho 0.01"}
FORMS |= {"every-5": "SAM in one step of five", "adam-part": "Adam by part", "sam-2x": "SAM, twice the steps"}
FORMS |= {"adam-4x": "Adam, four times the steps"}
DRAWN = ("SAM", *(name for name in FORMS.values() if name.startswith("SAM")))
PLAIN, WIDE, LARGE = "no augmentation", "twice the channels", "uniGradICON's channels"
FORMS |= {"adam-plain": f"Adam, {PLAIN}", "plain": f"Adam, twice the steps, {PLAIN}", "sam-plain": f"SAM, {PLAIN}"}
FORMS |= {f"constant-{rho}": f"SAM, rho {rho} constant" for rho in RHOS}
FORMS |= {"sam-4x": "SAM, four times the steps", "adam-8x": "Adam, eight times the steps"}
FORMS |= {"sam-0.003": "SAM, rho 0.003", "wide": f"Adam, twice the steps, {WIDE}", "sam-wide": f"SAM, {WIDE}"}
FORMS |= {"unigradicon": f"Adam, twice the steps, {LARGE}", "adam-unigradicon": f"Adam, {LARGE}"}
FORMS |= {"sam-unigradicon": f"SAM, {LARGE}"}
# Adam at equal compute; with as small batches in BatchNorm
CONTROL = {"SAM by part": "Adam by part", "SAM, twice the steps": "Adam, four times the steps"}
CONTROL |= {"SAM, four times the steps": "Adam, eight times the steps"}
CONTROL |= {f"SAM, {of}": f"Adam, twice the steps, {of}" for of in (PLAIN, WIDE, LARGE)}


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


def differences(table: pd.DataFrame, baseline: str, treatment: str) -> pd.DataFrame:
    """On the same seed, training and test domain: log2 of the ratios of the rises, and the difference of Dice."""
    keys = [*CELL, "seed"]
    both = [table[table.optimizer == name].set_index(keys) for name in (baseline, treatment)]
    a, b = (of.loc[both[0].index.intersection(both[1].index)] for of in both)
    ratios = {name: np.log2(b[of] / a[of]) for name, of in (("ratio", RISE), ("small", SMALL_RISE))}
    rows = pd.DataFrame(ratios | {"dice": b.dice - a.dice}).dropna(subset=[*ratios]).reset_index()
    return rows.assign(kind=seen(rows).mask(rows.test_domain == "training", OWN))


def interval(rows: pd.DataFrame, column: str, told: Callable[[float], str]) -> str:
    """The mean of the seeds' means, with its 90 % t interval over seeds."""
    seeds = rows.groupby("seed")[column].mean()
    if len(seeds) < 2:
        return told(seeds.mean())
    low, high = scipy.stats.t.interval(0.9, len(seeds) - 1, seeds.mean(), seeds.sem())
    return f"{told(seeds.mean())} [{told(low)}, {told(high)}]"


def line(rows: pd.DataFrame) -> dict:
    """tau: Kendall's, of flattening and the gain in Dice over the cells of a seed: above 0: they go together."""
    rows = whole_seeds(rows)
    own = (rows.kind == OWN).all()  # of which no Dice is measured
    taus = [scipy.stats.kendalltau(-of.ratio, of.dice).statistic for _, of in rows.groupby("seed") if not own]
    return {
        "sharpness, ratio [90 %]": interval(rows, "ratio", lambda log: f"{2**log:.2f}"),
        "at rho 0.001": interval(rows, "small", lambda log: f"{2**log:.2f}"),
        "Dice, difference [90 %]": "" if own else interval(rows, "dice", "{:+.3f}".format),
        "tau of each seed": ", ".join(f"{tau:+.2f}" for tau in taus),
        "networks and domains": len(rows),
    }


def flatter(table: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau of a measure with Dice, over all arms with one training, test set and seed; means over these."""
    table = table[table.test_domain != "training"].assign(kind=seen)
    keys, names = ["train_domain", "test_domain", "seed"], {"loss": "loss", SMALL_RISE: "sharpness at rho 0.001"}
    lines = []
    for kind, mine in table.groupby("kind"):
        cells = [cell for _, cell in mine.groupby(keys) if len(cell) >= ARMS]
        arms = [len(cell) for cell in cells]
        line = {"domains": kind, "trainings and sets": len(cells), "arms": f"{min(arms)} to {max(arms)}"}
        for measure, name in (names | {RISE: "sharpness at rho 0.01"}).items():
            taus = [scipy.stats.kendalltau(cell[measure], cell.dice).statistic for cell in cells]
            line[f"tau of {name}"] = f"{np.mean(taus):+.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def within(table: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau of a measure with Dice over the networks of one optimizer on a set, mean over sets.

    Networks of a seed share their start, so the interval is the jackknife's over seeds: of the optimizers with five.
    """
    table = table[table.test_domain != "training"].assign(kind=seen)
    table = table[table.groupby("optimizer").seed.transform("nunique") >= SEEDS]
    names = {"loss": "loss", SMALL_RISE: "sharpness at rho 0.001", RISE: "sharpness at rho 0.01"}

    def tau(rows: pd.DataFrame, measure: str) -> float:
        sets = [scipy.stats.kendalltau(cell[measure], cell.dice).statistic for _, cell in rows.groupby("test_domain")]
        return float(np.mean(sets))

    lines = []
    for (optimizer, kind), mine in table.groupby(["optimizer", "kind"]):
        seeds = mine.seed.unique()
        line = {"networks of": style.name_of(optimizer), "domains": kind}
        line |= {"sets": mine.test_domain.nunique(), "networks a set": mine.groupby("test_domain").size().max()}
        for measure, name in names.items():
            whole, n = tau(mine, measure), len(seeds)
            parts = np.array([n * whole - (n - 1) * tau(mine[mine.seed != seed], measure) for seed in seeds])
            low, high = scipy.stats.t.interval(0.9, n - 1, whole, scipy.stats.sem(parts))
            line[f"tau of {name} [90 %]"] = f"{whole:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    return pd.DataFrame(lines)


def draw(table: pd.DataFrame) -> None:
    """A table of every comparison, and the figure of those at equal compute."""
    table = table.replace({"optimizer": FORMS})
    others = [name for name in style.optimizers_of(table) if not name.lower().startswith("adam")]
    if unknown := {*others} - {"sam", *FORMS.values()}:
        raise ValueError(f"expected a name in FORMS, and its control if it is not {EQUAL_COMPUTE}, for {unknown}")
    pairs = [(CONTROL.get(name, EQUAL_COMPUTE), name) for name in others]
    pairs += [("adam", name) for name in others if name == "sam" or name.endswith(" constant")]
    pairs += [(f"Adam, {of}", f"SAM, {of}") for of in (PLAIN, LARGE)] + [("adam", EQUAL_COMPUTE)]
    lines = []
    for (baseline, treatment), kind in itertools.product(pairs, (OWN, *KINDS)):
        rows = differences(table, baseline, treatment).query("kind == @kind")
        if len(rows):
            versus = f"{style.name_of(treatment)} / {style.name_of(baseline)}"
            lines.append({"compared": versus, "domains": kind, **line(rows)})
    write_csv(pd.DataFrame(lines), PROJECT / "figures" / "table_sharpness.csv")
    write_csv(flatter(table), PROJECT / "figures" / "table_flatter.csv")
    write_csv(within(table), PROJECT / "figures" / "table_within.csv")
    drawn = [name for name in others if style.name_of(name) in DRAWN]
    picture, panels = style.panels(2, 2, 3.6, sharex=True, sharey=True)
    for ax, kind in zip(panels, KINDS, strict=True):
        for name in drawn:
            rows = differences(table, CONTROL.get(name, EQUAL_COMPUTE), name).query("kind == @kind")
            ax.plot(2.0**rows.ratio, rows.dice, **style.look(name, drawn) | {"linestyle": ""}, markersize=5)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{kind} domains", fontsize=10)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        style.open_up(ax)
    than = "of Adam at equal compute"  # of the forms by part and at twice the steps: Adam likewise
    panels[0].set_ylabel(f"Dice, minus that {than}")
    picture.supxlabel(f"sharpness on the domain, divided by that {than}  (← flatter)", fontsize=10)
    style.legend(picture, drawn)
    picture.savefig(f"{OUT}.png", dpi=slices.DPI, metadata={"Software": None})


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
