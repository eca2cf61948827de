"""Every table of README and docs comes from a committed CSV.

    python docs/tables.py                       make the tables again and put them into the pages
    python docs/tables.py --check               change nothing; fail where something would change
    python docs/tables.py --record runs/full    take over the results of a study that has been computed

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
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fmsam_lib.evaluation.corruptions import CORRUPTIONS
from fmsam_lib.plotting.style import NAMES, measure_name, name_of

PROJECT = Path(__file__).resolve().parents[1]
FIGURES = PROJECT / "figures"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ABOUT = ["commit", "cpu", "threads", "torch", "monai", "icon-registration", "unigradicon"]  # stands below the table
STEPS, COMPUTE = "SAM - Adam, equal steps [95 %]", "SAM - Adam, equal compute [95 %]"


# --- from a CSV to Markdown


def pages() -> list[Path]:
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """A page with every table as its CSV has it."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(PROJECT / found[2])}\n{found[3]}", text)


def table(path: Path) -> str:
    """Markdown of a CSV; commit, machine and versions, where all rows share them, are a line below it."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    about = [name for name in ABOUT if name in rows and rows[name].nunique() == 1]
    shown = rows.drop(columns=about).map(short)
    cells = [list(shown.columns), ["---"] * shown.shape[1], *shown.values.tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    said = ", ".join(f"{name} {rows[name].iloc[0]}" for name in about)
    return "\n".join([*lines, *(["", f"*{said}*"] if said else []), ""])


def short(cell: str) -> str:
    """Numbers with more than four digits are cut to four; all else stays as it was recorded.

    >>> [short(cell) for cell in ("0.06792289", "1.053", "0.710", "<= 0.1", "0.2 / 0.3")]
    ['0.06792', '1.053', '0.710', '<= 0.1', '0.2 / 0.3']
    """
    try:
        value = float(cell)
    except ValueError:
        return cell
    return cell if float(f"{value:.4g}") == value else f"{value:.4g}"


# --- from recorded tables to those that are shown


def difference(row: pd.Series) -> str:
    return f"{row['mean']:.3f} [{row.low:.3f}, {row.high:.3f}]"


def beside(rows: pd.DataFrame) -> dict[str, str]:
    """Mean Dice of Adam, of Adam at twice the steps and of SAM, with SAM's differences: of a comparison's two lines."""
    steps, compute = (rows[rows.baseline == name].iloc[0] for name in ("adam", "adam-2x"))
    means = [steps.mean_baseline, compute.mean_baseline, steps.mean_treatment]
    line = {name_of(o): f"{mean:.3f}" for o, mean in zip(("adam", "adam-2x", "sam"), means, strict=True)}
    return line | {STEPS: difference(steps), COMPUTE: difference(compute)}


def answer() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout.csv")
    rows = rows[rows.train_domain == "each"]
    names = {"unseen": "anatomies that the network has never seen", "seen": "anatomies that it was trained on"}
    return pd.DataFrame({"Dice on": name} | beside(rows[rows.test_domain == kind]) for kind, name in names.items())


def heldout() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout.csv")
    alone = pd.read_csv(FIGURES / "heldout_alone.csv", index_col="test_domain")
    trainings = rows.train_domain.str.split("+")
    unseen = pd.Series([d not in seen for d, seen in zip(rows.test_domain, trainings, strict=True)])
    parts = [(f"{d}, unseen", (rows.test_domain == d) & unseen, alone.loc[d]) for d in alone.index]
    each = rows.train_domain == "each"
    parts += [(f"all five, **{kind}**", each & (rows.test_domain == kind), alone.mean()) for kind in ("unseen", "seen")]
    names = {"before": "before", "ants-syn": name_of("ants-syn")}
    return pd.DataFrame(
        {"tested on": about} | {name: f"{without[n]:.3f}" for n, name in names.items()} | beside(rows[mine])
        for about, mine, without in parts
    )


def radius() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "radius.csv")
    rows.loc[rows.optimizer.str.startswith("adam"), "rho"] = float("nan")  # which they do not use
    rows.optimizer = pd.Categorical(rows.optimizer, ["adam", "adam-2x", "sam", "asam", "random"])
    rows = rows.assign(slow=-rows.lr).sort_values(["slow", "optimizer", "rho"])
    lines = []
    for (_, optimizer, rho), runs in rows.groupby(
        ["slow", "optimizer", "rho"], dropna=False, sort=False, observed=True
    ):
        dice = runs.groupby("domains").dice.mean()
        line = {"": name_of(optimizer), "rho": "" if pd.isna(rho) else f"{rho:g}", "learning rate": runs.lr.iloc[0]}
        line |= {"training loss at the end": f"{runs.loss.mean():.3f}"}
        lines.append(line | {f"Dice, {kind}": f"{dice[kind]:.3f}" for kind in ("seen", "unseen")})
    return pd.DataFrame(lines)


def robustness() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "quick_robustness.csv")
    lines = []
    for kind, mine in rows.groupby("corruption", sort=False):
        hardest = mine[mine.severity == mine.severity.max()]
        line = {"corruption": CORRUPTIONS[kind].what, "hardest step": f"{hardest.severity.iloc[0]:g}"}
        lines.append(line | beside(hardest))
    return pd.DataFrame(lines)


def flatness() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout_flatness.csv")
    rows = rows[(rows.measure == "ascent_rise") & (rows.rho == 0.01) & (rows.term == "total")]
    median = rows.groupby("optimizer").value.median()
    return pd.DataFrame(
        {"": name_of(o), "rise after ascent, rho = 0.01, median": f"{median[o]:.2f}"} for o in median.index
    )


def correlation() -> pd.DataFrame:
    rows = pd.read_csv(FIGURES / "heldout_correlation.csv")
    rows = rows[rows.term.fillna("total").eq("total") & rows.rho.fillna(0.01).eq(0.01)]
    lines = []
    for (measure, rho), mine in rows.groupby(["measure", "rho"], sort=False, dropna=False):
        tau = mine.set_index("performance").tau
        line = {"measure": measure_name(measure, rho)}
        lines.append(line | {f"tau with Dice, {kind}": f"{tau[kind]:.2f}" for kind in ("seen", "unseen")})
    return pd.DataFrame(lines)


MADE: dict[str, Callable[[], pd.DataFrame]] = {
    "table_answer": answer,
    "table_heldout": heldout,
    "table_radius": radius,
    "table_robustness": robustness,
    "table_flatness": flatness,
    "table_correlation": correlation,
}


# --- from a study that has been computed


def record(folder: Path) -> None:
    """`figures/table_<study>.csv`, and the study's line in `figures/table_studies.csv`, from `runs/<study>/`."""
    summary, comparison, methods = (
        pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
        for name in ("summary", "comparison", "methods")
    )
    by_method = methods.optimizer.str.endswith("+io").any()
    shown = methods_beside(methods) if by_method else domains_beside(summary, comparison)
    shown.to_csv(FIGURES / f"table_{folder.name}.csv", index=False)
    config = json.loads(next(folder.glob("*/*/seed*/config.json")).read_text())
    values = config["parameters"]
    line = {
        "study": folder.name,
        "command": f"`make study STUDY={folder.name}`",
        "commit": config["provenance"]["commit"],
        "seeds": ", ".join(sorted({path.name.removeprefix("seed") for path in folder.glob("*/*/seed*")})),
        "samples": " x ".join(map(str, values["shape"])),
        "steps": str(values["steps"]),
        "test pairs of a domain": ", ".join(map(str, sorted(set(summary.pairs)))),
        "time": "",  # by hand: `python -m fmsam_lib.study` prints it
    }
    path = FIGURES / "table_studies.csv"
    studies = pd.read_csv(path, dtype=str, keep_default_na=False)
    studies = studies[studies.study != folder.name]
    pd.concat([studies, pd.DataFrame([line])]).to_csv(path, index=False)


