"""Every table of README and docs comes from a committed CSV.

    python docs/tables.py                       make the tables again and put them into the pages
    python docs/tables.py --check               change nothing; fail where something would change
    python docs/tables.py --record runs/full    take over the results of a study that has been computed
    python docs/tables.py --refit               fit the answers again whose pairs are kept, before all else

A page says where a table stands, and what is between the two comments is written by this script:

    <!-- table: figures/NAME.csv -->
    <!-- end -->

`figures/table_*.csv` are as they are shown. Those in `MADE` are made here from recorded tables beside them; the others
are recorded by `--record` or were typed once, from the reports of studies that are no longer there.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from fmsam_lib.evaluation import anatomies
from fmsam_lib.evaluation.anatomies import LEVEL, NEW, THESE
from fmsam_lib.evaluation.corruptions import CORRUPTIONS
from fmsam_lib.evaluation.statistics import whole_seeds
from fmsam_lib.plotting.style import NAMES, measure_name, name_of
from fmsam_lib.study.file import read_study
from fmsam_lib.study.gather import gather

PROJECT = Path(__file__).resolve().parents[1]
FIGURES = PROJECT / "figures"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ABOUT = ["steps", "seed", "commit", "cpu", "threads", "torch", "device", "cuda", "monai"]  # below it
ABOUT += ["icon-registration", "unigradicon"]
STEPS, COMPUTE = "SAM - Adam, equal steps [95 %]", "SAM - Adam, equal compute [95 %]"


def rendered(text: str) -> str:
    """A page with every table as its CSV has it."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(PROJECT / found[2])}\n{found[3]}", text)


def table(path: Path) -> str:
    """Markdown of a CSV; commit, machine and versions, where all rows share them, are a line below it."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    about = [name for name in ABOUT if name in rows and rows[name].nunique() == 1]
    shown = rows.drop(columns=about).apply(lambda column: column if column.name == "commit" else column.map(short))
    cells = [list(shown.columns), ["---"] * shown.shape[1], *shown.values.tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    said = ", ".join(f"{name} {rows[name].iloc[0]}" for name in about)
    return "\n".join([*lines, *(["", f"*{said}*"] if said else []), ""])


def short(cell: str) -> str:
    """Numbers with more than four digits are cut to four; all else stays as it was recorded."""
    try:
        return cell if float(f"{float(cell):.4g}") == float(cell) else f"{float(cell):.4g}"
    except ValueError:
        return cell


def differences(rows: pd.DataFrame) -> dict[str, str]:
    """SAM's difference from each baseline, with its interval, of a comparison's lines."""
    shown = rows.apply(lambda row: f"{row['mean']:.3f} [{row.low:.3f}, {row.high:.3f}]", axis=1)
    return dict(zip(rows.baseline.map({"adam": STEPS, "adam-2x": COMPUTE}), shown, strict=True))


def beside(rows: pd.DataFrame) -> dict[str, str]:
    """Mean Dice of Adam, of Adam at twice the steps and of SAM, with SAM's differences: of a comparison's two lines."""
    means = dict(zip(rows.baseline, rows.mean_baseline, strict=True)) | {"sam": rows.mean_treatment.iloc[0]}
    return {name_of(optimizer): f"{mean:.3f}" for optimizer, mean in means.items()} | differences(rows)


def unseen() -> pd.DataFrame:
    """The answer: every anatomy when it was left out, their mean, a new one; with intervals of 90 %.

    Those at equal compute are of the mixed model over pairs; those at equal steps are over the seeds' means, that of a
    new anatomy over the anatomies'.
    """
    rows = pd.read_csv(FIGURES / "unseen.csv").query("role == 'primary'").set_index("anatomy")
    table = pd.DataFrame({"anatomy, never seen": rows.index})
    for name, values in {"Adam": rows.mean_baseline, "SAM": rows.mean_treatment}.items():
        table[name] = values.map("{:.3f}".format).to_numpy()
    table["SAM - Adam, equal compute [90 %]"] = rows.apply(interval, axis=1).to_numpy()
    table["verdict"] = rows.verdict.to_numpy()
    effects = pd.read_csv(FIGURES / "effects.csv").query("effect == 'equal steps, 8,000'")
    seeds = over_seeds(effects.pivot(index="seed", columns="anatomy", values="difference"))
    table["equal steps [90 %]"] = seeds.apply(interval, axis=1).reindex(rows.index).fillna("").to_numpy()
    return table


def volumes() -> pd.DataFrame:
    """In 3-D: every anatomy when it was left out, and SAM's difference where it was trained on."""
    rows = pd.read_csv(FIGURES / "real3d.csv").query("metric == 'dice'")
    first = rows[rows.role == "primary"].iloc[0]
    rows = rows[(rows.baseline == first.baseline) & (rows.treatment == first.treatment)]
    unseen, seen = (rows[rows.on == on].set_index("anatomy") for on in ("unseen", "seen"))
    shown = unseen[["before", "ants-syn", "mean_baseline", "mean_treatment"]].map("{:.3f}".format).replace("nan", "")
    shown.columns = ["before", "ANTs SyN", "Adam, twice the steps", "SAM"]
    shown["SAM - Adam [90 %]"] = unseen.apply(interval, axis=1)
    shown["verdict"] = unseen.verdict
    shown["where trained on it [90 %]"] = seen.apply(interval, axis=1).reindex(shown.index).fillna("")
    helps = pd.read_csv(FIGURES / "helps.csv").query("study == 'real3d' and training == 'adam-2x'")
    helps["anatomy"] = helps.train_domain.str.removeprefix("all-but-")
    dice = helps.pivot(index="anatomy", columns=["means", "amount"], values="dice").reindex(shown.index)
    for steps in (10, 50):
        gain = dice["io", steps] - dice["nothing", 0]
        gain[THESE] = gain.mean()
        shown[f"Adam, gain by {steps} steps on the pair"] = gain.map("{:+.3f}".format).replace("+nan", "")
    return shown.rename_axis("anatomy, never seen").reset_index()


