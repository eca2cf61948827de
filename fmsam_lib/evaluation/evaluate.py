"""Methods x test pairs x metrics -> tidy tables: `results.csv`, `costs.csv`, `robustness.csv`.

What a method finds is the same each time, to the bit, and stands in the results; what it takes, seconds and memory,
is the machine's, and stands apart.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError
from fmsam_lib.evaluation import baselines
from fmsam_lib.evaluation.robustness import robustness
from fmsam_lib.images.domains import open_domain
from fmsam_lib.metrics import learn2reg_field, measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Evaluate, about_run, trained_with
from fmsam_lib.records import DataError, written_whole

COLUMNS = ["train_domain", "test_domain", "optimizer", "seed", "pair", "label", "metric", "value", "unit"]


CURVES = [
    "train_domain",
    "test_domain",
    "optimizer",
    "seed",
    "pair",
    "corruption",
    "severity",
    "metric",
    "value",
    "unit",
]


Method = Callable[[Pair], tuple[Tensor, Tensor | None]]  # a pair's map and the swapped pair's, (1, D, *S); None: none


def evaluate(
    method: GradICON | Method | None, dataset, *, pairs: int, progress: bool = True, fields: Path | str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Metrics of a network or another method (None: no registration) on the first test pairs of `dataset`.

    Returns the rows (`results.csv`'s columns from `pair` on, and `test_domain`), what each pair took, in the same
    columns (seconds of one registration; peak_memory, the most that the whole process held in memory meanwhile, on
    Linux), and the problems: a pair whose files cannot be read, or for which the method finds no map or one that is
    not finite, is named there and the others go on. fields: a folder for Learn2Reg's displacement fields,
    `disp_<fixed>_<moving>.nii.gz`, on the grid of the evaluation.
    """
    rows, costs, problems = [], [], []
    for i in tqdm(range(min(pairs, dataset.test_count)), disable=not progress, desc=dataset.name, unit="pair"):
        try:
            pair = dataset.test_pair(i)
        except DataError as error:
            problems.append(str(error))
            continue
        about = {"test_domain": dataset.name, "pair": pair.name}
        try:
            phi_map, inverse, cost = (None, None, []) if method is None else _register(method, pair)
        except ValueError as error:
            problems.append(f"{dataset.name}, {pair.name}: left out, {error}")
            continue
        if not all(found is None or torch.isfinite(found).all() for found in (phi_map, inverse)):
            problems.append(f"{dataset.name}, {pair.name}: left out, the map found is not finite")
            continue
        rows += [about | row for row in measure(pair, phi_map, inverse)]
        costs += [about | {"label": ""} | row for row in cost]
        if fields is not None and phi_map is not None:
            _write_field(Path(fields), pair, phi_map)
    columns = [c for c in COLUMNS if c not in ("train_domain", "optimizer", "seed")]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(costs, columns=columns), problems


def _register(method: GradICON | Method, pair: Pair) -> tuple[Tensor, Tensor | None, list[dict]]:
    resets = _reset_peak()
    start = time.perf_counter()
    if isinstance(method, GradICON):
        with torch.no_grad():
            phi_map, inverse = method(pair.moving[None], pair.fixed[None]).map, None
    else:
        phi_map, inverse = method(pair)
    cost = [{"metric": "seconds", "value": time.perf_counter() - start, "unit": "s"}]
    if resets:
        cost.append({"metric": "peak_memory", "value": _peak() / 1024, "unit": "MiB"})
    if isinstance(method, GradICON):  # not a part of registering the pair
        with torch.no_grad():
            inverse = method(pair.fixed[None], pair.moving[None]).map
    return phi_map, inverse, cost


