"""One training step, the loop around it, and checkpoints that survive a kill."""

import fcntl
import json
import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fmsam_lib.config import ADDED, ConfigError, Train, as_dict, provenance, write_json, written_whole
from fmsam_lib.losses import Batch, Loss, jittered_points, objective
from fmsam_lib.network import GradICON, give_back_memory
from fmsam_lib.sam import SAM, rho_beside_lr
from fmsam_lib.weights import load

LOG_EVERY = 10
CHECKPOINT_EVERY = 50
GIVE_UP_AFTER = 10  # non-finite steps in a row


def train(net: GradICON, dataset, run: Train, *, progress: bool = True) -> list[dict]:
    """Train `net` on `dataset` into the folder `run.out`; returns the logged steps.

    Writes there: `config.json`, `history.jsonl` (a line per logged step), `checkpoint.pt` (to go on
    from after a kill) and, at the end, `weights.pt`. A training that was interrupted goes on from its checkpoint to
    the same weights, bit for bit, since every step's batch depends on `run.seed` and the step alone;
    one that is done is not repeated.

    Raises: ConfigError where the folder holds a training with other parameters; FloatingPointError
    when the loss or its gradient stays non-finite.
    """
    torch.set_num_threads(run.threads)
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _train(net, dataset, run, folder, progress)


def _train(net: GradICON, dataset, run: Train, folder: Path, progress: bool) -> list[dict]:
    _refuse_another(folder / "config.json", run)
    optimizer = torch.optim.Adam(net.parameters(), lr=run.lr)
    sam = perturbation(net, run)

    step, history, skipped, in_a_row = _resume(folder, net, optimizer, sam)
    _record(folder / "config.json", run, net, step)
    net.train()
    net.shape, net.save_memory = tuple(run.shape), run.save_memory
    if run.save_memory:
        give_back_memory()
    bar = tqdm(
        total=run.steps, initial=step, disable=not progress, desc=f"{run.train_domain} {run.optimizer}", unit="step"
    )
    with open(folder / "history.jsonl", "w") as log:
        log.writelines(json.dumps(line) + "\n" for line in history)
        while step < run.steps:
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, run)
            for group in sam.groups if sam is not None and run.rho_schedule == "lr" else []:
                group["rho"] = rho_beside_lr(cosine(step, run), run.lr, run.rho)
            start = time.perf_counter()
            batch = make_batch(dataset, run, step)
            waited = time.perf_counter() - start
            loss, finite = train_step(net, batch, run, optimizer, sam)
            skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
            if in_a_row == GIVE_UP_AFTER:
                raise FloatingPointError(
                    f"loss or gradient not finite {in_a_row} steps in a row, up to step {step}: "
                    f"try a smaller lr ({run.lr}) or rho ({run.rho})"
                )
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == run.steps:
                seconds = time.perf_counter() - start
                history.append(_line(step, loss, skipped, sam, seconds, waited))
                log.write(json.dumps(history[-1]) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{history[-1]['total']:.3f}")
            if step % CHECKPOINT_EVERY == 0 or step == run.steps:
                _checkpoint(folder, net, optimizer, sam, step, history, skipped, in_a_row)
    bar.close()
    net.eval()
    net.save(folder / "weights.pt")
    return history


def starting(run: Train) -> GradICON:
    """The network that `run` starts from: that of the file `run.weights`, else random weights by the seed alone.

    Raises: ValueError as `weights.load`; ConfigError where the file's network is 2-D and the run 3-D, or the reverse.
    """
    if not run.weights:
        torch.manual_seed(run.seed)
        return GradICON(len(run.shape), down=tuple(run.down), levels=run.levels, last_step=run.last_step)
    net = load(run.weights)
    if net.dim != len(run.shape):
        raise ConfigError(f"expected weights of a {len(run.shape)}-D network, got a {net.dim}-D one in {run.weights}")
    return net


def perturbation(net: GradICON, run: Train) -> SAM | None:
    """What `run.optimizer` puts beside Adam: nothing, SAM, or one of its variants (see `sam.py`)."""
    options = {
        "adam": None,
        "sam": {},
        "asam": {"adaptive": True},
        "sam-every": {"every": run.every},
        "looksam": {"every": run.every, "alpha": run.alpha},
        "random": {"random_seed": run.seed},
    }[run.optimizer]
    return None if options is None else SAM(net.parameters(), run.rho, net=net, **options)


def train_step(net: GradICON, batch: Batch, run: Train, optimizer, sam: SAM | None) -> tuple[Loss, bool]:
    """One update; the loss at w, and whether all was finite (when not, weights and buffers stay as they are)."""
    buffers = [buffer.clone() for buffer in net.buffers()]
    optimizer.zero_grad()
    loss = objective(net, batch, joint=run.joint, **run.loss())
    finite = backward(loss)  # gradient at w
    if finite and sam is not None and sam.due:
        with sam.perturbed():  # at w + eps: the worst weights within rho
            optimizer.zero_grad()
            there = objective(net, batch, joint=run.joint, **run.loss())
            finite = backward(there)  # its gradient is what moves w
        sam.rise = there.total.detach() - loss.total.detach()
    elif finite and sam is not None:
        sam.between()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if finite and all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients)):
        optimizer.step()
        return loss, True
    for buffer, value in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(value)  # BatchNorm's running statistics have seen what is not finite
    return loss, False


