"""Domains: the same access to training, validation and test pairs, whether made on the spot or read from files.

Whoever trains or evaluates sees no file and no manifest, only `open_domain` and what it returns.
"""

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmsam_lib.checking import ConfigError, nearest
from fmsam_lib.images.cache import load
from fmsam_lib.images.files import stem
from fmsam_lib.images.grid import Sample, check_oriented, turned
from fmsam_lib.images.manifest import BESIDE, Manifest, data_folder, held_out, read_manifest
from fmsam_lib.pair import Pair
from fmsam_lib.phantoms import pairs as synthetic
from fmsam_lib.records import DataError, data_error

FIRST = {"test": 1_000_000, "validation": 2_000_000}  # numbers of synthetic pairs; those before are for training


def domain_names(data=None) -> list[str]:
    """The synthetic domains, then the data sets found in the data folder."""
    return [*synthetic.DOMAINS, *sorted({path.parent.name for path in data_folder(data).glob("*/*_dataset.json")})]


def open_domain(name: str, *, shape: Sequence[int], data=None, seed: int = 0, subjects: int = 0):
    """A source of pairs on the grid `shape`: a synthetic domain, a data set's folder, or "a+b", a mixture.

    data: the folder of data sets (see `data_folder`). subjects: train on so many of each domain, its first; 0: on all.

    All have `name`, `shape`, `data` ("" where all is synthetic), `seed`, `subjects`, `labels`, `modality`, `pairing`,
    `training_pair(i)`: the i-th of an endless sequence drawn with `seed`, `test_count`: how many, `test_pair(i)`: the
    same for every seed, `validation_count` and `validation_pair(i)`: likewise, of subjects who are in neither training
    nor test, and `check()`: the messages of everything wrong with its files. All but mixtures also: `unit` ("mm", or
    "voxel" where the spacing is unknown) and `training_count` (images; pairs of a synthetic domain).
    Raises DataError for an unknown name, with the known ones; ConfigError for an argument that cannot be right.
    """
    if not isinstance(name, str) or not all(isinstance(n, int | np.integer) and n >= 0 for n in (seed, subjects)):
        raise ConfigError(f"expected {name=} as text, {seed=} and {subjects=} as whole numbers from 0 on: correct that")
    shape, least = tuple(np.atleast_1d(shape).tolist()), 16 if name in synthetic.DOMAINS else 2
    if len(shape) not in (2, 3) or not all(isinstance(side, int) and side >= least for side in shape):
        raise ConfigError(f"expected a shape of 2 or 3 sides, whole and from {least} on, got {shape}: give (64, 64)")
    folder, known = data_folder(data), domain_names(data)
    if known.count(name) > 1 or ("+" in name and name in known):
        raise data_error(folder / name, "a data set of another name", "a synthetic domain's, or a +", "Rename it.")
    if "+" in name:
        how: dict = {"shape": shape, "data": data, "seed": seed, "subjects": subjects}
        return Mixture(name, [open_domain(part, **how) for part in name.split("+")])
    if name in synthetic.DOMAINS:
        return SyntheticDomain(name, shape, seed, subjects)
    if name not in known:
        todo = "Correct the name, or set FMSAM_DATA to the folder of data sets."
        raise data_error(folder, f"one of {', '.join(known)}", f"{name!r}{nearest(name, known)}", todo)
    return FileDomain(read_manifest(folder / name), shape, seed, subjects)


def opens_again(domain) -> bool:
    """Whether another process finds the same domain by its name, shape and folder of data sets, with seed 0."""
    parts = getattr(domain, "domains", [domain])
    known = all(type(part) in (SyntheticDomain, FileDomain) and part.data in ("", domain.data) for part in parts)
    alike = known and {(p.shape, p.seed, p.subjects) for p in parts} == {(domain.shape, 0, domain.subjects)}
    return alike and domain.name == "+".join(part.name for part in parts)


def readable(dataset, numbers: Iterable[int], problems: list[str]) -> Iterator[Pair]:
    """The test pairs of these numbers; why one cannot be read, or that there is none, is added to `problems`."""
    for number in numbers if dataset.test_count else [0]:  # which says why
        try:
            yield dataset.test_pair(number)
        except DataError as error:
            problems.append(str(error))


