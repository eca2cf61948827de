"""A whole training: where it starts, its batches, the loop around the step, its end.

`train` is for scripts; notebook 10 calls its two steps one by one: `starting`, then `fit`.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError, in_project, read
from fmsam_lib.images.domains import opens_again
from fmsam_lib.metrics import mean_dice
from fmsam_lib.model.network import GradICON, give_back_memory
from fmsam_lib.model.weights import load, signed
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Train
from fmsam_lib.records import warn_once
from fmsam_lib.training import checkpoint
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.augmentation import augment, other_scanner
from fmsam_lib.training.averages import Averages
from fmsam_lib.training.losses import Batch, batch_of, jittered_points, with_masks
from fmsam_lib.training.seen import seen
from fmsam_lib.training.step import Recorded, perturbation, train_step

LOG_EVERY, CHECKPOINT_EVERY, VALIDATE_EVERY = 10, 50, 100  # steps
STATISTICS = 50  # of the last steps, whose batches give the averaged weights their BatchNorm's
IDLE = ("adam", "adam-2x", "sam", "asam", "random")  # the optimizers that do not use `every`
AHEAD = 2  # batches made while the network computes, for each thread that makes them
GPU_THREADS = 4  # that make batches: a GPU is quicker than one
GIVE_UP_AFTER = 10  # non-finite steps in a row

Watch = Callable[[checkpoint.State, GradICON], bool]  # sees the training after a step; true to stop it there


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """The training stopped because it was asked to; its checkpoint is written, and the same call goes on from there."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]  # all that a notebook shows


def train(
    domain, *, net: GradICON | None = None, out: Path | str | None = None, progress: bool = True, **options
) -> tuple[GradICON, list[dict]]:
    """Train a network on a domain of `open_domain`; returns it, ready for use, and the history, a dict a logged step.

        net, history = train(open_domain("brain-mr", shape=(64, 64)), optimizer="sam", rho=0.01, steps=400)

    net: the network to train further, in place, BatchNorm in training mode; None: a new one, or that of `weights`.
    out: the run's folder, where a training that was interrupted goes on (see `fit`); None: nothing is kept.
    options: fields of `parameters.Train`, each with its default there; not what the domain and `net` tell.

    Raises: ConfigError for options that cannot be right, or not in several processes; else as `starting` and `fit`.
    """
    if not hasattr(domain, "training_pair"):
        raise ConfigError(f"expected a domain, got {domain!r}: fm.open_domain(name, shape=(64, 64)) opens one")
    given = {"train_domain": domain.name, "shape": domain.shape, "data": getattr(domain, "data", "")}
    given["subjects"] = getattr(domain, "subjects", 0)
    if os.path.isfile(own := os.path.expanduser(str(options.get("weights", "")))):
        options["weights"] = os.path.abspath(own)  # from the current folder, as `out`
    if net is not None:
        if not any(p.requires_grad for p in net.parameters()):
            raise ConfigError("expected weights to train, got all of them frozen: net.requires_grad_() frees them")
        if net.dim != len(domain.shape):
            raise ConfigError(f"expected a {len(domain.shape)}-D network for {domain.name}, got a {net.dim}-D one")
        given |= {"weights": "", **{name: net.settings[name] for name in ("down", "up", "levels", "last_step")}}
    if twice := sorted(given.keys() & options.keys()):
        raise ConfigError(f"expected {', '.join(twice)} from the domain and the network given, got options too")
    kept = out and os.path.abspath(os.path.expanduser(out))  # "" is no folder
    with TemporaryDirectory() if out is None else nullcontext(kept) as folder:
        run = read(Train, options | given | {"out": folder}, source="the options of train")
        if run.optimizer in IDLE and run.every != Train.model_fields["every"].default:
            raise ConfigError("expected optimizer sam-every or looksam with `every`, which others do not use")
        if run.processes > 1 and net is not None:
            raise ConfigError("several processes cannot start from `net`: save it and give the file as `weights`")
        if run.processes > 1 and not opens_again(domain):
            found = f"got one that open_domain({domain.name!r}) does not give with its shape and data and seed 0"
            raise ConfigError(f"each of several processes opens the domain by its name, {found}: train in one process")
        net = starting(run) if net is None else net
        return net, fit(net, domain, run, progress=progress)


def starting(run: Train) -> GradICON:
    """The network that `run` starts from: that of the file `run.weights`, else random ones by the seed (torch's, too).

    Raises: ValueError as `weights.load`; ConfigError where the file's network is 2-D and the run 3-D, or the reverse.
    """
    if not run.weights:
        torch.manual_seed(run.seed)
        up = tuple(run.up) or None
        return GradICON(len(run.shape), down=tuple(run.down), up=up, levels=run.levels, last_step=run.last_step)
    net = load(path if Path(path := in_project(run.weights)).is_file() else run.weights)
    if net.dim != len(run.shape):
        raise ConfigError(f"expected weights of a {len(run.shape)}-D network, got a {net.dim}-D one in {run.weights}")
    return net


