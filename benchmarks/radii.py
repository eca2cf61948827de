"""How far each form of SAM climbs: the relative rise of the training loss at w + eps, over the radius.

    python benchmarks/radii.py [--run FOLDER]

FOLDER is a run of notebook 10, trained with Adam; without it a small network is trained on four synthetic domains (400
steps, seed 0). The rise is `L(w + eps) / L(w) - 1` in training mode, the mean over 50 batches of steps that the
training did not have, each with its own eps. Radii of two forms match where the rises do. With --run it writes
figures/radii.csv. Takes 3 minutes on one core.
"""

import argparse
import tempfile

import numpy as np
import pandas as pd
import torch

from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import load
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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", default="")
    folder = given = arguments.parse_args().run
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if not folder:
            folder = temporary
            run = Train(out=folder, train_domain=DOMAINS, optimizer="adam", steps=400, batch=4, validation=0)
            fit(starting(run), open_domain(DOMAINS, shape=(64, 64)), run)
        run, net = trained_with(folder), load(f"{folder}/weights.pt").train()
    dataset = open_domain(run.train_domain, shape=tuple(run.shape), data=run.data or None)
    frozen, rows = torch.optim.SGD(net.parameters(), lr=0.0), []
    for form, (changes, radii) in FORMS.items():
        for rho in radii:
            how = Train(**run.model_dump() | {"optimizer": "sam", "rho": rho} | changes)
            sam, rises = perturbation(net, how), []
            for step in range(run.updates, run.updates + BATCHES):
                batch = make_batches(dataset, how, step)
                state = State(step=how.updates)
                loss = train_step(net, batch, how, frozen, sam, state)
                rises.append(float(sam.rise) / float(loss.total))
            rows.append({"form": form, "rho": rho, "rise": np.mean(rises), "sd": np.std(rises, ddof=1)})
            print(rows[-1], flush=True)
    if not given:
        return
    made = provenance()
    about = {"trained_on": run.train_domain, "steps": run.updates, "seed": run.seed, "batches": BATCHES}
    about |= {"commit": made["commit"], "cpu": made["cpu"]}
    write_csv(pd.DataFrame(rows).assign(**about), PROJECT / "figures" / "radii.csv", float_format="%.4g")


if __name__ == "__main__":
    main()