def readable_test_pairs(dataset, count: int) -> list[Pair]:
    """The first `count` test pairs that can be read (evaluation names the others); DataError, with why, for none."""
    problems: list[str] = []
    pairs = [*itertools.islice(readable(dataset, range(dataset.test_count), problems), count)]
    if not pairs:
        raise DataError(f"{dataset.name} has no test pair that can be read:\n- " + "\n- ".join(problems))
    return pairs


class SyntheticDomain:
    """Pairs made on the spot; a training pair is kept, for making one takes longer than a small network's step."""

    unit, data, validation_count, test_count = "mm", "", 10, 50

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, subjects: int = 0):
        domain = synthetic.DOMAINS[name]
        self.name, self.shape, self.seed, self.subjects = name, shape, seed, subjects
        self.training_count = min(subjects or 200, 200)  # pairs
        self.labels, self.modality, self.pairing = domain.labels, domain.modality, domain.pairing
        self.made: dict[int, Pair] = {}

    def training_pair(self, index: int) -> Pair:
        number = int(np.random.default_rng([self.seed, index]).integers(self.training_count))
        if number not in self.made:
            pair = synthetic.make_pair(self.name, seed=self.seed, index=number, shape=self.shape)
            self.made[number] = dataclasses.replace(pair, true_map=None)  # the largest part, not needed to train
        return self.made[number]

    def validation_pair(self, index: int) -> Pair:
        return self._other("validation", index, self.validation_count)

    def test_pair(self, index: int) -> Pair:
        return self._other("test", index, self.test_count)

    def _other(self, kind: str, index: int, count: int) -> Pair:
        if not 0 <= index < count:
            raise data_error(self.name, f"a {kind} pair from 0 to {count - 1}", f"{index}", "Choose one of these.")
        pair = synthetic.make_pair(self.name, seed=0, index=FIRST[kind] + index, shape=self.shape)
        return dataclasses.replace(pair, title=f"{self.name}, {kind} pair {index + 1}")

    def check(self, *, test: bool = True) -> list[str]:
        return []


