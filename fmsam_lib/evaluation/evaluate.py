"""Methods x test pairs x metrics -> tidy tables: `results.csv`, `costs.csv`, `robustness.csv`, `pairs.csv`.

What a method finds is the same each time, to the bit; the seconds it takes are the machine's, and stand apart.
"""

import copy
import gzip
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError
from fmsam_lib.evaluation import baselines
from fmsam_lib.evaluation.corruptions import COLUMNS as OF_CURVES
from fmsam_lib.evaluation.corruptions import robustness
from fmsam_lib.images.domains import open_domain, readable
from fmsam_lib.metrics import learn2reg_field, measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Evaluate
from fmsam_lib.records import DataError, written_whole
from fmsam_lib.training.averages import gather_statistics
from fmsam_lib.training.checkpoint import trained_with

ROWS = ["test_domain", "pair", "label", "metric", "value", "unit"]
COLUMNS = ["train_domain", "test_domain", "optimizer", "seed", *ROWS[1:]]
CURVES = [*COLUMNS[:4], *OF_CURVES[1:]]
PAIRS = ["test_domain", "pair", "subjects"]
Method = Callable[[Pair], baselines.Maps]


def evaluate(net: GradICON | Method | None, domain, *, pairs: int = 10, progress: bool = False) -> pd.DataFrame:
    """Metrics of a network or another method (None: no registration) on the domain's first test pairs: tidy rows.

    Another method takes a `Pair` and returns its map and the swapped pair's, or None: `(1, D, *S)` each, as `phi.map`.
    Columns test_domain, pair, label, metric, value, unit; `fmsam_lib.metrics` defines the metrics. A pair that could
    not be measured is a warning that says why, as are missing labels or a grid unlike the network's. Raises DataError
    where no pair could be measured; ConfigError for what is no network, method or domain.

    >>> table = evaluate(None, open_domain("brain-mr", shape=(32, 32)), pairs=2)
    >>> table[table.metric == "dice"].groupby("pair").value.mean().round(2).tolist()
    [0.67, 0.36]
    """
    if not (net is None or callable(net)):
        raise ConfigError(f"expected a network, another method or None, got {net!r}: fm.load(file) reads a network")
    net = net.module if isinstance(net, nn.DataParallel) else getattr(net, "_orig_mod", net)  # of torch.compile
    if not hasattr(domain, "test_pair"):
        raise ConfigError(f"expected a domain, got {domain!r}: fm.open_domain(name, shape=(64, 64)) opens one")
    if isinstance(net, GradICON):
        net, shape = copy.deepcopy(net).eval(), tuple(getattr(domain, "shape", ()))  # the caller's stays in its mode
        if shape and net.dim != len(shape):
            raise ConfigError(f"expected a {len(shape)}-D network for {domain.name}, got a {net.dim}-D one")
        if shape and (trained := net.grid_unlike(shape)):
            todo = f"{domain.name} has {shape}, where Dice may be far lower: open it with shape=net.shape"
            warnings.warn(f"{trained}: {todo}", stacklevel=2)
    found = measured(net, domain, pairs=pairs, progress=progress)
    if found.results.empty and found.problems:
        raise DataError("no test pair could be measured:\n- " + "\n- ".join(found.problems))
    if len(found.pairs) and getattr(domain, "labels", {}) and "dice" not in found.results.metric.to_numpy():
        found.problems.append(f"{domain.name}: expected the labels it names, got none, so no Dice: add their files")
    for problem in found.problems:
        warnings.warn(problem, stacklevel=2)
    return found.results


class Measured(NamedTuple):
    """What `measured` finds: tables with the columns `ROWS`, `ROWS` and `PAIRS`, and problems in plain words."""

    results: pd.DataFrame
    costs: pd.DataFrame
    pairs: pd.DataFrame
    problems: list[str]


def measured(method: GradICON | Method | None, domain, *, pairs: int, progress: bool, fields=None) -> Measured:
    """Metrics of a method on the domain's first test pairs, the seconds of one registration, and who is on the pairs.

    A pair whose files cannot be read, or for which the method finds no map or one that cannot be one, is named among
    the problems, and the others go on. fields: a folder for Learn2Reg's displacement fields,
    `disp_<fixed>_<moving>.nii.gz`, on the grid of the evaluation.
    """
    rows: list[tuple] = []  # of many pairs: dicts would take thrice the room
    problems: list[str] = []
    costs, subjects = [], []
    bar = tqdm(range(min(pairs, domain.test_count)), disable=not progress, desc=domain.name, unit="pair")
    for pair in readable(domain, bar, problems):
        about = {"test_domain": domain.name, "pair": pair.name}
        try:
            phi_map, inverse, seconds = (None, None, 0.0) if method is None else register(method, pair)
            values = measure(pair, phi_map, inverse)
        except ConfigError:
            raise
        except ValueError as error:
            problems.append(f"{domain.name}, {pair.name}: left out, {error}")
            continue
        rows += [(*about.values(), *row.values()) for row in values]
        subjects.append(about | {"subjects": "|".join(pair.subjects)})
        if phi_map is not None:
            costs.append(about | {"label": "", "metric": "seconds", "value": seconds, "unit": "s"})
            if fields is not None:
                affine = np.eye(4) if pair.affine is None else pair.affine.numpy()
                image = nibabel.Nifti1Image(learn2reg_field(phi_map), affine)
                name = f"disp_{pair.name.replace('<-', '_').replace(os.sep, '_')}.nii.gz"
                with written_whole(Path(fields) / name) as partial:
                    partial.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    results, of_costs = (pd.DataFrame(table, columns=ROWS) for table in (rows, costs))
    return Measured(results, of_costs, pd.DataFrame(subjects, columns=PAIRS), problems)


