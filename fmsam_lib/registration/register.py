"""Register one pair of files: a warped image and a transform come out, in the fixed file's own space.

`register` finds one map; all that is saved follows from it, voxel by voxel of the fixed file:

    index in the fixed file -> unit coordinates x -> phi(x) -> index in the moving file -> RAS mm -> LPS mm

Unit coordinates run from 0, the centre of a canonical (RAS) axis' first sample, to 1, that of its last. Both
images' whole fields of view are laid over each other, as uniGradICON does: where the headers place the images
in the world has no influence on phi, only on the millimetres of the result.
"""

import dataclasses
import importlib.metadata
import json
import math
import time
import typing
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from fmsam_lib.images import files as data
from fmsam_lib.metrics import dice, folding_percent, sdlogj
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import jacobian_determinant, warp
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Similarity
from fmsam_lib.records import data_error, provenance
from fmsam_lib.registration.folder import ROLES, SUMMARY, spare, staged
from fmsam_lib.registration.volume import Volume, apply, itk_reads, read_labels, read_volume, slabs
from fmsam_lib.training.instance import optimise
from fmsam_lib.training.losses import lncc

BACKGROUND = {"MR": 0.0, "CT": -1000.0}  # what the warped image shows outside the moving one


SIMILARITIES = typing.get_args(Similarity)


def register(
    fixed,
    moving,
    net: GradICON | str | Path,
    *,
    modality: str = "mr",
    moving_modality: str | None = None,
    shape: tuple[int, ...] | None = None,
    io: int = 0,
    lr: float = 2e-5,
    lmbda: float = 1.5,
    sigma: float = 5.0,
    similarity: str = "lncc",
    seed: int = 0,
    labels=None,
    fixed_labels=None,
    progress: bool = True,
) -> "Registration":
    """Register the `moving` image to the `fixed` one: files of any shape, spacing and orientation.

    fixed, moving: a path or a nibabel image.
    net: a network, or its weights as `weights.load` takes them; it stays as it is, and the work is done on its device.
    modality: "mr" or "ct", of both images unless `moving_modality` is given.
    shape: the grid that the network works on; None for the one it was trained on (`net.shape`).
    io: steps of instance optimisation, of Adam (lr) on the loss of this very pair (lmbda, sigma, similarity: see
    `losses.objective`); the best iterate counts.
    labels: a label image of the moving image, to be warped; fixed_labels: one of the fixed image, for Dice.

    >>> result = register("fixed.nii.gz", "moving.nii.gz", net, io=50)  # doctest: +SKIP
    >>> result.summary["similarity"], result.save("out")  # doctest: +SKIP

    Warns where a header is in doubt. Raises ValueError for impossible arguments, weights that cannot be loaded or a
    transform that is not finite, and DataError (a ValueError) for images that cannot be registered.
    """
    start = time.perf_counter()
    kinds = {"fixed": modality.upper(), "moving": (moving_modality or modality).upper()}
    options = {"lr": lr, "lmbda": lmbda, "sigma": sigma, "similarity": similarity, "seed": seed}
    _check_options(kinds, io, options)
    net, weights = (load(net), str(net)) if isinstance(net, str | Path) else (net, None)
    shape = _grid(net, shape)

    fixed, moving = read_volume(fixed, net.dim, "fixed image"), read_volume(moving, net.dim, "moving image")
    notes = [*fixed.notes, *moving.notes]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    _check_pair(fixed, moving)
    sources = {"labels": labels, "fixed_labels": fixed_labels}
    labels = None if labels is None else read_labels(labels, moving)
    fixed_labels = None if fixed_labels is None else read_labels(fixed_labels, fixed)
    pair = Pair(
        name=f"{moving.name} to {fixed.name}",
        fixed=fixed.on_grid(shape, kinds["fixed"]),
        moving=moving.on_grid(shape, kinds["moving"]),
        fixed_label=None if fixed_labels is None else fixed.labels_on_grid(fixed_labels, shape),
        moving_label=None if labels is None else moving.labels_on_grid(labels, shape),
        labels={n: str(n) for n in ([] if fixed_labels is None else np.unique(fixed_labels).tolist()) if n},
        spacing=tuple((fixed.size / (np.array(shape) - 1)).tolist()),
        affine=fixed.grid_affine(shape) if fixed.oriented else None,
    )

    phi, losses, best, _ = optimise(net, pair.moving[None], pair.fixed[None], steps=io, progress=progress, **options)
    if not phi.map.isfinite().all():
        raise ValueError(f"expected a finite transform for {pair.name}, got NaN or infinity: are the weights damaged?")
    if 0 < len(losses) <= io:
        notes.append(f"instance optimisation: the loss was not finite at step {len(losses)}; the best before counts")
        warnings.warn(notes[-1], stacklevel=2)
    result = Registration(fixed, moving, phi, pair, {}, losses, labels, fixed_labels, BACKGROUND[kinds["moving"]])
    result.summary.update(
        fixed=fixed.where,
        moving=moving.where,
        **{name: str(source) for name, source in sources.items() if isinstance(source, str | Path)},
        network={"weights": weights, **net.settings, "shape": list(shape)},
        modality={name: kind.lower() for name, kind in kinds.items()},
        **_measure(pair, phi, sigma),
    )
    if io:
        done = {"steps_asked": io, "steps": len(losses) - 1, "best_step": best}
        done |= {"loss_before": losses[0], "loss_best": losses[best]}
        result.summary["instance_optimisation"] = done | options
    if labels is not None and fixed_labels is not None:
        result.summary["dice"] = result.dice()
    result.summary.update(
        seconds=round(time.perf_counter() - start, 2),
        notes=notes,
        version=importlib.metadata.version("fmsam"),
        provenance=provenance(),
    )
    return result


