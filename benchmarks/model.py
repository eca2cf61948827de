"""How fast the registration model is beside its peers, icon-registration with unigradicon, and MONAI's LNCC.

    python benchmarks/model.py

Writes benchmarks/model.csv, in 8 minutes on two quiet cores. All that is compared takes turns in one run with two
threads; values are medians. Steps and inferences of the full network run in processes of their own, each with its own
peak of memory. Both compute the same numbers (tests/model/test_network_peer.py), but for BatchNorm's statistics in
training, which ours takes over both directions in one batch; the row "directions apart" is without that.
"""

import json
import resource
import subprocess
import sys
import time

import pandas as pd
import peers
import torch
from recording import alternating, record
from torch import nn

from fmsam_lib.model.network import CHANNELS_LAST, GradICON, give_back_memory
from fmsam_lib.model.weights import UNIGRADICON, from_icon
from fmsam_lib.training.losses import Batch, jittered_points, lncc_loss, objective

THREADS = 2
SMALL = {"down": (16, 32, 64), "up": (16, 32, 64), "levels": 3, "last_step": True}
SMALL_SHAPE = (48, 64, 48)
FULL = {**UNIGRADICON, "last_step": True}
STEP_SIDE, INFERENCE_SIDE = 96, 175


def networks(shape, settings):
    """The peer's module with random weights and our network with the same."""
    theirs = peers.network(len(shape), **settings)
    peers.randomise(theirs)
    similarity = peers.icon_registration().LNCC(sigma=5)
    return peers.with_loss(theirs, shape, lmbda=1.5, similarity=similarity), from_icon(theirs.state_dict())


def peer_step(module, moving, fixed):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-5)
    module.train()

    def step():
        optimizer.zero_grad()
        module(moving, fixed).all_loss.backward()
        optimizer.step()

    return step


def our_step(net, moving, fixed, *, joint=True):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    net.train()

    def step():
        optimizer.zero_grad()
        points = jittered_points(tuple(fixed.shape[2:]), torch.Generator())
        objective(net, Batch(moving, fixed, points), lmbda=1.5, sigma=5, joint=joint).total.backward()
        optimizer.step()

    return step


def convolutions(net: GradICON, shape, layout):
    """All convolutions of one step of `net`, both directions, forward and backward, and nothing else."""
    calls = []
    modules = [module for module in net.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)]
    hooks = [module.register_forward_pre_hook(lambda m, x: calls.append((m, x[0].shape))) for module in modules]
    images = torch.rand(2, 1, *shape)
    net(images, images)
    for hook in hooks:
        hook.remove()
    # `last` is not called as a module: it takes the finest decoded channels at its step's resolution
    for unet, scale in zip(net.steps, net.scales, strict=True):
        side = [-(-n // 2**scale) for n in shape]
        calls.append((unet.last, (2, unet.last.in_channels, *side)))
    assert {module for module, _ in calls} == set(modules)
    inputs = [torch.rand(shape).contiguous(memory_format=layout) for _, shape in calls]
    for (_, shape), x in zip(calls, inputs, strict=True):
        x.requires_grad_(shape[1] != 2)  # the images themselves need no gradient

    def run():
        for (module, _), x in zip(calls, inputs, strict=True):
            y = module(x)
            y.backward(torch.ones_like(y))

    return run


def lncc_rows() -> list[dict]:
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    a, b = torch.rand(2, 2, 1, 64, 64, 64)
    a.requires_grad_()
    icon = peers.icon_registration().LNCC(sigma=5)
    monai = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=21, kernel_type="gaussian")
    assert torch.isclose(icon(a, b), lncc_loss(a, b, sigma=5), rtol=1e-4)
    seconds = alternating(
        9,
        icon=lambda: icon(a, b).backward(),
        monai=lambda: monai(a, b).backward(),
        ours=lambda: lncc_loss(a, b, sigma=5).backward(),
    )
    name = "LNCC, 2 x 1 x 64^3, forward and backward: time"
    return [
        ratio(f"{name} / icon-registration's", seconds["ours"], seconds["icon"], 0.10, "s"),
        ratio(f"{name} / MONAI's", seconds["ours"], seconds["monai"], 0.35, "s"),
    ]


def small_rows() -> list[dict]:
    module, net = networks(SMALL_SHAPE, SMALL)
    apart = networks(SMALL_SHAPE, SMALL)[1]
    moving, fixed = torch.rand(2, 1, 1, *SMALL_SHAPE)
    seconds = alternating(
        11,
        peer=peer_step(module, moving, fixed),
        ours=our_step(net, moving, fixed),
        apart=our_step(apart, moving, fixed, joint=False),
        floor=convolutions(net, SMALL_SHAPE, torch.contiguous_format),
        floor_last=convolutions(net, SMALL_SHAPE, CHANNELS_LAST[3]),
    )
    name = f"training step, 3 levels and last step of (16, 32, 64), {'x'.join(map(str, SMALL_SHAPE))}: time"
    ours = seconds["ours"]
    return [
        ratio(f"{name} / peer's", ours, seconds["peer"], 0.50, "s"),
        ratio(f"{name}, directions apart / peer's", seconds["apart"], seconds["peer"], None, "s"),
        ratio(f"{name} / its convolutions alone, in torch's default layout", ours, seconds["floor"], 1.35, "s"),
        ratio(f"{name} / its convolutions alone, channels last", ours, seconds["floor_last"], 1.5, "s"),
    ]


def full_rows() -> list[dict]:
    rounds = 3
    runs = {call: [] for call in ("step peer", "step ours", "step saving", "inference peer", "inference ours")}
    for _ in range(rounds):
        for call, results in runs.items():
            command = [sys.executable, __file__, *call.split()]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    median = {call: pd.DataFrame(results).median() for call, results in runs.items()}

    def rows(name, ours, peer, reach):
        return [
            ratio(f"{name}: {what} / peer's", median[ours][key], median[peer][key], reach and reach[key], unit)
            for what, key, unit in (("time", "seconds", "s"), ("peak memory", "gib", "GiB"))
        ]

    step, inference = f"training step, full network, {STEP_SIDE}^3", f"inference, full network, {INFERENCE_SIDE}^3"
    return [
        *rows(f"{step}, save_memory", "step saving", "step peer", {"seconds": 0.65, "gib": 0.70}),
        *rows(f"{step}", "step ours", "step peer", None),
        *rows(inference, "inference ours", "inference peer", {"seconds": 0.70, "gib": 0.70}),
    ]


def alone(what: str, who: str) -> dict:
    """Seconds of one step or inference after one to warm up, and the peak memory of the whole process, in GiB."""
    shape = ((STEP_SIDE if what == "step" else INFERENCE_SIDE),) * 3
    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 1, 1, *shape)
    module, net = networks(shape, FULL)
    if who == "peer":
        del net
        call = peer_step(module, moving, fixed) if what == "step" else peer_map(module.eval(), moving, fixed)
    else:
        del module
        if who == "saving":
            net.save_memory = True
            give_back_memory()
        call = our_step(net, moving, fixed) if what == "step" else our_map(net.eval(), moving, fixed)
    call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def peer_map(module, moving, fixed):
    return torch.no_grad()(lambda: module.regis_net(moving, fixed)(module.identity_map))


def our_map(net, moving, fixed):
    return torch.no_grad()(lambda: net(moving, fixed).map)


def ratio(figure: str, ours: float, other: float, reach: float | None, unit: str) -> dict:
    return {
        "figure": figure,
        "value": ours / other,
        "reach": f"<= {reach}" if reach else "",
        "unit": "ratio",
        "ours": ours,
        "other": other,
        "measured_in": unit,
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    if len(sys.argv) == 3:
        print(json.dumps(alone(*sys.argv[1:])))
        return
    versions = {name: peers.version(name) for name in ("monai", "icon-registration", "unigradicon")}
    record([*lncc_rows(), *small_rows(), *full_rows()], __file__, threads=THREADS, **versions)


if __name__ == "__main__":
    main()