def over_seeds(differences: pd.DataFrame) -> pd.DataFrame:
    """Mean and t interval of every anatomy, a column each, and of their mean; a row a seed.

    That of a new anatomy is over the anatomies' means, and never narrower than that of these (docs/protocol.md).
    """
    each, differences = differences.mean(), differences.assign(**{THESE: differences.mean(axis=1)})
    low, high = t.interval(LEVEL, len(differences) - 1, differences.mean(), differences.sem())
    found = pd.DataFrame({"mean": differences.mean(), "low": low, "high": high})
    low, high = t.interval(LEVEL, len(each) - 1, each.mean(), each.sem())
    found.loc[NEW] = each.mean(), np.minimum(low, found.low[THESE]), np.maximum(high, found.high[THESE])
    return found


def interval(row: pd.Series) -> str:
    """Signs stay, those of -0.000 too: whether an interval holds 0 is to be seen."""
    return f"{row['mean']:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"


def heldout() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout.csv")
    alone = pd.read_csv(FIGURES / "heldout_alone.csv", index_col="test_domain").rename(columns=name_of)
    each = rows[rows.train_domain == "each"]
    mine = rows[[test not in train for test, train in zip(rows.test_domain, rows.train_domain, strict=True)]]
    parts = [(f"{d}, unseen", mine[mine.test_domain == d], alone.loc[d]) for d in alone.index]
    parts += [(f"all five, **{k}**", each[each.test_domain == k], alone.mean()) for k in ("unseen", "seen")]
    return pd.DataFrame(
        {"tested on": about} | without.map("{:.3f}".format).to_dict() | beside(part) for about, part, without in parts
    )


def radius() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "radius.csv")
    rows["rho"] = rows.rho.mask(rows.optimizer.str.startswith("adam"))  # which does not use it
    rows["optimizer"] = pd.Categorical(rows.optimizer, ["adam", "adam-2x", "sam", "asam", "random"])
    lines = []
    for (lr, optimizer, rho), runs in rows.groupby(["lr", "optimizer", "rho"], dropna=False, observed=True):
        line = {"optimizer": name_of(optimizer), "rho": "" if pd.isna(rho) else f"{rho:g}", "learning rate": lr}
        dice = runs.groupby("domains").dice.mean().map("{:.3f}".format).rename("Dice, {}".format)
        lines.append(line | {"training loss at the end": f"{runs.loss.mean():.3f}"} | dice.to_dict())
    return pd.DataFrame(lines).sort_values("learning rate", ascending=False, kind="stable")