def fit(net: GradICON, dataset, run: Train, *, progress: bool = True, watch: Watch | None = None) -> list[dict]:
    """Train `net` on `dataset` into the folder `run.out`; returns the logged steps.

    Writes there what `checkpoint` names and, at the end, `weights.pt`. A training that was interrupted goes on from its
    checkpoint to the same weights, on a CPU bit for bit, since every step's batch depends on `run.seed` and the step
    alone; the steps of one that is done are not repeated.

    With `run.processes` above 1, that many are started on this machine (see `distributed.launch`); each begins with
    `starting(run)` and opens `run.train_domain` itself, and `net` receives the result.

    watch: is called after every step of a single process, with the state and the network in training mode, which it
    leaves as they are.

    Raises: ConfigError where the folder holds a training with other parameters or images; FloatingPointError when the
    loss or its gradient stays non-finite; RuntimeError when one of several processes fails; `Stopped` as `watch` asks.
    """
    folder = Path(run.out)
    if run.processes != parallel.count():
        parallel.launch(run)
        trained = load(folder / "weights.pt")
        net.load_state_dict(trained.state_dict())
        net.eval().shape, net.about = tuple(run.shape), trained.about
        return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with checkpoint.alone(folder):
            return _fit(net, dataset, run, folder, progress and parallel.rank() == 0, watch)
    finally:
        net.eval().first_stage, net.save_memory, net.precision, net.recorded = False, False, "float32", None
        torch.set_num_threads(threads)


def _fit(net: GradICON, dataset, run: Train, folder: Path, progress: bool, watch: Watch | None) -> list[dict]:
    first = parallel.rank() == 0
    device, now = device_of(run), checkpoint.identity(run, dataset, net)
    if run.first_stage and not net.settings["last_step"]:
        raise ConfigError("expected a network with a last step, which first_stage leaves out, got one without")
    net.to(device).train()
    net.save_memory, net.precision = run.save_memory, run.precision
    if run.save_memory:
        give_back_memory()
    if run.processes > 1:
        parallel.share_batch_norm(net)
    optimizer, sam = torch.optim.Adam(net.parameters(), lr=run.lr, fused=True), perturbation(net, run)
    averages = Averages(net, run.updates) if run.averages else None
    parts = {"net": net, "optimizer": optimizer, "sam": sam, "averages": averages}
    state = checkpoint.resume(folder, now, parts)
    net.shape, net.about = tuple(run.shape), {}  # what other weights saw, and answered, is past
    validation = [dataset.validation_pair(i) for i in range(min(run.validation, dataset.validation_count))]
    if first:
        checkpoint.record(folder, run, now, net, state)
    threads = GPU_THREADS if device.type == "cuda" else 1
    net.recorded = Recorded(net, run) if device.type == "cuda" and run.processes == 1 else None
    batches = ahead(lambda step: make_batches(dataset, run, step), range(state.step, run.updates), threads)
    logged, clock, waited, shown = state.step, time.perf_counter(), 0.0, dict[str, float]()  # shown beside the bar
    label = f"{run.train_domain} {run.optimizer}"
    bar = tqdm(total=run.updates, initial=state.step, disable=not progress, desc=label, unit="step")
    with closing(batches), bar:
        while state.step < run.updates:
            lr = learning_rate(state.step, run)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for group in sam.groups if sam and run.rho_schedule == "lr" else []:
                group["rho"] = run.rho * lr / run.lr  # GSAM's rho_t (Zhuang et al. 2022, arXiv 2203.08065)
            net.first_stage = state.step < run.stages[0]
            start = time.perf_counter()
            micro = next(batches)
            waited += time.perf_counter() - start
            loss = train_step(net, [batch.to(device) for batch in micro], run, optimizer, sam, state)
            if state.in_a_row == GIVE_UP_AFTER:
                told = f"loss or gradient not finite {state.in_a_row} steps in a row, up to step {state.step}"
                raise FloatingPointError(f"{told}: try a smaller lr ({run.lr}) or rho ({run.rho})")
            state.step += 1
            if averages is not None:
                averages.follow(net, state.step)
            last = state.step == run.updates
            bar.update()
            validates = validation and (state.step % VALIDATE_EVERY == 0 or last)
            dice = validate(net, validation) if validates else math.nan
            if state.step % LOG_EVERY == 0 or last:
                steps = state.step - logged
                times = {"seconds": (time.perf_counter() - clock) / steps, "seconds_waiting_for_data": waited / steps}
                line: dict[str, Any] = {"step": state.step, **{n: v.item() for n, v in loss._asdict().items()}}
                line |= {"dice": None if math.isnan(dice) else dice, "lr": lr, "gradient_evaluations": state.gradients}
                line |= {"skipped": state.skipped} | (sam.logged() if sam else {}) | times
                state.history.append(line)
                if first and checkpoint.diverged(state.history[0]["total"], line["total"]):
                    warn_once(f"{label}, seed {run.seed}: the loss grew tenfold or more: try a smaller lr ({run.lr})")
                logged, clock, waited = state.step, time.perf_counter(), 0.0
                if first:
                    with open(folder / "history.jsonl", "a", encoding="utf-8") as log:
                        log.write(json.dumps(line) + "\n")
                shown |= {name: line[name] for name in ("total", "dice", "rise", "skipped") if line.get(name)}
                bar.set_postfix(shown)
            if first and state.step in snapshot_steps(run):
                checkpoint.snapshot(folder, net, state.step)
            stop = watch is not None and watch(state, net) and not last
            if first and (state.step % CHECKPOINT_EVERY == 0 or last or stop):
                checkpoint.save(folder, now, parts, state)
            if stop:
                raise Stopped(f"The training stopped after step {state.step} of {run.updates}: run this again to go on")
    net.to("cpu")
    if first:
        numbers = range(numbered(run, 0) * run.batch, numbered(run, run.updates) * run.batch)
        about = {"seen": seen(dataset, numbers)}
        if averages is not None:
            ended = [batch for step in range(run.updates)[-STATISTICS:] for batch in make_batches(dataset, run, step)]
            for name, averaged in averages.networks([(batch.moving, batch.fixed) for batch in ended]).items():
                averaged.shape, averaged.about = net.shape, about | signed(averaged)
                averaged.save(folder / f"weights_{name}.pt")
        checkpoint.record(folder, run, now, net, state)  # the history's lines may not be on the disk yet
        net.about = about | signed(net)
        net.save(folder / "weights.pt")  # last: it says that the training is done
    return state.history


