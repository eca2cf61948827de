"""Train the networks that come with fmsam and write them with their checksums.

    FMSAM_DATA=... python studies/ship.py 2d 2d-sam 3d 3d-sam    # each 40 to 75 minutes on one core; goes on
    FMSAM_DATA=... python studies/ship.py --judge                # figures/pretrained.csv, captured.csv, scanners.csv
    FMSAM_DATA=... python studies/ship.py --licences             # two hours on one core: figures/licences.csv

They see synthetic images and those real sets whose licences allow any use: CardiacSunnybrook2D (CC0), FetalHeadUS
(CC BY 4.0), HippocampusMR (CC BY-SA 4.0). Each is trained on a coarse grid first, in 3-D twice, then on a finer one.
SAM's has half the steps of Adam's, which is the same compute. docs/pretrained.md has what came of it.
"""

import argparse
import dataclasses
import itertools
import os
import zlib

import pandas as pd
import torch

import fmsam_lib as fm
from fmsam_lib.evaluation.baselines import ants_syn
from fmsam_lib.evaluation.corruptions import robustness
from fmsam_lib.model.spatial import identity_map, warp, warp_label
from fmsam_lib.model.weights import SHIPPED, sha256, shipped, signed
from fmsam_lib.records import PROJECT, provenance, write_csv, written_whole
from fmsam_lib.study.file import read_study

SYNTHETIC = "brain-mr+lung-ct+knee-mr+abdomen-ct+heart-mr"
DOMAINS = {2: f"CardiacSunnybrook2D+FetalHeadUS+{SYNTHETIC}", 3: f"HippocampusMR+{SYNTHETIC}"}
COARSE = {"lr": 0.004, "augment": True, "contrast": 0.7, "validation": 14, "seed": 20}
FINE = COARSE | {"lr": 0.001}
COARSE_3D = COARSE | {"batch": 2, "steps": 4000, "sigma": 3.0, "lr": 0.002}  # at 0.004 SAM diverges
STAGES = {  # of Adam's steps
    2: [((64, 64), COARSE | {"batch": 4, "steps": 16000}), ((128, 128), FINE | {"batch": 4, "steps": 3000})],
    3: [
        ((32, 32, 32), COARSE_3D),
        ((32, 32, 32), COARSE_3D | {"seed": 21}),  # other pairs, from the full learning rate
        ((64, 64, 64), FINE | {"batch": 1, "steps": 1000}),
    ],
}
OPTIMIZERS = {"": {"optimizer": "adam"}, "-sam": {"optimizer": "sam", "rho": 0.001, "rho_schedule": "lr"}}
NETWORKS = {f"{dim}d{kind}": (dim, optimizer) for dim in STAGES for kind, optimizer in OPTIMIZERS.items()}
SETS = {
    2: ["CardiacSunnybrook2D", "FetalHeadUS", "CardiacACDC", "ChestJSRT", "ChestMontgomery", "SpineMR2D", "KneeCT2D"],
    3: ["HippocampusMR", "CardiacACDC", "SpineMR"],
}
GRIDS = {2: [(64, 64), (128, 128), (256, 256)], 3: [(48, 48, 48), (64, 64, 64)]}
SHIFTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)  # of a side of the grid


def trained(name: str, runs: str, dim: int, domains: str, optimizer: dict = OPTIMIZERS[""]) -> fm.GradICON:
    weights = ""
    for i, (shape, options) in enumerate(STAGES[dim]):
        domain, out = fm.open_domain(domains, shape=shape), f"{runs}/{name}/{i}"
        steps = options["steps"] // (2 if optimizer["optimizer"] == "sam" else 1)
        fm.train(domain, out=out, weights=weights, **options | optimizer | {"steps": steps})
        weights = f"{out}/weights.pt"
    return fm.load(weights)


def licences(runs: str, pairs: int = 30) -> pd.DataFrame:
    """Does it cost anything to train on free sets alone? `2d` beside the same recipe with all real sets, an anatomy
    left out of both: the Dice on it."""
    study, lines = read_study(PROJECT / "studies" / "unseen.yaml"), []
    real = {one: [name for name in study.members(one) if not name.islower()] for one in study.leave_one_out}
    for left in [one for one in real if not {*real[one]} & {*DOMAINS[2].split("+")}]:
        seen = "+".join(name for one in real if one != left for name in real[one]) + f"+{SYNTHETIC}"
        both = {"free sets": fm.pretrained("2d"), "all sets": trained(f"2d without the {left}", runs, 2, seen)}
        for (name, net), shape, test in itertools.product(both.items(), GRIDS[2][:2], real[left]):
            dice = fm.evaluate(net, fm.open_domain(test, shape=shape), pairs=pairs).query("metric == 'dice'")
            about = {"left out": left, "tested on": test, "grid": " x ".join(map(str, shape)), "trained on": name}
            lines.append(about | {"dice": dice.groupby("pair").value.mean().mean()})
    return pd.DataFrame(lines)


