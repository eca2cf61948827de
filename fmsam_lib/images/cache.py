"""Images brought onto the grid, remembered on disk: the second time no image file is opened."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fmsam_lib.images.files import parts
from fmsam_lib.images.grid import Sample, decode
from fmsam_lib.records import warn_once, written_whole

CACHE_VERSION = 7  # raise it whenever `decode` returns something else than before


def load(image_path, label_path=None, *, modality: str, shape: Sequence[int], labels=None) -> Sample:
    """`decode`, remembered on disk.

    The folder is the environment's FMSAM_CACHE, else `~/.cache/fmsam`. Changed files (size or time) and damaged cache
    entries are decoded anew; a folder that cannot be written means no cache.
    """
    options: dict = {"modality": modality, "shape": tuple(shape), "labels": labels and sorted(labels)}
    paths = [Path(os.path.abspath(path)) for path in (image_path, label_path) if path is not None]
    files = [str(part) for path in paths for part in parts(path)]
    if not all(map(os.path.isfile, files)):
        return decode(image_path, label_path, **options)  # has the words for what is missing
    stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((CACHE_VERSION, stamps, options)).encode()).hexdigest()
    folder = os.environ.get("FMSAM_CACHE") or Path.home() / ".cache" / "fmsam"
    entry, kinds = Path(folder) / f"{key[:32]}.sample", ("u1", "i8") if len(paths) == 2 else ("",)
    try:
        stored = np.fromfile(entry, dtype=np.uint64)
    except OSError:
        stored = np.empty(0, np.uint64)
    fitting = [layout for kind in kinds if (layout := _layout(options["shape"], kind)).itemsize == stored.nbytes]
    if not fitting or stored[0] != _checksum(stored):
        sample = decode(image_path, label_path, **options)
        _store(entry, sample)
        return sample
    record = stored.view(fitting[0])[0]
    label = torch.from_numpy(record["label"]) if len(paths) == 2 else None
    return Sample(torch.from_numpy(record["image"]), label, *record[["affine", "unit_of_index", "oriented"]])


@functools.cache
def _layout(shape: tuple[int, ...], label: str) -> np.dtype:
    """One record of fixed layout, stored raw: parsing an .npy header would double the time of a read.

    label: the type of its numbers, which the record's size tells; "" without a label.
    """
    fields: list[tuple] = [("checksum", "u8"), ("affine", "f8", (4, 4)), ("unit_of_index", "f8", (len(shape), 4))]
    fields += [("oriented", "u8"), ("image", "f4", (1, *shape)), ("label", label, (1, *shape))][: 3 if label else 2]
    return np.dtype([*fields, ("padding", "u1", (-np.dtype(fields).itemsize % 8,))])


def _checksum(stored: np.ndarray) -> np.uint64:
    """Finds any one damaged word in a tenth of a CRC's time; + 1 so that a file of zeros is not valid."""
    return stored[1:].sum(dtype=np.uint64) + np.uint64(1)


def _store(entry: Path, sample: Sample) -> None:
    kind = "" if sample.label is None else "u1" if sample.label.dtype == torch.uint8 else "i8"
    record = np.zeros(1, _layout(tuple(sample.image.shape[1:]), kind))
    for name, value in vars(sample).items():
        if value is not None:
            record[name] = np.asarray(value)
    record["checksum"] = _checksum(record.view(np.uint64))
    try:
        with written_whole(entry, synced=False) as part:  # no reader ever meets half an entry
            record.tofile(part)
    except OSError as error:
        warn_once(f"{entry.parent} keeps no cache: {error.strerror}. Set FMSAM_CACHE to a writable folder.")
