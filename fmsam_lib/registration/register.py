"""Register one pair of files: a warped image and a transform come out, in the fixed file's own space.

Both images' whole fields of view are laid over each other, as uniGradICON does: where the headers place the images
in the world has no influence on phi, only on the millimetres of the result.
"""

import importlib.metadata
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fmsam_lib.checking import read
from fmsam_lib.metrics import folding_percent, sdlogj
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import jacobian_determinant, warp
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Registering
from fmsam_lib.records import data_error, provenance
from fmsam_lib.registration.result import Registration
from fmsam_lib.registration.volume import Source, Volume, read_labels, read_volume
from fmsam_lib.training.instance import optimise
from fmsam_lib.training.losses import lncc


def register(
    fixed: Source,
    moving: Source,
    net: GradICON | str | Path,
    *,
    labels: Source | None = None,
    fixed_labels: Source | None = None,
    progress: bool = True,
    **options: Any,
) -> Registration:
    """Register the `moving` image to the `fixed` one: files of any shape, spacing and orientation.

    fixed, moving: a path or a nibabel image.
    net: a network, or its weights as `weights.load` takes them; it stays as it is, and the work is done on its device.
    labels: a label image of the moving image, to be warped; fixed_labels: one of the fixed image, for Dice.
    options: the fields of `parameters.Registering`, which says what they are; None for the default. With io > 0 the
    best iterate of instance optimisation counts (see `instance.optimise`).

    >>> result = register("fixed.nii.gz", "moving.nii.gz", net, io=50)  # doctest: +SKIP
    >>> result.summary["similarity"], result.save("out")  # doctest: +SKIP

    Warns where a header is in doubt. Raises ValueError for impossible options, weights that cannot be loaded or a
    transform that is not finite, and DataError (a ValueError) for images that cannot be registered.
    """
    start = time.perf_counter()
    given = {name: value for name, value in options.items() if value is not None}
    how = read(Registering, given, source="register's options")
    modality = {"fixed": how.modality, "moving": how.moving_modality or how.modality}
    network, weights = (load(net), str(net)) if isinstance(net, str | Path) else (net, None)
    shape, dim = tuple(how.shape or network.shape or ()), network.dim
    if len(shape) != dim:
        got = list(shape) if shape else "none, and the weights do not say what they were trained on"
        raise ValueError(f"expected {dim} numbers as `shape` (--shape) of a {dim}-D network, got {got}")

    here, there = read_volume(fixed, dim, "fixed image"), read_volume(moving, dim, "moving image")
    notes = [*here.notes, *there.notes]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    _check_pair(here, there)
    moving_label = None if labels is None else read_labels(labels, there)
    fixed_label = None if fixed_labels is None else read_labels(fixed_labels, here)
    pair = Pair(
        name=f"{there.name} to {here.name}",
        fixed=here.on_grid(shape, modality["fixed"]),
        moving=there.on_grid(shape, modality["moving"]),
        fixed_label=None if fixed_label is None else here.labels_on_grid(fixed_label, shape),
        moving_label=None if moving_label is None else there.labels_on_grid(moving_label, shape),
        labels={n: str(n) for n in ([] if fixed_label is None else np.unique(fixed_label).tolist()) if n},
        spacing=tuple((here.size / (np.array(shape) - 1)).tolist()),
        affine=here.grid_affine(shape) if here.oriented else None,
    )

    a, b = pair.moving[None], pair.fixed[None]
    loss = how.model_dump(include={"lr", "lmbda", "sigma", "similarity", "seed"})
    phi, losses, best, _ = optimise(network, a, b, steps=how.io, progress=progress, **loss)
    if not phi.map.isfinite().all():
        raise ValueError(f"expected a finite transform for {pair.name}, got NaN or infinity: are the weights damaged?")
    if 0 < len(losses) <= how.io:
        notes.append(f"instance optimisation: the loss was not finite at step {len(losses)}; the best before counts")
        warnings.warn(notes[-1], stacklevel=2)

    files = {"fixed": here.where, "moving": there.where, "labels": labels, "fixed_labels": fixed_labels}
    before, after = (lncc(image, b, sigma=how.sigma).item() for image in (a, warp(a, phi.map)))
    determinant = jacobian_determinant(phi.map)
    summary: dict[str, Any] = {role: str(file) for role, file in files.items() if isinstance(file, str | Path)} | {
        "network": {"weights": weights, **network.settings, "shape": list(shape)},
        "modality": modality,
        "similarity": {"measure": "mean LNCC", "sigma": how.sigma, "before": before, "after": after},
        "folding_percent": folding_percent(determinant),
        "sdlogj": sdlogj(determinant),
    }
    if how.io:
        done = {"steps_asked": how.io, "steps": len(losses) - 1, "best_step": best}
        summary["instance_optimisation"] = done | {"loss_before": losses[0], "loss_best": losses[best]} | loss
    result = Registration(here, there, phi, pair, summary, losses, moving_label, fixed_label)
    if found := result.dice():
        summary["dice"] = found
    summary["seconds"] = round(time.perf_counter() - start, 2)
    summary |= {"notes": notes, "version": importlib.metadata.version("fmsam"), "provenance": provenance()}
    return result


def _check_pair(fixed: Volume, moving: Volume) -> None:
    """Raises DataError unless the two could show the same thing."""
    if fixed.oriented != moving.oriented:
        silent, other = (moving, fixed) if fixed.oriented else (fixed, moving)
        expected = f"a header that states the orientation, as {other.where}'s does"
        todo = "Set it (nibabel: image.set_sform(affine, 1)): guessed, it could mirror the result."
        raise data_error(silent.where, expected, "qform and sform codes 0", todo)
    if fixed.axes != moving.axes:
        expected, todo = f"a slice along {fixed.axes}, as {fixed.where}", "Take slices of one orientation."
        raise data_error(moving.where, expected, f"one along {moving.axes}", todo)
    ratio = moving.size / fixed.size
    if ratio.max() > 3 or ratio.min() < 1 / 3:
        sizes = [" x ".join(f"{mm:.3g}" for mm in image.size) + " mm" for image in (fixed, moving)]
        expected = f"a field of view like the {sizes[0]} of {fixed.where}, at most 3 times as large or small"
        todo = "Crop or pad one of them, so that they show the same."
        if ratio.max() < 2 * ratio.min():
            todo = f"All axes differ by about {ratio.mean():.2g} times: is a spacing lost or in another unit? {todo}"
        raise data_error(moving.where, expected, f"{sizes[1]} (right, front, up)", todo)