class FileDomain:
    """Pairs of a manifest's files; those to train and validate on are kept in memory, without labels that are wrong."""

    def __init__(self, manifest: Manifest, shape: tuple[int, ...], seed: int, subjects: int = 0):
        if len(shape) > manifest.dimensions:
            raise data_error(manifest.folder, "a 2-D grid for its 2-D images", f"{shape}", "Choose a 2-D grid.")
        self.manifest, self.shape, self.seed, self.subjects = manifest, shape, seed, subjects
        self.name, self.data = manifest.folder.absolute().name, str(manifest.folder.parent.resolve())
        self.labels, self.modality, self.pairing = manifest.labels, manifest.modality, manifest.pairing
        self.unit = "mm" if manifest.spacing_known else "voxel"
        self.training, listed, self.validation_pairs = held_out(manifest)
        if subjects:
            everyone = (manifest.subject[i] for i in (*self.training, *itertools.chain(*(listed or []))))
            kept = [*dict.fromkeys(everyone)][:subjects]
            self.training = [i for i in self.training if manifest.subject[i] in kept]
            listed = listed and [pair for pair in listed if all(manifest.subject[i] in kept for i in pair)]
        self.training_count, self.validation_count = len(self.training), len(self.validation_pairs)
        self.training_pairs, self.test_count = listed, len(manifest.test_pairs)
        named, here = Counter(map(stem, manifest.subject)), manifest.folder
        below = {i: i.relative_to(here if i.is_relative_to(here) else i.anchor) for i in manifest.subject}
        called = {i: "_".join((*p.parts[: -1 if named[stem(i)] > 1 else 0], stem(i))) for i, p in below.items()}
        again = Counter(called.values())  # T1.nii.gz beside T1.mha
        self.called = {i: c if again[c] == 1 else f"{c}~{n}" for n, (i, c) in enumerate(called.items(), 1)}
        self.samples: dict[Path, tuple[Sample, Tensor | None, Tensor | None]] = {}
        self.axes, self.told = dict[Path, tuple[np.ndarray, bool]](), False  # of the images read, and whether they fit
        self.hashed: list = []  # what the files of `samples` were when they were last hashed for a training

    def training_pair(self, index: int) -> Pair:
        images, pairs = self.training, self.training_pairs
        rng = np.random.default_rng([self.seed, index])
        if not (images[1:] if pairs is None else pairs):
            expected = "two training images or more (a pair is of two different ones), or training pairs"
            todo = "Add some, take more subjects, or use this data set for testing only."
            raise data_error(self.manifest.folder, expected, f"{len(images)} images, {len(pairs or [])} pairs", todo)
        chosen = pairs[rng.integers(len(pairs))] if pairs else (images[i] for i in rng.choice(len(images), 2, False))
        return self._pair(*chosen)

    def validation_pair(self, index: int) -> Pair:
        return self._pair(*self.validation_pairs[index])

    def test_pair(self, index: int) -> Pair:
        if not 0 <= index < self.test_count:
            found, todo = f"{self.test_count} under registration_val", "Add some; without any, it is for training only."
            raise data_error(self.manifest.folder, f"test pair {index}, counted from 0", found, todo)
        return self._pair(*self.manifest.test_pairs[index], keep=False)

    def check(self, *, test: bool = True) -> list[str]:
        """Read all files that training and `test` need: every problem's message; for training alone labels warn."""
        about, problems = self.manifest, list[str]()
        pairs = [*(about.training_pairs or []), *about.test_pairs * test]
        images = sorted({*about.training, *itertools.chain(*pairs)})
        for files in [*zip(images, strict=True), *pairs]:
            try:
                self._pair(*files, keep=not test) if len(files) == 2 else self._sample(files[0], keep=not test)
            except DataError as error:
                problems.append(str(error))
        try:
            drawn = about.training if about.training_pairs is None else []  # at random
            for pair in itertools.pairwise(image for image in drawn if image in self.axes):
                self._fit(*pair)
        except DataError as error:
            problems.append(str(error))
        return [*dict.fromkeys(problems)]

    def _fit(self, *pair: Path) -> None:
        """Refuse a pair of which one header states no orientation; tell of one whose axes are turned to each other."""
        (fixed, here), (moving, there) = map(self.axes.__getitem__, pair)
        check_oriented([*map(str, pair)], (here, there))
        if not self.told and turned(fixed, moving, len(self.shape)):
            self.told = True
            apart = "their axes lie over 45 degrees apart, so one may be turned by 90 degrees, or show another plane"
            todo = "Resample all along the body's axes, and store a slice as (X, Y, 1)."
            warnings.warn(f"{pair[0]} and {pair[1]}: {apart}. {todo}", stacklevel=2)

    def _sample(self, image: Path, *, keep: bool = True) -> tuple[Sample, Tensor | None, Tensor | None]:
        """An image, its landmarks `(L, D)` in unit coordinates and its mask `(1, *S)`, None where it has none."""
        if keep and (there := self.samples.get(image)):
            return there
        label, mask, keypoints = (self.manifest.beside[kind][image] for kind in BESIDE)
        options: dict = {"modality": self.manifest.modality_of[image], "shape": self.shape}
        try:
            sample = load(image, label, labels=self.labels, **options)
        except DataError as error:
            if not (keep and label):
                raise
            sample = load(image, **options)  # which raises where it was not the label
            warnings.warn(f"{error} Until then {label.name} is left out of training and validation", stacklevel=2)
        inside = load(image, mask, **options).label if mask else None
        points = landmarks(keypoints, sample) if keypoints and len(self.shape) == self.manifest.dimensions else None
        self.axes[image] = sample.affine, bool(sample.oriented)
        read = sample, points, None if inside is None or not inside.any() else inside != 0
        if keep:
            self.samples[image] = read
        return read

    def _pair(self, fixed_path: Path, moving_path: Path, *, keep: bool = True) -> Pair:
        fixed, fixed_points, fixed_mask = self._sample(fixed_path, keep=keep)
        moving, moving_points, moving_mask = self._sample(moving_path, keep=keep)
        self._fit(fixed_path, moving_path)
        if fixed_points is None or moving_points is None:
            fixed_points = moving_points = None
        elif len(fixed_points) != len(moving_points):
            keypoints, found = self.manifest.beside["keypoints"], f"{len(fixed_points)} and {len(moving_points)}"
            expected = f"as many points as in {keypoints[moving_path]}, line by line"
            raise data_error(keypoints[fixed_path], expected, found, "Correct the files.")
        mm, n = self.unit == "mm", np.array(self.shape) - 1
        steps = (s.affine[:3, : len(n)] if mm else np.linalg.pinv(s.unit_of_index[:, :3]) / n for s in (fixed, moving))
        spacing, moving_spacing = (tuple(np.linalg.norm(columns, axis=0).tolist()) for columns in steps)
        return Pair(
            name=f"{self.called[fixed_path]}<-{self.called[moving_path]}", labels=self.labels, unit=self.unit,
            moving=moving.image, moving_label=moving.label, moving_mask=moving_mask, moving_landmarks=moving_points,
            fixed=fixed.image, fixed_label=fixed.label, fixed_mask=fixed_mask, fixed_landmarks=fixed_points,
            spacing=spacing, moving_spacing=moving_spacing,
            affine=torch.from_numpy(fixed.affine) if fixed.oriented else None,
            subjects=(self.manifest.subject[fixed_path], self.manifest.subject[moving_path]),
        )  # fmt: skip