def robustness() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "full_robustness.csv")
    hardest = rows[rows.severity == rows.groupby("corruption").severity.transform("max")]
    return pd.DataFrame(
        {"corruption": CORRUPTIONS[kind].what, "hardest step": f"{mine.severity.iloc[0]:g}"} | beside(mine)
        for kind, mine in hardest.groupby("corruption", sort=False)
    )


def flatness() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout_flatness.csv").query("measure == 'ascent_rise' and rho == 0.01")
    rise = rows[rows.term == "total"].groupby("optimizer").value.median().map("{:.2f}".format)
    return pd.DataFrame({"optimizer": rise.index.map(name_of), "rise after ascent, rho = 0.01, median": rise})


def correlation() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout_correlation.csv")
    rows = rows[rows.term.fillna("total").eq("total") & rows.rho.fillna(0.01).eq(0.01)]
    names = rows.apply(lambda row: measure_name(row.measure, row.rho), axis=1).rename("measure")
    tau = rows.tau.map("{:.2f}".format).set_axis([names, "tau with Dice, " + rows.performance]).unstack(sort=False)
    return tau.reset_index()


def tuning() -> pd.DataFrame:
    """Dice on the left-out synthetic anatomies, by learning rate and radius; a network of Dice 0 diverged."""
    rows = pd.read_csv(FIGURES / "tuning.csv")
    keys = ["optimizer", "lr", "rho", "gradients"]
    wide = rows.pivot(index=keys, columns="left_out", values="dice")
    wide = wide.assign(mean=wide.mean(axis=1)).map("{:.4f}".format).replace("0.0000", "diverged")
    return wide.reset_index().rename(columns={"lr": "learning rate"})


def pretrained() -> pd.DataFrame:
    """Dice of the networks that ship, by data set and grid."""
    rows = pd.read_csv(FIGURES / "pretrained.csv")
    wide = rows.pivot(index=["tested on", "seen", "grid", "pairs"], columns="network", values="dice")
    first = [name for name in ("before", "ANTs SyN") if name in wide]
    wide = wide[[*first, *sorted(set(wide.columns) - {*first})]].map("{:.3f}".format).replace("nan", "")
    wide = wide.rename(columns={"before": "no registration"})
    return wide.reset_index().assign(seen=lambda table: table.seen.map({True: "yes", False: "no"}))


def licences() -> pd.DataFrame:
    """Dice on an anatomy never seen, of networks that saw free sets or all."""
    rows = pd.read_csv(FIGURES / "licences.csv")
    wide = rows.pivot(index=["tested on", "grid"], columns="trained on", values="dice")[["free sets", "all sets"]]
    difference = (wide["free sets"] - wide["all sets"]).map("{:+.3f}".format)
    return wide.map("{:.3f}".format).assign(**{"free - all": difference}).reset_index()


def of_networks(name: str) -> pd.DataFrame:
    """A table of the networks that ship; no registration has a row in each dimension."""
    rows = pd.read_csv(FIGURES / f"{name}.csv")
    nothing = "no registration, " + rows.dim.astype(str) + "-D"
    return rows.assign(network=rows.network.mask(rows.network == "before", nothing))


def captured() -> pd.DataFrame:
    """Dice on the sets never seen where one image is shifted, of the networks that ship."""
    table = of_networks("captured").groupby(["network", "shift"]).dice.mean().unstack().map("{:.3f}".format)
    return table.rename(columns=lambda shift: f"{100 * shift:.0f} %").reset_index()


def scanners() -> pd.DataFrame:
    """Dice on the sets never seen where one image alone comes from another scanner, of the networks that ship."""
    rows = of_networks("scanners").query("not seen").copy()
    rows["image"] = rows.corruption.where(rows.severity > 0, "as it is")
    table = rows.groupby(["network", "image", "severity"]).dice.mean().unstack([1, 2])
    named = {"gamma": "to the power {0:.1f}", "bias_field": "bias field {1:g}"}
    table.columns = [named.get(kind, kind).format(2**severity, severity) for kind, severity in table.columns]
    return table.map("{:.3f}".format).reset_index()


