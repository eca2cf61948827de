"""What changes the Dice on an anatomy never seen, SAM in its forms and everything else, on one axis.

    python studies/effects.py runs/unseen runs/forms runs/alone ...    # keeps what their runs measured
    python studies/effects.py                                          # tables and figures of what is kept

Of every run figures/networks.csv keeps, a row a network (averages of its weights, too) and test set: the mean Dice,
that of the worst 5 % of pairs, and other measures. An effect is a difference between networks of the same training and
seed, on the sets that neither saw, averaged over trainings and sets. p is of a t test over seeds, by Holm's correction
over all that SAM is said to change but the primary contrast at its two lengths. Writes figures/effects.csv, a row an
effect, anatomy and seed; its figure and tables; figures/unseen_answer.png, spent.png and unseen_matrix.png;
figures/table_arms.csv and smoothness.png. figures/validation.csv keeps the Dice on subjects held out as trainings went
on; validation.png draws the longest ones. Where a study corrupted images, figures/corrupted.csv keeps the mean Dice of
every network, set and kind, and figures/table_corrupted.csv compares them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib import colors
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from statsmodels.stats.multitest import multipletests

from fmsam_lib.evaluation.anatomies import BAND, LEVEL, NEW, THESE
from fmsam_lib.evaluation.evaluate import read_results
from fmsam_lib.evaluation.statistics import per_pair, whole_seeds
from fmsam_lib.plotting import slices, style
from fmsam_lib.records import PROJECT, write_csv
from fmsam_lib.study.file import read_study
from fmsam_lib.training.checkpoint import trained_with

FIGURES = PROJECT / "figures"
SPOILT, VALIDATION = FIGURES / "corrupted.csv", FIGURES / "validation.csv"
UNSEEN, REAL, SHIFTS, FORMS, SETTINGS = (
    read_study(PROJECT / "studies" / f"{name}.yaml") for name in ("unseen", "real", "shifts", "forms", "settings")
)
ANATOMY = {name: anatomy for anatomy, names in UNSEEN.groups.items() for name in names}
SHIFT = dict(zip(SHIFTS.train_domains, ["one hospital", "the other hospital", "MR", "no MR"], strict=True))
ABOUT = ["study", "train_domain", "subjects", "optimizer", "seed", "gradients", "test_domain", "seen", "pairs"]
NETWORK = [name for name in ABOUT if name not in ("gradients", "seen", "pairs")]  # and the set that it is tested on
MEASURES = ["dice", "worst", "hd95", "sdlogj", "folding_percent"]
WORST = 0.05  # of the pairs
BY_SAM, OTHER = "SAM minus Adam, at equal compute if not said", "Adam, with other help"
MEASURED = "SAM minus Adam, other measures and images, and forms at equal steps"  # in the table alone
TUNED, LONGER, STEPS, STEPS_LONGER = (  # both primary arms at two lengths, at equal compute and at equal steps
    (("unseen", adam), ("unseen", sam))
    for adam, sam in (("adam-2x", "sam"), ("adam-4x", "sam-2x"), ("adam", "sam"), ("adam-2x", "sam-2x"))
)
PRIMARY = [f"as tuned (rho 0.001), {n} gradients" for n in ("8,000", "16,000")]
ONE = ("alone", "adam-2x")  # trained on one anatomy; with as many gradients, 4,000, on more of them
LARGE = ("settings", "sam-unigradicon")
INSTEAD = {  # beside the answer
    "trained on two anatomies, not one": "two anatomies, not one",
    "fine-tuned on 5 subjects": "five of its subjects",
    "50 steps of instance optimisation": "50 steps on the pair",
}
MORE = {
    "two anatomies": ("two", "adam"),
    "four anatomies": ("four", "adam"),
    "four and synthetic ones": ("unseen", "adam"),
}
# kind and name: the study and optimizer of the baseline, and of the treatment; and what is measured, if not Dice
EFFECTS = {
    **{(BY_SAM, name): of for name, of in zip(PRIMARY, (TUNED, LONGER), strict=True)},
    (BY_SAM, "32,000 gradients"): (("unseen", "adam-8x"), ("unseen", "sam-4x")),
    (BY_SAM, "equal steps, 4,000"): STEPS,
    (BY_SAM, "equal steps, 8,000"): STEPS_LONGER,
    (BY_SAM, "averaged weights (EMA) of both"): (("unseen", "adam-2x+ema"), ("unseen", "sam+ema")),
    (BY_SAM, "averaged weights (last quarter) of both"): (("unseen", "adam-2x+tail"), ("unseen", "sam+tail")),
    (BY_SAM, "rho 0.003"): (("forms", "adam-2x"), ("forms", "sam-0.003")),
    (BY_SAM, "rho 0.01"): (("forms", "adam-2x"), ("forms", "sam-0.01")),
    (BY_SAM, "rho 0.001, constant"): (("forms", "adam-2x"), ("forms", "constant-0.001")),
    (BY_SAM, "rho 0.01, constant"): (("forms", "adam-2x"), ("forms", "constant-0.01")),
    (BY_SAM, "climb by part of the batch"): (("forms", "adam-part"), ("forms", "part-0.0064")),
    (BY_SAM, "climb by layer"): (("forms", "adam-2x"), ("forms", "layer-0.0014")),
    (BY_SAM, "BatchNorm's weights alone"): (("forms", "adam-2x"), ("forms", "norms-0.07")),
    (BY_SAM, "relative to the weights (ASAM)"): (("forms", "adam-2x"), ("forms", "asam-0.08")),
    (BY_SAM, "in the last quarter alone"): (("forms", "adam-2x"), ("forms", "late-0.01")),
    (BY_SAM, "in one step of five"): (("forms", "adam-2x"), ("forms", "every-5")),
    (BY_SAM, "15 subjects a set"): (("few", "adam-2x-subjects=15"), ("few", "sam-subjects=15")),
    (BY_SAM, "5 subjects a set"): (("few", "adam-2x-subjects=5"), ("few", "sam-subjects=5")),
    (BY_SAM, "trained on one anatomy"): (("alone", "adam-2x"), ("alone", "sam")),
    (BY_SAM, "trained on one anatomy, rho 0.01"): (("alone", "adam-2x"), ("alone", "sam-0.01")),
    (BY_SAM, "half the penalty (lambda 0.75)"): (("settings", "lambda-0.75"), ("settings", "sam-lambda-0.75")),
    (BY_SAM, "no augmentation"): (("settings", "plain"), ("settings", "sam-plain")),
    (BY_SAM, "no augmentation, equal steps, 4,000"): (("settings", "adam-plain"), ("settings", "sam-plain")),
    (BY_SAM, "contrast varied in training"): (("settings", "contrast"), ("settings", "sam-contrast")),
    (BY_SAM, "twice the channels"): (("settings", "wide"), ("settings", "sam-wide")),
    (BY_SAM, "uniGradICON's channels, 4,000 gradients"): (("settings", "unigradicon"), LARGE),
    (BY_SAM, "uniGradICON's channels, equal steps, 2,000"): (("settings", "adam-unigradicon"), LARGE),
    (BY_SAM, "trained on real images alone"): (("real", "adam-2x"), ("real", "sam")),
    (BY_SAM, "another hospital, same anatomy"): (("hospital", "adam-2x"), ("hospital", "sam")),
    (BY_SAM, "another modality, other anatomies"): (("modality", "adam-2x"), ("modality", "sam")),
    (MEASURED, "rho 0.003, equal steps, 4,000"): (("unseen", "adam"), ("forms", "sam-0.003")),
    (MEASURED, "rho 0.01, equal steps, 4,000"): (("unseen", "adam"), ("forms", "sam-0.01")),
    (MEASURED, "climb by layer, equal steps, 4,000"): (("unseen", "adam"), ("forms", "layer-0.0014")),
    (MEASURED, "rho 0.001, constant, equal steps, 4,000"): (("unseen", "adam"), ("forms", "constant-0.001")),
    (MEASURED, "rho 0.01, constant, equal steps, 4,000"): (("unseen", "adam"), ("forms", "constant-0.01")),
    (MEASURED, "worst 5 % of pairs, 8,000 gradients"): (*TUNED, "worst"),
    (MEASURED, "worst 5 % of pairs, 16,000 gradients"): (*LONGER, "worst"),
    (MEASURED, "worst 5 % of pairs, equal steps, 4,000"): (*STEPS, "worst"),
    (MEASURED, "worst 5 % of pairs, equal steps, 8,000"): (*STEPS_LONGER, "worst"),
    (MEASURED, "HD95 (mm or samples), 8,000 gradients"): (*TUNED, "hd95"),
    (MEASURED, "HD95 (mm or samples), 16,000 gradients"): (*LONGER, "hd95"),
    (MEASURED, "folded, %, 8,000 gradients"): (*TUNED, "folding_percent"),
    (MEASURED, "folded, %, 16,000 gradients"): (*LONGER, "folding_percent"),
    (MEASURED, "anatomies trained on, 8,000 gradients"): (("seen", "adam-2x"), ("seen", "sam")),
    (MEASURED, "anatomies trained on, 16,000 gradients"): (("seen", "adam-4x"), ("seen", "sam-2x")),
    (MEASURED, "BatchNorm's statistics of the new images"): (("unseen", "adam-2x+bn"), ("unseen", "sam+bn")),
    (MEASURED, "corrupted images, mean of seven kinds"): (("corrupted", "adam-2x"), ("corrupted", "sam")),
    (OTHER, "averaged weights (EMA)"): (("unseen", "adam-2x"), ("unseen", "adam-2x+ema")),
    (OTHER, "averaged weights (last quarter)"): (("unseen", "adam-2x"), ("unseen", "adam-2x+tail")),
    (OTHER, "BatchNorm's statistics of the new images"): (("unseen", "adam-2x"), ("unseen", "adam-2x+bn")),
    (OTHER, "half the penalty (lambda 0.75)"): (("unseen", "adam-2x"), ("settings", "lambda-0.75")),
    (OTHER, "twice the penalty (lambda 3)"): (("unseen", "adam-2x"), ("settings", "lambda-3")),
    (OTHER, "no augmentation"): (("unseen", "adam-2x"), ("settings", "plain")),
    (OTHER, "contrast varied in training"): (("unseen", "adam-2x"), ("settings", "contrast")),
    (OTHER, "twice the channels"): (("unseen", "adam-2x"), ("settings", "wide")),
    (OTHER, "uniGradICON's channels, 4,000 gradients"): (("unseen", "adam"), ("settings", "unigradicon")),
    (OTHER, "no synthetic images"): (("unseen", "adam-2x"), ("real", "adam-2x")),
    (OTHER, "8,000 gradients, not 4,000"): (("unseen", "adam"), ("unseen", "adam-2x")),
    (OTHER, "16,000 gradients, not 8,000"): (("unseen", "adam-2x"), ("unseen", "adam-4x")),
    (OTHER, "32,000 gradients, not 16,000"): (("unseen", "adam-4x"), ("unseen", "adam-8x")),
}
RADII = {"sam-0.003": "SAM, rho 0.003", "sam-0.01": "SAM, rho 0.01"}  # beside 0.001, falling to 0
RADII |= {f"constant-{rho}": f"SAM, rho {rho}, constant" for rho in (0.001, 0.01)}
LONGEST = {"adam-8x": "adam", "sam-4x": "sam"}
PENALTIES = ("lambda-3", "adam-2x", "lambda-0.75")  # Adam's, from the smoothest maps on, with as many gradients
ADAM, IO, TUNING = ("adam-2x", "nothing", 0), "io", "fine-tuned, adam"
HELPS = {  # network, means and amount: of the baseline, and of the treatment
    (BY_SAM, "both after 50 steps of instance optimisation"): (("adam-2x", IO, 50), ("sam", IO, 50)),
    (BY_SAM, "both fine-tuned on 5 subjects, with Adam"): (("adam-2x", TUNING, 5), ("sam", TUNING, 5)),
    (BY_SAM, "fine-tuned by SAM, not Adam, on 5 subjects"): (("adam-2x", TUNING, 5), ("adam-2x", "fine-tuned, sam", 5)),
    **{(OTHER, f"{n} steps of instance optimisation"): (ADAM, ("adam-2x", IO, n)) for n in (10, 50)},
    **{(OTHER, f"fine-tuned on {n} subjects"): (ADAM, ("adam-2x", TUNING, n)) for n in (2, 5, 20)},
}


def trained_on(train_domain: str) -> str:
    """The training sets; "all but heart" where one anatomy is left out; of `shifts`, what `SHIFT` calls them."""
    one = UNSEEN.left_out(train_domain) or REAL.left_out(train_domain)
    return f"all but {one}" if one else SHIFT.get(train_domain, train_domain)


def kept(study: Path) -> pd.DataFrame:
    """What every network of a study measured on every set."""
    rows = []
    for folder in sorted(file.parent for file in study.glob("*/*/seed*/results.csv")):
        run, results = trained_with(folder), read_results(folder / "results.csv")
        if results.duplicated([*results.columns.drop("value")]).any():
            raise ValueError(f"{folder}/results.csv holds a value twice: remove it, and the study measures again")
        last = json.loads((folder / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        values = {m: per_pair(results, m).groupby(["optimizer", "test_domain"]).value for m in MEASURES if m != "worst"}
        for (name, test), dice in values["dice"]:
            about = {"study": study.name, "train_domain": trained_on(run.train_domain), "subjects": run.subjects}
            after = "".join(name.partition("+")[1:])
            about |= {"optimizer": folder.parent.name + after, "seed": run.seed, "pairs": len(dice)}
            about |= {"gradients": last["gradient_evaluations"], "test_domain": test}
            about |= {"seen": test in run.train_domain.split("+")}
            found = {measure: of.get_group((name, test)).mean(skipna=False) for measure, of in values.items()}
            rows.append(about | found | {"worst": dice.nsmallest(max(1, round(WORST * len(dice)))).mean()})
    return pd.DataFrame(rows)[ABOUT + MEASURES]


def corrupted(study: Path) -> pd.DataFrame:
    """What every network of a study measured on corrupted images: mean Dice of a kind over severities and pairs."""
    rows = []
    for file in sorted(study.glob("*/*/seed*/robustness.csv")):
        run, table = trained_with(file.parent), pd.read_csv(file)
        table = table[~table.optimizer.str.contains("+", regex=False)]  # the network alone
        spoilt = table.query("metric == 'dice' and severity > 0").groupby(["test_domain", "corruption"])
        about = {"study": study.name, "train_domain": trained_on(run.train_domain)}
        about |= {"optimizer": file.parent.parent.name, "seed": run.seed}
        for (test, kind), dice in spoilt.value.mean().items():
            seen = test in run.train_domain.split("+")
            rows.append(about | {"test_domain": test, "seen": seen, "corruption": kind, "dice": dice})
    return pd.DataFrame(rows)


def validated(study: Path) -> pd.DataFrame:
    """The Dice on subjects held out as the study's longest trainings went on."""
    parts = []
    for file in sorted(path for name in LONGEST for path in study.glob(f"*/{name}/seed*/history.jsonl")):
        run, lines = trained_with(file.parent), pd.read_json(file, lines=True).dropna(subset=["dice"])
        about = {"train_domain": trained_on(run.train_domain), "optimizer": file.parent.parent.name, "seed": run.seed}
        parts.append(lines[["gradient_evaluations", "dice"]].assign(**about)[[*about, "gradient_evaluations", "dice"]])
    return pd.concat(parts) if parts else pd.DataFrame()