def backward(loss: Loss) -> bool:
    """Fill the gradients, unless the loss is not finite: through NaN, torch's 2-D grid_sample crashes going back."""
    finite = bool(torch.isfinite(loss.total))
    if finite:
        loss.total.backward()
    return finite


def make_batch(dataset, run: Train, step: int) -> Batch:
    """The batch of a step: depends on the seed and the step alone, so that a resumed run sees the same."""
    first = (run.seed * 1_000_003 + step) * run.batch
    pairs = [dataset.training_pair(first + i) for i in range(run.batch)]
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    return Batch(
        torch.stack([pair.moving for pair in pairs]),
        torch.stack([pair.fixed for pair in pairs]),
        jittered_points(tuple(run.shape), generator),
    )


def cosine(step: int, run: Train) -> float:
    """Learning rate falling from `run.lr` to 0 along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return run.lr * 0.5 * (1 + math.cos(math.pi * step / run.steps))


def _line(step: int, loss: Loss, skipped: int, sam: SAM | None, seconds: float, waited: float) -> dict:
    line = {"step": step, **{name: value.item() for name, value in loss._asdict().items()}, "skipped": skipped}
    if sam is not None:
        line |= sam.logged()
    return line | {"seconds": seconds, "seconds_waiting_for_data": waited}


def _record(config: Path, run: Train, net: GradICON, step: int) -> None:
    """Parameters and provenance, once; a training that goes on from a checkpoint adds where it did."""
    there = json.loads(config.read_text()) if step and config.exists() else {}
    if not there:
        write_json(config, {"parameters": as_dict(run), "network": net.settings, "provenance": provenance()})
    elif step < run.steps:
        resumed = [*there.get("resumed", []), {"step": step} | provenance()]
        write_json(config, there | {"parameters": as_dict(run), "resumed": resumed})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, however that ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {folder}: wait for it or end it") from None
        yield


def _refuse_another(config: Path, run: Train) -> None:
    """A folder holds one training: going on with other parameters would mix two."""
    if not config.exists():
        return
    old, new = ADDED | json.loads(config.read_text())["parameters"], as_dict(run)
    where = ("out", "data", "save_memory", "threads")  # may differ: the same training at another place
    differing = [f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in new if k not in where and old.get(k) != new[k]]
    if differing:
        raise ConfigError(
            f"{config.parent} holds a training with other parameters:\n- "
            + "\n- ".join(differing)
            + "\ndelete the folder to train anew, or choose another `out`"
        )


def _checkpoint(
    folder: Path, net: GradICON, optimizer, sam: SAM | None, step: int, history: list, skipped: int, in_a_row: int
) -> None:
    counts = {"step": step, "skipped": skipped, "in_a_row": in_a_row}
    with written_whole(folder / "checkpoint.pt") as partial:
        states = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "sam": sam and sam.state_dict()}
        torch.save(counts | states | {"history": history}, partial)


def _resume(folder: Path, net: GradICON, optimizer, sam: SAM | None) -> tuple[int, list[dict], int, int]:
    """Step, history, skipped steps and those in a row to go on from; fills net, optimizer and sam."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, [], 0, 0
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it to train from the start") from error
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    if sam is not None:
        sam.load_state_dict(state["sam"])
    return state["step"], state["history"], state["skipped"], state["in_a_row"]
