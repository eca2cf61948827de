"""How long making a synthetic pair takes, and how much faster the cache is than decoding a file.

    python benchmarks/data.py

Writes benchmarks/data.csv. Without real images (FMSAM_DATA) it decodes a file that it makes itself.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch

from fmsam_lib.images import files as data
from fmsam_lib.phantoms import pairs as synthetic
from fmsam_lib.records import provenance, written_whole

REPEATS = 21


def seconds(call) -> float:
    """Median wall time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def image_and_label(folder: Path) -> tuple[Path, Path]:
    """A hippocampus where there is one, else two files of its size."""
    real = data.data_folder() / "HippocampusMR"
    paths = real / "imagesTr/hippocampus_001.nii.gz", real / "labelsTr/hippocampus_001.nii.gz"
    if all(path.exists() for path in paths):
        return paths
    rng = np.random.default_rng(0)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, top in zip(paths, (255, 3), strict=True):
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, top, (35, 51, 35), np.uint8), np.eye(4)), path)
    return paths


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for domain in synthetic.DOMAINS:
        value = seconds(lambda domain=domain: synthetic.make_pair(domain, seed=0, index=0, shape=(64, 64, 64)))
        rows.append((f"{domain}: a 64^3 pair", value, "<= 0.1", "s"))
    with tempfile.TemporaryDirectory() as folder:
        image, label = image_and_label(Path(folder))
        options = {"modality": "MR", "shape": (48, 64, 48), "labels": {1: "anterior", 2: "posterior"}}
        decoding = seconds(lambda: data.decode(image, label, **options))
        cached = seconds(lambda: data.load(image, label, cache=folder, **options))
    rows.append(("decoding an image with its label", decoding, "", "s"))
    rows.append(("reading them from the cache", cached, "", "s"))
    rows.append(("decoding / reading from the cache", decoding / cached, ">= 20", "ratio"))
    made = provenance()
    table = pd.DataFrame(rows, columns=["figure", "value", "reach", "unit"])
    table = table.assign(commit=made["commit"], cpu=made["cpu"], threads=2, torch=torch.__version__)
    print(table.iloc[:, :4].to_string(index=False))
    with written_whole(Path(__file__).with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


if __name__ == "__main__":
    os.environ.setdefault("FMSAM_DATA", sys.argv[1] if len(sys.argv) > 1 else "")
    main()
