"""Data sets: a folder `<Name>/` each, with its manifest `<Name>_dataset.json`, ours or Learn2Reg's own, read here."""

import itertools
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fmsam_lib.checking import nearest
from fmsam_lib.images.files import stem
from fmsam_lib.records import PROJECT, DataError, data_error

MANIFEST_KEYS = ("name", "dimensions", "modality", "pairing", "training", "registration_val")
LEARN2REG = {"tensorImageSize": "dimensions", "tensorImageShape": "dimensions", "pairings": "pairing"}  # as ours
ENTRIES = ("training", "test")  # lists of images
BESIDE = ("label", "mask", "keypoints")  # what an entry may name beside its image
OURS = {*MANIFEST_KEYS, *ENTRIES, "labels", "training_paired_images", "spacing_known"}
THEIRS = {"registration_test", "registration_direction", "reference", *LEARN2REG}  # they look like ours
PAIRINGS = ("inter-subject", "intra-subject", "unpaired", "paired")  # the last two are Learn2Reg's
READ_AS = {  # what modalities are called, in capitals, letters and digits only
    "CT": "(CB|FB|LD|HR|CE)?CT",
    "MR": "(?=.)(C?MRI?)?((T[12]|PD)(W|WEIGHTED|C|CE|GD|STAR|FLAIR)?|FLAIR|DWI|ADC|BSSFP|LGE)?(MRI?)?",
}
HELD_OUT = 5  # of the training subjects of a data set, one in so many is kept for validation, two at least
NUMBERED = re.compile(r"(?<=\d)(_slice\d+|_ED|_ES)?_(000\d)$")  # Learn2Reg's modality number, behind the subject's


def data_folder(folder: Path | str | None = None) -> Path:
    """The folder of data sets: the one given, else the environment's FMSAM_DATA, else the project's `data`."""
    return Path(folder or os.environ.get("FMSAM_DATA") or PROJECT / "data").expanduser()


