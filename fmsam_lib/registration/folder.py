"""The folder that a registration's results go to: all of them or none, and never over an input."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fmsam_lib.records import data_error

ROLES = ("fixed", "moving", "labels", "fixed_labels")  # of the input files
SUMMARY = "summary.json"
CUT = re.compile("~[0-9a-f]{10}$")  # how a name ends that `fitting` has cut
RESULT = re.compile(r"(warped|displacement|labels|disp_[^/]*)\.nii\.gz|overview\.png|summary\.json")


@contextmanager
def staged(folder: str | Path, inputs: Iterable[str] = ()) -> Iterator[Path]:
    """A hidden folder in `folder` to write into; its files get there when the block ends well, `summary.json` last.

    However the block ends, that summary only ever stands beside results that are complete, and earlier results are
    replaced only at the very end. Raises DataError, before the block, when `folder` cannot be written, or when a
    result there would take the place of one of the `inputs`.
    """
    folder = Path(folder)
    for path in map(Path, inputs):
        if path.resolve().parent == folder.resolve() and RESULT.fullmatch(path.name):
            found = "a folder where a result of the same name would replace it"
            raise data_error(path, "another folder for the results", found, "Choose another one.")
    with _hidden(folder) as staging:
        yield staging
        new = sorted(os.listdir(staging), key=lambda name: name == SUMMARY)
        old = _old_files(folder)
        (folder / SUMMARY).unlink(missing_ok=True)  # from here to the end the folder is not complete
        for name in old.difference(new):
            (folder / name).unlink(missing_ok=True)
        for name in new:
            os.replace(staging / name, folder / name)


@contextmanager
def _hidden(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`; both are removed at the end, `folder` where it was made for this and is empty."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fmsam-", suffix=".partial", dir=folder))
    except OSError as error:
        found = error.strerror or str(error)
        raise data_error(folder, "a folder to write the results into", found, "Choose another one.") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


def check_output(folder: str | Path, names: Iterable[str], size: int = 0) -> None:
    """Before the work: raises DataError unless files of these `names`, `size` bytes together, can go to `folder`.

    Each is made in earnest, empty and in a hidden folder, since every file system has its own rules.
    """
    folder = Path(folder)
    with _hidden(folder) as staging:
        for name in names:
            try:
                (staging / name).touch()
            except OSError as error:
                expected, found = f"a name that {folder} takes", error.strerror or str(error)
                todo = "Choose another folder for the results."
                taken, limit = len(os.fsencode(name)), os.pathconf(staging, "PC_NAME_MAX")
                if error.errno == errno.ENAMETOOLONG and taken > limit:
                    expected, found = f"at most {limit} bytes in a file's name", f"{taken}"
                    todo = "It holds the images' names: give them shorter ones, or links with shorter names (ln -s)."
                elif error.errno == errno.ENAMETOOLONG:
                    expected = f"at most {os.pathconf(staging, 'PC_PATH_MAX') - 1} bytes in a file's whole path"
                    found, todo = f"{len(os.fsencode(staging / name))}", "Choose a folder with a shorter path."
                raise data_error(folder / name, expected, found, todo) from error
        free = shutil.disk_usage(staging).free
    if size > free:
        expected, found = f"room for about {size / 1e6:,.0f} MB of results", f"{free / 1e6:,.0f} MB"
        raise data_error(folder, expected, found, "Make room there, or choose a folder on another disk.")


def fitting(fixed: str, moving: str) -> tuple[str, str]:
    """Names of two images as short as `disp_<fixed>_<moving>.nii.gz` needs them, which may take 255 bytes.

    They stay as they are where that fits. Else each that takes more than half is cut between characters, with `~` and a
    hash of all of it at its end, so that two pairs never become one.
    """
    half = (255 - len("disp__.nii.gz")) // 2
    fit = len(os.fsencode(fixed + moving)) <= 2 * half and not (CUT.search(fixed) or CUT.search(moving))
    short = []
    for name in (fixed, moving):
        if cut := (not fit and len(os.fsencode(name)) > half) or CUT.search(name):
            end = "~" + hashlib.sha256(os.fsencode(name)).hexdigest()[:10]
            while len(os.fsencode(name + end)) > half:
                name = name[:-1]
        short.append(name + end if cut else name)
    return short[0], short[1]


def _old_files(folder: Path) -> set[str]:
    """The results that an earlier summary in `folder` names: another pair's should not stay beside the new ones."""
    try:
        files = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in files if isinstance(name, str) and RESULT.fullmatch(name)}