def longer() -> pd.DataFrame:
    """Dice on anatomies never seen by the gradients that Adam and SAM spent, mean of the seeds that have all of these
    lengths, and the differences at equal compute, over seeds."""
    arms = {"adam": "Adam, 4,000", "adam-2x": "Adam, 8,000", "adam-4x": "Adam, 16,000"}
    arms |= {"sam": "SAM, 8,000", "sam-2x": "SAM, 16,000"}
    rows = pd.read_csv(FIGURES / "networks.csv").query("study == 'unseen' and not seen and optimizer in @arms")
    rows = rows.assign(anatomy=rows.train_domain.str.removeprefix("all but "))
    dice = rows.pivot(index="seed", columns=["optimizer", "anatomy", "test_domain"], values="dice").dropna()
    dice = dice.T.groupby(level=[0, 1]).mean().T  # an anatomy's sets averaged
    rows = dice.mean().unstack(0)
    rows.loc[THESE] = rows.mean()
    shown = {name: rows[arm].map("{:.3f}".format) for arm, name in arms.items()}
    for n, adam, sam in (("8,000", "adam-2x", "sam"), ("16,000", "adam-4x", "sam-2x")):
        shown[f"SAM - Adam, {n} [90 %]"] = over_seeds(dice[sam] - dice[adam]).apply(interval, axis=1)
    return pd.DataFrame(shown).reindex(rows.index).rename_axis("anatomy, never seen").reset_index()


def gap() -> pd.DataFrame:
    """How far Adam's networks are behind those that saw an anatomy, and SAM's loss beside it: 16,000 gradients."""
    rows = pd.read_csv(FIGURES / "networks.csv").query("study == 'unseen' and optimizer in ['adam-4x', 'sam-2x']")
    rows = whole_seeds(rows, "optimizer", "train_domain", "test_domain")
    study = read_study(PROJECT / "studies" / "unseen.yaml")
    rows["anatomy"] = rows.test_domain.map({name: one for one in study.groups for name in study.members(one)})
    keys = ["optimizer", "seen", "anatomy", "seed"]
    dice = rows.groupby([*keys, "test_domain"]).dice.mean().groupby(keys).mean().unstack("anatomy")
    adam, saw = dice.loc["adam-4x", False], dice.loc["adam-4x", True]
    of = {"gap": saw - adam, "loss": dice.loc["sam-2x", False] - adam}
    shown = pd.DataFrame({"Adam, never saw it": adam.mean(), "Adam, trained on it": saw.mean()})
    shown.loc[THESE] = shown.mean()
    shown = shown.map("{:.3f}".format)
    shown["gap [90 %]"] = over_seeds(of["gap"]).apply(interval, axis=1)
    shown["SAM - Adam, never saw it [90 %]"] = over_seeds(of["loss"]).apply(interval, axis=1)
    told = "{0[mean]:+.0f} % [{0[low]:+.0f} %, {0[high]:+.0f} %]".format
    shown["share of the gap [90 %]"] = (100 * share(of["loss"], of["gap"])).apply(told, axis=1)
    return shown.rename_axis("anatomy").reset_index()


def share(lost: pd.DataFrame, behind: pd.DataFrame) -> pd.DataFrame:
    """A ratio of means for every anatomy, a column each, and for their mean; a row a seed.

    Its interval is Fieller's: the shares for which the t test over seeds does not tell `lost - share * behind` from 0.
    """
    lost, behind = (table.assign(**{THESE: table.mean(axis=1)}) for table in (lost, behind))
    n, rows = len(lost), {}
    for name in lost:
        means = np.array([lost[name].mean(), behind[name].mean()])
        spread = np.cov(lost[name], behind[name]) * t.ppf((1 + LEVEL) / 2, n - 1) ** 2 / n
        (ll, lb), (_, bb) = np.outer(means, means) - spread
        low, high = sorted(np.roots([bb, -2 * lb, ll]).real) if bb > 0 else (np.nan, np.nan)  # no gap, no share
        rows[name] = {"mean": means[0] / means[1], "low": low, "high": high}
    return pd.DataFrame(rows).T


