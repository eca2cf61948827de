"""How long making a synthetic pair takes, and how much faster the cache is than decoding a file.

    python benchmarks/data.py

Writes benchmarks/data.csv. Without real images (FMSAM_DATA) it decodes a file that it makes itself.
"""

import os
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from recording import alternating, record

from fmsam_lib.images.cache import load
from fmsam_lib.images.grid import decode
from fmsam_lib.images.manifest import data_folder
from fmsam_lib.phantoms.anatomies import DOMAINS
from fmsam_lib.phantoms.pairs import make_pair

REPEATS = 21
THREADS = 1  # making a pair is hundreds of small operations


def image_and_label(folder: Path) -> tuple[Path, Path]:
    """A hippocampus where there is one, else two files of its size."""
    real = data_folder() / "HippocampusMR"
    paths = real / "imagesTr/hippocampus_001.nii.gz", real / "labelsTr/hippocampus_001.nii.gz"
    if all(path.exists() for path in paths):
        return paths
    rng = np.random.default_rng(0)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, top in zip(paths, (255, 3), strict=True):
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, top, (35, 51, 35), np.uint8), np.eye(4)), path)
    return paths


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    for domain in DOMAINS:
        taken = alternating(REPEATS, pair=lambda d=domain: make_pair(d, seed=0, index=0, shape=(64, 64, 64)))
        rows.append((f"{domain}: a 64^3 pair", taken["pair"], "<= 0.1", "s"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FMSAM_CACHE"] = folder
        image, label = image_and_label(Path(folder))
        options = {"modality": "MR", "shape": (48, 64, 48), "labels": {1: "anterior", 2: "posterior"}}
        taken = alternating(REPEATS, decoding=lambda: decode(image, label, **options))
        taken |= alternating(REPEATS, cached=lambda: load(image, label, **options))
    rows.append(("decoding an image with its label", taken["decoding"], "", "s"))
    rows.append(("reading them from the cache", taken["cached"], "", "s"))
    rows.append(("decoding / reading from the cache", taken["decoding"] / taken["cached"], ">= 20", "ratio"))
    record(rows, __file__, threads=THREADS)


if __name__ == "__main__":
    os.environ.setdefault("FMSAM_DATA", sys.argv[1] if len(sys.argv) > 1 else "")
    main()
