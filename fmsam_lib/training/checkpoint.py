"""What a training writes, and how it goes on from there after a kill, on a CPU to the same bits.

`config.json`: parameters and provenance. `history.jsonl`: a line per logged step. `checkpoint.pt`: all that going on
needs. `snapshots/`: weights on the way.
"""

import errno
import functools
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.domains import FileDomain, SyntheticDomain
from fmsam_lib.images.files import parts
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import DAMAGED, sha256, whole
from fmsam_lib.parameters import Train
from fmsam_lib.records import provenance, read_json, warn_once, write_json, written_whole
from fmsam_lib.training import distributed as parallel

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two trainings out of one folder
    fcntl = None  # type: ignore[assignment]

WRITES = (".checkpoint", ".config", ".history", ".weights", "snapshots/.step")  # before they have their names
SINCE = {"contrast": 0.0}  # what earlier trainings did without
MAY_DIFFER = ("out", "data", "save_memory", "snapshots", "threads", "device")  # the same training at another place


def trained_with(folder: Path | str) -> Train:
    """The parameters of the training in `folder`, from its `config.json`; ConfigError where it lacks one."""
    path = Path(folder) / "config.json"
    try:
        values = SINCE | json.loads(path.read_text(encoding="utf-8"))["parameters"] | {"out": str(folder)}  # moved
        absent = Train.model_fields.keys() - values.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = "none" if isinstance(error, FileNotFoundError) else repr(error)
        way = "run 10_train with this folder as `out` first, or correct the path"
        raise ConfigError(f"expected a run of notebook 10_train in {folder}, got {got}: {way}") from error
    if absent:
        raise ConfigError(f"expected every parameter in {path}, got none for {', '.join(sorted(absent))}; train anew")
    return read(Train, values, source=str(path))


@dataclass
class State:
    """Where a training stands, beside the network, its optimizer and SAM: all goes into the checkpoint."""

    step: int = 0  # done
    gradients: int = 0  # evaluated so far, of whole batches: what a training costs
    skipped: int = 0  # steps that were not finite
    in_a_row: int = 0
    scale: float = 2.0**16  # of the loss, in fp16, which loses gradients below 6e-8 (arXiv 1710.03740)
    scaled_well: int = 0  # steps since the scale last changed
    history: list[dict] = field(default_factory=list)


def diverged(first: float, last: float) -> bool:
    """Whether a training's last loss is NaN or above ten times its first, which counts as 1 at least and 10 at most."""
    return not last <= 10 * min(max(1.0, first), 10.0)  # below 1 pairs differ so; above 10 it has diverged already


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, however that ends; of several, the first one holds it."""
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        if parallel.rank() == 0:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is training in {folder}: wait for it or end it") from None
            except OSError as error:
                warn_once(f"{folder}: this disk keeps no locks ({error.strerror}); never train here twice at once")
            for left in (file for name in WRITES for file in folder.glob(f"{name}*.partial")):
                left.unlink()  # by one that was killed while it wrote
        yield


def identity(run: Train, dataset, net: GradICON) -> dict:
    """What makes two trainings the same: parameters, hashes of weights, of what is frozen, of images, pairs' seed."""
    starts = vars(net).setdefault("starts", {})  # by folder: who trained on in one before has lost its first weights
    if run.out not in starts or not Path(run.out, "checkpoint.pt").exists():
        frozen = " ".join(name for name, p in net.named_parameters() if not p.requires_grad)
        values = b"".join(value.cpu().numpy().tobytes() for value in net.state_dict().values()) + frozen.encode()
        starts[run.out] = hashlib.sha256(values).hexdigest()[:12]
    of_domain = {"domain_seed": getattr(dataset, "seed", 0), "hash_of_images": hash_of_images(dataset)}
    return {"parameters": run.model_dump(), "start": starts[run.out]} | of_domain


def hash_of_images(dataset) -> str:
    """Of all images and masks that a training may read, or of an own domain's first pair; "" of synthetic domains."""
    found, domains = list[list](), getattr(dataset, "domains", [dataset])
    for domain in (d for d in domains if type(d) not in (FileDomain, SyntheticDomain, type(None))):
        twice = (domain.training_pair(0) for _ in range(2))
        images = [torch.cat([pair.moving, pair.fixed]).detach().cpu().float().numpy().tobytes() for pair in twice]
        found.append([hashlib.sha256(images[0]).hexdigest() if images[0] == images[1] else ""])  # drawn anew
    for domain in (d for d in domains if isinstance(d, FileDomain)):
        about, listed, own = domain.manifest, domain.training_pairs, len(found)
        for image in itertools.chain(*listed) if listed else domain.training:
            hashes = [hashed(path).values() for path in (image, about.beside["mask"][image]) if path]
            found.append([bool(listed), about.modality_of[image], *itertools.chain(*hashes)])
        if domain.hashed != found[own:]:  # what it keeps in memory is of files as they were
            domain.samples, domain.hashed = {}, found[own:]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12] if found else ""


