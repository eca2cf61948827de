"""What `register` found and what it writes; all of it follows from one map, voxel by voxel of the fixed file:

    index in the fixed file -> unit coordinates x -> phi(x) -> index in the moving file -> RAS mm -> LPS mm

Unit coordinates run from 0, the centre of a canonical (RAS) axis' first sample, to 1, that of its last.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel import Nifti1Header, Nifti1Image
from scipy.ndimage import map_coordinates

from fmsam_lib.metrics import dice
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting.slices import overview
from fmsam_lib.records import data_error
from fmsam_lib.registration.folder import ROLES, SUMMARY, staged
from fmsam_lib.registration.volume import Source, Volume, apply, itk_reads, read_labels, slabs

BACKGROUND = {"mr": 0.0, "ct": -1000.0}  # what the warped image shows outside the moving one
# Where a file lies, as its header says it.
GEOMETRY = ["qform_code", "sform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d"]
GEOMETRY += [f"{name}_{axis}" for name in ("qoffset", "srow") for axis in "xyz"]


@dataclass(frozen=True)
class Registration:
    """What `register` found.

    phi: from the fixed image's unit coordinates to the moving one's. pair: both images on the network's grid, as
    `explore(result.pair, result.phi)` wants them. losses: of instance optimisation, from step 0.
    summary: similarity before and after, folding, SDlogJ, Dice, seconds, notes, provenance. labels, fixed_labels: in
    their images' voxel order.
    """

    fixed: Volume
    moving: Volume
    phi: Transform
    pair: Pair
    summary: dict[str, Any]
    losses: list[float]
    labels: np.ndarray | None
    fixed_labels: np.ndarray | None

    @cached_property
    def warped(self) -> Nifti1Image:
        """The moving image seen from the fixed file's voxels: looked up once, linearly, in its own voxels; float32."""
        background = BACKGROUND[self.summary["modality"]["moving"]]
        return self._file(self._look_up(self.moving.values, order=1, background=background))

    def warp_labels(self, labels: Source) -> Nifti1Image:
        """A label image of the moving image (a path or a nibabel image) on the fixed file's voxels, nearest neighbour.

        Integer types are kept. Raises DataError unless they are whole numbers on the moving image's grid.
        """
        return self._file(self._look_up(read_labels(labels, self.moving), order=0))

    def displacement(self) -> Nifti1Image:
        """The displacement field that ITK-family tools apply: LPS mm, float32, `(X, Y, Z, 1, 3)`, intent vector.

        ITK reads a file `(X, Y)` as 2-D, so its field is `(X, Y, 1, 1, 2)`. It reads a file `(X, Y, 1)` as 3-D, but a
        vector field of one slice as 2-D, so that file's field is `(X, Y, 2, 1, 3)`, the slice twice.
        Raises DataError where ITK cannot read the fixed file's own geometry.
        """
        dim, affine = self.fixed.itk_dim, self.fixed.affine
        if not itk_reads(affine, dim):
            todo = "Resample the image without shear, or use Learn2Reg's form."
            raise data_error(self.fixed.where, "axes that ITK reads", str(affine.tolist()), todo)
        field = np.empty((*self.fixed.shape, 3), np.float32)
        for slab, index in slabs(self.fixed.shape):
            ras = apply(self.moving.affine[:3], index + self.voxel_displacement[:, slab]) - apply(affine[:3], index)
            field[slab] = np.moveaxis(ras, 0, -1) * (-1, -1, 1)  # ITK's axes point to the left and to the back
        if dim == 3 and field.shape[2] == 1:
            field = np.repeat(field, 2, axis=2)
        return self._file(field[:, :, :, None, :dim], intent="vector")

    def learn2reg(self) -> Nifti1Image:
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
        """Of each of the fixed image's labels, on its voxels, before and after; nothing unless both have labels."""
        if self.labels is None or self.fixed_labels is None:
            return {}
        still = dataclasses.replace(self, phi=Transform(self.phi.shape))  # no displacement
        before, after = still._look_up(self.labels, order=0), self._look_up(self.labels, order=0)
        found = {}
        for n, name in self.pair.labels.items():
            fixed, *warped = (torch.from_numpy(values == n) for values in (self.fixed_labels, before, after))
            found[name] = dict(zip(("before", "after"), (dice(mask, fixed) for mask in warped), strict=True))
        return found

    def save(self, folder: str | Path) -> list[Path]:
        """Write everything into `folder`, whole or not at all; the files' paths. Raises DataError when it cannot."""
        with staged(folder, [self.summary[role] for role in ROLES if role in self.summary]) as staging:
            self.write(staging)
        return [Path(folder) / name for name in self.summary["files"]]

    def write(self, staging: Path) -> None:
        """Write `_images`, `overview.png` and `summary.json` into a `staged` folder."""
        self.summary["files"] = []
        try:
            for name, image in self._images():
                nibabel.save(image, staging / name)
                self.summary["files"].append(name)
            overview(self.pair, self.phi.map).savefig(staging / "overview.png", dpi=150, metadata={"Software": None})
            self.summary["files"] += ["overview.png", SUMMARY]
            (staging / SUMMARY).write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            todo = "None were written. Make room, or choose another folder."
            raise data_error(staging.parent, "room for the results", error.strerror or str(error), todo) from error

    def _images(self) -> Iterator[tuple[str, Nifti1Image]]:
        """By the names of their files; the field twice, for ITK-family tools and, as `disp_…`, for Learn2Reg's."""
        yield "warped.nii.gz", self.warped
        yield f"disp_{self.fixed.name}_{self.moving.name}.nii.gz", self.learn2reg()
        if itk_reads(self.fixed.affine, self.fixed.itk_dim):  # else a note says so
            yield "displacement.nii.gz", self.displacement()
        if self.labels is not None:
            yield "labels.nii.gz", self._file(self._look_up(self.labels, order=0))

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

    def _file(self, values: np.ndarray, intent: str = "none") -> Nifti1Image:
        """`values` on the fixed file's voxels as NIfTI; of that header qform, sform and unit as they are, no more."""
        old, header = self.fixed.file.header, Nifti1Header()
        header.set_data_shape(values.shape)
        if isinstance(old, Nifti1Header):
            for key in GEOMETRY:
                header[key] = old[key]
            header["pixdim"][:4] = old["pixdim"][:4]
        else:
            header.set_sform(self.fixed.affine, 1)
            header.set_qform(self.fixed.affine, 1)
        header.set_intent(intent)
        return Nifti1Image(values, header.get_best_affine(), header, dtype=values.dtype)