def draw_validation(curves: pd.DataFrame) -> None:
    """Mean and range over the trainings."""
    picture, (ax,) = style.panels(1, 1, 3.2, "Dice, subjects held out")
    for name, looks in LONGEST.items():
        mine = curves[curves.optimizer == name].set_index("gradient_evaluations").dice
        style.curve(ax, mine, style.LOOKS[looks] | {"marker": ""}, label=style.name_of(looks))
    ax.set_xlabel("gradients spent (SAM: two a step)")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    style.open_up(ax)
    ax.set_ylim(bottom=curves[curves.gradient_evaluations >= 2000].dice.min())
    ax.legend(frameon=False, loc="lower right")
    length, arms = curves.gradient_evaluations.max(), curves.groupby("optimizer")
    numbers = f"{arms.train_domain.nunique().min()} trainings, {arms.seed.nunique().min()} seed"
    ax.set_title(f"{length:,} gradients, mean and range of {numbers}", fontsize=10)
    picture.savefig(FIGURES / "validation.png", dpi=slices.DPI, metadata={"Software": None})


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Adam beside SAM for every kind of corruption, on the sets that a network never saw: means over anatomies."""
    rows = table[~table.seen].set_index(["corruption", "train_domain", "seed", "test_domain"])
    lines = []
    for kind, mine in rows.groupby("corruption", sort=False):
        arms = [mine[mine.optimizer == name].dice for name in ("adam-2x", "sam")]
        shared = arms[0].index.intersection(arms[1].index)
        adam, sam = (by_anatomy(arm.loc[shared]) for arm in arms)
        both = sam - adam
        seeds, each = both.groupby("seed").mean(), both.groupby("anatomy").mean()
        line = {"corruption": kind.replace("_", " "), "Adam, twice the steps": f"{adam.mean():.3f}"}
        line |= {"SAM": f"{sam.mean():.3f}", "SAM - Adam [90 %]": with_interval(each.mean(), seeds)}
        line |= {"lowest anatomy": f"{each.min():+z.3f}", "highest anatomy": f"{each.max():+z.3f}"}
        lines.append(line)
    return pd.DataFrame(lines)


def by_anatomy(values: pd.Series) -> pd.Series:
    """The mean of every anatomy and seed, its sets averaged first, of the seeds that have all trainings and sets.

    The index has seed and test_domain, at least.
    """
    table = values.rename("value").reset_index()
    table = whole_seeds(table, *table.columns.intersection(["train_domain", "test_domain"]))
    table = table.assign(anatomy=table.test_domain.map(ANATOMY))
    return table.groupby(["anatomy", "seed", "test_domain"]).value.mean().groupby(["anatomy", "seed"]).mean()


def effects(networks: pd.DataFrame, helps: pd.DataFrame, spoilt: pd.DataFrame) -> pd.DataFrame:
    """Every effect that was measured: an anatomy and seed a row."""
    seen = networks[networks.seen & (networks.study == "unseen")].assign(study="seen", seen=False)
    spoilt = spoilt.groupby(["train_domain", "optimizer", "seed", "test_domain", "seen"], as_index=False).dice.mean()
    networks = pd.concat([networks, seen, *([spoilt.assign(study="corrupted", pairs=0)] if len(spoilt) else [])])
    shift = networks.train_domain.map(lambda name: "hospital" if "hospital" in name else "modality")
    number = networks.train_domain.str.startswith("all but").map({True: "four", False: "two"})
    study = networks.study.mask(networks.study == "shifts", shift).mask(networks.study == "domains", number)
    networks = networks.assign(study=study)
    cell = ["train_domain", "seed", "test_domain"]
    rows, unseen = {}, networks[~networks.seen].set_index(["study", "optimizer"]).sort_index()
    for name, (*keys, measure) in {name: (*of, "dice")[:3] for name, of in EFFECTS.items()}.items():
        if all(key in unseen.index for key in keys):
            both = [unseen.loc[[key]].set_index([*cell, "pairs"])[measure] for key in keys]  # of as many pairs
            rows[name] = by_anatomy((both[1] - both[0]).dropna())
            if rows[name].empty:
                print(f"{name[1]}: no seed of both arms has every training and set, so it is left out")
    helped = helps.set_index(["training", "means", "amount"]).sort_index()
    for name, keys in HELPS.items():
        both = [helped.loc[[key]].set_index(["seed", "test_domain"]).dice for key in keys]
        rows[name] = by_anatomy((both[1] - both[0]).dropna())
    for name, of in MORE.items():  # not the same trainings: the means of each anatomy are compared
        if {of, ONE} <= {*unseen.index}:
            more, one = (by_anatomy(unseen.loc[[key]].set_index(cell).dice) for key in (of, ONE))
            rows[OTHER, f"trained on {name}, not one"] = (more - one).dropna()
    table = pd.concat(rows, names=["kind", "effect"]).rename("difference").reset_index()
    return table.sort_values("kind", key=lambda kind: kind.map([BY_SAM, MEASURED, OTHER].index), kind="stable")


def ends(seeds: pd.Series) -> tuple[float, float]:
    """The t interval of the mean over seeds."""
    return scipy.stats.t.interval(LEVEL, len(seeds) - 1, seeds.mean(), seeds.sem())


def with_interval(mean: float, seeds: pd.Series) -> str:
    """A difference in words, with the t interval over seeds where there are three or more."""
    return f"{mean:+.3f}" + (" [{:+.3f}, {:+.3f}]".format(*ends(seeds)) if len(seeds) > 2 else "")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """An effect a row: the mean over anatomies, with a t interval over seeds where there are three or more."""
    lines = []
    for (kind, effect), mine in table.groupby(["kind", "effect"], sort=False):
        seeds, each = mine.groupby("seed").difference.mean(), mine.groupby("anatomy").difference.mean()
        line = {"difference": "with it - without" if kind == OTHER else "SAM - Adam", "of": effect}
        line |= {"change [90 %]": with_interval(each.mean(), seeds), "p, Holm": np.nan}
        if kind != OTHER and effect not in PRIMARY and len(seeds) > 2:
            line["p, Holm"] = scipy.stats.ttest_1samp(seeds, 0).pvalue
        for name, at in (("lowest", each.idxmin()), ("highest", each.idxmax())):
            line[f"{name} anatomy"] = f"{each.loc[at]:+z.3f} ({at})"
        lines.append(line | {"anatomies": len(each), "seeds": len(seeds)})
    lines = pd.DataFrame(lines)
    listed = lines["p, Holm"].dropna()
    lines.loc[listed.index, "p, Holm"] = multipletests(listed, method="holm")[1] if len(listed) else listed
    return lines.assign(**{"p, Holm": lines["p, Holm"].map("{:.3f}".format).replace({"nan": "", "0.000": "< 0.001"})})


def draw(table: pd.DataFrame) -> None:
    """An effect a row, below the heading of its kind: anatomies as points, their mean as a bar, its value beside it."""
    rows = [(kind, name) for kind, mine in table.groupby("kind", sort=False) for name in ("", *mine.effect.unique())]
    picture = slices.Picture(figsize=(8, min(0.24 * len(rows) + 1.4, slices.MOST_HIGH)), layout="constrained")
    ax, looks = picture.subplots(), dict(zip(sorted(UNSEEN.groups), [*style.LOOKS.values()][3:], strict=False))
    ax.axvspan(-BAND, BAND, color="#e6e6e6", zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    for y, (kind, name) in enumerate(rows):
        mine = table[(table.kind == kind) & (table.effect == name)]
        each, seeds = mine.groupby("anatomy").difference.mean(), mine.groupby("seed").difference.mean()
        for anatomy, difference in each.items():
            ax.plot(difference, y, markersize=4.5, **looks[anatomy] | {"linestyle": ""})
        if name:
            ax.plot(each.mean(), y, marker="|", markersize=13, markeredgewidth=3, color="black")
            if len(seeds) > 2:
                ax.plot(ends(seeds), [y, y], color="black", linewidth=1)
            told = f"{each.mean():+.3f}, {len(seeds)} seed{'s' * (len(seeds) > 1)}".replace("-", "−")
            ax.annotate(told, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [name or kind for kind, name in rows], fontsize=9)
    for label, (_, name) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if name else "bold")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    told = "change of Dice on anatomies never seen (grey: ±0.01; line: 90 % over seeds)"
    ax.set_xlabel(told, fontsize=10, x=0.35)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for name, look in looks.items():
        ax.plot([], [], label=name, **look | {"linestyle": ""})
    ax.plot([], [], marker="|", markersize=12, markeredgewidth=3, color="black", linestyle="", label="mean")
    picture.legend(loc="outside upper center", ncols=6, frameon=False)
    picture.savefig(FIGURES / "effects.png", dpi=slices.DPI, metadata={"Software": None})


def answer(table: pd.DataFrame) -> None:
    """SAM minus Adam on every anatomy when it was left out, and on all: after both lengths, and at equal steps.

    Below, what helps instead, as the mean of all.
    """
    model = pd.read_csv(FIGURES / "unseen.csv").query("role == 'primary'").set_index("anatomy")
    parts = {"equal compute, 16,000 gradients": model}
    for name, effect in (
        ("equal compute, 8,000 gradients (intervals over seeds alone)", PRIMARY[0]),
        ("equal steps, 8,000: SAM costs twice as much (likewise)", "equal steps, 8,000"),
    ):
        seeds = table[table.effect == effect].pivot(index="seed", columns="anatomy", values="difference")
        seeds[THESE] = seeds.mean(axis=1)
        parts[name] = seeds.apply(ends).set_axis(["low", "high"]).T.assign(mean=seeds.mean())
    others = table[(table.kind == OTHER) & table.effect.isin(INSTEAD)].groupby("effect")
    others = {name: rows.groupby("seed").difference.mean() for name, rows in others}
    others = {INSTEAD[name]: (*ends(seeds), seeds.mean()) for name, seeds in others.items()}
    parts["Adam with other help, minus Adam without (likewise; 3 seeds)"] = pd.DataFrame(
        others, ["low", "high", "mean"]
    ).T
    places = {name: float(y) for y, name in enumerate([*UNSEEN.leave_one_out, THESE, NEW])}
    places |= {name: len(places) - 0.2 + 0.5 * i for i, name in enumerate(INSTEAD.values())}  # a line each
    picture = slices.Picture(figsize=(7.5, 6.4), layout="constrained")
    ax = picture.subplots()
    ax.axvspan(-BAND, BAND, color="#e6e6e6", zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    for i, (label, part) in enumerate(parts.items()):
        look = style.LOOKS[("adam", "sam", "asam", "random")[i]] | {"linestyle": "-"}
        ax.plot([], [], label=label, **look)
        for name, row in part.iterrows():
            y = places[name] + (0 if name in INSTEAD.values() else 0.29 * (i - 1))
            ax.plot([row.low, row.high], [y, y], linewidth=2.5, color=look["color"])
            ax.plot(row["mean"], y, **look)
            told = f"{row['mean']:+z.3f} [{row.low:+.3f}, {row.high:+.3f}]".replace("-", "−")
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9, "color": look["color"]}
            ax.annotate(told, (1.02, y), **at)
    for y in (places[THESE], places[NEW] + 1):
        ax.axhline(y - 0.5, color="gray", linewidth=0.8)
    ax.set_yticks([*places.values()], [*places])
    ax.set_ylim(max(places.values()) + 0.4, -0.5)
    ax.set_xlabel("change of Dice on anatomies never seen (90 % intervals; grey: ±0.01)")
    style.open_up(ax)
    picture.legend(loc="outside upper center", frameon=False)
    picture.savefig(FIGURES / "unseen_answer.png", dpi=slices.DPI, metadata={"Software": None})


def spent(networks: pd.DataFrame, helps: pd.DataFrame) -> None:
    """Mean Dice against the gradients spent, of the seeds that have every arm: on all anatomies, and of each radius."""
    arms = {name for of in (TUNED, LONGER, STEPS) for _, name in of}
    runs = networks[networks.study == "unseen"]
    picture, panels = style.panels(2, 2, 4.0, "Dice, mean of the anatomies")
    on_all, number = lengths(runs, {*arms, "adam-2x+ema", "sam+ema"})
    panels[0].set_title(f"five anatomies, {number} seeds", fontsize=10)
    for (kind, seen), line in on_all.groupby(["kind", "seen"]):
        look, plain = style.LOOKS[kind], line[~line.optimizer.str.contains("+", regex=False)]
        look = look | {"linestyle": ":" if seen else "-", "markerfacecolor": "white" if seen else None}
        told = "trained on the anatomy" if seen else "never saw it"
        panels[0].plot(plain.gradients, plain.dice, label=f"{style.name_of(kind)}, {told}", **look)
        averaged = line.drop(index=plain.index)
        if not seen:
            look = style.LOOKS[kind] | {"marker": "D", "linestyle": "", "markerfacecolor": "white"}
            label = f"{style.name_of(kind)}, averaged weights (EMA)"
            panels[0].plot(averaged.gradients, averaged.dice, label=label, **look, markersize=9)
    alone, number = lengths(runs[~runs.seen], {*arms, *LONGEST})
    for kind, line in alone.groupby("kind"):
        thin = style.LOOKS[kind] | {"linestyle": "-", "marker": ".", "alpha": 0.5}
        panels[0].plot(
            line.gradients, line.dice, linewidth=1, label=f"{style.name_of(kind)}, never saw it, {number} seed", **thin
        )
    syn = helps[helps.training == "ants-syn"].set_index("test_domain").dice.groupby(ANATOMY).mean().mean()
    panels[0].axhline(syn, label=style.name_of("ants-syn"), **style.LOOKS["ants-syn"] | {"marker": ""})
    on_two, number = lengths(on_chest_and_knee(networks), {*arms, *RADII})
    panels[1].set_title(f"chest and knee, never seen, {number} seeds", fontsize=10)
    for kind, line in on_two[~on_two.optimizer.isin([*RADII])].groupby("kind"):
        panels[1].plot(line.gradients, line.dice, **style.LOOKS[kind] | {"linestyle": "-"})
    for i, (name, label) in enumerate(RADII.items()):
        (point,) = on_two[on_two.optimizer == name].itertuples()
        look = {"marker": "^v<>"[i], "color": "#E69F00" if "constant" in name else "#CC79A7", "linestyle": ""}
        panels[1].plot(point.gradients, point.dice, label=label, **look)
    for ax in panels:
        ax.set_xscale("log", base=2)
        ticks = sorted({*(alone if ax is panels[0] else on_two).gradients})
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
        style.open_up(ax)
        ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        ax.set_xlabel("gradients spent (SAM: two a step)")
    picture.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    picture.savefig(FIGURES / "spent.png", dpi=slices.DPI, metadata={"Software": None})


def lengths(networks: pd.DataFrame, arms: set[str]) -> tuple[pd.DataFrame, int]:
    """Mean Dice over anatomies, a row for each of the arms and whether it saw them; of how many seeds."""
    runs = whole_seeds(networks[networks.optimizer.isin(arms)], "optimizer", "train_domain", "test_domain")
    kinds = np.where(runs.optimizer.str.startswith("adam"), "adam", "sam")
    runs = runs.assign(anatomy=runs.test_domain.map(ANATOMY), kind=kinds)
    keys = ["kind", "optimizer", "seen", "gradients"]
    sets = runs.groupby([*keys, "anatomy", "test_domain"]).dice.mean()
    means = sets.groupby([*keys, "anatomy"]).mean().groupby(keys).mean()
    return means.reset_index().sort_values("gradients"), runs.seed.nunique()


def matrix(networks: pd.DataFrame, helps: pd.DataFrame) -> None:
    """Mean Dice of Adam and SAM's difference, of every training on every set; a frame: it was trained on the set."""
    left_out, sets = [f"all but {anatomy}" for anatomy in UNSEEN.leave_one_out], UNSEEN.test_domains
    runs = networks[(networks.study == "unseen") & networks.optimizer.isin(["adam-2x", "sam", "adam-4x", "sam-2x"])]
    runs = whole_seeds(runs, "optimizer", "train_domain", "test_domain")
    cells = runs.groupby(["optimizer", "train_domain", "test_domain"])[["dice", "seen"]].mean()
    dice = {name: cells.dice[name].unstack().loc[left_out, sets].to_numpy() for name in runs.optimizer.unique()}
    framed = cells.seen["sam"].unstack().loc[left_out, sets].to_numpy(bool)
    before = helps[helps.training == "none"].groupby("test_domain").dice.mean().loc[sets].to_numpy()[None]
    of_dice = {"cmap": "cividis", "norm": colors.Normalize(before.min(), dice["adam-4x"].max())}
    of_gains = {"cmap": "PuOr", "norm": colors.Normalize(-0.03, 0.03)}
    blocks = [("Dice before registration", before, [""], of_dice)]
    for number, adam, sam in (("8,000", "adam-2x", "sam"), ("16,000", "adam-4x", "sam-2x")):
        blocks.append((f"Dice of Adam, {number} gradients", dice[adam], left_out, of_dice))
        blocks.append((f"SAM minus Adam, {number} gradients", dice[sam] - dice[adam], left_out, of_gains))
    picture = slices.Picture(figsize=(8, slices.MOST_HIGH), layout="constrained")
    panels = picture.subplots(len(blocks), 1, height_ratios=[len(rows) for _, _, rows, _ in blocks], sharex=True)
    for ax, (title, values, rows, look) in zip(panels, blocks, strict=True):
        ax.imshow(values, aspect="auto", **look)
        for (row, column), value in np.ndenumerate(values):
            dark = look["norm"](value) < 0.5 if look is of_dice else abs(look["norm"](value) - 0.5) > 0.35
            told = f"{value:.3f}" if look is of_dice else f"{value:+z.3f}".replace("-", "−")
            ax.text(column, row, told, ha="center", va="center", fontsize=9, color="white" if dark else "black")
            if len(rows) > 1 and framed[row, column]:
                place = (column - 0.46, row - 0.42)
                ax.add_patch(Rectangle(place, 0.92, 0.84, fill=False, edgecolor="black", linewidth=1.5))
        ax.set_title(title, fontsize=10)
        ax.set_yticks(range(len(rows)), rows, fontsize=9)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    panels[-1].set_xticks(range(len(sets)), sets, rotation=20, ha="right", rotation_mode="anchor", fontsize=9)
    panels[-1].set_xlabel(f"tested on (mean of {runs.seed.nunique()} seeds; framed: trained on this set)")
    for ax, label in ((panels[1], "Dice"), (panels[-1], "difference of Dice")):
        picture.colorbar(ax.images[0], ax=ax, label=label, aspect=10, pad=0.02)
    picture.savefig(FIGURES / "unseen_matrix.png", dpi=slices.DPI, metadata={"Software": None})


def on_chest_and_knee(networks: pd.DataFrame) -> pd.DataFrame:
    """The networks on all subjects that left out the chest or the knee, on it; what two studies share once."""
    rows = networks[networks.study.isin(["unseen", "forms", "settings"]) & ~networks.seen]
    rows = rows[rows.train_domain.isin(["all but chest", "all but knee"])]
    return rows.drop_duplicates(["optimizer", "seed", "train_domain", "test_domain"])


def arms(networks: pd.DataFrame) -> pd.DataFrame:
    """Means of every arm without the chest or the knee on these two, of the seeds that every arm has but the longest.

    Are the arms alike in their transforms? An arm and its gradients a row, the best first.
    """
    rows = on_chest_and_knee(networks)
    rows = rows[~rows.optimizer.str.contains("+", regex=False) & ~rows.optimizer.isin([*LONGEST])]
    rows = whole_seeds(rows, "optimizer", "test_domain").assign(anatomy=rows.test_domain.map(ANATOMY))
    keys = ["optimizer", "gradients"]
    each = rows.groupby([*keys, "seed", "anatomy"])[MEASURES].mean()
    means = each.groupby(keys).mean().assign(seeds=rows.seed.nunique())
    of_seeds = each.groupby(["seed", *keys]).mean().reset_index(keys)
    beside = of_seeds.groupby("seed", group_keys=False).apply(beside_the_penalty).groupby(keys).beside
    beside = {arm: "" if of.isna().any() or arm[0] in PENALTIES else with_interval(of.mean(), of) for arm, of in beside}
    means["beside"] = pd.Series(beside)
    return means.sort_values("dice", ascending=False).reset_index()


