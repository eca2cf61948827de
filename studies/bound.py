"""What keeps Dice on HippocampusMR low: the network, its transforms, or the loss? Instance optimisation that sees more.

    FMSAM_DATA=... python studies/bound.py    # an hour of one core; goes on where it stopped

The network `3d` that comes with fmsam is optimised for each of the first test pairs, by the loss that it was trained
with, by others, and by the labels themselves, which no registration may use: these say what the same network with the
same penalty could reach. Writes figures/bound.csv, a row a loss and pair, and figures/table_bound.csv, their means.
"""

import copy
import dataclasses

import pandas as pd
import torch
from torch import Tensor

from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import mean_dice, measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import sample
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import pretrained
from fmsam_lib.pair import Pair
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.training.losses import Batch, jittered_points, lncc, objective

FIGURES = PROJECT / "figures"
SHAPE, PAIRS, STEPS, LR, SIGMA = (40, 48, 40), 12, 50, 0.001, 3.0
AS_TRAINED = {"steps": STEPS, "similarity": "lncc", "sigma": SIGMA, "lmbda": 1.5, "images": 1.0, "labels": 0.0}
LOSSES = {
    "none: the network as it is": AS_TRAINED | {"steps": 0},
    "LNCC, as in training": AS_TRAINED,
    "LNCC in windows of half the width": AS_TRAINED | {"sigma": SIGMA / 2},
    "LNCC, a fifth of the penalty": AS_TRAINED | {"lmbda": 0.3},
    "MIND, a fifth of the penalty": AS_TRAINED | {"similarity": "mind", "lmbda": 0.3},
    "labels alone": AS_TRAINED | {"images": 0.0, "labels": 1.0},
    "labels and LNCC": AS_TRAINED | {"labels": 1.0},
}
KEYS = ["loss", "pair"]


def overlap(phi: Transform, pair: Pair) -> Tensor:
    """Soft Dice of the structures, mean over them and both directions: `phi` of the pair and of the swapped pair."""
    numbers = torch.tensor([0, *pair.labels])
    moving, fixed = (
        (label == numbers.view(-1, 1, 1, 1))[None, 1:].float() for label in (pair.moving_label, pair.fixed_label)
    )
    targets = torch.cat([fixed, moving])
    warped = sample(torch.cat([moving, fixed]), phi.map, padding="zeros")
    return (2 * (warped * targets).flatten(2).sum(2) / (warped + targets).flatten(2).sum(2)).mean()


def optimised(net: GradICON, pair: Pair, *, steps: int, images: float, labels: float, lmbda: float, **loss) -> Tensor:
    """The pair's map `(1, D, *S)` after `steps` of Adam on `images` x similarity + penalty + `labels` x overlap."""
    net, found = copy.deepcopy(net).eval().requires_grad_(), []
    net.register_forward_hook(lambda module, given, phi: found.append(phi))
    optimizer, generator = torch.optim.Adam(net.parameters(), lr=LR), torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = Batch(pair.moving[None], pair.fixed[None], jittered_points(tuple(pair.fixed.shape[1:]), generator))
        found.clear()
        terms = objective(net, batch, lmbda=lmbda, **loss)
        total = images * terms.similarity + lmbda * terms.regulariser - 2 * labels * overlap(found[0], pair)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        return net(pair.moving[None], pair.fixed[None]).map


def facts(pair: Pair, phi_map: Tensor) -> dict[str, float]:
    """What is worth a column: overlap of the structures and of their union, similarity, regularity."""
    whole = {name: (getattr(pair, name) > 0).long() for name in ("moving_label", "fixed_label")}
    rows = {row["metric"]: row["value"] for row in measure(pair, phi_map)}
    warped = sample(pair.moving[None], phi_map, padding="zeros")
    return {
        "dice": mean_dice(pair, phi_map),
        "dice_whole": mean_dice(dataclasses.replace(pair, labels={1: "whole"}, **whole), phi_map),
        "lncc": float(lncc(warped, pair.fixed[None], sigma=SIGMA)),
        "sdlogj": rows["sdlogj"],
        "folding_percent": rows["folding_percent"],
    }


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A loss a row, means over the pairs that all losses have."""
    everywhere = table.groupby("pair").loss.nunique() == len(LOSSES)
    rows = table[table.pair.map(everywhere)].groupby("loss")
    digits = {"dice": 3, "dice_whole": 3, "lncc": 3, "sdlogj": 2, "folding_percent": 3}
    means = pd.DataFrame({name: rows[name].mean().map(f"{{:.{n}f}}".format) for name, n in digits.items()})
    names = {"dice": "Dice", "dice_whole": "Dice of both as one", "lncc": "LNCC", "sdlogj": "SDlogJ"}
    return means.loc[list(LOSSES)].reset_index().rename(columns=names | {"folding_percent": "folded, %"})


def main() -> None:
    torch.set_num_threads(1)
    path, made = FIGURES / "bound.csv", provenance()
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEYS)
    done = set(table[KEYS].itertuples(index=False, name=None))
    net, domain = pretrained("3d"), open_domain("HippocampusMR", shape=SHAPE)
    for pair in map(domain.test_pair, range(PAIRS)):
        for name, loss in LOSSES.items():
            if (name, pair.name) in done:
                continue
            row = {"loss": name, "pair": pair.name} | facts(pair, optimised(net, pair, **loss))
            row |= {"commit": made["commit"], "cpu": made["cpu"]}
            table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            write_csv(table, path, float_format="%.5g")
            print(f"{pair.name}, {name}: Dice {row['dice']:.3f}, LNCC {row['lncc']:.3f}", flush=True)
    write_csv(shown(table), FIGURES / "table_bound.csv")


if __name__ == "__main__":
    main()
