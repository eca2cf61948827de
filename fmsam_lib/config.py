"""What a run is: its parameters, checked once, and where its numbers come from."""

import ast
import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "scipy", "pandas", "monai", "nibabel", "loss-landscapes", "matplotlib")
Optimizer = Literal["adam", "adam-2x", "sam", "asam", "sam-every", "looksam", "random"]
Schedule = Literal["constant", "lr"]
Similarity = Literal["lncc", "lncc2", "mind"]
Method = Literal["none", "ants-syn", "io", "network", "network+io"]
Corruption = Literal["noise", "bias_field", "gamma", "inversion", "blur", "slices", "misalignment"]


class ConfigError(ValueError):
    """A parameter that cannot be right: says which, what was expected and what came."""


# --- parameters of the notebooks: their defaults stand in the notebooks' parameter cells alone ---


@dataclass(frozen=True, kw_only=True)
class Start:
    """Notebook 00: a network trained before your eyes."""

    domain: str
    shape: list[int]
    steps: int
    rho: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Notebook 04: SAM's climb, on two weights and on a small network."""

    domain: str
    shape: list[int]
    steps: int
    rho: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Look:
    """Notebook 01: one domain's images."""

    domain: str
    shape: list[int]
    data: str
    index: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Train:
    """Notebook 10: one training."""

    out: str
    train_domain: str
    optimizer: Optimizer
    seed: int
    shape: list[int]
    data: str
    weights: str
    down: list[int]
    levels: int
    last_step: bool
    first_stage: int
    steps: int
    batch: int
    accumulate: int
    augment: bool
    validation: int
    lr: float
    lr_schedule: Literal["cosine", "constant"]
    clip: float
    rho: float
    rho_schedule: Schedule
    every: int
    alpha: float
    similarity: Similarity
    sigma: float
    lmbda: float
    joint: bool
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bf16", "fp16"]
    processes: int
    sync_climb: bool
    save_memory: bool
    snapshots: int
    threads: int

    def __post_init__(self):
        parts = self.processes * self.accumulate
        if self.batch % parts:
            raise ConfigError(f"expected batch to be a multiple of processes x accumulate, {parts}, got {self.batch}")
        if self.first_stage and not (self.first_stage < self.steps and (self.last_step or self.weights)):
            raise ConfigError(
                f"expected first_stage to be below steps, and last_step, which is added after it; got "
                f"first_stage {self.first_stage}, steps {self.steps}, last_step {self.last_step}"
            )
        if self.optimizer == "looksam" and self.processes > 1 and not self.sync_climb:
            raise ConfigError(
                "expected sync_climb with looksam in several processes: they must bend their gradients by one direction"
            )

    def loss(self) -> dict:
        """What `losses.objective` takes of it."""
        return {"similarity": self.similarity, "sigma": self.sigma, "lmbda": self.lmbda}

    @property
    def stages(self) -> tuple[int, int]:
        """Optimizer steps without the last step, and in all: twice as many of both for the baseline at SAM's cost."""
        times = 2 if self.optimizer == "adam-2x" else 1
        return times * self.first_stage, times * self.steps

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.stages[1]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Notebook 20: one trained network, or what it is compared with, on every test domain."""

    run: str
    out: str
    methods: list[Method]
    test_domains: list[str]
    shape: list[int]
    data: str
    pairs: int
    io: int
    io_lr: float
    alone_io: int
    alone_lr: float
    corruptions: list[Corruption]
    corrupted_pairs: int
    fields: bool
    threads: int

    def __post_init__(self):
        of_a_run = [name for name in self.methods if name not in ("none", "ants-syn")]
        if of_a_run and not self.run:
            raise ConfigError(
                f"expected run, the folder of a training, for the methods {', '.join(of_a_run)}; got none"
            )
        steps = {"network+io": ("io", self.io), "io": ("alone_io", self.alone_io)}
        for method, (name, number) in steps.items():
            if method in self.methods and number < 1:
                raise ConfigError(f"expected {name} of at least 1 step with the method {method}, got {number}")


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Notebook 30: the loss around one trained network."""

    run: str
    out: str
    test_domains: list[str]
    data: str
    pairs: int
    radius: float
    line_points: int
    plane_points: int
    directions: int
    normalisation: Literal["filter", "layer", "none"]
    direction_seed: int
    measured_on: list[str]
    rhos: list[float]
    draws: int
    ascent_steps: int
    eigenvalues: int
    probes: int
    lanczos_steps: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Between:
    """Notebook 35: from one solution to the other, and the plane of both and their common start."""

    baseline: str
    treatment: str
    out: str
    test_domains: list[str]
    data: str
    pairs: int
    path_points: int
    plane_points: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Notebook 40: all runs of a study, side by side."""

    study: str
    folder: str
    baseline: str
    treatment: str


@dataclass(frozen=True, kw_only=True)
class Register:
    """Notebook 50: one pair of files."""

    fixed: str
    moving: str
    labels: str
    fixed_labels: str
    modality: Literal["mr", "ct"]
    weights: str
    shape: list[int]
    io: int
    lr: float
    sigma: float
    out: str
    seed: int
    threads: int


# What older records don't say: how they were made.
ADDED = {"weights": "", "similarity": "lncc", "joint": True, "save_memory": False}
ADDED |= {"rho_schedule": "constant", "every": 5, "alpha": 0.7}
ADDED |= {"first_stage": 0, "accumulate": 1, "augment": False, "validation": 0, "lr_schedule": "cosine", "clip": 0.0}
ADDED |= {"device": "cpu", "precision": "float32", "processes": 1, "sync_climb": True, "snapshots": 0}

AT_LEAST = {
    **dict.fromkeys(("accumulate", "batch", "corrupted_pairs", "directions", "down", "every", "levels", "pairs"), 1),
    **dict.fromkeys(("processes", "steps", "threads"), 1),
    **dict.fromkeys(("alpha", "alone_io", "clip", "direction_seed", "eigenvalues", "first_stage", "index", "io"), 0),
    **dict.fromkeys(("ascent_steps", "lmbda", "probes", "rho", "seed", "seeds", "snapshots", "validation"), 0),
    **dict.fromkeys(("line_points", "plane_points", "path_points"), 3),
    **dict.fromkeys(("draws", "lanczos_steps"), 2),
    "shape": 16,
}
POSITIVE = ("alone_lr", "io_lr", "lr", "radius", "rhos", "sigma")
LENGTH = {"shape": (2, 3)}
ODD = ("line_points", "plane_points")  # so that the trained weights are one of the points
NOT_EMPTY = ("down", "methods", "optimizers", "rhos", "seeds", "test_domains", "train_domain")


def read(kind: type, values: dict, *, source: str = "parameters"):
    """`kind` (a dataclass above) from `values`, every problem named at once.

    >>> read(Look, {"domain": "brain-mr", "shape": [64, 64], "data": "", "index": -1, "pears": 3})
    Traceback (most recent call last):
    fmsam_lib.config.ConfigError: 3 problems in parameters (of Look):
    - pears: unknown; known are domain, shape, data, index, pairs (did you mean pairs?)
    - pairs: missing
    - index: expected at least 0, got -1
    """
    known = {field.name: hint for field, hint in zip(fields(kind), typing.get_type_hints(kind).values(), strict=True)}
    problems = [
        f"{name}: unknown; known are {', '.join(known)}{nearest(name, known)}" for name in values.keys() - known
    ]
    optional = {field.name for field in fields(kind) if field.default_factory is not dataclasses.MISSING}
    problems += [f"{name}: missing" for name in known if name not in values and name not in optional]
    problems += [
        f"{name}: {problem}"
        for name in known
        if name in values
        for problem in problems_of(name, values[name], known[name])
    ]
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise ConfigError(f"{count} in {source} (of {kind.__name__}):\n" + "\n".join(f"- {p}" for p in problems))
    return kind(**{name: _as(values[name], known[name]) for name in known if name in values})


def nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def problems_of(name: str, value, hint) -> list[str]:
    if not _fits(value, hint):
        trick = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and _number(value) else ""
        return [f"expected {_words(hint)}, got {value!r}{trick}"]
    items = value if isinstance(value, list) else [value]
    found = []
    if name in NOT_EMPTY and not value:
        found.append(f"expected at least one, got {value!r}")
    if name in LENGTH and len(value) not in LENGTH[name]:
        found.append(f"expected {' or '.join(map(str, LENGTH[name]))} numbers, got {value!r}")
    if any(isinstance(item, float) and not math.isfinite(item) for item in items):
        return [f"expected finite numbers, got {value!r}"]
    if name in AT_LEAST and any(item < AT_LEAST[name] for item in items):
        found.append(f"expected at least {AT_LEAST[name]}, got {value!r}")
    if name in POSITIVE and any(item <= 0 for item in items):
        found.append(f"expected above 0, got {value!r}")
    if name in ODD and value % 2 == 0:
        found.append(f"expected an odd number, got {value!r}")
    if isinstance(value, list) and name not in ("down", "shape") and len(set(map(str, items))) < len(items):
        found.append(f"expected each once, got {value!r}")
    return found


def _fits(value, hint) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is list:
        return isinstance(value, list | tuple) and all(_fits(item, hint.__args__[0]) for item in value)
    if isinstance(hint, types.GenericAlias):
        return isinstance(value, hint.__origin__)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _as(value, hint):
    if isinstance(value, list | tuple):
        return [_as(item, hint.__args__[0]) for item in value]
    return float(value) if hint is float else value


def _words(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.GenericAlias) and typing.get_origin(hint.__args__[0]) is Literal:
        return "a list of some of " + ", ".join(typing.get_args(hint.__args__[0]))
    return str(hint) if isinstance(hint, types.GenericAlias) else hint.__name__


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def from_notebook(kind: type, namespace: dict):
    """The checked parameters of the notebook whose globals are `namespace`; call it in the second cell.

    A parameter counts as given when the parameter cell, or the cell papermill puts after it, assigns it, so
    that a misspelt one is found and variables of later cells don't count when a person runs the cell again.
    Both cells begin with "# Parameters".
    """
    cells = namespace["In"]
    last = max((i for i, cell in enumerate(cells) if cell.startswith("# Parameters")), default=None)
    if last is None:
        raise ConfigError('no parameter cell was run: run the first code cell (it begins with "# Parameters")')
    first = last
    while cells[first - 1].startswith("# Parameters"):
        first -= 1
    names = {name: None for cell in cells[first : last + 1] for name in _assigned(cell)}
    return read(kind, {name: namespace[name] for name in names}, source="the parameter cell")


def _assigned(cell: str) -> Iterator[str]:
    for node in ast.parse(cell).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def trained_with(folder: Path | str) -> Train:
    """The parameters of the training in `folder`, from its `config.json`."""
    path = Path(folder) / "config.json"
    try:
        return read(Train, ADDED | json.loads(path.read_text())["parameters"], source=str(path))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ConfigError(f"expected a run of notebook 10_train in {folder}, got {error!r}; train it first") from error


def about_run(folder: Path | str) -> dict:
    """`train_domain`, `optimizer` and `seed` of the training in `folder`; "" stands for no registration."""
    if not folder:
        return {"train_domain": "", "optimizer": "none", "seed": None}
    run = trained_with(folder)
    return {"train_domain": run.train_domain, "optimizer": run.optimizer, "seed": run.seed}


# --- provenance, and files that are written whole or not at all ---


def provenance() -> dict:
    """Commit, versions and hardware, for `config.json`."""
    import torch  # here: reading parameters does not need it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    """The project's git commit, "+" behind it where files differ from it; "unknown" outside a checkout.

    Recorded benchmarks may differ: one script's record should not mark the next one's.
    """
    git = ["git", "-C", str(PROJECT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/*.csv"]
        dirty = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """A path to write to that takes `path`'s place when the block ends well, and is removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def as_dict(parameters) -> dict:
    return dataclasses.asdict(parameters)