def device_of(run: Train) -> torch.device:
    """The processor or this process's GPU; "auto" takes GPUs where there is one for every process.

    Raises ConfigError where "cuda" finds too few.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if run.device == "cuda" and gpus < run.processes:
        raise ConfigError(f"expected a GPU for each process, {run.processes}, torch finds {gpus}: choose cpu or auto")
    on_gpu = run.device != "cpu" and gpus >= run.processes
    return torch.device(f"cuda:{parallel.rank()}" if on_gpu and run.processes > 1 else "cuda" if on_gpu else "cpu")


def learning_rate(step: int, run: Train) -> float:
    """Constant (as uniGradICON's), or from `run.lr` to 0 along half a cosine (Loshchilov & Hutter 2017, 1608.03983)."""
    share = 0 if run.lr_schedule == "constant" else step / run.updates
    return run.lr * 0.5 * (1 + math.cos(math.pi * share))


def snapshot_steps(run: Train) -> set[int]:
    """After which steps the weights are kept: `run.snapshots` times, evenly, the last time at the end."""
    return {round(run.updates * (i + 1) / run.snapshots) for i in range(run.snapshots)}


def numbered(run: Train, step: int) -> int:
    """The number of a step among those of all seeds; its pairs follow from it."""
    return run.seed * 1_000_003 + step


def make_batches(dataset, run: Train, step: int) -> list[Batch]:
    """This process's part of a step's batch, cut into micro-batches.

    Depends on the seed and the step alone, so that a resumed training sees the same.
    """
    number, own = numbered(run, step), run.batch // run.processes
    numbers = range(number * run.batch, (number + 1) * run.batch)[parallel.rank() * own :][:own]
    images = with_masks([dataset.training_pair(i) for i in numbers])
    generators = [torch.Generator().manual_seed(i) for i in numbers]
    if run.augment:
        images = [augment(*both, generator) for both, generator in zip(images, generators, strict=True)]
    if run.contrast:
        by = zip(images, generators, strict=True)
        images = [(other_scanner(a, run.contrast, g), other_scanner(b, run.contrast, g)) for (a, b), g in by]
    points = jittered_points(tuple(run.shape), torch.Generator().manual_seed(number))
    moving, fixed = (torch.stack(part).split(own // run.accumulate) for part in zip(*images, strict=True))
    return [batch_of(m, f, points) for m, f in zip(moving, fixed, strict=True)]


def ahead(make: Callable[[int], list[Batch]], steps: range, threads: int = 1) -> Generator[list[Batch], None, None]:
    """`make(step)` of every step, the next ones already at work in threads of their own."""
    with ThreadPoolExecutor(threads, "batches") as pool:
        pending = deque(pool.submit(make, step) for step in steps[: AHEAD * threads])
        for step in steps:
            batch = pending.popleft().result()
            if step + AHEAD * threads in steps:
                pending.append(pool.submit(make, step + AHEAD * threads))
            yield batch


def validate(net: GradICON, pairs: list[Pair]) -> float:
    """Mean Dice over the pairs that have labels, NaN where none has; the network stays as it is."""
    net.eval()
    maps = [net.map_of(pair.moving, pair.fixed) for pair in pairs]
    net.train()
    values = [value for value in map(mean_dice, pairs, maps) if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan
