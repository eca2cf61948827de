"""One training step, the loop around it, and checkpoints that survive a kill."""

import json
import math
import pickle
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fmsam_lib.config import ConfigError, Train, as_dict, provenance, write_json, written_whole
from fmsam_lib.losses import Batch, Loss, jittered_points, objective
from fmsam_lib.network import GradICON
from fmsam_lib.sam import SAM

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
    _refuse_another(folder / "config.json", run)
    write_json(folder / "config.json", {"parameters": as_dict(run), "provenance": provenance()})
    optimizer = torch.optim.Adam(net.parameters(), lr=run.lr)
    sam = SAM(net.parameters(), run.rho, adaptive=run.optimizer == "asam", net=net) if run.optimizer != "adam" else None

    step, history, skipped = _resume(folder, net, optimizer)
    net.train()
    bar = tqdm(
        total=run.steps, initial=step, disable=not progress, desc=f"{run.train_domain} {run.optimizer}", unit="step"
    )
    with open(folder / "history.jsonl", "w") as log:
        log.writelines(json.dumps(line) + "\n" for line in history)
        while step < run.steps:
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, run)
            start = time.perf_counter()
            batch = make_batch(dataset, run, step)
            waited = time.perf_counter() - start
            loss, finite = train_step(net, batch, run, optimizer, sam)
            skipped = 0 if finite else skipped + 1
            if skipped == GIVE_UP_AFTER:
                raise FloatingPointError(
                    f"loss or gradient not finite {skipped} steps in a row, up to step {step}: "
                    f"try a smaller lr ({run.lr}) or rho ({run.rho})"
                )
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == run.steps:
                seconds = time.perf_counter() - start
                history.append(_line(step, loss, finite, sam, seconds, waited))
                log.write(json.dumps(history[-1]) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{history[-1]['total']:.3f}")
            if step % CHECKPOINT_EVERY == 0 or step == run.steps:
                _checkpoint(folder, net, optimizer, step, history, skipped)
    bar.close()
    net.eval()
    net.save(folder / "weights.pt")
    return history


def untrained(run: Train) -> GradICON:
    """The network that `run` starts from: its random weights depend on the seed alone."""
    torch.manual_seed(run.seed)
    return GradICON(len(run.shape), down=tuple(run.down), levels=run.levels, last_step=run.last_step)


def train_step(net: GradICON, batch: Batch, run: Train, optimizer, sam: SAM | None) -> tuple[Loss, bool]:
    """One update; the loss at w, and whether all was finite (when not, the weights stay as they are)."""
    optimizer.zero_grad()
    loss = objective(net, batch, lmbda=run.lmbda, sigma=run.sigma)
    if not backward(loss):  # gradient at w
        return loss, False
    if sam is not None:
        with sam.perturbed():  # at w + eps: the worst weights within rho
            optimizer.zero_grad()
            if not backward(objective(net, batch, lmbda=run.lmbda, sigma=run.sigma)):  # its gradient moves w
                return loss, False
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    finite = all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients))
    if finite:
        optimizer.step()
    return loss, finite


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


def _line(step: int, loss: Loss, finite: bool, sam: SAM | None, seconds: float, waited: float) -> dict:
    line = {"step": step, **{name: value.item() for name, value in loss._asdict().items()}, "finite": finite}
    if sam is not None:
        line |= {"gradient_norm": sam.gradient_norm, "step_norm": sam.step_norm}
    return line | {"seconds": seconds, "seconds_waiting_for_data": waited}


def _refuse_another(config: Path, run: Train) -> None:
    """A folder holds one training: going on with other parameters would mix two."""
    if not config.exists():
        return
    old, new = json.loads(config.read_text())["parameters"], as_dict(run)
    where = ("out", "data", "threads")  # may differ: the same training at another place
    differing = [f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in new if k not in where and old.get(k) != new[k]]
    if differing:
        raise ConfigError(
            f"{config.parent} holds a training with other parameters:\n- "
            + "\n- ".join(differing)
            + "\ndelete the folder to train anew, or choose another `out`"
        )


def _checkpoint(folder: Path, net: GradICON, optimizer, step: int, history: list[dict], skipped: int) -> None:
    with written_whole(folder / "checkpoint.pt") as partial:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "skipped": skipped}
        torch.save(state | {"history": history}, partial)


def _resume(folder: Path, net: GradICON, optimizer) -> tuple[int, list[dict], int]:
    """Step, history and skipped steps to go on from; the checkpoint's state is put into net and optimizer."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, [], 0
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it to train from the start") from error
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["history"], state["skipped"]
