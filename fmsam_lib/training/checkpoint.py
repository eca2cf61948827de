"""What a training writes: its record, two logs, and checkpoints to go on from after a kill, to the same bits."""

import fcntl
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fmsam_lib.checking import ConfigError
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.records import provenance, write_json, written_whole
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.losses import Loss
from fmsam_lib.training.sam import SAM


@dataclass
class State:
    """Where a training stands, beside the network, its optimizer and SAM: all goes into the checkpoint."""

    step: int = 0  # done
    gradients: int = 0  # evaluated so far, of whole batches: what a training costs
    skipped: int = 0  # steps that were not finite
    in_a_row: int = 0
    scale: float = 2.0**16  # of the loss, in fp16
    scaled_well: int = 0  # steps since the scale last changed
    history: list[dict] = field(default_factory=list)
    best: dict | None = None  # step, dice and net of the best validation


def line_of(state: State, loss: Loss, dice: float, optimizer, sam: SAM | None) -> dict:
    line = {"step": state.step, **{name: value.item() for name, value in loss._asdict().items()}}
    line |= {"dice": None if math.isnan(dice) else dice, "lr": optimizer.param_groups[0]["lr"]}
    line |= {"gradient_evaluations": state.gradients, "skipped": state.skipped}
    return line | (sam.logged() if sam is not None else {})


def in_words(history: list[dict]) -> str:
    """What the newest line says, with the last Dice known.

    >>> line = {"total": 0.51234, "dice": 0.87, "skipped": 0, "rho": 0.01, "rise": 0.0042}
    >>> in_words([line, line | {"dice": None}])
    'loss 0.512, Dice 0.870, rise 0.0042'
    """
    line = history[-1]
    words = [f"loss {line['total']:.3f}"]
    words += [f"Dice {before['dice']:.3f}" for before in reversed(history) if before["dice"] is not None][:1]
    words += [f"rise {line['rise']:.2g}"] if "rise" in line else []
    words += [f"{line['skipped']} steps not finite"] if line["skipped"] else []
    return ", ".join(words)


def in_a_log(history: list[dict], run: Train) -> str:
    line = history[-1]
    left = round(line["seconds"] * (run.updates - line["step"]))
    time_left = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return f"step {line['step']}/{run.updates}: {in_words(history)}, {line['seconds']:.3g} s/step, {time_left} left\n"


def write_history(folder: Path, run: Train, state: State) -> None:
    """Both logs, up to the checkpoint: whatever came after it is done again."""
    with written_whole(folder / "history.jsonl") as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in state.history))
    with written_whole(folder / "train.log") as partial:
        words = (in_a_log(state.history[: i + 1], run) for i in range(len(state.history)))
        partial.write_text("".join(words))


def append_history(folder: Path, run: Train, state: State) -> None:
    for name, text in (
        ("history.jsonl", json.dumps(state.history[-1]) + "\n"),
        ("train.log", in_a_log(state.history, run)),
    ):
        with open(folder / name, "a") as log:
            log.write(text)


def record(config: Path, run: Train, net: GradICON, step: int) -> None:
    """Parameters and provenance, once; a training that goes on from a checkpoint adds where it did."""
    there = json.loads(config.read_text()) if step and config.exists() else {}
    if not there:
        write_json(config, {"parameters": run.model_dump(), "network": net.settings, "provenance": provenance()})
    elif step < run.updates:
        resumed = [*there.get("resumed", []), {"step": step} | provenance()]
        write_json(config, there | {"parameters": run.model_dump(), "resumed": resumed})


def save_best(folder: Path, net: GradICON, state: State) -> None:
    if state.best is None:
        return
    best = GradICON(**net.settings)
    best.shape = net.shape
    best.load_state_dict(state.best["net"])
    best.save(folder / "best.pt")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, however that ends; of several, the first one holds it."""
    with open(folder / ".lock", "w") as lock:
        try:
            if parallel.rank() == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in folder.rglob(".*.partial"):  # by one that was killed while it wrote
                    left.unlink()
        except BlockingIOError:
            raise ConfigError(f"another process is training in {folder}: wait for it or end it") from None
        yield


MAY_DIFFER = ("out", "data", "save_memory", "snapshots", "threads", "device")  # the same training at another place


def refuse_another(parameters: dict, run: Train, folder: Path) -> None:
    """A folder holds one training: going on with other parameters would mix two."""
    old, new = parameters, run.model_dump()
    names = [name for name in new if name not in MAY_DIFFER]
    differing = [f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in names if old.get(k) != new[k]]
    if differing:
        raise ConfigError(
            f"{folder} holds a training with other parameters:\n- "
            + "\n- ".join(differing)
            + "\ndelete the folder to train anew, or choose another `out`"
        )


def save(folder: Path, net: GradICON, optimizer, sam: SAM | None, run: Train, state: State) -> None:
    """All that going on to the same weights needs; the learning rate and the batches follow from the step."""
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "sam": sam and sam.state_dict()}
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    with written_whole(folder / "checkpoint.pt") as partial:
        torch.save(states | {"random": random, "parameters": run.model_dump(), "state": vars(state)}, partial)


def snapshot(folder: Path, net: GradICON, step: int) -> None:
    """The weights after `step` as one vector, `snapshots/step<step>.pt`."""
    with written_whole(folder / "snapshots" / f"step{step:06d}.pt") as partial:
        torch.save(torch.nn.utils.parameters_to_vector(net.parameters()).detach().cpu(), partial)


def resume(folder: Path, net: GradICON, optimizer, sam: SAM | None, run: Train) -> State:
    """Where to go on from; fills net, optimizer, sam and torch's random generators.

    Raises ConfigError for a folder of a training with other parameters, and for a checkpoint that cannot be read.
    """
    if (folder / "config.json").exists():
        refuse_another(json.loads((folder / "config.json").read_text())["parameters"], run, folder)
    path = folder / "checkpoint.pt"
    if not path.exists():
        return State()
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it to train from the start") from error
    if "parameters" not in saved:
        raise ConfigError(f"{path} is of an earlier version of this project: delete it to train from the start")
    refuse_another(saved["parameters"], run, folder)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    if sam is not None:
        sam.load_state_dict(saved["sam"])
    torch.set_rng_state(saved["random"]["cpu"])
    if len(saved["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])
    return State(**saved["state"])
