"""Where numbers come from and how they are kept: provenance, files written whole or not at all, errors about files.

In: values, tables, paths. Out: files in their final form, or the error that says what to do.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

PACKAGE = Path(__file__).resolve().parent
# The checkout with notebooks and studies; of an installed package the folder that one works in.
PROJECT = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path.cwd()
warn_once = cache(partial(warnings.warn, stacklevel=3))
PACKAGES = ("torch", "numpy", "scipy", "pandas", "monai", "nibabel", "SimpleITK", "loss-landscapes", "matplotlib")


class DataError(ValueError):
    """Something is wrong with a file, a manifest or a data set's name."""


def data_error(where, expected: str, found: str | Exception, todo: str) -> DataError:
    """The message in the one form that all have; of an exception it takes the last line, or the system's words."""
    if isinstance(found, Exception):
        found = getattr(found, "strerror", None) or str(found).strip().split("\n")[-1]
    return DataError(f"{where}: expected {expected}, found {found}. {todo}")


def encodable(path: str | os.PathLike) -> str:
    """A path that ITK takes; it ends the program at one that is not in UTF-8. Raises DataError."""
    shown = os.fsencode(path).decode(errors="backslashreplace")
    if shown != os.fspath(path):
        raise data_error(shown, "a path in UTF-8", "other bytes", "Rename it.")
    return shown


def provenance() -> dict:
    """Commit, hash of the library's sources, versions and hardware, for `config.json`."""
    import torch  # here: reading parameters does not need it

    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(":", 1)[1].strip() for line in told.splitlines() if line.startswith("model name")]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "sources": sources(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


@cache
def sources() -> str:
    """A hash of the package's Python files as they are on disk: two dirty commits look alike, these don't."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str:
    """The project's git commit, "+" behind it where files differ; "unknown" outside a checkout, or in another's.

    Recorded benchmarks may differ: one script's record should not mark the next one's.
    """
    told = partial(subprocess.check_output, cwd=PACKAGE.parent, stderr=subprocess.DEVNULL, text=True)
    try:  # which fails for the last one where the package is untracked
        below, commit, _ = told(["git", "rev-parse", "--show-prefix", "HEAD", f"HEAD:{PACKAGE.name}"]).split("\n", 2)
        dirty = told(["git", "status", "--porcelain", "--", ".", ":!benchmarks/*.csv"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return "unknown" if below else commit[:12] + "+" * bool(dirty)


@contextmanager
def written_whole(path: Path | str, *, synced: bool = True) -> Iterator[Path]:
    """A path to write to that takes `path`'s place when the block ends well, and is removed when not.

    synced: it is on the disk before it has its name, which takes milliseconds; else a power cut may leave it empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:99]}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        if synced:
            with open(partial, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path | str, otherwise: Any = None) -> Any:
    """What a JSON file says; `otherwise` where there is none, a damaged one, or something of another type."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise
    return found if otherwise is None or isinstance(found, type(otherwise)) else otherwise


def write_csv(table: pd.DataFrame, path: Path | str, columns: list[str] | None = None, **how: Any) -> None:
    """A table as CSV, its `columns` in that order, numbers in full, so that the same run gives the same bytes.

    how: further options of `DataFrame.to_csv`.
    """
    with written_whole(path) as partial:
        table.reindex(columns=columns).to_csv(partial, index=False, lineterminator="\n", **how)
