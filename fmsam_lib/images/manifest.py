"""Data sets: a folder `<Name>/` each, with Learn2Reg's manifest `<Name>_dataset.json`, read and checked here."""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fmsam_lib.images.grid import MODALITIES
from fmsam_lib.records import PROJECT, DataError, data_error

MANIFEST_KEYS = ("name", "dimensions", "modality", "labels", "pairing", "training", "registration_val")


def data_folder(folder: Path | str | None = None) -> Path:
    """The folder of data sets: the one given, else the environment's FMSAM_DATA, else the project's `data`."""
    return Path(folder or os.environ.get("FMSAM_DATA") or PROJECT / "data")


@dataclass(frozen=True)
class Manifest:
    """What a data set says about itself; paths are whole ones, checked to exist.

    labels: structures by number, without the background. training: images.
    training_pairs: (fixed, moving) images, None for all ordered pairs of distinct training images.
    test_pairs: (fixed, moving) images. label_of: every image's label file or None. subject: whose image it is.
    spacing_known: `"spacing_known": false` in the manifest says that its millimetres mean nothing.
    """

    name: str
    folder: Path
    dimensions: int
    modality: str
    labels: dict[int, str]
    pairing: str
    training: list[Path]
    training_pairs: list[tuple[Path, Path]] | None
    test_pairs: list[tuple[Path, Path]]
    label_of: dict[Path, Path | None]
    subject: dict[Path, str]
    spacing_known: bool


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check `<Name>/<Name>_dataset.json` of the folder `<Name>`.

    An image's label file and subject are those of its entry `{"image", "label", "subject"}` under `training`
    or `test`; else the label is the file of the same name under `labels…` beside `images…`, if there,
    and the subject follows from the file's name (see `subject_of`).
    Raises DataError: no such folder or manifest, broken JSON, missing keys, missing files, duplicates,
    pairs of an image with itself, a subject in both training and test.
    """
    folder = Path(folder)
    path = folder / f"{folder.resolve().name}_dataset.json"
    if not path.is_file():
        found = "no such file" if folder.is_dir() else "no such folder"
        todo = "Put the data set there or set FMSAM_DATA to its parent."
        raise data_error(path, "a data set's manifest", found, todo)
    try:
        return _checked(path, json.loads(path.read_text(encoding="utf-8")))
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise data_error(path, "JSON of Learn2Reg's structure", found, "Compare it with another data set's.") from error


def _checked(path: Path, content: dict) -> Manifest:
    def demand(fine: bool, expected: str, found: object, todo: str = "Correct the manifest.") -> None:
        if not fine:
            raise data_error(path, expected, str(found), todo)

    missing = [key for key in MANIFEST_KEYS if key not in content]
    demand(not missing, f"the keys {', '.join(MANIFEST_KEYS)}", f"no {', '.join(missing)}", "Add what is missing.")
    folder, dimensions, labels = path.parent, content["dimensions"], content["labels"]
    demand(dimensions in (2, 3), "dimensions 2 or 3", dimensions)
    modalities = sorted(set(content["modality"].values()))
    fine, expected = modalities in [[known] for known in MODALITIES], f"one modality, {' or '.join(MODALITIES)}"
    demand(fine, expected, modalities, "Correct or split the manifest.")
    if isinstance(labels.get("0"), dict):  # Learn2Reg nests them by modality
        labels = labels["0"]
    labels = {int(number): name for number, name in labels.items() if int(number) != 0}
    fine = all(0 < number < 256 for number in labels)
    demand(fine, "labels from 1 to 255", sorted(labels), "Renumber them, in the label files too.")

    def image_pairs(key):
        return [(folder / pair["fixed"], folder / pair["moving"]) for pair in content[key]]

    training = [folder / entry["image"] for entry in content["training"]]
    training_pairs = image_pairs("training_paired_images") if "training_paired_images" in content else None
    test_pairs = image_pairs("registration_val")
    trained_on, tested_on = {*training, *itertools.chain(*(training_pairs or []))}, {*itertools.chain(*test_pairs)}
    listed = [entry for entry in [*content["training"], *content.get("test", [])] if isinstance(entry, dict)]
    entries = {folder / entry["image"]: entry for entry in listed}
    label_of = {}
    for image in sorted(trained_on | tested_on):
        beside = image.parent.parent / image.parent.name.replace("images", "labels") / image.name
        label_of[image] = beside if beside != image and beside.is_file() else None
        if "label" in entries.get(image, {}):
            label = entries[image]["label"]
            label_of[image] = folder / label if label else None

    absent = [str(file) for file in (*label_of, *label_of.values()) if file and not file.is_file()]
    found = f"{len(absent)} missing: {', '.join(absent[:3])}"
    demand(not absent, "every listed file on disk", found, "Copy the files there or correct the manifest.")
    twice = [image.name for image, times in Counter(training).items() if times > 1]
    demand(not twice, "every training image once", f"{', '.join(twice)} again", "Remove the second entry.")
    itself = [fixed.name for fixed, moving in [*(training_pairs or []), *test_pairs] if fixed == moving]
    demand(not itself, "pairs of two different images", f"{', '.join(itself[:3])} with itself", "Correct the pair.")
    subjects = {image: str(entries.get(image, {}).get("subject", subject_of(image))) for image in label_of}
    shared = sorted({subjects[image] for image in trained_on} & {subjects[image] for image in tested_on})
    todo = "Move their images to one side, or tell subjects apart by a key 'subject' in the entries."
    demand(not shared, "no subject in both training and test", ", ".join(shared[:5]), todo)
    spacing_known = content.get("spacing_known", True)
    demand(isinstance(spacing_known, bool), "spacing_known true or false", repr(spacing_known))
    said = {key: content[key] for key in ("name", "dimensions", "pairing")}
    return Manifest(
        **said, folder=folder, modality=modalities[0], labels=labels, training=training, training_pairs=training_pairs,
        test_pairs=test_pairs, label_of=label_of, subject=subjects, spacing_known=spacing_known,
    )  # fmt: skip


def subject_of(image: Path | str) -> str:
    """Whose image it is: the file's name without slice, phase and Learn2Reg's modality number at its end.

    The modality number goes only if a number remains to tell subjects apart.

    >>> [subject_of(f"{name}.nii.gz") for name in ("SC-HF-I-01_slice02_ED", "OASIS_0001_0000", "case_0001")]
    ['SC-HF-I-01', 'OASIS_0001', 'case_0001']
    """
    stem = re.sub(r"\.nii(\.gz)?$", "", Path(image).name)
    stem = re.sub(r"(?<=\d)(_slice\d+|_ED|_ES)?_000\d$", r"\1", stem)
    return re.sub(r"(_slice\d+|_ED|_ES)+$", "", stem)