def domains_beside(summary: pd.DataFrame, comparison: pd.DataFrame) -> pd.DataFrame:
    """A line for each train and test domain, as of the studies `full` and `hippocampus`."""
    lines = []
    for row in summary.to_dict("records"):
        train = row["train_domain"]
        line = {"trained on": train.replace("+", " + "), "tested on": row["test_domain"], "seen": row["seen"]}
        names = {"before": "before"} | {n: name_of(n) for n in ("ants-syn", "adam", "adam-2x", "sam") if n in row}
        line |= {name: f"{row[column]:.3f}" for column, name in names.items()}
        cell = (comparison.train_domain == train) & (comparison.test_domain == row["test_domain"])
        mine = comparison[cell & (comparison.metric == "dice") & (comparison.treatment == "sam")]
        line |= {{"adam": STEPS}.get(d.baseline, COMPUTE): difference(d) for _, d in mine.iterrows()}
        lines.append(
            line | {"folded %, Adam / SAM": " / ".join(f"{row[f'folding {o} %']:.3f}" for o in ("adam", "sam"))}
        )
    return pd.DataFrame(lines)


def methods_beside(methods: pd.DataFrame) -> pd.DataFrame:
    """A line for each method, as of the study `baselines`: Dice on every domain, means of errors, seconds."""
    trained = set("+".join(methods.train_domain.dropna()).split("+"))
    lines = []
    order = [name + io for io in ("", "+io") for name in NAMES]
    for method in sorted(methods.optimizer.unique(), key=order.index):
        mine = methods[methods.optimizer == method]
        dice = mine[mine.metric == "dice"]
        means = {"landmark error, mm": ("tre", ".1f"), "inverse error, mm": ("inverse_error", ".2f")}
        line = {"method": name_of(method)}
        for domain, value in zip(dice.test_domain, dice["mean"], strict=True):
            line[domain if domain in trained else f"{domain}, unseen"] = f"{value:.3f}"
        for column, (metric, digits) in means.items():
            line[column] = f"{mine[mine.metric == metric]['mean'].mean():{digits}}"
        lines.append(line | {"s a pair": f"{dice.seconds.median():.2g}"})
    return pd.DataFrame(lines).replace("nan", "")


# --- the command


def main() -> int:
    arguments = argparse.ArgumentParser(description="Put every table of README and docs into its place.")
    arguments.add_argument("--check", action="store_true", help="change nothing; fail where something would change")
    arguments.add_argument("--record", type=Path, metavar="FOLDER", help="a computed study: runs/<study>")
    given = arguments.parse_args()
    if given.record:
        record(given.record.resolve())
    wrong = []
    made = {FIGURES / f"{name}.csv": lambda make=make: make().to_csv(index=False) for name, make in MADE.items()}
    for path, text in [*made.items(), *((page, lambda page=page: rendered(page.read_text())) for page in pages())]:
        new = text()
        if not path.exists() or path.read_text() != new:
            wrong.append(str(path.relative_to(PROJECT)))
            if not given.check:
                path.write_text(new)
    if wrong:
        print(("differ: " if given.check else "written: ") + ", ".join(wrong))
    return 1 if wrong and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
