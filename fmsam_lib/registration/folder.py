"""The folder that a registration's results go to: all of them or none, and never over an input."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fmsam_lib.records import data_error, encodable, read_json, write_json

ROLES = ("fixed", "moving", "labels", "fixed_labels", "fixed_mask", "moving_mask")  # of the input files
SUMMARY = "summary.json"
MOVING = ".fmsam-moving.json"  # while results get to their places: which these are, and which were there
LONGEST = 143  # bytes of a file's name that encrypted shares take; others take 255
RESULT = re.compile(
    r"(warped|labels|(inverse_)?displacement|jacobian|inverse_error|disp_[^/]*)\.nii\.gz|(inverse_)?transform\.h5"
    r"|overview\.png|summary\.json"
)


@contextmanager
def staged(folder: str | Path, inputs: Iterable[str] = ()) -> Iterator[Path]:
    """A hidden folder in `folder` to write into; its files get there when the block ends well, `summary.json` last.

    However the block ends, that summary only ever stands beside results that are complete, and earlier results are
    replaced only at the very end. Raises DataError, before the block, when `folder` cannot be written, or when a
    result there would take the place of one of the `inputs`, or of a file that no registration has left there.
    """
    folder = Path(encodable(folder))
    try:
        given = [path for path in map(Path, inputs) if path.resolve().parent == folder.resolve()]
        for path in filter(lambda path: RESULT.fullmatch(path.name), (*given, *foreign(folder))):
            found = "a folder where a result of the same name could replace it"
            raise data_error(path, "another folder for the results", found, "Choose another one.")
        made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fmsam-", suffix=".partial", dir=folder))
    except OSError as error:
        raise data_error(folder, "a folder to write the results into", error, "Choose another one.") from error
    try:
        yield staging
        new = sorted(os.listdir(staging), key=lambda name: name == SUMMARY)
        for name in new:  # on the disk before they have their names, or a power cut would leave them empty
            with open(staging / name, "rb+") as written:
                os.fsync(written.fileno())
        old = listed(folder / SUMMARY) | listed(folder / MOVING)
        write_json(folder / MOVING, {"files": sorted(old.union(new))})
        (folder / SUMMARY).unlink(missing_ok=True)  # from here to the end the folder is not complete
        for name in old.difference(new):  # another pair's should not stay beside the new ones
            (folder / name).unlink(missing_ok=True)
        for name in new:
            os.replace(staging / name, folder / name)
        (folder / MOVING).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # what is not empty stays
            for path in made:
                path.rmdir()


def listed(summary: Path) -> set[str]:
    """The results that a `summary.json` names."""
    named = read_json(summary, {}).get("files")
    return {name for name in map(str, named if isinstance(named, list) else []) if RESULT.fullmatch(name)}


def foreign(folder: Path) -> list[Path]:
    """What is called as a result and is none, neither of a summary there nor of a move that was interrupted."""
    ours = {SUMMARY} | listed(folder / SUMMARY) | listed(folder / MOVING)
    return [path for path in folder.glob("*") if path.name not in ours]


def check_room(folder: str | Path, size: int) -> None:
    """Before the work: raises DataError unless `size` bytes have room in `folder`, and our names in its path."""
    taken = len(os.fsencode(Path(folder).resolve())) + 200
    limit = os.pathconf(folder, "PC_PATH_MAX") if hasattr(os, "pathconf") else 32_767  # Windows' longest
    if taken > limit:
        raise data_error(folder, f"at most {limit - 200} bytes in the path", f"{taken - 200}", "Choose a shorter one.")
    if size > (free := shutil.disk_usage(folder).free):
        expected, found = f"room for up to {size / 1e6:,.0f} MB of results", f"{free / 1e6:,.0f} MB"
        raise data_error(folder, expected, found, "Make room there, or choose a folder on another disk.")


def fitting(fixed: str, moving: str) -> tuple[str, str]:
    """Names of two images that fit into `disp_<fixed>_<moving>.nii.gz`, which may have `LONGEST` bytes.

    A longer one is cut between characters and ends in a hash of all of it, so that two pairs never become one.
    """
    half = (LONGEST - len("disp__.nii.gz")) // 2

    def cut(name: str) -> str:
        if len(os.fsencode(name)) <= half:
            return name
        end = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        return os.fsencode(name)[: half - 13].decode(errors="ignore") + "~" + end

    return cut(fixed), cut(moving)
