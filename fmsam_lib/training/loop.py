"""One training step, the loop around it, and checkpoints that survive a kill.

Several processes: `python -m fmsam_lib.training` is what each of them runs (see `parallel.launch`).
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON, give_back_memory
from fmsam_lib.model.weights import load
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Train
from fmsam_lib.training import checkpoint
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.augmentation import augment
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.losses import Batch, Loss, jittered_points, objective
from fmsam_lib.training.sam import SAM, rho_beside_lr

LOG_EVERY = 10


CHECKPOINT_EVERY = 50


VALIDATE_EVERY = 100


AHEAD = 2  # batches made while the network computes


GIVE_UP_AFTER = 10  # non-finite steps in a row


def train(net: GradICON, dataset, run: Train, *, progress: bool = True) -> list[dict]:
    """Train `net` on `dataset` into the folder `run.out`; returns the logged steps.

    Writes there: `config.json`, `history.jsonl` (a line per logged step), `train.log` (the same to read),
    `checkpoint.pt` (to go on from after a kill), `snapshots/` of the weights (`run.snapshots` of them, one vector
    each) and, at the end, `weights.pt` and, of the highest Dice on the validation pairs, `best.pt`. A training that
    was interrupted goes on from its checkpoint to the same weights, bit for bit, since every step's batch depends on
    `run.seed` and the step alone; one that is done is not repeated.

    With `run.processes` above 1, that many are started on this machine; each begins with `starting(run)` and opens
    `run.train_domain` itself, and `net` receives the result.

    Raises: ConfigError where the folder holds a training with other parameters; FloatingPointError
    when the loss or its gradient stays non-finite; RuntimeError when one of several processes fails.
    """
    folder = Path(run.out)
    if run.processes != parallel.count():
        parallel.launch(run)
        net.load_state_dict(load(folder / "weights.pt").state_dict())
        net.eval().shape = tuple(run.shape)
        return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    torch.set_num_threads(run.threads)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone(folder):
        return _train(net, dataset, run, folder, progress and parallel.rank() == 0)


def _train(net: GradICON, dataset, run: Train, folder: Path, progress: bool) -> list[dict]:
    first = parallel.rank() == 0
    device = device_of(run)
    if run.first_stage and not net.settings["last_step"]:
        raise ConfigError("expected a network with a last step, which first_stage leaves out, got one without")
    net.to(device).train()
    net.shape, net.save_memory, net.precision = tuple(run.shape), run.save_memory, run.precision
    if run.save_memory:
        give_back_memory()
    if run.processes > 1:
        parallel.share_batch_norm(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=run.lr)
    sam = perturbation(net, run)
    state = checkpoint.resume(folder, net, optimizer, sam, run)
    validation = [dataset.validation_pair(i) for i in range(min(run.validation, dataset.validation_count))]
    snapshots = snapshot_steps(run)
    if first:
        checkpoint.record(folder / "config.json", run, net, state.step)
        checkpoint.write_history(folder, run, state)
    batches = ahead(lambda step: make_batches(dataset, run, step), range(state.step, run.updates))
    logged, clock, waited = state.step, time.perf_counter(), 0.0
    label = f"{run.train_domain} {run.optimizer}"
    with (
        closing(batches),
        tqdm(total=run.updates, initial=state.step, disable=not progress, desc=label, unit="step") as bar,
    ):
        while state.step < run.updates:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, run)
            for group in sam.groups if sam is not None and run.rho_schedule == "lr" else []:
                group["rho"] = rho_beside_lr(learning_rate(state.step, run), run.lr, run.rho)
            net.first_stage = state.step < run.stages[0]
            start = time.perf_counter()
            micro = next(batches)
            waited += time.perf_counter() - start
            loss = train_step(net, [batch.to(device) for batch in micro], run, optimizer, sam, state)
            if state.in_a_row == GIVE_UP_AFTER:
                raise FloatingPointError(
                    f"loss or gradient not finite {state.in_a_row} steps in a row, up to step {state.step}: "
                    f"try a smaller lr ({run.lr}) or rho ({run.rho})"
                )
            state.step += 1
            last = state.step == run.updates
            bar.update()
            dice = math.nan
            if validation and (state.step % VALIDATE_EVERY == 0 or last):
                dice = validate(net, validation)
                better = not math.isnan(dice) and (state.best is None or dice > state.best["dice"])
                if better and not net.first_stage:
                    weights = {name: value.cpu().clone() for name, value in net.state_dict().items()}
                    state.best = {"step": state.step, "dice": dice, "net": weights}
            if state.step % LOG_EVERY == 0 or last:
                steps = state.step - logged
                times = {"seconds": (time.perf_counter() - clock) / steps, "seconds_waiting_for_data": waited / steps}
                state.history.append(checkpoint.line_of(state, loss, dice, optimizer, sam) | times)
                logged, clock, waited = state.step, time.perf_counter(), 0.0
                if first:
                    checkpoint.append_history(folder, run, state)
                bar.set_postfix_str(checkpoint.in_words(state.history))
            if first and state.step in snapshots:
                checkpoint.snapshot(folder, net, state.step)
            if first and (state.step % CHECKPOINT_EVERY == 0 or last):
                checkpoint.save(folder, net, optimizer, sam, run, state)
    net.first_stage = False
    net.eval().to("cpu")
    if first:
        checkpoint.save_best(folder, net, state)
        net.save(folder / "weights.pt")  # last: it says that the training is done
    return state.history


def snapshot_steps(run: Train) -> set[int]:
    """After which steps the weights are kept: `run.snapshots` times, evenly, the last time at the end."""
    return {round(run.updates * (i + 1) / run.snapshots) for i in range(run.snapshots)}


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


def device_of(run: Train) -> torch.device:
    """The processor or this process's GPU; "auto" takes GPUs where there is one for every process.

    Raises ConfigError where "cuda" finds too few.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if run.device == "cuda" and gpus < run.processes:
        raise ConfigError(
            f"expected a GPU for each process, {run.processes}, torch finds {gpus}: choose 'cpu' or 'auto'"
        )
    on_gpu = run.device != "cpu" and gpus >= run.processes
    return torch.device("cuda", parallel.rank()) if on_gpu else torch.device("cpu")