def _reset_peak() -> bool:
    """Have Linux count the process's peak of memory anew; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _write_field(folder: Path, pair: Pair, phi_map: Tensor) -> None:
    names = (name.replace(os.sep, "_") for name in pair.name.split("<-"))
    affine = np.eye(4) if pair.affine is None else pair.affine.numpy()
    with written_whole(folder / f"disp_{'_'.join(names)}.nii.gz") as partial:
        whole = partial.with_name(f"{partial.name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(learn2reg_field(phi_map), affine), whole)
        os.replace(whole, partial)


def evaluate_all(settings: Evaluate, *, progress: bool = True) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Every method of the settings on every test domain: the tables `results`, `costs`, `robustness`, and problems.

    A domain that cannot be opened, or a method that is not there, is a problem, not the end. Raises DataError when
    nothing could be measured and that was for problems (not for want of labels).
    """
    tables, problems = {"results": [], "costs": [], "robustness": []}, []
    for name in settings.methods:
        try:
            method, about = _method(name, settings)
        except ConfigError as error:
            if name != "ants-syn":
                raise
            problems.append(str(error))
            continue
        for domain in settings.test_domains:
            try:
                dataset = open_domain(domain, shape=tuple(settings.shape), data=settings.data or None)
            except DataError as error:
                problems.append(str(error))
                continue
            fields = Path(settings.out) / "fields" / about["optimizer"] / domain if settings.fields else None
            results, costs, found = evaluate(method, dataset, pairs=settings.pairs, progress=progress, fields=fields)
            found_tables = {"results": results, "costs": costs}
            if settings.corruptions and name in ("none", "network"):
                how = {"pairs": settings.corrupted_pairs, "progress": progress}
                curves, of_curves = robustness(method, dataset, settings.corruptions, **how)
                found_tables["robustness"] = curves
                found = [*found, *of_curves]
            for kind, table in found_tables.items():
                if len(table):  # an empty one would take the others' types away
                    tables[kind].append(table.assign(**about))
            problems += found
    if problems and not tables["results"]:
        raise DataError("no test pair could be measured:\n- " + "\n- ".join(problems))
    columns = {"results": COLUMNS, "costs": COLUMNS, "robustness": CURVES}
    whole = {
        kind: pd.concat(t, ignore_index=True) if t else pd.DataFrame(columns=columns[kind])
        for kind, t in tables.items()
    }
    return whole, list(dict.fromkeys(problems))


def _method(name: str, settings: Evaluate) -> tuple[GradICON | Method | None, dict]:
    """The method of this name, and whose results its are: the columns train_domain, optimizer and seed.

    Raises ConfigError where its program or its run is not there.
    """
    alone = {"train_domain": "", "seed": None}
    if name == "none":
        return None, alone | {"optimizer": "none"}
    if name == "ants-syn":
        baselines.ants()
        return baselines.ants_syn, alone | {"optimizer": "ants-syn"}
    run = trained_with(settings.run)
    if name == "io":
        net, how = baselines.untrained(run), {"steps": settings.alone_io, "lr": settings.alone_lr}
        about = alone | {"optimizer": "io"}
    else:
        net, about = load(Path(settings.run) / "weights.pt"), about_run(settings.run)
        if name == "network":
            return net, about
        how = {"steps": settings.io, "lr": settings.io_lr}
        about["optimizer"] += "+io"
    return lambda pair: baselines.instance_optimised(net, pair, run, **how), about


def write_results(results: pd.DataFrame, path: Path | str, columns: list[str] = COLUMNS) -> None:
    """`results.csv`: the columns in order, numbers in full, so that the same run gives the same bytes.

    columns: `CURVES` for `robustness.csv`.
    """
    with written_whole(path) as partial:
        results.reindex(columns=columns).to_csv(partial, index=False, lineterminator="\n")


def read_results(path: Path | str) -> pd.DataFrame:
    """A `results.csv`, `costs.csv` or `robustness.csv`; `seed` is a nullable integer, text columns are never NaN."""
    types = dict.fromkeys({*COLUMNS, *CURVES}, str) | {"seed": "Int64", "severity": float, "value": float}
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values={"value": [""], "seed": [""]})