def beside_the_penalty(of_seed: pd.DataFrame) -> pd.DataFrame:
    """How far the arms of a seed lie above Adam's line from one weight of the penalty to the next.

    Not a number where the line does not reach, and of arms with more gradients or fewer than those on the line have.
    """
    line = of_seed.set_index("optimizer").loc[[*PENALTIES]]
    there = np.interp(of_seed.sdlogj, line.sdlogj, line.dice, left=np.nan, right=np.nan)
    as_long = (of_seed.gradients / line.gradients.iloc[0] - 1).abs() < 0.01
    return of_seed.assign(beside=(of_seed.dice - there).where(as_long))


def arms_told(means: pd.DataFrame) -> pd.DataFrame:
    """The table of the arms as it is shown."""
    digits = {"dice": 3, "worst": 3, "hd95": 2, "sdlogj": 3, "folding_percent": 3}
    told = means.drop(columns="seeds").assign(
        **{name: means[name].map(f"{{:.{n}f}}".format) for name, n in digits.items()}
    )
    told = told.rename(columns={"beside": "Dice, above lambda's line [90 %]"})
    names = {"optimizer": "arm", "dice": "Dice", "worst": "Dice, worst 5 %", "hd95": "HD95, mm or samples"}
    return told.rename(columns=names | {"sdlogj": "SDlogJ", "folding_percent": "folded, %"})


