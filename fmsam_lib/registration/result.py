"""What `register` found and what it writes; all of it follows from one transform in ITK's space:

    point of the fixed image -> the network's displacement, on its grid -> start -> point of the moving image

SimpleITK applies it, composes it and writes it, so whoever else uses ITK gets the same images.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from fmsam_lib.images.files import Source, ids, read_labels
from fmsam_lib.images.grid import CT_WINDOW, affine, check_same_grid, nearest, placed, without_fill
from fmsam_lib.metrics import dice, percent
from fmsam_lib.model.spatial import identity_map, voxels
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting.cards import card, regularity
from fmsam_lib.plotting.slices import fitting, overview
from fmsam_lib.records import data_error, write_json
from fmsam_lib.registration.folder import ROLES, SUMMARY, staged
from fmsam_lib.registration.start import index_to_lps
from fmsam_lib.registration.verdict import in_words


@dataclass(frozen=True)
class Registration:
    """What `register` found.

    fixed, moving: the images as SimpleITK read them. phi, psi: from the grid's unit coordinates over the fixed image to
    the moving image brought there by `start`, and back. transform: from the fixed image's points to the moving one's,
    in ITK's space; inverse: back, None where `start` has no inverse. pair: both images on the network's grid, as
    `explore(result.pair, result.phi)` wants them. losses: of instance optimisation, from step 0. summary: similarity,
    folding, SDlogJ, Dice, verdict, seconds, notes, provenance. error: by how much there and back misses, mm, on the
    grid. labels, fixed_labels: None or an image each.
    """

    fixed: sitk.Image
    moving: sitk.Image
    phi: Transform
    psi: Transform
    start: sitk.Transform
    transform: sitk.Transform
    inverse: sitk.Transform | None
    pair: Pair
    summary: dict[str, Any]
    losses: list[float]
    error: sitk.Image
    names: tuple[str, str]
    labels: sitk.Image | None = None
    fixed_labels: sitk.Image | None = None

    def _repr_html_(self) -> str:
        """At the end of a cell: before and after, and whether to trust it."""
        similarity, said = self.summary["similarity"], "{before:.3f} before, {after:.3f} after"
        facts = {
            "verdict": in_words(self.summary["verdict"]).removeprefix("verdict: "),
            similarity["measure"]: said.format(**similarity),
            **{f"Dice, {label}": said.format(**dice) for label, dice in self.summary.get("dice", {}).items()},
            **regularity(self.phi.map),
            "folded": percent(self.summary["folding_percent"]),  # where a mask counts, within it
            "SDlogJ": f"{self.summary['sdlogj']:.3f}",
        }
        return card(" onto ".join(reversed(self.names)), facts, overview(self.pair, self.phi.map))

    @cached_property
    def warped(self) -> sitk.Image:
        """The moving image seen from the fixed image's voxels, linearly; float32; outside its `background`."""
        return linearly(self.moving, self.fixed, self.transform, self.summary["modality"]["moving"])

    def warp_labels(self, labels: Source) -> sitk.Image:
        """A label image of the moving image (a file, say) on the fixed image's voxels, nearest neighbour, ids kept.

        Raises DataError unless they are whole numbers on the moving image's grid.
        """
        there = check_same_grid(labels, read_labels(labels, 2), "moving image", self.moving)
        return nearest(there, self.fixed, self.transform)

    @cached_property
    def displacement(self) -> sitk.Image:
        """The displacement at the fixed image's voxels that ITK-family tools apply: LPS mm, float32 vectors."""
        return field_of(self.transform, self.fixed)

    def learn2reg(self) -> nibabel.Nifti1Image:
        """Learn2Reg's form `(*S, D)`, float32, voxels: `map_coordinates(moving, identity + disp)` is the warped image.

        moving and identity: as the two files store them, whatever their orientations and shapes.
        """
        dim = self.fixed.GetDimension()
        to_mm, to_index = index_to_lps(self.fixed), np.linalg.inv(index_to_lps(self.moving))
        mm = sitk.GetArrayFromImage(self.displacement)  # ([Z,] Y, X, D)
        for plane, field in enumerate(mm if dim == 3 else mm[None]):
            index = np.stack(np.meshgrid(*map(np.arange, field.shape[1::-1]), [plane], [1.0]), -1)[:, :, 0, 0]
            there = index @ to_mm.T
            there[..., :dim] += field
            there = there @ to_index.T
            nearest_voxel = np.rint(there)  # a rounding error beyond the edge would be outside for scipy
            there = np.where(np.abs(there - nearest_voxel) < 1e-5, nearest_voxel, there)
            field[:] = (there - index)[..., :dim]
        image = nibabel.Nifti1Image(mm.swapaxes(0, dim - 1), affine(self.fixed))
        image.header.set_xyzt_units("mm")
        return image

    def dice(self) -> dict[str, dict[str, float]]:
        """Of each label that both images have, on the fixed one's voxels, before and after; nothing without labels."""
        if self.labels is None or self.fixed_labels is None:
            return {}
        identity = sitk.Transform(self.fixed.GetDimension(), sitk.sitkIdentity)
        moved = [(self.fixed_labels, identity), (self.labels, self.start), (self.labels, self.transform)]
        images = [sitk.GetArrayFromImage(nearest(labels, self.fixed, transform)) for labels, transform in moved]
        found: dict[str, dict[str, float]] = {}
        for n in sorted({*self.pair.labels}.intersection(ids(self.labels))):
            fixed, before, after = (torch.from_numpy(values == n) for values in images)
            found[str(n)] = {"before": dice(before, fixed), "after": dice(after, fixed)}
        return found

    def save(self, folder: str | Path) -> list[Path]:
        """Write everything into `folder`, whole or not at all; the files' paths. Raises DataError when it cannot."""
        with staged(folder, [self.summary[role] for role in ROLES if role in self.summary]) as staging:
            self.write(staging)
        return [Path(folder) / name for name in self.summary["files"]]

    def write(self, staging: Path) -> None:
        """Write all of `_files`, `overview.png` and `summary.json` into a `staged` folder."""
        self.summary["files"] = []
        try:
            for name, what in self._files():
                write(what, staging / name)
                self.summary["files"].append(name)
            figure = overview(self.pair, self.phi.map, in_words(self.summary["verdict"]))
            figure.savefig(staging / "overview.png", dpi=fitting(figure), metadata={"Software": None})
            self.summary["files"] += ["overview.png", SUMMARY]
            write_json(staging / SUMMARY, self.summary)
        except (OSError, RuntimeError) as error:
            todo = "None were written. Make room, or choose another folder."
            raise data_error(staging.parent, "room for the results", error, todo) from error

    def _files(self) -> Iterator[tuple[str, Any]]:
        """By name; the displacement twice, for ITK-family tools and, as `disp_…`, for Learn2Reg's."""
        yield "warped.nii.gz", self.warped
        yield f"disp_{'_'.join(self.names)}.nii.gz", self.learn2reg()
        yield "displacement.nii.gz", self.displacement
        yield "jacobian.nii.gz", growth(self.displacement)
        yield "transform.h5", self.transform
        yield "inverse_error.nii.gz", sitk.Resample(self.error, self.fixed)
        if self.inverse is not None:
            yield "inverse_displacement.nii.gz", field_of(self.inverse, self.moving)
            yield "inverse_transform.h5", self.inverse
        if self.labels is not None:
            yield "labels.nii.gz", nearest(self.labels, self.fixed, self.transform)


