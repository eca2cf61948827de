"""How far each form of SAM climbs: the relative rise of the training loss at w + eps, over the radius.

    python benchmarks/radii.py [--run FOLDER]      # 3 minutes on one core
    python benchmarks/radii.py --architectures     # of SAM alone, in networks of other sizes: 18 minutes on one core

FOLDER is a run of notebook 10, trained with Adam; without it a small network is trained on four synthetic domains (400
steps, seed 0). The rise is `L(w + eps) / L(w) - 1` in training mode, the mean over 50 batches of steps that the
training did not have (20 of other sizes), each with its own eps. Radii of two forms match where the rises do. With
--run it writes figures/radii.csv; --architectures trains with Adam each network that figures/architectures.csv lacks,
and adds it there.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import UNIGRADICON, load
from fmsam_lib.parameters import Train
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.training.checkpoint import State, trained_with
from fmsam_lib.training.loop import fit, make_batches, starting
from fmsam_lib.training.step import perturbation, train_step

DOMAINS = "brain-mr+lung-ct+knee-mr+abdomen-ct"
BATCHES = 50
FORMS = {
    "SAM": ({}, (0.001, 0.003, 0.01, 0.03)),
    "by part": ({"climb": "part", "accumulate": 4}, (0.001, 0.003, 0.01, 0.03)),
    "by layer": ({"climb": "layer"}, (0.001, 0.003, 0.01, 0.03)),
    "norms alone": ({"climb": "norms"}, (0.01, 0.03, 0.1, 0.3)),
    "ASAM": ({"optimizer": "asam"}, (0.01, 0.03, 0.1, 0.3)),
}
SMALL = {"optimizer": "adam", "steps": 400, "batch": 4, "validation": 0}
VOLUMES = SMALL | {"shape": [48, 48, 48], "batch": 2}
ARCHITECTURES = {  # all but the last with the rate of their studies, which diverges at the width of the last
    "2-D, (16, 32, 64)": SMALL | {"lr": 0.004},
    "2-D, twice the channels": SMALL | {"lr": 0.002, "down": [32, 64, 128]},
    "2-D, uniGradICON's channels": SMALL | {"lr": 0.002, **UNIGRADICON},
    "3-D, (16, 32, 64)": VOLUMES | {"lr": 0.004},
    "3-D, uniGradICON's own": VOLUMES | {"lr": 5e-5, "steps": 200, "batch": 1, **UNIGRADICON},
}


def trained(folder: str, **given) -> None:
    run = Train(out=folder, train_domain=DOMAINS, **given)
    fit(starting(run), open_domain(DOMAINS, shape=tuple(run.shape)), run)


def measured(folder: Path | str, forms: dict, batches: int) -> list[dict]:
    """The rise of every form and radius, of a training's network."""
    run, net = trained_with(Path(folder)), load(f"{folder}/weights.pt").train()
    dataset = open_domain(run.train_domain, shape=tuple(run.shape), data=run.data or None)
    frozen, rows = torch.optim.SGD(net.parameters(), lr=0.0), []
    about = {"weights": sum(p.numel() for p in net.parameters())}
    about |= {"trained_on": run.train_domain, "steps": run.updates, "seed": run.seed, "batches": batches}
    for form, (changes, radii) in forms.items():
        for rho in radii:
            how = Train(**run.model_dump() | {"optimizer": "sam", "rho": rho} | changes)
            sam, rises = perturbation(net, how), []
            for step in range(run.updates, run.updates + batches):
                batch = make_batches(dataset, how, step)
                state = State(step=how.updates)
                loss = train_step(net, batch, how, frozen, sam, state)
                rises.append(float(sam.rise) / float(loss.total))
            rows.append({"form": form, "rho": rho, "rise": np.mean(rises), "sd": np.std(rises, ddof=1), **about})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", default="")
    arguments.add_argument("--architectures", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    made, figures = provenance(), PROJECT / "figures"
    about = {"commit": made["commit"], "cpu": made["cpu"]}
    with tempfile.TemporaryDirectory() as folder:
        if given.architectures:
            kept, rows = pd.read_csv(figures / "architectures.csv"), []
            for name in [name for name in ARCHITECTURES if name not in {*kept.network}]:
                trained(f"{folder}/{name}", **ARCHITECTURES[name])
                rows += [{"network": name} | row for row in measured(f"{folder}/{name}", {"SAM": FORMS["SAM"]}, 20)]
            rows = pd.concat([kept, pd.DataFrame(rows).assign(**about)]).set_index("network").loc[[*ARCHITECTURES]]
            write_csv(rows.reset_index(), figures / "architectures.csv", float_format="%.4g")
        elif given.run:
            rows = pd.DataFrame(measured(given.run, FORMS, BATCHES))
            write_csv(rows.assign(**about), figures / "radii.csv", float_format="%.4g")
        else:
            trained(folder, **SMALL)
            measured(folder, FORMS, BATCHES)


if __name__ == "__main__":
    main()