def hashed(image: Path) -> dict[Path, str]:
    """SHA-256 of every file that belongs to an image and can be read."""
    files = parts(image) if os.access(image, os.R_OK) else []
    there = ((file, file.stat()) for file in files if os.access(file, os.R_OK) and file.is_file())
    return {file: _hash(file, stat.st_size, stat.st_mtime_ns) for file, stat in there}


_hash = functools.cache(lambda path, *_: sha256(path))  # once in a process, unless size or date changes


def refuse_another(there: dict, now: dict, folder: Path) -> None:
    """A folder holds one training: going on with another `identity` would mix two."""
    old, new = (SINCE | {**who, **who["parameters"], "parameters": None} for who in (there, now))
    fixed = {"snapshots"} if new["snapshots"] and (folder / "weights.pt").exists() else set()  # it would leave none
    if names := [name for name in new if name not in {*MAY_DIFFER} - fixed and old.get(name) != new[name]]:
        differing = "\n- ".join(f"{name}: {old.get(name)!r} there, {new[name]!r} now" for name in names)
        todo = "delete the folder to train anew, or choose another `out`"
        raise ConfigError(f"{folder} holds a training with other parameters or images:\n- {differing}\n{todo}")


def record(folder: Path, run: Train, now: dict, net: GradICON, state: State) -> None:
    """Parameters and provenance, once, to which a training that goes on adds where it did; the history up to there."""
    config = folder / "config.json"
    there = read_json(config, {}) if state.step else {}
    if not there:
        write_json(config, now | {"network": net.settings, "provenance": provenance()})
    elif state.step < run.updates:
        write_json(config, there | now | {"resumed": [*there.get("resumed", []), {"step": state.step} | provenance()]})
    with written_whole(folder / "history.jsonl") as partial:  # the lines after the checkpoint will be made again
        partial.write_text("".join(json.dumps(line) + "\n" for line in state.history), encoding="utf-8")


def save(folder: Path, now: dict, parts: dict[str, Any], state: State) -> None:
    """All that going on to the same weights needs; the learning rate and all that is random follow from the step.

    parts: what has a `state_dict`, by name, None where a training has none: network, optimizer, SAM, averages.
    """
    states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
    with written_whole(folder / "checkpoint.pt") as partial:
        torch.save(now | states | {"state": vars(state)}, partial)


def resume(folder: Path, now: dict, parts: dict[str, Any]) -> State:
    """Where the training of the identity `now` goes on from; fills the parts (see `save`).

    From the start, with a warning, where the checkpoint cannot be read: that is kept beside, and is of no more use.
    Raises ConfigError for a folder of a training with other parameters or images, or of one that is done and has lost
    its checkpoint.
    """
    path, there = folder / "checkpoint.pt", read_json(folder / "config.json", {})
    if now.keys() <= there.keys():  # else it is damaged: the checkpoint says whose it is
        refuse_another(there, now, folder)
    if not path.exists():
        if (folder / "weights.pt").exists() and not (folder / "checkpoint_damaged.pt").exists():
            raise ConfigError(f"{folder}: a finished training, but no checkpoint.pt: delete weights.pt to train anew")
        return State()
    try:
        saved = whole(path)
        there = {name: saved[name] for name in now}
    except DAMAGED as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EIO, errno.ENOMEM, errno.EPERM, errno.ESTALE):
            raise  # the disk's trouble: the file may be whole
        if parallel.rank() == 0:
            aside = path.replace(folder / "checkpoint_damaged.pt")
            warnings.warn(f"{path} cannot be read ({error}): it is {aside} now, and this trains anew", stacklevel=2)
        return State()
    refuse_another(there, now, folder)
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(saved[name])
    return State(**saved["state"])


def snapshot(folder: Path, net: GradICON, step: int) -> None:
    """The weights after `step` as one vector, `snapshots/step<step>.pt`."""
    with written_whole(folder / "snapshots" / f"step{step:06d}.pt") as partial:
        torch.save(torch.nn.utils.parameters_to_vector(net.parameters()).detach().cpu(), partial)