def _measure(pair: Pair, phi: Transform, sigma: float) -> dict:
    """Similarity, folding and regularity, on the network's grid."""
    moving, fixed = pair.moving[None], pair.fixed[None]
    determinant = jacobian_determinant(phi.map)
    return {
        "similarity": {
            "measure": "mean LNCC",
            "sigma": sigma,
            "before": lncc(moving, fixed, sigma=sigma).item(),
            "after": lncc(warp(moving, phi.map), fixed, sigma=sigma).item(),
        },
        "folding_percent": folding_percent(determinant),
        "sdlogj": sdlogj(determinant),
    }


@dataclass(frozen=True)
class Registration:
    """What `register` found.

    phi: from the fixed image's unit coordinates to the moving one's. pair: both images on the network's grid, as
    `view.explore(result.pair, result.phi)` wants them. losses: of instance optimisation, from step 0.
    summary: similarity before and after, folding, SDlogJ, Dice, seconds, notes, provenance. labels, fixed_labels: in
    their images' voxel order. background: what the warped image shows outside the moving one.
    """

    fixed: Volume
    moving: Volume
    phi: Transform
    pair: Pair
    summary: dict
    losses: list[float]
    labels: np.ndarray | None
    fixed_labels: np.ndarray | None
    background: float

    @cached_property
    def warped(self) -> nibabel.Nifti1Image:
        """The moving image seen from the fixed file's voxels: looked up once, linearly, in its own voxels; float32."""
        return self._file(self._look_up(self.moving.values, order=1, background=self.background))

    def warp_labels(self, labels) -> nibabel.Nifti1Image:
        """A label image of the moving image (a path or a nibabel image) on the fixed file's voxels, nearest neighbour.

        Integer types are kept. Raises DataError unless they are whole numbers on the moving image's grid.
        """
        return self._file(self._look_up(read_labels(labels, self.moving), order=0))

    def displacement(self) -> nibabel.Nifti1Image:
        """The displacement field that ITK-family tools apply: LPS mm, float32, `(X, Y, Z, 1, 3)`, intent vector.

        ITK reads a file `(X, Y)` as 2-D, so its field is `(X, Y, 1, 1, 2)`. It reads a file `(X, Y, 1)` as 3-D, but a
        vector field of one slice as 2-D, so that file's field is `(X, Y, 2, 1, 3)`, the slice twice.
        Raises DataError where ITK cannot read the fixed file's own geometry.
        """
        dim = self.fixed.itk_dim
        if not itk_reads(self.fixed.affine, dim):
            todo = "Resample the image without shear, or use Learn2Reg's form."
            raise data_error(self.fixed.where, "axes that ITK reads", str(self.fixed.affine.tolist()), todo)
        field = np.empty((*self.fixed.shape, 3), np.float32)
        for slab, index in slabs(self.fixed.shape):
            there = index + self.voxel_displacement[:, slab]
            ras = apply(self.moving.affine[:3], there) - apply(self.fixed.affine[:3], index)
            field[slab] = np.moveaxis(ras, 0, -1) * (-1, -1, 1)  # ITK's axes point to the left and to the back
        if dim == 3 and field.shape[2] == 1:
            field = np.repeat(field, 2, axis=2)
        return self._file(field[:, :, :, None, :dim], intent="vector")

    def learn2reg(self) -> nibabel.Nifti1Image:
        """Learn2Reg's form `(*S, D)`, float32, voxels: `map_coordinates(moving, identity + disp)` is the warped image.

        moving and identity: as the two files store them, whatever their orientations and shapes.
        """
        field = np.moveaxis(self.voxel_displacement, 0, -1)
        return self._file(field if self.fixed.itk_dim == 3 else field[:, :, 0, :2])

    @cached_property
    def voxel_displacement(self) -> np.ndarray:
        """`(3, X, Y, Z)` float32: index in the moving file minus index in the fixed file, at each fixed voxel."""
        field = np.empty((3, *self.fixed.shape), np.float32)
        dim = len(self.phi.shape)
        for slab, index in slabs(self.fixed.shape):
            x = torch.from_numpy(apply(self.fixed.unit_of_index, index)).float()
            phi = self.phi(x.view(1, dim, -1, *[1] * (dim - 1))).view(x.shape)
            field[:, slab] = apply(self.moving.index_of_unit, phi.numpy()) - index
        return field

    def dice(self) -> dict[str, dict[str, float]]:
        """Of each of the fixed image's labels, on its voxels, before (fields of view over each other) and after."""
        unregistered = dataclasses.replace(self, phi=Transform(self.phi.shape))  # no displacement
        warped = {"before": unregistered._look_up(self.labels, order=0), "after": self._look_up(self.labels, order=0)}

        def mask(values: np.ndarray, number: int) -> Tensor:
            return torch.from_numpy(values == number)

        return {
            str(number): {
                when: dice(mask(values, number), mask(self.fixed_labels, number)) for when, values in warped.items()
            }
            for number in self.pair.labels
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write everything into `folder`, whole or not at all; the files' paths. Raises DataError when it cannot."""
        spare(folder, [self.summary[role] for role in ROLES if role in self.summary])
        with staged(folder) as staging:
            self.write(staging)
        return [Path(folder) / name for name in self.summary["files"]]

    def write(self, staging: Path) -> None:
        """Write `warped.nii.gz`, `displacement.nii.gz` (ITK), `disp_<fixed>_<moving>.nii.gz` (Learn2Reg),
        `labels.nii.gz` (if there are any), `overview.png` and `summary.json` into a `staged` folder.
        """
        from fmsam_lib.plotting.slices import overview  # matplotlib takes a while to import

        makers = {
            "warped.nii.gz": lambda: self.warped,
            f"disp_{self.fixed.name}_{self.moving.name}.nii.gz": self.learn2reg,
        }
        if itk_reads(self.fixed.affine, self.fixed.itk_dim):  # else a note says so
            makers["displacement.nii.gz"] = self.displacement
        if self.labels is not None:
            makers["labels.nii.gz"] = lambda: self._file(self._look_up(self.labels, order=0))
        self.summary["files"] = [*makers, "overview.png", SUMMARY]
        try:
            for name, make in makers.items():
                nibabel.save(make(), staging / name)
            overview(self.pair, self.phi.map).savefig(staging / "overview.png", dpi=150, metadata={"Software": None})
            (staging / SUMMARY).write_text(json.dumps(self.summary, indent=2) + "\n")
        except OSError as error:
            todo = "None were written. Make room, or choose another folder."
            raise data_error(staging.parent, "room for the results", error.strerror or str(error), todo) from error

    def _look_up(self, values: np.ndarray, *, order: int, background: float = 0) -> np.ndarray:
        """`values` `(X, Y, Z)` of the moving file at the fixed file's voxels; order 0 is nearest, 1 linear."""
        result = np.empty(self.fixed.shape, values.dtype)
        end = np.array(values.shape).reshape(3, 1, 1, 1) - 0.5  # a voxel reaches half its size beyond its centre
        for slab, index in slabs(self.fixed.shape):
            index += self.voxel_displacement[:, slab]
            inside = ((index >= -0.5) & (index < end)).all(0)
            found = map_coordinates(values, index, output=values.dtype, order=order, mode="nearest", prefilter=False)
            result[slab] = np.where(inside, found, values.dtype.type(background))
        return result

    def _file(self, values: np.ndarray, intent: str = "none") -> nibabel.Nifti1Image:
        """`values` on the fixed file's voxels as NIfTI; of that header qform, sform and unit as they are, no more."""
        old, header = self.fixed.file.header, nibabel.Nifti1Header()
        if isinstance(old, nibabel.Nifti1Header):
            for key in GEOMETRY:
                header[key] = old[key]
            header.set_data_shape(values.shape)
            header["pixdim"][:4] = old["pixdim"][:4]
            image = nibabel.Nifti1Image(values, header.get_best_affine(), header, dtype=values.dtype)
        else:
            image = nibabel.Nifti1Image(values, self.fixed.affine, dtype=values.dtype)
            image.set_sform(self.fixed.affine, 1)
            image.set_qform(self.fixed.affine, 1)
        image.header.set_intent(intent)
        return image


GEOMETRY = ("qform_code", "sform_code", "xyzt_units", *(f"quatern_{a}" for a in "bcd"))


GEOMETRY += tuple(f"{name}_{a}" for name in ("qoffset", "srow") for a in "xyz")


# What is checked before the work


def _grid(net: GradICON, shape) -> tuple[int, ...]:
    shape = getattr(net, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError(
            f"expected `shape` (--shape), got none, and the weights do not say what grid they were trained on; "
            f"give {net.dim} numbers, as in the training"
        )
    whole = isinstance(shape, list | tuple | torch.Size) and all(isinstance(n, int) and n >= 16 for n in shape)
    if not whole or len(shape) != net.dim:
        raise ValueError(
            f"expected `shape` (--shape) to be {net.dim} whole numbers of at least 16 for this {net.dim}-D network, "
            f"got {shape!r}"
        )
    return tuple(shape)


def _check_options(kinds: dict[str, str], io: int, options: dict) -> None:
    for name, kind in kinds.items():
        if kind not in data.MODALITIES:
            raise ValueError(f"expected mr or ct as the {name} image's modality, got {kind.lower()!r}")
    if options["similarity"] not in SIMILARITIES:
        raise ValueError(f"expected similarity to be one of {', '.join(SIMILARITIES)}, got {options['similarity']!r}")
    wrong = [f"io {io}"] * (not isinstance(io, int) or io < 0)
    wrong += [f"lmbda {options['lmbda']}"] * (not 0 <= options["lmbda"] < math.inf)
    wrong += [f"{name} {options[name]}" for name in ("lr", "sigma") if not 0 < options[name] < math.inf]
    if wrong:
        raise ValueError(f"expected a whole number io and lmbda from 0, lr and sigma above 0, got {', '.join(wrong)}")


def _check_pair(fixed: Volume, moving: Volume) -> None:
    """Raises DataError unless the two could show the same thing."""
    if fixed.oriented != moving.oriented:
        silent, other = (moving, fixed) if fixed.oriented else (fixed, moving)
        expected = f"a header that states the orientation, as {other.where}'s does"
        todo = "Set it (nibabel: image.set_sform(affine, 1)): guessed, it could mirror the result."
        raise data_error(silent.where, expected, "qform and sform codes 0", todo)
    if fixed.axes != moving.axes:
        todo = "Take slices of one orientation, or correct the header."
        raise data_error(
            moving.where, f"a slice along {fixed.axes}, as {fixed.where}", f"one along {moving.axes}", todo
        )
    ratio = moving.size / fixed.size
    if ratio.max() > 3 or ratio.min() < 1 / 3:
        sizes = [" x ".join(f"{mm:.3g}" for mm in image.size) + " mm" for image in (fixed, moving)]
        expected = f"a field of view like the {sizes[0]} of {fixed.where}, at most 3 times as large or small"
        todo = "Crop or pad one of them, so that they show the same."
        if ratio.max() < 2 * ratio.min():
            todo = f"All axes differ by about {ratio.mean():.2g} times: is a spacing lost or in another unit? {todo}"
        raise data_error(moving.where, expected, f"{sizes[1]} (right, front, up)", todo)
