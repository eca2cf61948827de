"""Register one pair of files: a warped image and a transform come out, in the fixed file's own space.

The network sees both images on one grid over the fixed one's field of view; `start` says how the moving one gets there.
"""

import importlib.metadata
import re
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import SimpleITK as sitk  # noqa: N813
import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.files import Source, ids, name_of, read_labels, read_values, stem
from fmsam_lib.images.grid import affine, check_same_grid, labels_on_grid, on_grid, oriented, placed, reference
from fmsam_lib.metrics import determinants, folding_percent, percent, sdlogj
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import warp
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Registering
from fmsam_lib.records import data_error, provenance
from fmsam_lib.registration.folder import ROLES, fitting
from fmsam_lib.registration.result import Registration, displacing, field_of, growth
from fmsam_lib.registration.start import FOUND, NAMED, doubts, starting
from fmsam_lib.registration.verdict import LIMITS, judge
from fmsam_lib.training.instance import optimise
from fmsam_lib.training.losses import lncc


def register(
    fixed: Source,
    moving: Source,
    net: GradICON | str | Path,
    *,
    labels: Source | None = None,
    fixed_labels: Source | None = None,
    fixed_mask: Source | None = None,
    moving_mask: Source | None = None,
    progress: bool = True,
    **options: Any,
) -> Registration:
    """Register the `moving` image to the `fixed` one: files of any shape, spacing and orientation.

    fixed, moving: a path, or an image of nibabel's or SimpleITK's.
    net: a network, or its weights as `weights.load` takes them; it stays as it is, and the work is done on its device.
    labels: a label image of the moving image, to be warped; fixed_labels: one of the fixed image, for Dice.
    fixed_mask, moving_mask: label images; where they are 0, instance optimisation does not look, nor, of the fixed one,
    the measures.
    options: the fields of `parameters.Registering`, which says what they are; None for the default. With io > 0 the
    best iterate of instance optimisation counts (see `instance.optimise`).

    >>> result = register("fixed.nii.gz", "moving.nii.gz", net, io=50)  # doctest: +SKIP
    >>> result.summary["similarity"], result.save("out")  # doctest: +SKIP

    Warns where a header is in doubt. Raises ValueError for impossible options, weights that cannot be loaded or a
    transform that is not finite, and DataError (a ValueError) for images that cannot be registered.
    """
    begun = time.perf_counter()
    how = read(Registering, {k: v for k, v in options.items() if v is not None}, source="register's options")
    modality = {"fixed": how.modality, "moving": how.moving_modality or how.modality}
    network, weights = (load(net), str(net)) if isinstance(net, str | Path) else (net, None)
    if not isinstance(getattr(network, "_orig_mod", network), GradICON):  # there torch.compile keeps it
        todo = "fm.load(file) reads a network, net, losses = fm.train(...) trains one"
        raise ConfigError(f"expected a network or its weights, got {type(network).__name__}: {todo}")
    shape, dim = tuple(how.shape or network.shape or ()), network.dim
    if len(shape) != dim:
        got = list(shape) if shape else "none, and the weights do not say what they were trained on"
        raise ValueError(f"expected {dim} numbers as `shape` (--shape) of a {dim}-D network, got {got}")
    trained = network.grid_unlike(shape)
    told = [f"{trained}: {shape} may register far worse"] if trained else []

    here, there = (_read(source, dim, name) for source, name in ((fixed, "fixed image"), (moving, "moving image")))
    where = (name_of(fixed, "fixed image"), name_of(moving, "moving image"))
    notes, sided = told + doubts(where, (here, there)), oriented(here)  # before the headers are lost in joining
    if here.GetDimension() != there.GetDimension():  # ITK reads a file (X, Y) as 2-D, one (X, Y, 1) as 3-D
        here, there = (sitk.JoinSeries([i]) if i.GetDimension() == 2 else i for i in (here, there))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    grid = reference(here, shape)
    own = reference(there, shape, beside=grid)
    fixed_on_grid = on_grid(here, grid, modality["fixed"].upper(), where[0])
    moving_alone = on_grid(there, own, modality["moving"].upper(), where[1]) if how.start in FOUND else fixed_on_grid
    start = starting(how.start, (grid, own), (fixed_on_grid, moving_alone), where)
    files = dict(zip(ROLES, (fixed, moving, labels, fixed_labels, fixed_mask, moving_mask), strict=True))
    marks, marks_on_grid = {}, {}  # labels and masks: as they are, and on the grid
    for role, file in files.items():
        if role not in ("fixed", "moving") and file is not None:
            image, name, way = (here, where[0], None) if role.startswith("fixed") else (there, where[1], start)
            marks[role] = check_same_grid(name_of(file, role), read_labels(file, 2, what=role), name, image)
            marks_on_grid[role] = labels_on_grid(marks[role], grid, way)
            if role.endswith("mask") and not marks_on_grid[role].any():
                found, todo = "none of it there", "Is it too small, or elsewhere? Choose another mask or --start."
                raise data_error(name_of(file, role), "a mask that holds samples of the grid", found, todo)
    structures = [{*ids(marks[role])} - {0} if role in marks else set() for role in ("fixed_labels", "labels")]
    if all(structures) and (alone := sorted(structures[0] ^ structures[1])):
        notes.append(f"no Dice of the labels {alone}: only one of the two images has them")
        warnings.warn(notes[-1], stacklevel=2)
    masks: dict[str, Any] = {}
    if {"fixed_mask", "moving_mask"} & marks.keys():  # where only one image has a mask, all of the other counts
        everywhere = torch.ones_like(fixed_on_grid)
        masks = {role: marks_on_grid.get(role, everywhere) != 0 for role in ("fixed_mask", "moving_mask")}
    names = fitting(short(where[0]), short(where[1]))
    pair = Pair(
        name=f"{names[1]} to {names[0]}",
        fixed=fixed_on_grid,
        moving=on_grid(there, grid, modality["moving"].upper(), where[1], start),
        fixed_label=marks_on_grid.get("fixed_labels"),
        moving_label=marks_on_grid.get("labels"),
        labels={n: str(n) for n in sorted(structures[0])},
        spacing=grid.GetSpacing()[:dim],
        affine=torch.from_numpy(affine(grid)) if sided else None,
        **masks,
    )
    if not pair.moving.any():
        found = f"nothing of it there, from the start {how.start}"
        raise data_error(where[1], f"an image that overlaps {where[0]}", found, "Choose another --start or image.")

    a, b = pair.moving[None], pair.fixed[None]
    loss = how.model_dump(include={"lr", "lmbda", "sigma", "similarity", "seed"})
    counts = [mask[None] for mask in (pair.moving_mask, pair.fixed_mask) if mask is not None]
    phi, losses, best, psi = optimise(network, a, b, steps=how.io, masks=counts, progress=progress, **loss)
    if not phi.map.isfinite().all():
        raise ValueError(f"expected a finite transform for {pair.name}, got NaN or infinity: are the weights damaged?")
    if 0 < len(losses) <= how.io:
        notes.append(f"instance optimisation: the loss was not finite at step {len(losses)}; the best before counts")
        warnings.warn(notes[-1], stacklevel=2)

    if how.similarity != "lncc" and not how.io:
        notes.append(f"{how.similarity} without --io leaves the network's map as it is, and LNCC no longer judges it")
        warnings.warn(notes[-1], stacklevel=2)
    where_fixed = counts[-1] if counts else None
    before, after = (lncc(image, b, sigma=how.sigma, mask=where_fixed).item() for image in (a, warp(a, phi.map)))
    comparable = how.similarity == "lncc" and len({*modality.values()}) == 1  # LNCC means something
    against: list[str] = []
    if how.start not in NAMED and 1 not in grid.GetSize():  # a file's: of the others none can
        folded = 100 * float((sitk.GetArrayViewFromImage(growth(field_of(start, grid))) <= 0).mean())
        if folded > LIMITS["folding"][1]:
            against = [f"the start {how.start} mirrors or folds {percent(folded)} of the image"]
    if after < before and comparable and not how.keep_worse:
        notes.append(f"the network makes the images less alike (LNCC {before:.3f} to {after:.3f}): left as they were")
        warnings.warn(notes[-1], stacklevel=2)
        phi, psi, after, against = Transform(shape), Transform(shape), before, [*against, notes[-1]]
    determinant = determinants(pair, phi.map)
    summary: dict[str, Any] = {role: str(file) for role, file in files.items() if isinstance(file, str | Path)} | {
        "network": {"weights": weights, **network.settings, "shape": list(shape)},
        "modality": modality,
        "start": how.start,
        "size": {"fixed": here.GetSize(), "moving": there.GetSize()},
        "similarity": {"measure": "mean LNCC", "sigma": how.sigma, "before": before, "after": after},
        "folding_percent": folding_percent(determinant),
        "sdlogj": sdlogj(determinant),
    }
    if how.io:
        done = {"steps_asked": how.io, "steps": len(losses) - 1, "best_step": best}
        summary["instance_optimisation"] = done | {"loss_before": losses[0], "loss_best": losses[best]} | loss
    transform = sitk.CompositeTransform([start, displacing(phi, grid)])  # the last one comes first
    transform.FlattenTransform()
    inverse = None
    try:
        inverse = sitk.CompositeTransform([displacing(psi, grid), start.GetInverse()])
        inverse.FlattenTransform()
    except RuntimeError:
        notes.append(f"the transform {how.start} has no inverse, so none is written")
    similarity = summary["similarity"] if comparable else None
    summary["verdict"], error = judge(network, pair, phi.map, psi.map, similarity, against)
    error_map = placed(error.reshape(grid.GetSize()).numpy().transpose(), grid)
    parts = (phi, psi, start, transform, inverse, pair, summary, losses, error_map, names)
    result = Registration(here, there, *parts, marks.get("labels"), marks.get("fixed_labels"))
    if overlap := result.dice():
        start_dice, end_dice = (fmean(dice[when] for dice in overlap.values()) for when in ("before", "after"))
        if end_dice < start_dice - 0.01:  # the verdict needs no labels, but does not look away
            reasons = [f"mean Dice falls from {start_dice:.3f} to {end_dice:.3f}", summary["verdict"]["reason"]]
            summary["verdict"] |= {"verdict": "look at it", "reason": "; ".join(filter(None, reasons))}
    summary |= {"dice": overlap, "seconds": round(time.perf_counter() - begun, 2), "notes": notes}
    summary |= {"version": importlib.metadata.version("fmsam"), "provenance": provenance()}
    return result


def short(path: str) -> str:
    """What Learn2Reg calls the image: `0001` of `Name_0001_0000.nii.gz`, else the file's name without format."""
    return re.sub(r"^.*_(\d{4})_\d{4}$", r"\1", stem(path))


def _read(source: Source, dim: int, what: str) -> sitk.Image:
    image = read_values(source, dim, what)
    if max(image.GetSize()) > 32_767:
        expected, found = "sides of at most 32,767, as NIfTI has", f"size {image.GetSize()}"
        raise data_error(name_of(source, what), expected, found, "Shrink or cut it.")
    if dim == 2 and min((*image.GetSize(), 1)[:3]) > 1:
        found, todo = f"a volume of shape {image.GetSize()}", "Use a network for volumes, or save one slice."
        raise data_error(name_of(source, what), "a single slice, for this 2-D network", found, todo)
    return image
