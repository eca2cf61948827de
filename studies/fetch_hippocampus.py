"""Fetch HippocampusMR of the Medical Segmentation Decathlon.

    python studies/fetch_hippocampus.py [FOLDER OF DATA SETS]      # else that of FMSAM_DATA, else data

A study that needs it and does not find it runs this by itself.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from fmsam_lib.images.manifest import data_folder, read_manifest
from fmsam_lib.records import DataError, data_error, written_whole


def fetch_hippocampus(folder: Path | str | None = None) -> Path:
    """Make `<folder>/HippocampusMR` from the Medical Segmentation Decathlon's task 4 (CC-BY-SA 4.0, 27 MB).

    The 260 images in order of number: 200 to train, the last 60 to test, each with its mirror image in the
    list. Uses what was put there by hand: `HippocampusMR/{imagesTr,labelsTr}`, `Task04_Hippocampus/` or
    `Task04_Hippocampus.tar`; else downloads through MONAI. Returns the data set's folder.
    """
    folder = data_folder(folder)
    target, extracted = folder / "HippocampusMR", folder / "Task04_Hippocampus"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Everything is prepared aside, then moved in one step: what is half finished never looks complete.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
            source = extracted if extracted.is_dir() else _download_hippocampus(folder, Path(work))
            ready = Path(work) / "ready"
            for part in ("imagesTr", "labelsTr"):
                (ready / part).mkdir(parents=True)
                for file in source.glob(f"{part}/hippocampus_*.nii.gz"):
                    shutil.copyfile(file, ready / part / file.name)
            _write_hippocampus_manifest(ready, source)
            os.replace(ready, target)
    elif not (target / "HippocampusMR_dataset.json").is_file():
        _write_hippocampus_manifest(target, target)
    return read_manifest(target).folder


def _download_hippocampus(folder: Path, work: Path) -> Path:
    from monai.apps import DecathlonDataset, download_url, extractall  # here: importing MONAI takes seconds

    task = "Task04_Hippocampus"
    where, by_hand = folder / "HippocampusMR", folder / f"{task}.tar"
    tar = by_hand if by_hand.is_file() else work / by_hand.name
    try:
        url, md5 = DecathlonDataset.resource[task], DecathlonDataset.md5[task]
        download_url(url, tar, hash_val=md5, hash_type="md5")  # of a file that is there it checks the hash alone
        extractall(tar, work)  # refuses links and what would lie outside
    except Exception as error:  # without network MONAI raises no narrower one
        todo = f"Without network, put {by_hand.name} into {folder}, or its imagesTr and labelsTr into {where}."
        expected, found = "task 4 of the Medical Segmentation Decathlon", f"{type(error).__name__}: {error}"
        raise data_error(tar if tar == by_hand else where, expected, found, todo) from error
    return work / task


def _write_hippocampus_manifest(target: Path, source: Path) -> None:
    images, labels = (
        sorted(file.name for file in (target / part).glob("hippocampus_*.nii.gz")) for part in ("imagesTr", "labelsTr")
    )
    if len(images) != 260 or images != labels:
        expected, found = "260 imagesTr and their labelsTr", f"{len(images)} images and {len(labels)} labels"
        raise data_error(source, expected, found, "Complete or remove the folder.")
    train, test = images[:200], images[200:]
    content = {
        "name": "HippocampusMR", "release": "1.0", "dimensions": 3, "modality": {"0": "MR"},
        "description": "T1-weighted MR of the hippocampus, cropped; Medical Segmentation Decathlon task 4, "
        "also Learn2Reg 2020 task 4. Inter-subject registration.",
        "licence": "CC-BY-SA 4.0",
        "reference": "Antonelli et al. 2022, The Medical Segmentation Decathlon, Nature Communications 13:4128",
        "labels": {"0": "background", "1": "anterior", "2": "posterior"}, "pairing": "inter-subject",
        "numTraining": len(train), "numRegistration_val": len(test),
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in train],
        "registration_val": [
            {"fixed": f"./imagesTr/{fixed}", "moving": f"./imagesTr/{moving}"}
            for fixed, moving in zip(test, reversed(test), strict=True)
        ],
    }  # fmt: skip
    with written_whole(target / "HippocampusMR_dataset.json") as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        print(f"HippocampusMR is in {fetch_hippocampus(*sys.argv[1:2])}")
    except DataError as error:
        sys.exit(str(error))
