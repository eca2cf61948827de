"""What helps more than SAM on an anatomy never seen? The networks of a study, each on the anatomy that it has not seen.

    FMSAM_DATA=... python studies/helps.py runs/unseen --seeds 10    # 45 minutes a seed; goes on where it stopped
    FMSAM_DATA=... python studies/helps.py runs/real3d --trainings adam-2x --means nothing io --pairs 60

For every data set of that anatomy: the network as it is, instance optimisation of each test pair (10 and 50 steps), and
fine-tuning on 2, 5 and 20 subjects of its training images with Adam (400 steps) and with SAM (200, as many gradients).
Rates and radius are those of docs/protocol.md. And of every set: no registration, and ANTs SyN. Writes
figures/helps.csv, a row a network, set and means.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from fmsam_lib.evaluation.baselines import ants_syn, instance_optimised
from fmsam_lib.evaluation.evaluate import evaluate
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import EQUAL_COMPUTE, Train
from fmsam_lib.records import PROJECT, provenance, write_csv
from fmsam_lib.training.checkpoint import trained_with
from fmsam_lib.training.loop import train

OUT = PROJECT / "figures" / "helps.csv"
GRADIENTS = 400
WITH = ["study", "train_domain", "training", "seed", "test_domain", "means", "amount"]
WITHOUT = {"none": None, "ants-syn": ants_syn}  # networks
AMOUNTS = {"nothing": (0,), "io": (10, 50), "fine-tuned, adam": (2, 5, 20), "fine-tuned, sam": (2, 5, 20)}


def helped(weights: Path, run: Train, name: str, means: str, amount: int, pairs: int) -> pd.DataFrame:
    """The metrics of a set's test pairs, after the network got this much of this help."""
    net = load(weights)
    domain = open_domain(name, shape=tuple(run.shape), subjects=amount if means.startswith("fine") else 0)
    if means == "io":
        return evaluate(lambda pair: instance_optimised(net, pair, run, steps=amount, lr=0.0003), domain, pairs=pairs)
    if means != "nothing":
        optimizer = means.rpartition(" ")[2]
        steps = GRADIENTS // (2 if optimizer == "sam" else 1)
        like = run.model_dump(include={"seed", "batch", "augment", "rho_schedule", *run.loss()})
        like |= {"rho": 0.001, "lr": 0.001, "validation": 0, "progress": False}
        net, _ = train(domain, net=net, optimizer=optimizer, steps=steps, **like)
    return evaluate(net, domain, pairs=pairs)


def asked(
    study: Path, seeds: list[int], trainings: list[str], kinds: list[str], pairs: int
) -> Iterator[tuple[tuple, Callable[[], pd.DataFrame]]]:
    """What to measure, by the columns `WITH`, and how: every network, seed by seed, then what needs none."""
    folders = [f for f in sorted(study.glob("*/*/seed*")) if f.parent.name in trainings and int(f.name[4:]) in seeds]
    sets: dict[str, Train] = {}
    for folder in sorted(folders, key=lambda folder: int(folder.name[4:])):
        run = trained_with(folder)
        tested = pd.read_csv(folder / "results.csv").test_domain.unique()
        new = sorted({*tested} - {*run.train_domain.split("+")})
        sets |= dict.fromkeys(new, run)
        for name, means in itertools.product(new, kinds):
            for amount in AMOUNTS[means]:
                of = functools.partial(helped, folder / "weights.pt", run, name, means, amount, pairs)
                yield (study.name, folder.parent.parent.name, folder.parent.name, run.seed, name, means, amount), of
    for (name, run), (method, find) in itertools.product(sets.items(), WITHOUT.items()):
        of = functools.partial(evaluate, find, open_domain(name, shape=tuple(run.shape)), pairs=pairs)
        yield (study.name, "none", method, 0, name, "nothing", 0), of


def measure(study: Path, *what) -> None:
    table = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame(columns=WITH)
    done, made = set(table[WITH].itertuples(index=False, name=None)), provenance()
    for keys, of in asked(study, *what):
        if keys in done:
            continue
        values = of().groupby(["metric", "pair"]).value.mean().groupby("metric")
        row = dict(zip(WITH, keys, strict=True)) | values.mean().reindex(["dice", "hd95", "folding_percent"]).to_dict()
        row |= {"pairs": values.size()["dice"], "commit": made["commit"], "cpu": made["cpu"]}
        table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
        write_csv(table, OUT, float_format="%.6g")
        print(*keys, f"{row['dice']:.4f}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("study", type=Path, help="folder of a study whose trainings leave anatomies out")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[10])
    arguments.add_argument("--trainings", nargs="+", default=[EQUAL_COMPUTE, "sam"])
    arguments.add_argument("--means", nargs="+", choices=AMOUNTS, default=[*AMOUNTS])
    arguments.add_argument("--pairs", type=int, default=150, help="at most, of each set")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    measure(given.study, given.seeds, given.trainings, given.means, given.pairs)


if __name__ == "__main__":
    main()