def radii() -> pd.DataFrame:
    """The relative rise of the loss at each form's step."""
    return rises("radii", ["form"])


def architectures() -> pd.DataFrame:
    """The same of SAM's step in networks of other sizes."""
    table = rises("architectures", ["network", "weights", "steps"])
    return table.assign(weights=table.weights.map("{:,}".format))


def rises(name: str, keys: list[str]) -> pd.DataFrame:
    """Relative rises of the loss in per cent, in the order that they were measured in, a radius a column."""
    rows = pd.read_csv(FIGURES / f"{name}.csv")
    table = rows.assign(rise=(100 * rows.rise).map("{:.1f} %".format)).pivot(index=keys, columns="rho", values="rise")
    table = table.reindex(rows.drop_duplicates(keys).set_index(keys).index)
    return table.fillna("").rename(columns="rho {:g}".format).reset_index()


MADE = {
    f"table_{make.__name__}": make
    for make in (
        unseen,
        longer,
        gap,
        volumes,
        radii,
        architectures,
        pretrained,
        licences,
        captured,
        scanners,
        heldout,
        radius,
        tuning,
        robustness,
        flatness,
        correlation,
    )
}


def record(folder: Path) -> None:
    """`figures/table_<study>.csv`, and the study's line in `figures/table_studies.csv`, from `runs/<study>/`.

    Of a study that leaves anatomies out, `figures/<study>.csv`: its answer.csv, beside it the Dice of each anatomy
    before registration and by SyN; and `figures/<study>_pairs.csv`, from which the answer can be fitted again.
    """
    summary, comparison, methods = (
        pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
        for name in ("summary", "comparison", "methods")
    )
    by_method = methods.optimizer.str.endswith("+io").any()
    study = read_study(folder / "40_compare.study.yaml")
    if study.leave_one_out:
        answer = pd.read_csv(folder / "answer.csv")
        groups = {one: study.members(one) for one in study.leave_one_out}
        answered(answer, methods, groups).to_csv(FIGURES / f"{folder.name}.csv", index=False)
        found, both = gather(study, folder), (answer.baseline[0], answer.treatment[0])
        keep_pairs(anatomies.unseen(found.results, found.pairs, groups, both, "dice"), folder.name)
    else:
        shown = methods_beside(methods) if by_method else domains_beside(summary, comparison)
        shown.to_csv(FIGURES / f"table_{folder.name}.csv", index=False)
    runs = sorted(folder.glob("*/*/seed*/config.json"))
    config = json.loads(runs[0].read_text(encoding="utf-8"))
    line = {
        "study": folder.name,
        "command": f"`make study STUDY={folder.name}`",
        "commit": config["provenance"]["commit"],
        "seeds": ", ".join(sorted({path.parent.name.removeprefix("seed") for path in runs})),
        "samples": " x ".join(map(str, config["parameters"]["shape"])),
        "steps": str(config["parameters"]["steps"]),
        "test pairs of a domain": ", ".join(map(str, sorted(set(summary.pairs)))),
        "time": "",  # by hand: `python -m fmsam_lib.study` prints it
    }
    path = FIGURES / "table_studies.csv"
    studies = pd.read_csv(path, dtype=str, keep_default_na=False)
    pd.concat([studies[studies.study != folder.name], pd.DataFrame([line])]).to_csv(path, index=False)


def keep_pairs(rows: pd.DataFrame, name: str) -> None:
    """The Dice of every pair of patients and seed that an answer rests on."""
    rows.drop(columns="difference").astype({"seed": int}).round(6).to_csv(FIGURES / f"{name}_pairs.csv", index=False)


def refitted(name: str) -> pd.DataFrame:
    """`figures/<name>.csv`, its primary lines as they come out of the pairs that are kept."""
    kept = pd.read_csv(FIGURES / f"{name}.csv")
    first, rest = (kept[(kept.role == "primary") == primary] for primary in (True, False))
    pairs = pd.read_csv(FIGURES / f"{name}_pairs.csv")
    pairs = pairs.assign(difference=pairs.treatment - pairs.baseline)
    again = anatomies.answer_of(pairs, (first.baseline.iloc[0], first.treatment.iloc[0]))
    first = first.drop(columns=again.columns.drop("anatomy")).merge(again, on="anatomy")
    return pd.concat([first, rest])[kept.columns]