def register(method: GradICON | Method, pair: Pair, *, back=True) -> tuple[Tensor, Tensor | None, float]:
    """A pair's map, the swapped pair's (`back`), the seconds of the one registration; ValueError: one is not finite."""
    start = time.perf_counter()
    if isinstance(method, GradICON):
        phi_map = method.map_of(pair.moving, pair.fixed)
        seconds = time.perf_counter() - start
        inverse = method.map_of(pair.fixed, pair.moving) if back else None
    else:
        try:
            found = method(pair)
        except TypeError as error:
            if not isinstance(method, nn.Module):
                raise
            todo = "lambda pair: (net(pair.moving[None], pair.fixed[None]), None) makes a method of another network"
            raise ConfigError(f"expected a GradICON, or a method that takes a Pair, got {error}: {todo}") from error
        seconds = time.perf_counter() - start
        phi_map, inverse = found if isinstance(found, tuple | list) and len(found) == 2 else (None, None)
        if not (isinstance(phi_map, Tensor) and (inverse is None or isinstance(inverse, Tensor))):
            raise ConfigError(f"expected a method to return tensors (map, inverse or None), got {found!r:.60}")
        phi_map, inverse = phi_map.float(), inverse if inverse is None else inverse.float()
    if not all(found is None or found.isfinite().all() for found in (phi_map, inverse)):
        raise ValueError("the map found is not finite")
    return phi_map, inverse, seconds


def evaluate_all(run: Evaluate, *, progress: bool = True) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Every method of the run on every test domain: `costs`, `robustness`, `pairs`, `results`, and the problems.

    A domain that cannot be opened, or a method that is not there, is a problem, not the end. Raises DataError when
    nothing could be measured and that was for problems (not for want of labels).
    """
    columns = {"costs": COLUMNS, "robustness": CURVES, "pairs": PAIRS, "results": COLUMNS}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in columns}
    problems: list[str] = []
    for name in run.methods:
        try:
            method, about = _method(name, run)
        except ConfigError as error:
            if name != "ants-syn":
                raise
            problems.append(str(error))
            continue
        for domain in run.test_domains:
            try:
                dataset = open_domain(domain, shape=tuple(run.shape), data=run.data or None)
            except DataError as error:
                problems.append(str(error))
                continue
            if name == "network+bn" and isinstance(method, GradICON):
                method = _gathered(method, dataset, run.pairs)
            fields = Path(run.out) / "fields" / about["optimizer"] / domain if run.fields else None
            found = measured(method, dataset, pairs=run.pairs, progress=progress, fields=fields)
            problems += found.problems
            if run.corruptions and (method is None or isinstance(method, GradICON)):
                rows, lost = robustness(method, dataset, run.corruptions, pairs=run.corrupted_pairs, progress=progress)
                tables["robustness"].append(rows.assign(**about))
                problems += lost
            for kind in ("costs", "pairs", "results"):
                tables[kind].append(getattr(found, kind).assign(**about))
    whole = {name: together(parts, columns[name])[columns[name]] for name, parts in tables.items()}
    if problems and whole["results"].empty:
        raise DataError("no test pair could be measured:\n- " + "\n- ".join(problems))
    return whole | {"pairs": whole["pairs"].drop_duplicates(ignore_index=True)}, list(dict.fromkeys(problems))


def together(parts: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The tables as one; an empty one with these columns where none has a row."""
    filled = [part for part in parts if len(part)]  # an empty one would take the others' types away
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _method(name: str, run: Evaluate) -> tuple[GradICON | Method | None, dict[str, Any]]:
    """The method of this name, and whose results its are: the columns train_domain, optimizer and seed.

    Raises ConfigError where its program or its run is not there.
    """
    about: dict[str, Any] = {"train_domain": "", "seed": None, "optimizer": name}
    if name == "none":
        return None, about
    if name == "ants-syn":
        baselines.ants()
        return baselines.ants_syn, about
    trained = trained_with(run.run)
    if name == "io":
        net, steps, lr = baselines.untrained(trained), run.alone_io, run.alone_lr
    else:
        after = name.removeprefix("network")
        average = f"_{after[1:]}" if after in ("+ema", "+tail") else ""
        if average and not trained.averages:
            raise ConfigError(f"expected a training with averages: true for {name}, got one without in {run.run}")
        if average and not (Path(run.run) / f"weights{average}.pt").exists():
            todo = "delete weights.pt and train again: the checkpoint makes both"
            raise ConfigError(f"expected weights{average}.pt in {run.run}, got none: {todo}")
        net, about = load(Path(run.run) / f"weights{average}.pt"), trained.about()
        about["optimizer"] += after
        if after != "+io":
            return net, about
        steps, lr = run.io, run.io_lr
    return lambda pair: baselines.instance_optimised(net, pair, trained, steps=steps, lr=lr), about


def _gathered(net: GradICON, dataset, pairs: int) -> GradICON:
    """The network with BatchNorm's statistics of the test images, which needs no labels: a first step of adaptation."""
    there = [(pair.moving, pair.fixed) for pair in readable(dataset, range(min(pairs, dataset.test_count)), [])]
    number = -(-len(there) // 8)  # of batches, which count alike, so none is much smaller
    parts = (zip(*there[k::number], strict=True) for k in range(number))
    gather_statistics(net, ((torch.stack(moving), torch.stack(fixed)) for moving, fixed in parts))
    return net


def read_results(path: Path | str) -> pd.DataFrame:
    """A `results.csv`, `costs.csv` or `robustness.csv`; `seed` is a nullable integer, text columns are never NaN."""
    types = dict.fromkeys({*COLUMNS, *CURVES}, str) | {"seed": "Int64", "severity": float, "value": float}
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values={"value": [""], "seed": [""]})