class Manifest(NamedTuple):
    """What a data set says about itself; paths are whole ones, checked to exist.

    labels: structures by number, without the background. training: images.
    training_pairs: (fixed, moving) images, None for all ordered pairs of distinct training images.
    test_pairs: (fixed, moving) images. beside: by "label", "mask" and "keypoints", every image's file or None.
    modality: "CT" or "MR", or both with a plus; modality_of: each image's own. subject: whose image it is.
    spacing_known: `"spacing_known": false` in the manifest says that its millimetres mean nothing, as those of a PNG.
    """

    folder: Path  # the domain is called as it
    dimensions: int
    modality: str
    labels: dict[int, str]
    pairing: str
    training: list[Path]
    training_pairs: list[tuple[Path, Path]] | None
    test_pairs: list[tuple[Path, Path]]
    beside: dict[str, dict[Path, Path | None]]
    modality_of: dict[Path, str]
    subject: dict[Path, str]
    spacing_known: bool


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check `<Name>/<Name>_dataset.json` of the folder `<Name>`.

    An image's files and subject are those of its entry `{"image", "label", "mask", "keypoints", "subject"}` under
    `training` or `test`; else the files are those of the same name under `labels…`, `masks…` and `keypoints…` (.csv)
    beside `images…`, if there, and the subject follows from the file's name (see `subject_of`), as does the modality
    where there are several. Subjects of test images that stand under `training` too are taken out of training, with a
    warning: Learn2Reg lists its validation cases there. A key that looks like a misspelt one is a warning, too.
    Raises DataError: no such folder or manifest, broken JSON, missing keys, missing files, duplicates,
    pairs of an image with itself, an unknown modality, a subject in both training and test by other images.
    """
    folder = Path(folder)
    paths = [folder / f"{called.name}_dataset.json" for called in (folder.absolute(), folder.resolve())]  # of a link
    path = next(filter(Path.is_file, paths), paths[0])
    if not path.is_file():
        found, other = "no such file" if folder.is_dir() else "no such folder", [*folder.glob("*_dataset.json")][:1]
        todo = "Rename it." if other else "Put the data set there or set FMSAM_DATA to its parent."
        raise data_error(path, "a data set's manifest", other[0].name if other else found, todo)
    try:
        return _checked(path, json.loads(path.read_text(encoding="utf-8-sig")))
    except DataError:
        raise
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise data_error(path, "JSON of Learn2Reg's structure", found, "Compare it with another data set's.") from error


def _checked(path: Path, content: dict) -> Manifest:
    def demand(fine: bool, expected: str, found: object, todo: str = "Correct the manifest.") -> None:
        if not fine:
            raise data_error(path, expected, str(found), todo)

    folder, content = path.parent, {LEARN2REG.get(key, key): value for key, value in content.items()} | content
    missing = [key for key in MANIFEST_KEYS if key not in content]
    demand(not missing, f"the keys {', '.join(MANIFEST_KEYS)}", f"no {', '.join(missing)}", "Add what is missing.")
    for key in content.keys() - OURS - THEIRS:
        if (told := nearest(key, OURS)) and not key.startswith("num"):  # Learn2Reg counts its lists
            warnings.warn(f"{path}: the unknown key {key!r} says nothing{told}", stacklevel=3)
    demand(isinstance(content["name"], str) and content["name"] != "", "text as name", repr(content["name"]))
    demand(content["pairing"] in PAIRINGS, f"a pairing of {', '.join(PAIRINGS)}", repr(content["pairing"]))
    # Learn2Reg says by modality what we say once.
    sizes, spoken = (v if isinstance(v := content[k], dict) else {"0": v} for k in ("dimensions", "modality"))
    dimensions = {sum(n > 1 for n in s) if isinstance(s, list) else int(str(s).rstrip("dD")) for s in sizes.values()}
    demand(dimensions in ({2}, {3}), "dimensions 2 or 3", ", ".join(map(str, sorted(dimensions))))
    read_as = {int(number): _read_as(name) for number, name in spoken.items()}
    todo = "Write MR for images without Hounsfield units: each is scaled by its own range."
    demand(bool(read_as) and "" not in read_as.values(), "modalities to read as CT or MR", [*spoken.values()], todo)
    named = content.get("labels") or {}
    nested = [names for names in named.values() if isinstance(names, dict)] or [named]
    structures = [(int(number), name) for names in nested for number, name in names.items() if int(number) != 0]
    labels = dict(structures)
    fine = all(labels[n] == name and isinstance(name, str) and -(2**63) <= n < 2**63 for n, name in structures)
    fine = fine and len({*labels.values()}) == len(labels) and all(map(str.strip, labels.values()))
    demand(fine, "labels of at most 64 bits with one name each, of its own", structures)

    def image_pairs(key: str) -> list[tuple[Path, Path]]:
        return [(folder / pair["fixed"], folder / pair["moving"]) for pair in content.get(key) or []]

    own, more = ([e if isinstance(e, dict) else {"image": e} for e in content.get(key) or []] for key in ENTRIES)
    entries: dict[Path, dict] = {}
    for image, entry in ((folder / entry["image"], entry) for entry in (*more, *own)):
        entries[image] = entries.get(image, {}) | entry  # of an image in both, what stands under `training` counts
    training = [folder / entry["image"] for entry in own]
    for key in {key for entry in (*more, *own) for key in entry} - {"image", "subject", *BESIDE}:
        if told := nearest(key, ("subject", *BESIDE)):
            warnings.warn(f"{path}: the unknown key {key!r} in an entry says nothing{told}", stacklevel=3)
    training_pairs, test_pairs = image_pairs("training_paired_images") or None, image_pairs("registration_val")
    itself = [fixed.name for fixed, moving in [*(training_pairs or []), *test_pairs] if fixed == moving]
    demand(not itself, "pairs of two different images", f"{', '.join(itself[:3])} with itself", "Correct the pair.")
    counted = Counter(map(os.path.normpath, training))  # a file has several names: a/b, a/../a/b
    twice = [os.path.basename(image) for image, times in counted.items() if times > 1]
    demand(not twice, "every training image once", f"{', '.join(twice)} again", "Remove the second entry.")
    trained_on, tested_on = {*training, *itertools.chain(*(training_pairs or []))}, {*itertools.chain(*test_pairs)}
    images = sorted(trained_on | tested_on)
    stated = {i: entries.get(i, {}).get("subject") for i in images}
    subjects = {i: subject_of(i, len(read_as) > 1) if s is None else str(s) for i, s in stated.items()}
    again = {subjects[image] for image in trained_on & tested_on}
    left = [image for image in training if subjects[image] not in again]
    left_pairs = training_pairs and [p for p in training_pairs if not again & {subjects[image] for image in p}]
    if again and (left_pairs if training_pairs else left):  # else nothing would be left: no habit, but a mistake
        told = f"the test subjects {', '.join(sorted(again)[:5])} ({len(again)} in all) stand under training too"
        warnings.warn(f"{path}: {told}; they are taken out of training", stacklevel=3)
        training, training_pairs = left, left_pairs
        trained_on = {*training, *itertools.chain(*(training_pairs or []))}
    shared = sorted({subjects[image] for image in trained_on} & {subjects[image] for image in tested_on})
    todo = "Move their images to one side, or tell subjects apart by a key 'subject' in the entries."
    demand(not shared, "no subject in both training and test", ", ".join(shared[:5]), todo)

    modality_of = dict.fromkeys(images, read_as[min(read_as)])
    if len({*read_as.values()}) > 1:
        numbers = {image: NUMBERED.search(stem(image)) for image in images}
        modality_of = {image: read_as.get(int(number[2]), "") if number else "" for image, number in numbers.items()}
    unclear = [image.name for image, modality in modality_of.items() if not modality]
    expected = f"images of several modalities named as a1_{max(read_as):04}, with the modality's number at the end"
    demand(not unclear, expected, ", ".join(unclear[:3]), "Rename them, or split the manifest.")
    beside: dict[str, dict[Path, Path | None]] = {key: {} for key in BESIDE}
    for key, image in itertools.product(BESIDE, images):
        kind, name = f"{key.removesuffix('s')}s", f"{stem(image)}.csv" if key == "keypoints" else image.name
        file = image.parent.parent / image.parent.name.replace("images", kind) / name
        found = file if "images" in image.parent.name and os.path.isfile(file) and (labels or key != "label") else None
        entry = entries.get(image, {})
        beside[key][image] = found if key not in entry else folder / entry[key] if entry[key] else None
    files = [*images, *itertools.chain(*(of.values() for of in beside.values()))]
    absent = [str(file) for file in files if file and not os.path.isfile(file)]
    gone = f"{len(absent)} missing: {', '.join(absent[:3])}"
    gone += " (a folder: dcm2niix makes a file of it)" * any(map(os.path.isdir, absent))
    demand(not absent, "every listed file on disk", gone, "Copy the files there or correct the manifest.")
    spacing_known = content.get("spacing_known", not any(image.suffix.lower() == ".png" for image in images))
    demand(isinstance(spacing_known, bool), "spacing_known true or false", repr(spacing_known))
    return Manifest(
        folder=folder, dimensions=dimensions.pop(), pairing=content["pairing"], labels=labels,
        modality="+".join(dict.fromkeys(read_as.values())), modality_of=modality_of, training=training,
        training_pairs=training_pairs, test_pairs=test_pairs, beside=beside, subject=subjects,
        spacing_known=spacing_known,
    )  # fmt: skip


def _read_as(name: str) -> str:
    """CT or MR, as which images of a modality are read, "" where that is not known.

    >>> [_read_as(name) for name in ("MR", "T1w", "CBCT", "ct", "US")]
    ['MR', 'MR', 'CT', 'CT', '']
    """
    word = re.sub(r"[^A-Z0-9]", "", name.upper())
    return next((modality for modality, pattern in READ_AS.items() if re.fullmatch(pattern, word)), "")


def subject_of(image: Path | str, numbered: bool = False) -> str:
    """Whose image it is: BIDS' `sub-XX` at the start of its name, else that without visit, slice, phase and Learn2Reg's
    modality number: one behind four digits, slice or phase, or, `numbered` being all images, behind any digit.

    >>> names = ("sub-01_ses-2_T1w", "pat01_visit1", "SC-HF-I-01_slice02_ED", "OASIS_0001_0000", "T1_0001")
    >>> [subject_of(f"{name}.nii.gz") for name in names]
    ['sub-01', 'pat01', 'SC-HF-I-01', 'OASIS_0001', 'T1_0001']
    """
    name = stem(image)
    if numbered or re.search(r"(_\d{4}|_slice\d+|_ED|_ES)_000\d$", name):
        name = NUMBERED.sub(r"\1", name)
    return re.sub(r"^(sub-[^_]+).*|(_slice\d+|_ED|_ES)*(_(ses-|visit[-_]?\d).*)?$", r"\1", name)


def held_out(manifest: Manifest) -> tuple[list[Path], list[tuple[Path, Path]] | None, list[tuple[Path, Path]]]:
    """Training images, training pairs (None: all ordered ones) and validation pairs, which share no subject.

    One subject in five is held out, two at least, the manifest's last, of ten training subjects or more; of fewer
    none, nor where no listed pair would be left on either side. Without listed pairs, each held-out image is fixed
    once, the next one of another subject moving.
    """
    listed = manifest.training_pairs
    images = [*manifest.training, *itertools.chain(*(listed or []))]
    subjects = list(dict.fromkeys(manifest.subject[image] for image in images))
    kept_apart = set(subjects[-max(2, len(subjects) // HELD_OUT) :]) if len(subjects) >= 10 else set()
    training = [image for image in manifest.training if manifest.subject[image] not in kept_apart]
    if listed is not None:
        within = [pair for pair in listed if not any(manifest.subject[image] in kept_apart for image in pair)]
        apart = [pair for pair in listed if all(manifest.subject[image] in kept_apart for image in pair)]
        return (training, within, apart) if within and apart else (manifest.training, listed, [])
    images = [image for image in manifest.training if manifest.subject[image] in kept_apart]
    pairs = []
    for i, fixed in enumerate(images):
        others = [image for image in images[i + 1 :] + images[:i] if manifest.subject[image] != manifest.subject[fixed]]
        pairs += [(fixed, moving) for moving in others[:1]]
    return training, None, pairs