def smoothness(means: pd.DataFrame) -> None:
    """Dice against SDlogJ, a point an arm; those that differ by the penalty or by the length alone are joined."""
    at = means.set_index("optimizer")[["sdlogj", "dice"]]
    picture = slices.Picture(figsize=(7, 4.6), layout="constrained")
    ax, adam, sam = picture.subplots(), style.LOOKS["adam"], style.LOOKS["sam"]
    lines = {
        "Adam, 8,000 gradients, by lambda": ([*PENALTIES], adam),
        "SAM, 8,000 gradients, by lambda": (["sam", "sam-lambda-0.75"], sam),
        "Adam, lambda 1.5, by gradients": (["adam", "adam-2x", "adam-4x"], adam | {"linestyle": ":"}),
        "SAM, lambda 1.5, by gradients": (["sam", "sam-2x"], sam | {"linestyle": ":"}),
    }
    for label, (names, look) in lines.items():
        ax.plot(at.sdlogj[names], at.dice[names], label=label, **look)
    others = at.drop(index={name for names, _ in lines.values() for name in names})
    variants = FORMS.variants | SETTINGS.variants
    by_adam = np.array([variants[name]["optimizer"].startswith("adam") for name in others.index])
    for label, of, look in (("Adam, other arms", by_adam, adam), ("SAM, other forms and arms", ~by_adam, sam)):
        ax.plot(others.sdlogj[of], others.dice[of], label=label, **look | {"linestyle": "", "markerfacecolor": "white"})
    below, left = {"xytext": (7, -11)}, {"xytext": (-7, 4), "ha": "right"}
    said = {name: ("lambda 0.75", below) for name in ("lambda-0.75", "sam-lambda-0.75")}
    said |= {"lambda-3": ("lambda 3", below), "adam": ("4,000", below), "plain": ("no augmentation", below)}
    said |= {name: ("16,000", left) for name in ("adam-4x", "sam-2x")} | {"wide": ("twice the channels", below)}
    for name, (text, where) in said.items():
        ax.annotate(text, at.loc[name], **where, textcoords="offset points", fontsize=8, color="#333333")
    ax.set_xlabel("SDlogJ (the smaller, the smoother the map)")
    ax.set_ylabel(f"Dice, chest and knee never seen, {means.seeds.iloc[0]} seeds")
    style.open_up(ax)
    picture.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    picture.savefig(FIGURES / "smoothness.png", dpi=slices.DPI, metadata={"Software": None})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("studies", nargs="*", type=Path, help="folders of computed studies")
    path = FIGURES / "networks.csv"
    networks = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=ABOUT + MEASURES)
    for study in arguments.parse_args().studies:
        parts = [part for part in (networks, kept(study)) if len(part)]
        networks = pd.concat(parts).drop_duplicates(NETWORK, keep="last").sort_values(ABOUT[:-1])
        write_csv(networks, path, float_format="%.5g")
        networks = pd.read_csv(path)  # rounded, as whoever draws it again will have it
        if len(curves := validated(study)):
            curves = pd.concat([pd.read_csv(VALIDATION), curves] if VALIDATION.exists() else [curves])
            curves = curves.drop_duplicates([*curves][:-1], keep="last").sort_values([*curves][:-1])
            write_csv(curves, VALIDATION, float_format="%.5g")
        if len(spoilt := corrupted(study)):
            spoilt = pd.concat([pd.read_csv(SPOILT), spoilt] if SPOILT.exists() else [spoilt])
            write_csv(spoilt.drop_duplicates([*spoilt][:-1], keep="last"), SPOILT, float_format="%.5g")
    named = {key for of in EFFECTS.values() for key in of[:2]}
    for key in sorted({*zip(networks.study, networks.optimizer, strict=True)} - named):
        if key[0] not in ("shifts", "domains") and "+" not in key[1] and key != ("forms", "sam"):  # that of unseen
            print(f"{' '.join(key)}: in no effect")
    helps = pd.read_csv(FIGURES / "helps.csv").query("study == 'unseen'")
    spoilt = pd.read_csv(SPOILT) if SPOILT.exists() else pd.DataFrame(columns=[*ABOUT, "dice"])
    spoilt = spoilt[spoilt.study == "shifts"]
    table = effects(networks, helps, spoilt)
    write_csv(table, FIGURES / "effects.csv", float_format="%.5g")
    write_csv(shown(table), FIGURES / "table_effects.csv")
    means = arms(networks)
    write_csv(arms_told(means), FIGURES / "table_arms.csv")
    smoothness(means)
    if len(spoilt):
        write_csv(by_kind(spoilt), FIGURES / "table_corrupted.csv")
    several = table.groupby(["kind", "effect"]).seed.transform("nunique") > 1
    draw(table[several & (table.kind != MEASURED) & ~table.effect.str.startswith("averaged weights (last quarter)")])
    answer(table)
    spent(networks, helps)
    draw_validation(pd.read_csv(VALIDATION))
    matrix(networks, helps)


if __name__ == "__main__":
    main()
