"""Whether memory and open files stay where they are over long trainings and evaluations.

    python benchmarks/longrun.py

Writes benchmarks/longrun.csv, in 2 minutes on two quiet cores. A training with SAM of 2,000 steps, with checkpoints,
validation and a history as a study has them; then 200 pairs of files and 200 synthetic ones are evaluated, with a
network. Memory is what belongs to this process alone (its unique set size), less what the C library holds free. The
growth is the slope of a line through the samples, one every 20 steps or pairs, after the first quarter.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import psutil
import torch
from recording import record

from fmsam_lib.evaluation.evaluate import measured
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.training.loop import fit, starting

STEPS, PAIRS, EVERY = 2000, 200, 20
SHAPE = (32, 32)
SUBJECTS = 20  # of a synthetic domain, which keeps the pairs that it has made
REACH = {"memory": "<= 1", "files": "<= 0.1"}


class Watched:
    """Samples of this process: after how many steps, MB of memory, open files."""

    def __init__(self) -> None:
        self.process, self.samples = psutil.Process(), []
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def sample(self, done: int) -> None:
        gc.collect()
        if self.trim:
            self.trim(0)
        files = self.process.num_handles() if sys.platform == "win32" else self.process.num_fds()
        self.samples.append((done, self.process.memory_full_info().uss / 1e6, files))

    def rows(self, what: str, unit: str) -> list[tuple]:
        """Growth over a hundred steps or pairs, by least squares, and the memory at the end."""
        done, memory, files = np.array(self.samples[len(self.samples) // 4 :]).T
        slopes = {name: round(100 * np.polyfit(done, y, 1)[0], 6) for name, y in (("memory", memory), ("files", files))}
        most = np.ptp(memory)
        return [
            (f"{what}: growth of memory", slopes["memory"], REACH["memory"], f"MB per 100 {unit}"),
            (f"{what}: growth of open files", slopes["files"], REACH["files"], f"files per 100 {unit}"),
            (f"{what}: highest less lowest memory", most, "", "MB"),
            (f"{what}: memory at the end", memory[-1], "", "MB"),
        ]


def training(folder: Path, steps: int) -> list[tuple]:
    """One of `steps` steps, as a study's, but smaller."""
    small = {"shape": [*SHAPE], "down": [8, 16], "levels": 2, "batch": 2, "rho": 0.01, "sigma": 3.0}
    run = Train(out=str(folder), optimizer="sam", subjects=SUBJECTS, steps=steps, validation=2, **small)
    watched = Watched()

    def watch(state, net) -> bool:
        if state.step % EVERY == 0:
            watched.sample(state.step)
        return False

    fit(starting(run), open_domain("brain-mr", shape=SHAPE, subjects=SUBJECTS), run, progress=False, watch=watch)
    return watched.rows(f"training, {steps} steps", "steps")


def of_files(folder: Path, pairs: int) -> None:
    """A data set `Files` with so many test pairs of compressed files."""
    generator = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / "Files" / part).mkdir(parents=True)
    for i in range(pairs + 3):
        label = np.zeros((40, 36), np.uint8)
        label[8:20, 10 : 20 + i % 6] = 1
        image = (200 * label.astype(int) + generator.integers(0, 200, label.shape)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f"Files/imagesTr/p{i:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / f"Files/labelsTr/p{i:04d}.nii.gz")
    name = "./imagesTr/p{:04d}.nii.gz".format
    manifest = {
        **{"name": "Files", "dimensions": 2, "modality": {"0": "MR"}, "labels": {"0": "background", "1": "box"}},
        **{"pairing": "inter-subject", "training": [{"image": name(i)} for i in (0, 1)]},
        "registration_val": [{"fixed": name(i + 2), "moving": name(i + 3)} for i in range(pairs)],
    }
    (folder / "Files/Files_dataset.json").write_text(json.dumps(manifest), encoding="utf-8")


def evaluation(domain, what: str, pairs: int) -> list[tuple]:
    """`pairs` of the domain's pairs, measured with a small network."""
    torch.manual_seed(0)
    net, watched = GradICON(2, down=(8, 16), levels=2, last_step=False).eval(), Watched()

    class Sampled:
        """The domain, which takes a sample before it gives a pair."""

        def __getattr__(self, name):
            return getattr(domain, name)

        def test_pair(self, number: int):
            if number % EVERY == 0:
                watched.sample(number)
            return domain.test_pair(number)

    measured(net, Sampled(), pairs=pairs, progress=False)
    watched.sample(pairs)
    return watched.rows(f"evaluation, {pairs} {what}", "pairs")


def main() -> None:
    steps, pairs = (STEPS, PAIRS) if len(sys.argv) == 1 else map(int, sys.argv[1:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FMSAM_CACHE"] = str(folder / "cache")  # every file is read for the first time
        of_files(folder, pairs)
        rows = training(folder / "run", steps)
        files = open_domain("Files", shape=SHAPE, data=folder)
        rows += evaluation(files, "pairs of files", pairs)
        made = open_domain("brain-mr", shape=SHAPE)
        made.test_count = pairs
        rows += evaluation(made, "synthetic pairs", pairs)
    if len(sys.argv) == 1:
        record(rows, __file__, threads=1)
    else:  # a trial
        print(*rows, sep="\n")


if __name__ == "__main__":
    main()
