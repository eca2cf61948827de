"""`fmsam-register apply`: other images, labels and points moved by the transform in a folder of results; no network.

Forward, images and labels of the moving image's space come onto the fixed image's voxels, and points of the fixed image
go to where they lie in the moving one, as everywhere in ITK. The inverse does both the other way round.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk  # noqa: N813

from fmsam_lib.checking import ConfigError
from fmsam_lib.images.files import read_labels, read_values, stem
from fmsam_lib.images.grid import check_same_grid, nearest
from fmsam_lib.records import data_error, encodable, read_json, write_csv
from fmsam_lib.registration.folder import RESULT, SUMMARY
from fmsam_lib.registration.result import linearly, write

AXES, SPACES = ["x", "y", "z"], ("lps", "ras", "voxels")


def saved(folder: str | Path, *, inverse: bool = False) -> tuple[sitk.Transform, sitk.Image, sitk.Image | None, str]:
    """Of a folder of results: the transform, images that lie as the target and the source, the source's modality.

    The source is None where the transform has no inverse: then no file lies as the moving image.
    Raises DataError where the folder does not hold it.
    """
    folder = encodable(folder)
    try:
        summary = read_json(Path(folder) / SUMMARY, {})
        if not (file := Path(folder) / f"{'inverse_' * inverse}transform.h5").exists():
            raise ValueError("no such file")
        transform = sitk.ReadTransform(str(file))
        files = [Path(folder) / f"{name}.nii.gz" for name in ("warped", "inverse_displacement")]
        places = [sitk.ReadImage(str(file)) for file in files[: 1 + (inverse or files[1].exists())]]
        sizes = [summary["size"][role] for role in ("fixed", "moving")]
        modality = summary["modality"]["fixed" if inverse else "moving"]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        expected = f"a folder of fmsam-register with its {'inverse ' * inverse}transform"
        pairs = sorted(path.parent.name for path in Path(folder).glob(f"*/{SUMMARY}"))
        several = f"{len(pairs)} in folders of their own", f"Give one of them: {', '.join(pairs[:9])}."
        raise data_error(folder, expected, *(several if pairs else (error, "Register the pair anew."))) from error
    # a displacement of one slice has it twice
    fixed, moving = [*(image[tuple(map(slice, size))] for image, size in zip(places, sizes, strict=False)), None][:2]
    return transform, *((moving, fixed) if inverse else (fixed, moving)), modality


def read_points(path: str | Path, space: str | None, image: sitk.Image) -> tuple[np.ndarray, pd.DataFrame]:
    """Points `(L, D)` in LPS mm of a CSV: columns x, y, z in `space` lps, ras or voxels of `image`; None: lps.

    Without a header only in a `space`: Learn2Reg's keypoints are voxels. Also the table, as text. Raises DataError.
    """
    dim = image.GetDimension()
    text = {"encoding": "utf-8-sig", "dtype": str, "keep_default_na": False}
    try:
        table = pd.read_csv(path, **text)
        table = table.rename(columns={name: n for name in table if (n := name.strip().lower()) in AXES})
        if headless := not set(AXES[:dim]) <= set(table.columns):
            table = pd.read_csv(path, header=None, names=AXES, **text)[AXES[:dim]]  # of a plane a third number, too
        if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first cells for names of the lines
            raise ValueError("lines of more cells than the first line has: decimal commas?")
        points = table[AXES[:dim]].to_numpy(dtype=np.float64)
        if not len(points) or not np.isfinite(points).all():
            raise ValueError(f"{len(points)} points, or some that are no numbers")
    except (OSError, ValueError, KeyError) as error:
        expected, todo = f"a CSV of points, columns {', '.join(AXES[:dim])}", "Write a header x,y,z and a line a point."
        raise data_error(path, expected, error, todo) from error
    if headless and not space:
        todo = "Say what the numbers are: --space voxels (Learn2Reg's keypoints), lps or ras."
        raise data_error(path, f"a header {','.join(AXES[:dim])}, or a space", "neither", todo)
    return _in_space(points, space, image.TransformContinuousIndexToPhysicalPoint), table


def _check_inside(path: str, points: np.ndarray, image: sitk.Image) -> None:
    """Raises DataError where no point lies in the image, and warns of some outside, but not off a single slice."""
    size = np.array(image.GetSize())
    index = _in_space(points, "voxels", image.TransformPhysicalPointToContinuousIndex)
    outside = ((np.abs(index - (size - 1) / 2) > size / 2) & (size > 1)).any(axis=1)
    if outside.all():
        todo = "Check --space (lps, ras or voxels), and whether they are another image's."
        raise data_error(path, "points that lie in their image", f"none of {len(points)} there", todo)
    if outside.any():
        warnings.warn(f"{path}: {outside.sum()} of {len(points)} points lie outside their image", stacklevel=3)


def _in_space(points: np.ndarray, space: str | None, through_image: Callable) -> np.ndarray:
    """Points `(L, D)` from a space to LPS or back."""
    if space == "voxels":
        return np.array([through_image(point) for point in points.tolist()])
    return points * ((-1, -1, 1) if space == "ras" else (1, 1, 1))[: points.shape[1]]


def apply(
    folder: str | Path,
    out: str | Path,
    *,
    images: Sequence[str] = (),
    labels: Sequence[str] = (),
    points: str | None = None,
    paired_points: str | None = None,
    space: str | None = None,
    inverse: bool = False,
) -> dict[str, float]:
    """Write `<name>.nii.gz` of each image and label image, and `<name>.csv` of the points, into `out`.

    paired_points: the same places in the other image, line by line: then the mean distances by the headers alone and
    after, in mm, are returned as `tre_before` and `tre`. space: of the points, see `read_points`.
    Raises DataError; ConfigError for another space.
    """
    if space not in (None, *SPACES):
        raise ConfigError(f"expected space to be one of {', '.join(SPACES)}, got {space!r}")
    transform, target, source, modality = saved(folder, inverse=inverse)
    dim, out, made, theirs = target.GetDimension(), Path(encodable(out)), {}, f"the images of {folder}"
    if paired_points and not points:
        raise data_error(paired_points, "points of the other image too", "none", "Give both.")
    if source is None and points and space == "voxels":
        todo = "Give the points in lps or ras mm."
        raise data_error(folder, "the moving image's voxels", "a transform without an inverse, and none", todo)
    for path in [*images, *labels]:
        image = read_labels(path, 2) if path in labels else read_values(path, 2)
        if image.GetDimension() < dim:  # (X, Y), whose file does not say how high it lies
            image = check_same_grid(path, image, theirs, source) if source else sitk.JoinSeries([image])
        image = image[:, :, 0] if image.GetDimension() > dim and image.GetSize()[2] == 1 else image
        if image.GetDimension() > dim:
            raise data_error(path, "a 2-D image, as those of the folder", f"size {image.GetSize()}", "Save one slice.")
        kind = modality if sitk.GetArrayViewFromImage(image).min() < -500 else "mr"  # PET, dose: no air beside CT
        moved = nearest(image, target, transform) if path in labels else linearly(image, target, transform, kind)
        if not sitk.GetArrayFromImage(nearest(image == image, target, transform)).any():  # 1 where it lies
            raise data_error(path, f"an image that overlaps {theirs}", "nothing of it there", "Check its header.")
        made[f"{stem(path)}.nii.gz"] = moved
    found = {}
    if points:
        here, table = read_points(points, space, target)
        table = table.drop(columns="error_mm", errors="ignore")  # of an earlier call
        _check_inside(points, here, target)
        there = np.array([transform.TransformPoint(point) for point in here.tolist()])
        onto = source or target  # no voxels then: the points are in mm
        table[AXES[:dim]] = _in_space(there, space, onto.TransformPhysicalPointToContinuousIndex)
        made[f"{Path(points).stem}.csv"] = table
        if paired_points:
            truth, _ = read_points(paired_points, space, onto)
            if source:
                _check_inside(paired_points, truth, source)
            if len(truth) != len(here):
                todo = "Give the same places in the same order."
                raise data_error(paired_points, f"{len(here)} points, as {points}", f"{len(truth)}", todo)
            before, table["error_mm"] = np.linalg.norm([here - truth, there - truth], axis=2)
            found = {"tre_before": float(before.mean()), "tre": float(table["error_mm"].mean())}
    if len(made) < len(images) + len(labels) + bool(points):
        raise data_error(out, "files with names of their own", ", ".join(made), "Rename one, or apply it twice.")
    for given in (*images, *labels, points, paired_points):
        if given and Path(given).resolve().parent == out.resolve():
            raise data_error(given, "another folder for the results", "the folder of an input", "Choose another one.")
    if Path(folder).resolve() == out.resolve() and (lost := [name for name in made if RESULT.fullmatch(name)]):
        raise data_error(out, "another folder", f"that {lost[0]} there would be replaced", "Choose another one.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, what in made.items():
            (write_csv if isinstance(what, pd.DataFrame) else write)(what, out / name)
    except (OSError, RuntimeError) as error:
        raise data_error(out, "a folder to write the results into", error, "Choose another one.") from error
    return found


def main(argv: list[str]) -> int:
    """`fmsam-register apply`: 0 when the results are in the folder. Raises DataError."""
    parser = argparse.ArgumentParser(prog="fmsam-register apply", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", help="of results of fmsam-register")
    parser.add_argument("--out", required=True, help="folder for what is moved")
    parser.add_argument("--images", nargs="+", default=[], help="images to be moved, linearly")
    parser.add_argument("--labels", nargs="+", default=[], help="label images to be moved, nearest neighbour")
    parser.add_argument("--points", help="CSV of points: columns x, y, z, or, with --space, without a header")
    parser.add_argument("--paired-points", help="the same places in the other image, line by line, for the TRE")
    parser.add_argument("--space", choices=SPACES, help="of the points (default: lps, of a file with a header)")
    parser.add_argument("--inverse", action="store_true", help="from the fixed image to the moving one")
    options = vars(parser.parse_args(argv))
    if not (options["images"] or options["labels"] or options["points"]):
        parser.error("expected --images, --labels or --points: there is nothing to move")
    if found := apply(**options):
        print(f"TRE {found['tre_before']:.3f} by the headers -> {found['tre']:.3f} mm")
    return 0