def perturbation(net: GradICON, run: Train) -> SAM | None:
    """What `run.optimizer` puts beside Adam: nothing, SAM, or one of its variants (see `sam.py`)."""
    options = {
        "adam": None,
        "adam-2x": None,
        "sam": {},
        "asam": {"adaptive": True},
        "sam-every": {"every": run.every},
        "looksam": {"every": run.every, "alpha": run.alpha},
        "random": {"random_seed": run.seed},
    }[run.optimizer]
    return None if options is None else SAM(net.parameters(), run.rho, net=net, **options)


def train_step(net: GradICON, micro: list[Batch], run: Train, optimizer, sam: SAM | None, state: State) -> Loss:
    """One update; the loss at w. Where something is not finite, weights and buffers stay, and `state` counts it.

    micro: the parts of the batch, one after the other; the gradient is that of their mean, and of all processes'.
    """
    buffers = [buffer.clone() for buffer in net.buffers()]
    climbs = sam is not None and sam.due
    loss, finite = gradient(net, micro, run, optimizer, state, share=not climbs or run.sync_climb)  # at w
    if finite and climbs:
        with sam.perturbed():  # at w + eps: the worst weights within rho
            there, finite = gradient(net, micro, run, optimizer, state)  # this one is what moves w
        sam.rise = there.total - loss.total
    elif finite and sam is not None:
        sam.between()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    finite = finite and bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
    if finite:
        if run.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), run.clip)
        optimizer.step()
    else:
        for buffer, value in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(value)  # BatchNorm's running statistics have seen what is not finite
    state.skipped, state.in_a_row = (state.skipped, 0) if finite else (state.skipped + 1, state.in_a_row + 1)
    if run.precision == "fp16":
        rescale(state, finite)
    return loss


