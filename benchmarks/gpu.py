"""The model on a GPU beside its peer, icon-registration with unigradicon, in one run; what is the same twice.

    python benchmarks/gpu.py                        writes benchmarks/gpu.csv, in some minutes; without a GPU it says so
    python benchmarks/gpu.py --device cpu --small   tries every line in a minute and writes nothing

A step is `step.train_step` of a batch that lies on the GPU already; the peer's is its loss, `backward` and Adam, always
in float32. Peer and ours are built, timed and taken down in turn, twice; times are medians, with the GPU waited for
after each call. Memory is the most that torch had handed out, network and optimizer included.
"""

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import model
import peers
import torch
from recording import record

from fmsam_lib.images.domains import open_domain
from fmsam_lib.model import network
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import UNIGRADICON, load
from fmsam_lib.parameters import Train
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.loop import fit, starting
from fmsam_lib.training.losses import Batch, jittered_points, lncc_loss
from fmsam_lib.training.step import Recorded, perturbation, train_step

FULL = {name: [*value] if isinstance(value, tuple) else value for name, value in UNIGRADICON.items()}
SIZES = {
    "full": {**FULL, "last_step": True}, "step": [(160, (0.25, 0.50)), (96, (0.20, 0.50))], "inference": 175,
    "small": {"down": [16, 32, 64], "up": [16, 32, 64], "levels": 3, "last_step": True},
    "2-D": (64, 64), "3-D": (48, 64, 48), "lncc": [(2, 64, 0.10), (1, 128, 0.07)], "repeats": 6,
}  # fmt: skip
TRIAL = SIZES | {
    "full": {"down": [4, 8], "up": [4, 8], "levels": 2, "last_step": True}, "step": [(32, (0, 0)), (24, (0, 0))],
    "small": {"down": [4, 8], "up": [4, 8], "levels": 2, "last_step": True}, "inference": 40,
    "2-D": (32, 32), "3-D": (24, 24, 24), "lncc": [(2, 24, 0), (1, 32, 0)], "repeats": 1,
}  # fmt: skip

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS has no deterministic kind
SLABS = (128, 32, 8)  # planes at half resolution; the library takes 16

Build = Callable[[], Callable[[], object]]  # makes a network and what goes with it; its result is one call to time


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(builds: dict[str, Build], device: torch.device, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a call and GiB at its peak, by name; one build after the other, twice."""
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    memory = dict.fromkeys(builds, math.nan)
    warm = 3 if device.type == "cuda" else 0
    for _ in range(2 if repeats > 1 else 1):
        for name, build in builds.items():
            torch.manual_seed(0)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # now: what a graph takes when it is recorded, it keeps
            call = build()
            for i in range(warm + repeats):
                wait(device)
                start = time.perf_counter()
                call()
                wait(device)
                if i >= warm:
                    seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            del call
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: (statistics.median(times), memory[name]) for name, times in seconds.items()}


def images(shape, batch: int, device: torch.device):
    return torch.rand(2, batch, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def settings(shape, widths: dict, **more) -> Train:
    return Train(**{"shape": [*shape], "sigma": 5.0, "lmbda": 1.5, "lr": 1e-5, "steps": 1} | widths | more)


def peer_step(shape, widths: dict, batch: int, device: torch.device) -> Callable:
    module = model.networks(tuple(shape), widths)[0].to(device)
    return model.peer_step(module, *images(shape, batch, device))


def training(run: Train, device: torch.device) -> tuple[GradICON, Callable]:
    """A network, and what makes a step of its training on a batch."""
    net = starting(run).to(device).train()
    net.precision, net.save_memory = run.precision, run.save_memory
    optimizer, sam, state = torch.optim.Adam(net.parameters(), lr=run.lr, fused=True), perturbation(net, run), State()
    net.recorded = Recorded(net, run) if device.type == "cuda" else None
    return net, lambda batch: train_step(net, [batch], run, optimizer, sam, state)


def our_step(shape, widths: dict, batch: int, device: torch.device, **more) -> Callable:
    _, step = training(settings(shape, widths, batch=batch, **more), device)
    points = jittered_points(tuple(shape), torch.Generator().manual_seed(0))
    return partial(step, Batch(*images(shape, batch, device), points).to(device))


def inference(shape, widths: dict, device: torch.device, ours: bool, precision: str = "float32") -> Callable:
    theirs, net = model.networks(tuple(shape), widths)
    both = images(shape, 1, device)
    if not ours:
        return model.peer_map(theirs.to(device).eval(), *both)
    net.precision = precision
    return model.our_map(net.to(device).eval(), *both)


def steps(size: dict, device: torch.device) -> list[dict]:
    rows = []
    for side, (seconds, memory) in size["step"]:
        peer, ours = (partial(f, (side,) * 3, size["full"], 1, device) for f in (peer_step, our_step))
        builds: dict[str, Build] = {"peer": peer}
        ways = {name: {"precision": name} for name in ("bf16", "fp16", "float32")}
        ways["bf16, save_memory"] = {"precision": "bf16", "save_memory": True}
        for name, how in ways.items():
            builds[name] = partial(ours, optimizer="adam", **how)
        if side == size["step"][-1][0]:
            builds["sam"] = partial(ours, optimizer="sam")
        found = measure(builds, device, size["repeats"])
        for name in ways:
            reach = (seconds, memory) if "bf16" in name else (None, None)
            for what, unit, at in (("time", "s", 0), ("peak memory", "GiB", 1)):
                figure = f"full step, {side}^3, {name} / peer's float32: {what}"
                rows.append(model.ratio(figure, found[name][at], found["peer"][at], reach[at], unit))
        if "sam" in found:
            rows.append(model.ratio(f"full step, {side}^3: SAM / Adam", found["sam"][0], found["float32"][0], 2.0, "s"))
    return rows


def inferences(size: dict, device: torch.device) -> list[dict]:
    shape, full = (size["inference"],) * 3, size["full"]
    builds: dict[str, Build] = {
        "peer": lambda: inference(shape, full, device, ours=False),
        "float32": lambda: inference(shape, full, device, ours=True),
        "bf16": lambda: inference(shape, full, device, ours=True, precision="bf16"),
    }
    found = measure(builds, device, size["repeats"])
    name, rows = f"inference, {size['inference']}^3", []
    for planes in SLABS:  # which suits a GPU; the first holds the whole volume
        with mock.patch.object(network, "GPU_SLAB", planes):
            seconds, gib = measure({"": builds["float32"]}, device, size["repeats"])[""]
        for what, unit, value in (("time", "s", seconds), ("peak memory", "GiB", gib)):
            rows.append({"figure": f"{name}, slabs of {planes}: {what}", "value": value, "reach": "", "unit": unit})
    return rows + [
        model.ratio(f"{name}, {p} / peer's float32: {what}", found[p][at], found["peer"][at], reach, unit)
        for p, reaches in (("float32", (0.50, 0.45)), ("bf16", (None, None)))
        for at, (what, unit, reach) in enumerate((("time", "s", reaches[0]), ("peak memory", "GiB", reaches[1])))
    ]


def small_steps(size: dict, device: torch.device) -> list[dict]:
    rows = []
    for name, reach in (("2-D", 0.20), ("3-D", 0.25)):
        peer, ours = (partial(f, size[name], size["small"], 4, device) for f in (peer_step, our_step))
        builds: dict[str, Build] = {"peer": peer, "adam": partial(ours, optimizer="adam")}
        builds["sam"] = partial(ours, optimizer="sam")
        found = measure(builds, device, size["repeats"])
        where = f"small {name} step, {'x'.join(map(str, size[name]))}, batch 4"
        rows.append(model.ratio(f"{where} / peer's: time", found["adam"][0], found["peer"][0], reach, "s"))
        rows.append(model.ratio(f"{where}: SAM / Adam", found["sam"][0], found["adam"][0], 2.0, "s"))
        if device.type == "cuda":
            call = ours(optimizer="adam")
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                wait(device)
            kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            rows.append({"figure": f"{where}: kernels and copies", "value": len(kernels), "reach": "", "unit": "count"})
    return rows


def similarities(size: dict, device: torch.device) -> list[dict]:
    rows, icon = [], peers.icon_registration().LNCC(sigma=5)
    for number, side, reach in size["lncc"]:
        a, b = images((side,) * 3, number, device)
        a.requires_grad_()
        builds: dict[str, Build] = {
            "peer": lambda a=a, b=b: lambda: icon(a, b).backward(),
            "ours": lambda a=a, b=b: lambda: lncc_loss(a, b, sigma=5).backward(),
        }
        found = measure(builds, device, size["repeats"])
        figure = f"LNCC, {number} x {side}^3, forward and backward / icon-registration's: time"
        rows.append(model.ratio(figure, found["ours"][0], found["peer"][0], reach, "s"))
    return rows


def twice(size: dict, device: torch.device) -> list[dict]:
    """Which results are the same bytes when computed twice: 1 or 0; nan where torch refuses to try."""

    def trained(name: str, **more) -> torch.Tensor:
        torch.manual_seed(0)
        run = settings(size[name], size["small"], batch=2, lr=1e-3, **{"optimizer": "adam", **more})
        net, step = training(run, device)
        for i in range(5):
            points = jittered_points(tuple(run.shape), torch.Generator().manual_seed(i))
            step(Batch(*images(run.shape, 2, device), points).to(device))
        return torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    def mapped(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        return model.our_map(
            starting(settings(size[name], size["small"])).to(device).eval(), *images(size[name], 1, device)
        )()

    def similar() -> torch.Tensor:
        a, b = images(size["3-D"], 2, device)
        a.requires_grad_()
        lncc_loss(a, b, sigma=5).backward()
        return a.grad

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "LNCC's gradient": similar,
        "a map, 2-D": lambda: mapped("2-D"),
        "a map, 3-D": lambda: mapped("3-D"),
        "five steps of Adam, 2-D": lambda: trained("2-D"),
        "five steps of Adam, 3-D": lambda: trained("3-D"),
        "five steps of Adam, 3-D, bf16": lambda: trained("3-D", precision="bf16"),
        "five steps of SAM, 3-D": lambda: trained("3-D", optimizer="sam"),
    }
    rows = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for name, call in calls.items():
            figure = f"the same bytes twice{', deterministic algorithms' * deterministic}: {name}"
            try:
                value = float(torch.equal(call(), call()))
            except RuntimeError as error:  # an operation has no deterministic kind
                print(f"{figure}: {str(error).splitlines()[0]}")
                value = math.nan
            rows.append({"figure": figure, "value": value, "reach": "", "unit": "1 yes, 0 no"})
    torch.use_deterministic_algorithms(False)
    return rows


def two_processes() -> list[dict]:
    """How far two processes by NCCL lead from one, of the way that the weights went."""
    if torch.cuda.device_count() < 2:
        print(f"GPUs: {torch.cuda.device_count()}. Two processes by NCCL take two, and were not tried.")
        return []
    nets: list[GradICON] = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            run = Train(out=out, processes=processes, device="cuda", optimizer="sam", batch=4, steps=10, validation=0)
            net = starting(run)
            fit(net, open_domain(run.train_domain, shape=tuple(run.shape)), run, progress=False)
            nets.append(load(Path(out) / "weights.pt"))
    one, two, start = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (*nets, starting(run)))
    apart = float((one - two).norm() / (one - start).norm())
    return [
        {"figure": "two processes by NCCL: apart from one / way", "value": apart, "reach": "<= 0.01", "unit": "ratio"}
    ]


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    about.add_argument("--small", action="store_true", help="small sizes; nothing is written")
    given = about.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No GPU that torch can use: nothing was measured, and benchmarks/gpu.csv stays as it is.")
        return
    if given.device == "cpu":
        torch.set_num_threads(1)
    device, size = torch.device(given.device), TRIAL if given.small else SIZES
    rows = [row for part in (similarities, small_steps, inferences, steps, twice) for row in part(size, device)]
    if device.type == "cuda":
        rows += two_processes()
    if given.small or device.type == "cpu":
        print(*(f"{row['figure']}: {row['value']:.3g}" for row in rows), sep="\n")
        return
    versions = {name: peers.version(name) for name in ("icon-registration", "unigradicon")}
    cuda = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    record(rows, __file__, threads=torch.get_num_threads(), **cuda, **versions)


if __name__ == "__main__":
    main()