def answered(rows: pd.DataFrame, methods: pd.DataFrame, groups: dict[str, list[str]]) -> pd.DataFrame:
    """The answer's lines, those of Dice with the means of what needs no training; an anatomy's sets are averaged."""
    anatomy = {name: group for group, names in groups.items() for name in names}
    dice = methods[(methods.metric == "dice") & methods.test_domain.isin(anatomy)]
    dice = dice.pivot_table("mean", ["optimizer", dice.test_domain.map(anatomy)])["mean"].unstack(0)
    dice = dice.reindex(columns=["none", "ants-syn"]).rename(columns={"none": "before"})
    dice = dice[dice.index.isin(rows.anatomy)]
    dice.loc[THESE] = dice.loc[NEW] = dice.mean()
    return rows.join(dice, on="anatomy").assign(**{c: lambda t, c=c: t[c].where(t.metric == "dice") for c in dice})


def domains_beside(summary: pd.DataFrame, comparison: pd.DataFrame) -> pd.DataFrame:
    """A line for each train and test domain, as of the studies `full` and `hippocampus`."""
    sams = comparison[(comparison.metric == "dice") & (comparison.treatment == "sam")]
    lines = []
    for row in summary.to_dict("records"):
        train, test = row["train_domain"], row["test_domain"]
        line = {"trained on": train.replace("+", " + "), "tested on": test, "seen": row["seen"]}
        line |= {name_of(n): f"{row[n]:.3f}" for n in ("before", "ants-syn", "adam", "adam-2x", "sam") if n in row}
        line |= differences(sams[(sams.train_domain == train) & (sams.test_domain == test)])
        lines.append(line | {"folded %, Adam / SAM": f"{row['folding adam %']:.3f} / {row['folding sam %']:.3f}"})
    return pd.DataFrame(lines)


def methods_beside(methods: pd.DataFrame) -> pd.DataFrame:
    """A line for each method, as of the study `baselines`: Dice on every domain, means of errors, seconds."""
    trained = set("+".join(methods.train_domain.dropna()).split("+"))
    order = [name + io for io in ("", "+io") for name in NAMES]
    lines = []
    for method in sorted(methods.optimizer.unique(), key=order.index):
        mine = methods[methods.optimizer == method]
        dice = mine[mine.metric == "dice"]
        landmarks, inverse = mine.groupby("metric")["mean"].mean().reindex(["tre", "inverse_error"])
        heads = [domain if domain in trained else f"{domain}, unseen" for domain in dice.test_domain]
        line = {"method": name_of(method)} | dict(zip(heads, dice["mean"].map("{:.3f}".format), strict=True))
        line |= {"landmark error, mm": f"{landmarks:.1f}", "inverse error, mm": f"{inverse:.2f}"}
        lines.append(line | {"s a pair": f"{dice.seconds.median():.2g}"})
    return pd.DataFrame(lines).replace("nan", "")


def wanted() -> Iterator[tuple[Path, str]]:
    """Every file that is made here and its text: the tables, then the pages that show them."""
    for name, make in MADE.items():
        yield FIGURES / f"{name}.csv", make().to_csv(index=False)
    for page in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]:
        yield page, rendered(page.read_text(encoding="utf-8"))


def main() -> None:
    arguments = argparse.ArgumentParser(description="Put every table of README and docs into its place.")
    arguments.add_argument("--check", action="store_true", help="change nothing; fail where something would change")
    arguments.add_argument("--record", type=Path, metavar="FOLDER", help="a computed study: runs/<study>")
    arguments.add_argument("--refit", action="store_true", help="fit the kept pairs again")
    given = arguments.parse_args()
    if given.refit:
        for path in sorted(FIGURES.glob("*_pairs.csv")):
            name = path.stem.removesuffix("_pairs")
            refitted(name).to_csv(FIGURES / f"{name}.csv", index=False, float_format="%.5g")  # what a fit repeats
    if given.record:
        record(given.record.resolve())
    for path, text in wanted():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if given.check:
            sys.exit(f"differs: {path.relative_to(PROJECT)}; run python docs/tables.py")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
