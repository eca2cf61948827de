"""Can a registration be trusted? Signs that need no label: "fine", "look at it" with the reasons, or "unknown".

Each sign is counted from what is usual to its limit; the worst one decides. The limits come from a small network's
registrations of synthetic and real 2-D pairs. `benchmarks/verdict.py` finds them, and measures on other pairs how well
the signs predict a low Dice: `figures/verdict.csv`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fmsam_lib.metrics import determinants, folding_percent, within
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import inverse_error, voxels
from fmsam_lib.pair import Pair
from fmsam_lib.training.seen import unlike

# By sign: what is usual, the median of good registrations, and the limit, their 90th percentile (folding: by hand).
LIMITS = {
    "inverse_error": (2.4, 3.7),
    "folding": (0.0, 0.1),
    "similarity_lost": (-0.16, 0.0),
    "dissimilarity": (0.14, 0.66),
    "unlike": (3.5, 18.0),
}
SAID = {
    "inverse_error": "there and back misses by {:.2g} samples of the grid (95th percentile, up to {:.2g} is usual)",
    "folding": "{:.2g} % of the cells fold (up to {:.2g} % is usual)",
    "similarity_lost": "LNCC falls by {:.2g} ({:.2g} is usual, below 0 it rises)",
    "dissimilarity": "the images are still unlike each other: 1 - LNCC is {:.2g} (up to {:.2g} is usual)",
    "unlike": "the images are unlike those of the training: {:.2g} times as far off as any of {where} (limit {:.2g})",
}


def worst(signs: dict[str, float]) -> float:
    """The largest of the signs, each counted from what is usual in steps to its limit: above 1 is beyond it."""
    return max((value - LIMITS[name][0]) / (LIMITS[name][1] - LIMITS[name][0]) for name, value in signs.items())


def judge(
    net: GradICON, pair: Pair, phi: Tensor, psi: Tensor, similarity: dict | None, against: Iterable[str] = ()
) -> tuple[dict, Tensor]:
    """A verdict for `summary.json`, and the map of the inverse-consistency error `|psi(phi(x)) - x|`, mm, `(*S)`.

    phi, psi: of the pair and of the swapped one, `(1, D, *S)`. similarity: LNCC before and after, or None: no judge.
    against: what else speaks against it, in words. A fixed mask limits all that is said of phi and psi but this map.
    """
    samples = voxels(inverse_error(psi, phi), tuple(pair.fixed.shape[1:]))[0].movedim(0, -1)  # (*S, D)
    error = (samples * torch.tensor(pair.spacing)).norm(dim=-1)
    missed, mm = (within(length, pair.fixed_mask, slice(None)).flatten() for length in (samples.norm(dim=-1), error))
    where = ""
    signs = {
        "inverse_error": float(missed.kthvalue(max(1, int(0.95 * len(missed)))).values),
        "folding": folding_percent(determinants(pair, phi)),
    }
    if similarity:
        signs["similarity_lost"] = round(similarity["before"] - similarity["after"], 5)  # not float32's last bit
        signs["dissimilarity"] = 1 - similarity["after"]
    if domains := net.about.get("seen"):
        signs["unlike"], where = unlike([pair.fixed, pair.moving], domains)
    beyond = [name for name, value in signs.items() if worst({name: value}) > 1]
    reasons = [*against, *(SAID[name].format(signs[name], LIMITS[name][1], where=where) for name in beyond)]
    known = "look at it" if reasons else "fine" if domains else "unknown"
    if not domains:
        reasons.append("the weights do not say what the network was trained on")
    verdict: dict[str, Any] = {"verdict": known, "reason": "; ".join(reasons), "signs": signs, "nearest": where}
    return verdict | {"inverse_error_mm": {"mean": float(mm.mean()), "max": float(mm.max())}}, error


def in_words(verdict: dict[str, Any]) -> str:
    """A verdict as people read it."""
    return "verdict: {verdict}, {reason}".format(**verdict).removesuffix(", ")