def linearly(image: sitk.Image, onto: sitk.Image, transform: sitk.Transform, modality: str) -> sitk.Image:
    """An image through a transform from the points of `onto`; float32; outside its `background`."""
    outside = background(sitk.GetArrayViewFromImage(image), modality)
    return sitk.Resample(image, onto, transform, sitk.sitkLinear, outside, sitk.sitkFloat32)


def background(image: np.ndarray, modality: str) -> float:
    """What a warped image shows outside: of CT air; of others 0, or their lowest value where 0 is amid the values."""
    low = CT_WINDOW[0] if modality == "ct" else float(without_fill(image).min())
    return low if modality == "ct" or (image[image >= low] < 0).mean() > 0.25 else 0.0


def displacing(phi: Transform, grid: sitk.Image) -> sitk.DisplacementFieldTransform:
    """The network's map as ITK's transform over the grid, in mm; ITK interpolates it linearly, as `phi.map` is."""
    shape, dim = phi.shape, grid.GetDimension()
    steps = voxels(phi.displacement(identity_map(shape)), shape)[0].double().numpy()  # (D, *S) in samples
    mm = np.tensordot(index_to_lps(grid)[:dim, : len(shape)], steps, 1).reshape(dim, *grid.GetSize())
    return sitk.DisplacementFieldTransform(placed(mm.transpose(), grid))


def field_of(transform: sitk.Transform, onto: sitk.Image) -> sitk.Image:
    """A transform as the displacement at each voxel of an image."""
    place = (onto.GetSize(), onto.GetOrigin(), onto.GetSpacing(), onto.GetDirection())
    return sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat32, *place)


def growth(field: sitk.Image) -> sitk.Image:
    """The Jacobian determinant of the map by a `field_of` displacements, at each of its voxels."""
    dim = field.GetDimension()
    # ITK's filter takes the vectors as along the image's axes, so they are turned there.
    along = sitk.GetArrayViewFromImage(field) @ np.float32(field.GetDirection()).reshape(dim, dim)
    # It halves the derivative at the border, unless the field goes on there in a straight line.
    wider = np.pad(along, [(1, 1)] * dim + [(0, 0)], mode="reflect", reflect_type="odd")
    turned = sitk.GetImageFromArray(wider, isVector=True)
    turned.SetSpacing(field.GetSpacing())
    determinant = sitk.Crop(sitk.DisplacementFieldJacobianDeterminant(turned), [1] * dim, [1] * dim)
    determinant.CopyInformation(field)
    return determinant


def write(what: sitk.Image | sitk.Transform | nibabel.Nifti1Image, path: str | os.PathLike) -> None:
    """Write an image or a transform in the format of its name."""
    if isinstance(what, sitk.Transform):
        sitk.WriteTransform(what, str(path))
    elif isinstance(what, nibabel.Nifti1Image):
        nibabel.save(what, path)
    else:
        # ITK reads a vector image of one slice as 2-D, beside the 3-D image it belongs to: hence the slice twice.
        alone = what.GetNumberOfComponentsPerPixel() > 1 and what.GetSize()[2:] == (1,)
        image = sitk.ZeroFluxNeumannPad(what, [0, 0, 0], [0, 0, 1]) if alone else what
        sitk.WriteImage(image, str(path), useCompression=True)