def landmarks(path: Path, sample: Sample) -> Tensor:
    """Learn2Reg's keypoints on the grid of their image, `(L, D)` in unit coordinates.

    The file has no header and a point in each line: `x,y,z`, the index in the image's file (of a 2-D one also `x,y`).
    Raises DataError for another file, and for points more than a sample of the grid outside the image.
    """
    dim, shape = len(sample.unit_of_index), sample.image.shape[1:]
    try:
        points = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
        if points.shape[1] not in (dim, 3):
            raise ValueError(f"{points.shape[1]} numbers in a line")
        unit = points @ sample.unit_of_index[:, : points.shape[1]].T + sample.unit_of_index[:, 3]
        outside = ~(np.abs(unit - 0.5) <= 0.5 + 1 / (np.array(shape) - 1)).all(axis=1)
        if outside.any():
            raise ValueError(f"{points[outside][0].tolist()}, which is not in the image")
    except (OSError, ValueError) as error:
        expected = "x,y,z in each line and no header: a voxel's index in the image's file"
        raise data_error(path, expected, str(error), "Correct the file.") from error
    return torch.from_numpy(unit).float()


class Mixture:
    """Several domains in turn, so each as often as the others whatever its size; each pair carries its own labels.

    uniGradICON balances its data sets likewise, by as many pairs of each in an epoch (Tian et al. 2024). Not for tests.
    """

    test_count = 0

    def __init__(self, name: str, domains: list):
        self.name, self.domains = name, domains
        self.shape, self.seed, self.subjects = domains[0].shape, domains[0].seed, domains[0].subjects
        self.data = next((domain.data for domain in domains if domain.data), "")
        self.labels: dict[int, str] = {}
        self.modality = "+".join(dict.fromkeys(domain.modality for domain in domains))
        self.pairing = "+".join(dict.fromkeys(domain.pairing for domain in domains))
        self.validated = [domain for domain in domains if domain.validation_count]
        self.validation_count = min((d.validation_count for d in self.validated), default=0) * len(self.validated)

    def training_pair(self, index: int) -> Pair:
        turn, domain = divmod(index, len(self.domains))
        return self.domains[domain].training_pair(turn)

    def validation_pair(self, index: int) -> Pair:
        turn, domain = divmod(index, len(self.validated))
        return self.validated[domain].validation_pair(turn)

    def test_pair(self, index: int) -> Pair:
        raise data_error(self.name, "a single domain to test on", "a mixture", "Test its domains one by one.")

    def check(self, *, test: bool = True) -> list[str]:
        return [message for domain in self.domains for message in domain.check(test=test)]
