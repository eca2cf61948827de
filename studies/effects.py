"""What changes the Dice on an anatomy never seen, SAM in its forms and everything else, on one axis.

    python studies/effects.py runs/unseen runs/forms runs/alone runs/few    # keeps the Dice of their runs
    python studies/effects.py                                               # the table and the figure of what is kept

Of every run figures/dice.csv keeps the mean Dice of each test set, a row a network (averages of its weights, too) and
set. An effect is a difference between networks of the same training and seed, on the sets that neither saw, averaged
over trainings, seeds and sets. Writes figures/effects.csv, a row an effect and anatomy, its figure and its table, and
figures/spent.png.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import yaml

from fmsam_lib.evaluation.anatomies import BAND
from fmsam_lib.evaluation.evaluate import read_results
from fmsam_lib.evaluation.statistics import per_pair
from fmsam_lib.plotting import slices, style
from fmsam_lib.records import PROJECT, write_csv
from fmsam_lib.training.checkpoint import trained_with

FIGURES = PROJECT / "figures"
GROUPS = yaml.safe_load((PROJECT / "studies" / "unseen.yaml").read_text(encoding="utf-8"))["groups"]
ANATOMY = {name: anatomy for anatomy, names in GROUPS.items() for name in names}
COLUMNS = [
    "study",
    "train_domain",
    "subjects",
    "optimizer",
    "seed",
    "gradients",
    "test_domain",
    "seen",
    "pairs",
    "dice",
]
CELL = ["train_domain", "seed", "test_domain"]
# name, the study and optimizer of the baseline, and of the treatment
UNSEEN, ALONE, FORMS, FEW = "unseen", "alone", "forms", "few"
SAM = {
    "SAM, as tuned (rho 0.001)": ((UNSEEN, "adam-2x"), (UNSEEN, "sam")),
    "SAM, as tuned, twice the gradients": ((UNSEEN, "adam-4x"), (UNSEEN, "sam-2x")),
    "SAM, rho 0.01": ((FORMS, "adam-2x"), (FORMS, "sam-0.01")),
    "SAM by part of the batch": ((FORMS, "adam-part"), (FORMS, "part-0.0064")),
    "SAM by layer": ((FORMS, "adam-2x"), (FORMS, "layer-0.0014")),
    "SAM, 15 subjects a set": ((FEW, "adam-2x-subjects=15"), (FEW, "sam-subjects=15")),
    "SAM, 5 subjects a set": ((FEW, "adam-2x-subjects=5"), (FEW, "sam-subjects=5")),
    "SAM, trained on one anatomy": ((ALONE, "adam-2x"), (ALONE, "sam")),
    "SAM, rho 0.01, trained on one anatomy": ((ALONE, "adam-2x"), (ALONE, "sam-0.01")),
}
OTHER = {
    "averaged weights (EMA)": ((UNSEEN, "adam-2x"), (UNSEEN, "adam-2x+ema")),
    "averaged weights (last quarter)": ((UNSEEN, "adam-2x"), (UNSEEN, "adam-2x+tail")),
    "statistics of the new images": ((UNSEEN, "adam-2x"), (UNSEEN, "adam-2x+bn")),
    "8,000 gradients, not 4,000": ((UNSEEN, "adam"), (UNSEEN, "adam-2x")),
    "16,000 gradients, not 8,000": ((UNSEEN, "adam-2x"), (UNSEEN, "adam-4x")),
}
HELPS = {
    "10 steps of instance optimisation": ("io", 10),
    "50 steps of instance optimisation": ("io", 50),
    "fine-tuned on 2 subjects": ("fine-tuned, adam", 2),
    "fine-tuned on 5 subjects": ("fine-tuned, adam", 5),
    "fine-tuned on 20 subjects": ("fine-tuned, adam", 20),
}


def trained_on(train_domain: str) -> str:
    """The training sets; "all but heart" for all groups of `unseen` but one."""
    names = set(train_domain.split("+"))
    whole = [anatomy for anatomy, members in GROUPS.items() if names >= {*members}]
    others = [anatomy for anatomy, members in GROUPS.items() if names.isdisjoint(members)]
    return f"all but {others[0]}" if len(whole) == len(GROUPS) - 1 and len(others) == 1 else train_domain


def kept(study: Path) -> pd.DataFrame:
    """The mean Dice of every network of a study on every set."""
    rows = []
    for folder in sorted(file.parent for file in study.glob("*/*/seed*/results.csv")):
        run = trained_with(folder)
        last = json.loads((folder / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        values = per_pair(read_results(folder / "results.csv"), "dice")
        for (name, test), dice in values.groupby(["optimizer", "test_domain"]).value:
            about = {
                "study": study.name,
                "train_domain": trained_on(run.train_domain),
                "subjects": run.subjects,
                "seed": run.seed,
            }
            after = name.partition("+")
            about |= {"optimizer": folder.parent.name + "".join(after[1:]), "gradients": last["gradient_evaluations"]}
            about |= {"test_domain": test, "seen": test in run.train_domain.split("+"), "pairs": len(dice)}
            rows.append(about | {"dice": dice.mean()})
    return pd.DataFrame(rows)[COLUMNS]


def paired(baseline: pd.Series, treatment: pd.Series) -> pd.DataFrame:
    """By anatomy: the mean difference over its sets, trainings and seeds, and how many seeds there are."""
    rows = pd.DataFrame({"baseline": baseline, "treatment": treatment}).dropna().reset_index()
    rows = rows.assign(anatomy=rows.test_domain.map(ANATOMY), difference=rows.treatment - rows.baseline)
    sets = rows.groupby(["anatomy", "test_domain"])[["baseline", "treatment", "difference"]].mean()
    means = sets.groupby("anatomy").mean()
    return means.assign(seeds=rows.groupby("anatomy").seed.nunique()).reset_index()


def effects(dice: pd.DataFrame, helps: pd.DataFrame) -> pd.DataFrame:
    """Every effect that was measured, an anatomy a row."""
    rows, unseen = [], dice[~dice.seen].set_index(["study", "optimizer"]).sort_index()
    for kind, listed in (("SAM minus Adam at equal compute", SAM), ("Adam, with other help", OTHER)):
        for name, keys in listed.items():
            if all(key in unseen.index for key in keys):
                of = [unseen.loc[[key]].set_index(CELL).dice for key in keys]
                rows.append(paired(*of).assign(kind=kind, effect=name))
    mine = helps[helps.training == "adam-2x"].set_index(["means", "amount"]).sort_index()
    for name, key in HELPS.items():
        of = [mine.loc[[one]].set_index(["seed", "test_domain"]).dice for one in (("nothing", 0), key)]
        rows.append(paired(*of).assign(kind=kind, effect=name))
    few = unseen.loc[[(ALONE, "adam-2x")]].groupby(["seed", "test_domain"]).dice.mean()
    many = unseen.loc[[(UNSEEN, "adam")]].groupby(["seed", "test_domain"]).dice.mean()
    rows.append(paired(few, many).assign(kind=kind, effect="trained on all other anatomies, not one"))
    return pd.concat(rows, ignore_index=True)[
        ["kind", "effect", "anatomy", "baseline", "treatment", "difference", "seeds"]
    ]


def draw(table: pd.DataFrame) -> None:
    """An effect a row, below the heading of its kind: anatomies as points, their mean as a bar, its value beside it."""
    rows = [(kind, name) for kind, mine in table.groupby("kind", sort=False) for name in ("", *mine.effect.unique())]
    picture = slices.Picture(figsize=(8, 0.27 * len(rows) + 1.4), layout="constrained")
    ax, looks = picture.subplots(), dict(zip(sorted(GROUPS), [*style.LOOKS.values()][3:], strict=False))
    ax.axvspan(-BAND, BAND, color="#e6e6e6", zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    for y, (kind, name) in enumerate(rows):
        mine = table[(table.kind == kind) & (table.effect == name)]
        for line in mine.itertuples():
            ax.plot(line.difference, y, markersize=4.5, **looks[line.anatomy] | {"linestyle": ""})
        if name:
            mean = mine.difference.mean()
            ax.plot(mean, y, marker="|", markersize=15, markeredgewidth=3, color="black")
            seeds = "1 seed" if mine.seeds.max() == 1 else f"{mine.seeds.max()} seeds"
            ax.annotate(
                f"{mean:+.3f}, {seeds}".replace("-", "−"), (1.02, y), xycoords=("axes fraction", "data"), va="center"
            )
    ax.set_yticks(range(len(rows)), [name or kind for kind, name in rows])
    for label, (_, name) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if name else "bold")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("change of Dice on anatomies never seen  (grey: too small to matter)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    for name, look in looks.items():
        ax.plot([], [], label=name, **look | {"linestyle": ""})
    ax.plot([], [], marker="|", markersize=13, markeredgewidth=3, color="black", linestyle="", label="mean")
    picture.legend(loc="outside upper center", ncols=6, frameon=False)
    picture.savefig(FIGURES / "effects.png", dpi=slices.DPI, metadata={"Software": None})


def spent(dice: pd.DataFrame, helps: pd.DataFrame) -> None:
    """Mean Dice over the anatomies against the gradients spent, of the seed that has every length."""
    runs = dice[
        (dice.study == UNSEEN) & ~dice.optimizer.str.contains("+", regex=False) & dice.test_domain.isin(ANATOMY)
    ]
    seed = runs[runs.optimizer == "adam-4x"].seed.min()
    rows = runs[runs.seed == seed].assign(
        kind=lambda t: t.optimizer.str.partition("-")[0], anatomy=runs.test_domain.map(ANATOMY)
    )
    keys = ["kind", "seen", "gradients"]
    means = (
        rows.groupby([*keys, "anatomy", "test_domain"])
        .dice.mean()
        .groupby([*keys, "anatomy"])
        .mean()
        .groupby(keys)
        .mean()
    )
    picture, (ax,) = style.panels(1, 1, 3.8, "Dice, mean of five anatomies")
    for (kind, seen), line in means.groupby(level=[0, 1]):
        look = style.LOOKS[kind] | {"linestyle": ":" if seen else "-", "markerfacecolor": "white" if seen else None}
        told = "trained on the anatomy" if seen else "never saw it"
        ax.plot(line.index.get_level_values(2), line, label=f"{style.name_of(kind)}, {told}", **look)
    syn = helps[helps.training == "ants-syn"].set_index("test_domain").dice
    value = syn.groupby(ANATOMY).mean().mean()
    ax.axhline(value, label=style.name_of("ants-syn"), **style.LOOKS["ants-syn"] | {"marker": ""})
    ax.set_xscale("log", base=2)
    ticks = sorted(set(means.index.get_level_values(2)))
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.set_xlabel(f"gradients spent in training (seed {seed}); at as many, SAM has made half of Adam's steps")
    style.open_up(ax)
    picture.legend(loc="outside right center", frameon=False)
    picture.savefig(FIGURES / "spent.png", dpi=slices.DPI, metadata={"Software": None})


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The effects as results.md has them."""
    rows = table.groupby(["kind", "effect"], sort=False).agg(
        change=("difference", "mean"), low=("difference", "min"), high=("difference", "max"),
        anatomies=("anatomy", "nunique"), seeds=("seeds", "max"),
    )  # fmt: skip
    return (
        rows.assign(**{n: rows[n].map("{:+.3f}".format) for n in ("change", "low", "high")})
        .rename(columns={"change": "change of Dice", "low": "lowest anatomy", "high": "highest anatomy"})
        .reset_index()
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("studies", nargs="*", type=Path, help="folders of computed studies")
    path = FIGURES / "dice.csv"
    dice = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    for study in arguments.parse_args().studies:
        parts = [part for part in (dice[dice.study != study.name], kept(study)) if len(part)]
        dice = pd.concat(parts).sort_values(COLUMNS[:-1])
        write_csv(dice, path, float_format="%.6g")
    helps = pd.read_csv(FIGURES / "helps.csv")
    table = effects(dice, helps)
    write_csv(table, FIGURES / "effects.csv", float_format="%.6g")
    write_csv(shown(table), FIGURES / "table_effects.csv")
    draw(table)
    spent(dice, helps)


if __name__ == "__main__":
    main()
