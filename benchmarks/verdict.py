"""How well a verdict without labels predicts a low Dice: AUC of each sign and of the whole.

    python benchmarks/verdict.py [--steps 1500]       needs FMSAM_DATA for the real sets; without it they are left out

A small network is trained on three synthetic domains (seed 0) and registers test pairs of every synthetic domain and of
the real 2-D sets, as they are and with the moving image spoilt. A registration is bad where its Dice is below 0.7 or
below that of no registration. Pairs with an odd number set the limits in `fmsam_lib/registration/verdict.py`: what one
good registration in ten exceeds. Pairs with an even number are what figures/verdict.csv and figures/verdict.png report.
Takes 8 minutes on one core.
"""

import argparse
import dataclasses
import math
import tempfile

import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import mannwhitneyu

import fmsam_lib as fm
from fmsam_lib.evaluation.corruptions import CORRUPTIONS, corrupt
from fmsam_lib.images.domains import readable
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.spatial import identity_map, warp
from fmsam_lib.phantoms.anatomies import DOMAINS
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.registration.verdict import LIMITS, judge, worst
from fmsam_lib.training.losses import lncc

TRAINED_ON, SHAPE = "brain-mr+lung-ct+knee-mr", (64, 64)
REAL = ("ChestJSRT", "ChestMontgomery", "FetalHeadUS", "KneeCT2D", "SpineMR2D", "CardiacSunnybrook2D", "CardiacACDC")
SPOILT = ("noise", "inversion", "slices", "misalignment")  # each at its strongest, in turn
BAD = 0.7


def row(net, pair, domain: str, kind: str) -> dict | None:
    """The signs of one registration, and whether it was bad; None without labels."""
    moving, place = pair.moving, None
    if kind:
        moving, place = corrupt(pair, kind, CORRUPTIONS[kind].severities[-1])
    seen = dataclasses.replace(pair, moving=moving)
    with torch.no_grad():
        phi, psi = net(moving[None], pair.fixed[None]).map, net(pair.fixed[None], moving[None]).map
    before, after = (lncc(image, pair.fixed[None]).item() for image in (moving[None], warp(moving[None], phi)))
    verdict, _ = judge(net, seen, phi, psi, {"before": before, "after": after})
    still = identity_map(SHAPE)
    whole, still = (phi, still) if place is None else (place(phi), place(still))
    dice, first = mean_dice(pair, whole), mean_dice(pair, still)
    if math.isnan(dice):
        return None
    about = {"domain": domain, "spoilt": kind, "dice_before": first, "dice": dice, "bad": dice < BAD or dice < first}
    return about | verdict["signs"] | {"whole": worst(verdict["signs"])}


def auc(rows: pd.DataFrame, sign: str) -> float:
    """The chance that a bad registration has a higher sign than a good one."""
    bad, good = rows[rows.bad][sign], rows[~rows.bad][sign]
    return float(mannwhitneyu(bad, good).statistic / len(bad) / len(good)) if len(bad) and len(good) else math.nan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        net, _ = fm.train(
            fm.open_domain(TRAINED_ON, shape=SHAPE), optimizer="adam", steps=steps, batch=4, out=folder, progress=False
        )
    rows, problems = [], []
    for name in [*DOMAINS, *(name for name in fm.domain_names() if name in REAL)]:
        dataset = fm.open_domain(name, shape=SHAPE)
        for i, pair in enumerate(readable(dataset, range(dataset.test_count), problems)):
            found = [row(net, pair, name, kind) for kind in ("", SPOILT[i // 2 % len(SPOILT)])]
            rows += [one | {"odd": i % 2 == 1} for one in found if one]
    everything = pd.DataFrame(rows)
    good = everything[everything.odd & ~everything.bad]
    print(f"median and 90th percentile of {len(good)} good registrations, for LIMITS:")
    print(good[list(LIMITS)].quantile([0.5, 0.9]).round(4).to_string())
    found = everything[~everything.odd]
    signs = [*LIMITS, "whole"]
    groups = {"all": found, "as they are": found[found.spoilt == ""], "spoilt": found[found.spoilt != ""]}
    groups |= {"synthetic": found[found.domain.isin(list(DOMAINS))], "real": found[~found.domain.isin(list(DOMAINS))]}
    groups |= dict(iter(found[found.spoilt == ""].groupby("domain")))
    table = pd.DataFrame(
        [
            {"pairs": name, "n": len(part), "bad": int(part.bad.sum())}
            | {sign: auc(part, sign) for sign in signs}
            | {
                "flagged of the bad": (part[part.bad].whole > 1).mean(),
                "of the good": (part[~part.bad].whole > 1).mean(),
            }
            for name, part in groups.items()
        ]
    )
    made = provenance()
    print(table.round(2).to_string(index=False), *problems, sep="\n")
    about = {"steps": steps, "seed": 0, "commit": made["commit"], "cpu": made["cpu"], "torch": torch.__version__}
    write_csv(table.assign(**about), PROJECT / "figures" / "verdict.csv", float_format="%.4g")
    draw(found, table)


def draw(found: pd.DataFrame, table: pd.DataFrame) -> None:
    """Left: every registration, its Dice over its worst sign. Right: the AUC of each sign."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=[3, 2])
    for spoilt, colour, marker, label in (
        (False, "#0072B2", "o", "as it is"),
        (True, "#D55E00", "x", "moving image spoilt"),
    ):
        part = found[(found.spoilt != "") == spoilt]
        left.scatter(
            part.whole.clip(0.1, 100), part.dice, s=12, c=colour, marker=marker, label=label, alpha=0.6, linewidths=0.8
        )
    left.axvline(1, color="black", linewidth=1)
    left.axhline(BAD, color="grey", linewidth=1, linestyle="--")
    left.set(
        xscale="log",
        xlabel="worst sign over its limit: above 1 the verdict is “look at it”",
        ylabel="Dice after registration",
    )
    left.legend(fontsize=8, loc="lower left")
    signs = [*LIMITS, "whole"]
    for name, marker, colour in (("all", "D", "black"), ("synthetic", "s", "#009E73"), ("real", "o", "#CC79A7")):
        values = table[table.pairs == name][signs].iloc[0]
        right.plot(values, range(len(signs)), marker, color=colour, label=name, alpha=0.8)
    right.axvline(0.5, color="grey", linewidth=1, linestyle="--")
    right.set(
        yticks=range(len(signs)),
        yticklabels=[s.replace("_", " ") for s in signs],
        xlim=(0, 1),
        xlabel="AUC for a bad registration",
    )
    right.legend(fontsize=8, title="test pairs")
    figure.savefig(PROJECT / "figures" / "verdict.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
