"""What registration makes of pairs that get worse by degrees."""

import copy
import math
from collections.abc import Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from fmsam_lib.evaluation.corruptions import CORRUPTIONS, Corrupted, _check_kinds, corrupt, placed
from fmsam_lib.images.domains import readable
from fmsam_lib.metrics import determinants, folding_percent, mean_dice
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.pair import Pair

COLUMNS = ["test_domain", "pair", "corruption", "severity", "metric", "value", "unit"]


def robustness(
    net: GradICON | None, dataset, kinds: Sequence[str], *, pairs: int, seed: int = 0, progress: bool = True
) -> tuple[pd.DataFrame, list[str]]:
    """How registration by `net` (None: none at all) of the first test pairs suffers from each kind of corruption.

    Returns rows `test_domain, pair, corruption, severity, metric, value, unit` and the problems. Each kind starts at
    severity 0, the clean pair. dice: the mean over the structures of the pair's own labels, looked up once, through the
    whole map from the fixed to the original moving image; no row without labels. folding_percent: of the network's map.
    A pair that cannot be read, or severities at which a map is not finite, are named in the problems and left out.

    Raises ValueError for an unknown kind, with the known ones.
    """
    _check_kinds(kinds)
    net = net and copy.deepcopy(net).eval()  # the caller's own stays in the mode it is in
    rows: list[dict] = []
    problems: list[str] = []
    bar = tqdm(range(min(pairs, dataset.test_count)), disable=not progress, desc=dataset.name, unit="pair")
    for pair in readable(dataset, bar, problems):
        clean = _registered(net, pair, Corrupted(pair.moving, None))
        not_finite = [] if clean else ["clean"]
        for kind in kinds:
            for severity in (0.0, *CORRUPTIONS[kind].severities):
                found = _registered(net, pair, corrupt(pair, kind, severity, seed=seed)) if severity else clean
                if severity and not found:
                    not_finite.append(f"{kind} {severity:g}")
                about = {"test_domain": dataset.name, "pair": pair.name, "corruption": kind, "severity": severity}
                rows += [about | row for row in found if not math.isnan(row["value"])]
        if not_finite:
            problems.append(f"{dataset.name}, {pair.name}: a map is not finite ({', '.join(not_finite)}); left out")
    return pd.DataFrame(rows, columns=COLUMNS), problems


def _registered(net: GradICON | None, pair: Pair, corrupted: Corrupted) -> list[dict]:
    """What is measured of one registration, Dice NaN without labels; [] when its map is not finite."""
    phi_map, folding = identity_map(tuple(pair.fixed.shape[1:])), []
    if net is not None:
        images = (image[None].to(next(net.parameters()).device) for image in (corrupted.moving, pair.fixed))
        with torch.no_grad():
            phi_map = net(*images).map.cpu()
        if not phi_map.isfinite().all():
            return []
        folding = [{"metric": "folding_percent", "value": folding_percent(determinants(pair, phi_map)), "unit": "%"}]
    whole = phi_map if corrupted.place is None else placed(corrupted.place, phi_map)
    return [{"metric": "dice", "value": mean_dice(pair, whole), "unit": "1"}, *folding]
