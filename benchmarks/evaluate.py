"""How long the metrics of one registration take, and its surface distances beside MONAI's and DeepMind's.

    python benchmarks/evaluate.py

Writes benchmarks/evaluate.csv, in a minute. One pair of 64^3 with four structures, the warped against the fixed label,
one thread, medians of repeats; the peers take their turns in between. MONAI's HD95 is of another convention (edge
samples, unweighted), so only its time is compared; DeepMind's gives what ours does.
"""

import warnings
from dataclasses import replace

import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance
from recording import alternating, record

from fmsam_lib.metrics import measure, surface_distances
from fmsam_lib.model.spatial import identity_map, warp_label
from fmsam_lib.pair import Pair
from fmsam_lib.phantoms.pairs import make_pair

REPEATS = 21
DOMAINS = ("brain-mr", "abdomen-ct")  # the largest surfaces of all domains, and ordinary organs


def four_structures(domain: str) -> Pair:
    pair = make_pair(domain, seed=0, index=0, shape=(64, 64, 64))
    return replace(pair, labels={number: pair.labels[number] for number in (1, 2, 3, 4)})


def peers(pair: Pair, phi_map: torch.Tensor) -> dict:
    """Calls that give the HD95 of every structure: ours, MONAI's and DeepMind's."""
    warped = warp_label(pair.moving_label[None], phi_map)[0, 0]
    masks = [(warped == number, pair.fixed_label[0] == number) for number in pair.labels]
    one_hot = [torch.stack(side)[None].float() for side in zip(*masks, strict=True)]
    arrays = [(a.numpy(), b.numpy()) for a, b in masks]

    def deepmind():
        found = [surface_distance.compute_surface_distances(b, a, pair.spacing) for a, b in arrays]
        return [surface_distance.compute_robust_hausdorff(distances, 95) for distances in found]

    return {
        "ours": lambda: [surface_distances(a, b, pair.spacing)[0] for a, b in masks],
        "MONAI": lambda: compute_hausdorff_distance(
            *one_hot, include_background=True, percentile=95, spacing=list(pair.spacing)
        ),
        "DeepMind": deepmind,
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # both peers use what their own dependencies call deprecated
    rows = []
    for domain in DOMAINS:
        pair = four_structures(domain)
        phi_map = pair.true_map[None]
        inverse = 2 * identity_map(phi_map.shape[2:]) - phi_map  # to first order: it takes as long
        ours = {"measure": lambda p=pair, a=phi_map, b=inverse: measure(p, a, b)}
        taken = alternating(REPEATS, **ours, **peers(pair, phi_map))
        rows.append((f"{domain}: all metrics of a 64^3 pair, 4 structures", taken["measure"], "<= 0.25", "s"))
        rows.append((f"{domain}: its surface distances", taken["ours"], "", "s"))
        rows.append((f"{domain}: surface distances / MONAI's HD95", taken["ours"] / taken["MONAI"], "", "ratio"))
        ratio = taken["ours"] / taken["DeepMind"]
        rows.append((f"{domain}: surface distances / DeepMind's HD95", ratio, "", "ratio"))
    record(rows, __file__, threads=1)


if __name__ == "__main__":
    main()