def ship(name: str, net: fm.GradICON) -> None:
    for p in net.parameters():
        p.data = p.data.half().float()  # as it will be read again
    net.about |= signed(net)
    net.save(SHIPPED / f"{name}.pt", half=True)
    with written_whole(SHIPPED / f"{name}.sha256") as partial:
        partial.write_text(f"{sha256(SHIPPED / f'{name}.pt')}\n")


def methods(dim: int) -> dict[str, fm.GradICON | None]:
    """No registration, and the networks that ship."""
    return {"before": None} | {name: fm.pretrained(name) for name in shipped() if NETWORKS[name][0] == dim}


def judged(dim: int, pairs: int = 30) -> pd.DataFrame:
    """Dice and folding on every real set, on several grids, beside those without registration; on the grid of the
    last stage those of ANTs SyN, too."""
    lines = []
    for test, shape in itertools.product(SETS[dim], GRIDS[dim]):
        domain = fm.open_domain(test, shape=shape)
        classical = {"ANTs SyN": ants_syn} if shape == STAGES[dim][-1][0] else {}
        for name, method in (methods(dim) | classical).items():
            table = fm.evaluate(method, domain, pairs=pairs)
            means = table.groupby(["metric", "pair"]).value.mean().groupby("metric").mean()
            about = {"network": name, "tested on": test, "seen": test in DOMAINS[dim].split("+")}
            about |= {"grid": " x ".join(map(str, shape)), "pairs": table.pair.nunique()}
            lines.append(about | {metric: means.get(metric) for metric in ("dice", "folding_percent")})
    return pd.DataFrame(lines)


class Shifted:
    """A domain whose moving images, with their labels, are shifted by a share of a side, each in its own direction."""

    def __init__(self, domain, by: float) -> None:
        self.domain, self.by = domain, by

    def __getattr__(self, name: str):
        return getattr(self.domain, name)

    def test_pair(self, index: int) -> fm.Pair:
        pair = self.domain.test_pair(index)
        random = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
        offset = torch.randn(len(self.shape), generator=random)
        offset = (self.by * offset / offset.norm()).view(1, -1, *[1] * len(self.shape))
        points = identity_map(tuple(self.shape)) + offset
        image, label = warp(pair.moving[None], points)[0], warp_label(pair.moving_label[None], points)[0]
        return dataclasses.replace(pair, moving=image, moving_label=label)


def captured(dim: int, pairs: int = 10) -> pd.DataFrame:
    """Dice on the sets never seen, on the grid of the last stage, where one image is shifted against the other."""
    lines = []
    for test in [name for name in SETS[dim] if name not in DOMAINS[dim].split("+")]:
        domain = fm.open_domain(test, shape=STAGES[dim][-1][0])
        for (name, net), by in itertools.product(methods(dim).items(), SHIFTS):
            dice = fm.evaluate(net, Shifted(domain, by), pairs=pairs).query("metric == 'dice'")
            about = {"network": name, "dim": dim, "tested on": test, "shift": by, "pairs": dice.pair.nunique()}
            lines.append(about | {"dice": dice.groupby("pair").value.mean().mean()})
    return pd.DataFrame(lines)


def scanners(dim: int, pairs: int = 30) -> pd.DataFrame:
    """Dice on every real set, on the grid of the last stage, where the moving image alone has another brightness curve
    or a bias field."""
    tables = []
    for test, (name, net) in itertools.product(SETS[dim], methods(dim).items()):
        domain = fm.open_domain(test, shape=STAGES[dim][-1][0])
        rows, problems = robustness(net, domain, ["gamma", "bias_field"], pairs=pairs, progress=False)
        assert not problems, problems
        rows = rows[rows.metric == "dice"].groupby(["corruption", "severity"]).value
        about = {"network": name, "dim": dim, "tested on": test, "seen": test in DOMAINS[dim].split("+")}
        tables.append(rows.agg(dice="mean", pairs="count").reset_index().assign(**about))
    return pd.concat(tables)


JUDGED = {"pretrained": judged, "captured": captured, "scanners": scanners}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks to train")
    parser.add_argument("--judge", action="store_true", help="measure those that are there")
    parser.add_argument(
        "--licences", action="store_true", help="compare 2d with networks that saw sets that are not free"
    )
    parser.add_argument("--runs", default=str(PROJECT / "runs" / "pretrained"), help="folder of the trainings")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for name in given.names:
        dim, optimizer = NETWORKS[name]
        ship(name, trained(name, given.runs, dim, DOMAINS[dim], optimizer))
    tables = {"licences": licences(given.runs)} if given.licences else {}
    for name, measure in JUDGED.items() if given.judge else ():
        tables[name] = pd.concat([measure(dim) for dim in STAGES], ignore_index=True)
    made = provenance()
    for name, table in tables.items():
        write_csv(table.assign(commit=made["commit"], cpu=made["cpu"]), PROJECT / "figures" / f"{name}.csv")


if __name__ == "__main__":
    main()