def gradient(net, micro: list[Batch], run: Train, optimizer, state: State, *, share: bool = True) -> tuple[Loss, bool]:
    """Fill `.grad` at the weights where the network stands; the loss there, and whether it was finite.

    share: average over the processes. Where SAM's first pass does not (`run.sync_climb` is False), each climbs by
    its own part of the batch: m-sharpness (Foret et al. 2021), another objective than SAM's of the whole batch.
    (BatchNorm's statistics are shared even then, so that a little of the other parts comes in by them.)
    """
    optimizer.zero_grad()
    scale = state.scale if run.precision == "fp16" else 1.0
    losses, finite = [], True
    for batch in micro:
        loss = objective(net, batch, joint=run.joint, **run.loss())
        losses.append(torch.stack([part.detach() for part in loss]))
        # Going back through NaN, torch's 2-D grid_sample crashes.
        finite = parallel.all_agree(bool(torch.isfinite(loss.total)), loss.total.device)
        if not finite:
            break
        (loss.total * (scale / len(micro))).backward()
    state.gradients += 1
    mean = torch.stack(losses).mean(0)
    parallel.average([mean])
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if finite and scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
    if finite and share:
        parallel.average(gradients)
    return Loss(*mean), finite


def rescale(state: State, finite: bool) -> None:
    """Halve the factor of the loss after an overflow, double it after 2,000 good steps, as torch's GradScaler does.

    fp16 loses gradients below 6e-8 (Micikevicius et al. 2018, arXiv 1710.03740). GradScaler itself unscales once an
    update, where SAM has two passes.
    """
    state.scaled_well = state.scaled_well + 1 if finite else 0
    if not finite:
        state.scale /= 2
    elif state.scaled_well == 2000:
        state.scale, state.scaled_well = state.scale * 2, 0


def make_batches(dataset, run: Train, step: int) -> list[Batch]:
    """This process's part of a step's batch, cut into micro-batches.

    Depends on the seed and the step alone, so that a resumed training sees the same.
    """
    number = run.seed * 1_000_003 + step
    own = run.batch // run.processes
    size = own // run.accumulate
    first = number * run.batch + parallel.rank() * own
    images = [_images(dataset.training_pair(i), run, i) for i in range(first, first + own)]
    points = jittered_points(tuple(run.shape), torch.Generator().manual_seed(number))
    moving, fixed = (torch.stack(part).split(size) for part in zip(*images, strict=True))
    return [Batch(m, f, points) for m, f in zip(moving, fixed, strict=True)]


def _images(pair: Pair, run: Train, index: int) -> tuple[Tensor, Tensor]:
    if not run.augment:
        return pair.moving, pair.fixed
    return augment(pair.moving, pair.fixed, torch.Generator().manual_seed(index))


def ahead(make: Callable[[int], list[Batch]], steps: range) -> Iterator[list[Batch]]:
    """`make(step)` of every step, the next ones already at work in a thread of their own."""
    with ThreadPoolExecutor(1, "batches") as pool:
        pending = deque(pool.submit(make, step) for step in steps[:AHEAD])
        try:
            for step in steps:
                batch = pending.popleft().result()
                if step + AHEAD in steps:
                    pending.append(pool.submit(make, step + AHEAD))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


@torch.no_grad()
def validate(net: GradICON, pairs: list[Pair]) -> float:
    """Mean Dice over the pairs that have labels, NaN where none has; the network stays as it is."""
    net.eval()
    device = next(net.parameters()).device
    phis = [net(pair.moving[None].to(device), pair.fixed[None].to(device)).map.cpu() for pair in pairs]
    net.train()
    values = [mean_dice(pair, phi) for pair, phi in zip(pairs, phis, strict=True)]
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def learning_rate(step: int, run: Train) -> float:
    """Constant (as uniGradICON's), or from `run.lr` to 0 along half a cosine (Loshchilov & Hutter 2017, 1608.03983)."""
    if run.lr_schedule == "constant":
        return run.lr
    return run.lr * 0.5 * (1 + math.cos(math.pi * step / run.updates))
