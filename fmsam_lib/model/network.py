"""The multi-step GradICON network: coarse to fine, each step refines the map of those before it.

Architecture of GradICON (Tian et al. 2023, arXiv 2206.05897) as uniGradICON uses it (Tian et al. 2024,
arXiv 2403.05780), of any width, depth and number of levels, in 2-D and 3-D.
"""

import ctypes
import functools
import itertools
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmsam_lib.model.spatial import look_up
from fmsam_lib.model.transform import LINEAR, Transform
from fmsam_lib.records import warn_once, written_whole

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONAL_CONV = {2: F.conv2d, 3: F.conv3d}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
Channels = tuple[int, ...]
SLAB = 8  # planes at half resolution: small enough to stay in a processor's cache, large enough to fill it
GPU_SLAB = 16  # each costs a GPU launches; memory grows with it. benchmarks/gpu.py tries several


class UNet(nn.Module):
    """One step: from moving and fixed `(N, 1, *S)` to a displacement `(N, D, *S)` in unit coordinates.

    Residuals pass by average pooling on the way down and by linear upsampling on the way up; the last
    convolution starts at zero, so an untrained network is the identity.

    down: channels after each halving. up: channels after each doubling, from the finest.
    """

    def __init__(self, dim: int, down: Channels, up: Channels):
        super().__init__()
        self.dim = dim
        above = (*up[1:], 0)  # what comes up from the next coarser depth, beside its skip
        self.down = nn.ModuleList(CONV[dim](i, o, 3, padding=1, stride=2) for i, o in itertools.pairwise((2, *down)))
        self.up = nn.ModuleList(
            getattr(nn, f"ConvTranspose{dim}d")(skip + coarse, out, kernel_size=4, padding=1, stride=2)
            for skip, coarse, out in zip(down, above, up, strict=True)
        )
        self.norm = nn.ModuleList(getattr(nn, f"BatchNorm{dim}d")(out) for out in up)
        self.last = CONV[dim](2 + up[0], dim, kernel_size=3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        # In channels-last layout convolutions and upsampling are quickest, BatchNorm and concatenation too, but
        # only where no slice breaks it.
        x = torch.cat([moving, fixed], 1).contiguous(memory_format=CHANNELS_LAST[self.dim])
        skips = []
        for conv in self.down:
            skips.append(x)
            y = conv(F.leaky_relu(x))
            x = y.add_(fit_channels(halve(x), y.shape[1]))
        for depth in reversed(range(1, len(self.up))):
            x = self.ascend(depth, x, skips[depth])
        if self.training or torch.is_grad_enabled():
            return self.finish(x, skips[0])
        # The finest depth holds most of the memory. Without statistics to gather or gradients to keep it is made
        # slab by slab along the first axis, one plane more on either side for the kernels' reach.
        slabs, planes = [], SLAB if x.device.type == "cpu" else GPU_SLAB
        for start in range(0, x.shape[2], planes):
            first, end = max(start - 1, 0), start + planes + 1
            slab = self.finish(x[:, :, first:end], skips[0][:, :, 2 * first : 2 * end])
            slabs.append(slab[:, :, 2 * (start - first) :][:, :, : 2 * planes])
        return torch.cat(slabs, 2)

    def ascend(self, depth: int, x: Tensor, skip: Tensor) -> Tensor:
        """From `x` at `depth` to twice its resolution, beside its `skip`."""
        y = self.up[depth](F.leaky_relu(x))
        coarse = fit_channels(x, y.shape[1]).contiguous(memory_format=CHANNELS_LAST[self.dim])
        x = self.norm[depth](y.add_(doubled(coarse)))
        keep_layout(x)
        x = x[:, :, *[slice(0, n) for n in skip.shape[2:]]]  # odd sizes come back one too large
        return torch.cat([x, skip], 1)

    def finish(self, x: Tensor, skip: Tensor) -> Tensor:
        """The finest depth, and the displacement: `last` convolved in a way that is quicker for so few channels.

        On a processor the kernel's three taps along the first axis become channels of one convolution that is flat
        along that axis, and are added up afterwards, each from its neighbouring plane.
        """
        weight, bias = self.last.parameters()
        flat = [0, 0] * (self.dim - 1)
        if x.is_cuda:  # whose matrix units take channels by eights only: empty ones beside its own
            spare = [*flat, 0, 0, 0, -self.last.in_channels % 8]
            wide = F.pad(weight, [*spare, 0, -self.dim % 8])
            y = FUNCTIONAL_CONV[self.dim](self.ascend(0, x, F.pad(skip, spare)), wide, padding=1)[:, : self.dim]
        else:
            x = self.ascend(0, x, skip)
            taps = weight.movedim(2, 0).flatten(0, 1).unsqueeze(2)
            taps = FUNCTIONAL_CONV[self.dim](x, taps, padding=(0, *[1] * (self.dim - 1)))
            before, here, after = keep_layout(taps).chunk(3, 1)
            y = F.pad(before[:, :, :-1], [*flat, 1, 0]) + here + F.pad(after[:, :, 1:], [*flat, 0, 1])
        return (y + bias.view(1, -1, *[1] * self.dim)) / 10


def doubled(x: Tensor) -> Tensor:
    """`x` in channels-last layout, upsampled linearly to twice the size."""
    if not (x.is_cuda and torch.is_grad_enabled()):
        return F.interpolate(x, scale_factor=2, mode=LINEAR[x.dim() - 2])
    # A GPU's own kernel takes neither that layout nor, under autocast, half precision; its way back adds in any order.
    x = x.movedim(1, -1)
    for axis in range(1, x.dim() - 1):
        shape, band = x.shape, halfway_band(x.shape[axis], dtype=x.dtype, device=x.device)
        x = (band @ x.reshape(shape[:axis].numel(), shape[axis], -1)).view(*shape[:axis], -1, *shape[axis + 1 :])
    return x.movedim(-1, 1)


@functools.lru_cache(maxsize=128)
@torch.inference_mode(False)
def halfway_band(n: int, *, dtype, device) -> Tensor:
    """`(2n, n)`: a quarter of a neighbour and three of the nearest sample, the border repeated."""
    return F.interpolate(torch.eye(n)[None], scale_factor=2, mode="linear")[0].mT.contiguous().to(device, dtype)


def keep_layout(x: Tensor) -> Tensor:
    """`x` itself, whose gradient will arrive in channels-last layout."""
    if x.requires_grad:
        layout = CHANNELS_LAST[x.dim() - 2]  # not `x` in the hook, which would hold `x`, and `x` the hook, for ever
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))
    return x


def halve(x: Tensor) -> Tensor:
    """Means of two samples along every axis; an odd one out, or a single one, stays itself."""
    return getattr(F, f"avg_pool{x.dim() - 2}d")(x, [min(2, n) for n in x.shape[2:]], ceil_mode=True)


def fit_channels(x: Tensor, channels: int) -> Tensor:
    """Keep the first `channels` of `x`, or put empty ones before them."""
    missing = channels - x.shape[1]
    if missing <= 0:
        return x[:, :channels]
    return torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), x], 1)


class GradICON(nn.Module):
    """`phi = net(moving, fixed)`: a `Transform` with `moving(phi(x)) ~ fixed(x)`.

    The first step sees the images at `1 / 2^(levels - 1)` of their resolution, every following one at twice
    the resolution of the one before and with the moving image already warped; `last_step` adds one
    more at full resolution (uniGradICON's second stage).

    dim: 2 or 3. down, up: channels of every step's `UNet`; `up` is `down` unless given.

    With `net.save_memory = True` every step but the last computes its activations a second time on the way
    back instead of keeping them: the same gradients for a sixth more time. With `net.precision` "bf16" or "fp16" the
    steps' U-Nets compute in half precision (autocast); weights, maps and the loss stay in float32. With
    `net.first_stage = True` the last step is left out, as in uniGradICON's first stage. `net.recorded`: while it trains
    on a GPU, `step.Recorded`.
    """

    def __init__(self, dim: int = 3, *, down: Channels, up: Channels | None = None, levels: int = 3, last_step=True):
        super().__init__()
        down = tuple(map(int, down))  # a file would not hold numpy's
        up = down if up is None else tuple(map(int, up))
        if dim not in CONV:
            raise ValueError(f"expected dim 2 or 3, got {dim}")
        if len(up) != len(down) or not up or min(*down, *up, levels) < 1:
            got = f"got levels={levels}, down={down}, up={up}"
            raise ValueError(f"expected levels >= 1 and as many `up` as `down` channels, all positive; {got}")
        self.settings: dict[str, Any] = dict(dim=dim, down=list(down), up=list(up), levels=levels, last_step=last_step)
        self.dim, self.levels = dim, levels
        self.shape: tuple[int, ...] | None = None  # the grid that it was trained on
        self.about: dict[str, Any] = {}  # what goes with its weights: see `training.seen` and `weights.golden`
        self.save_memory, self.precision, self.first_stage = False, "float32", False
        self.recorded: Callable[..., Tensor] | None = None
        self.scales = [*reversed(range(levels)), *([0] if last_step else [])]  # halvings before each step
        self.steps = nn.ModuleList(UNet(dim, down, up) for _ in self.scales)

    def forward(self, moving: Tensor, fixed: Tensor) -> Transform:
        """moving, fixed: `(N, 1, *S)` in [0, 1], the same shape, 16 samples or more along each axis."""
        fits = fixed.dim() == self.dim + 2 and fixed.shape[1] == 1 and min(fixed.shape[2:]) >= 16
        if not fits or moving.shape != fixed.shape:
            expected = f"both images of one shape (N, 1, {'X, Y, Z'[: 3 * self.dim - 2]}), at least 16 samples"
            got = f"got {tuple(moving.shape)} and {tuple(fixed.shape)}: resample or pad smaller ones"
            raise ValueError(f"expected {expected} a side, {got}")
        half = HALF.get(self.precision)
        own = torch.float32 if half else next(self.parameters()).dtype
        if not (moving.dtype == fixed.dtype == own or torch.is_autocast_enabled(fixed.device.type)):
            todo = "try net.float()" if own != torch.float32 else "try moving.float() and fixed.float()"
            raise ValueError(f"expected {own} as in the weights, got {moving.dtype}, {fixed.dtype}: {todo}")
        seen = moving.device.type == "cpu" and moving.numel() and not torch.compiler.is_compiling()  # a GPU would wait
        if seen and any(image.min() < -0.5 or image.max() > 1.5 for image in (moving, fixed)):
            warn_once("a network expects images in [0, 1], and got values far beyond: scale them, or nothing fits")
        pyramid = [(moving, fixed)]
        for _ in range(self.levels - 1):
            pyramid.append((halve(pyramid[-1][0]), halve(pyramid[-1][1])))
        phi, steps = Transform(fixed.shape[2:]), len(self.steps) - self.first_stage
        for i, (unet, scale) in enumerate(zip(self.steps[:steps], self.scales[:steps], strict=True)):
            coarse_moving, coarse_fixed = pyramid[scale]
            if phi.fields:
                coarse_moving = look_up(coarse_moving, phi.grid(coarse_fixed.shape[2:]))
            compute = torch.autocast(moving.device.type, half)(unet.__call__) if half else unet
            if self.save_memory and torch.is_grad_enabled() and i < steps - 1:
                compute = functools.partial(computed_twice, compute, unet)
            phi = phi.then(compute(coarse_moving, coarse_fixed).to(own))
        return phi

    @torch.no_grad()
    def map_of(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The map `(1, D, *S)` of two images `(1, *S)`, on the CPU, wherever the network is."""
        device = next(self.parameters()).device
        return self(moving[None].to(device), fixed[None].to(device)).map.cpu()

    def save(self, path: Path | str, *, half: bool = False) -> None:
        """Settings, weights and training grid in one file, written whole or not at all; `weights.load` reads it.

        half: the parameters in half precision, for a file of half the size; BatchNorm's statistics stay as they are.
        """
        kept, parameters = self.state_dict(), dict(self.named_parameters())
        weights = {name: value.half() if half and name in parameters else value for name, value in kept.items()}
        rounded = half and any(bool((value != kept[name]).any()) for name, value in weights.items())
        saved = {"settings": self.settings, "weights": weights, "shape": self.shape and [*map(int, self.shape)]}
        read = self.about.get("norm", norm := self.norm())  # of the weights that the rest was said of
        about = self.about if math.isclose(read, norm, rel_tol=1e-9) else {}  # else trained on since, in one's own loop
        about = {k: value for k, value in about.items() if k != "norm" and not (rounded and k == "golden")}
        saved |= {"about": about} if about else {}
        with written_whole(path) as partial, open(partial, "wb") as file:
            torch.save(saved, file)  # given a path, it would write that path's name into the file

    def norm(self) -> float:
        """Of all weights and statistics, in double precision: it tells what was trained on from what was read."""
        return math.sqrt(sum(float(t.double().square().sum()) for t in self.state_dict().values()))

    def grid_unlike(self, shape: tuple[int, ...]) -> str:
        """What to say of a grid far from that of the training; empty where it is near, or nobody knows."""
        far = self.shape and max(max(a / b, b / a) for a, b in zip(self.shape, shape, strict=False)) > 1.5
        return f"the network was trained on {tuple(self.shape)} samples" if self.shape and far else ""


def give_back_memory() -> None:
    """Have Linux' C library return freed blocks of 4 MB and more at once, for as long as the process lives.

    It otherwise keeps those up to 32 MB, and a network's many sizes leave holes between them: 0.7 GB in a training step
    of the full network at 96^3.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD


def computed_twice(compute: Callable[..., Tensor], unet: nn.Module, *images: Tensor) -> Tensor:
    """`compute(*images)`, whose activations are computed again on the way back instead of kept."""
    contexts = nullcontext(), BuffersKept(unet)  # of the first time and of the second
    return checkpoint(compute, *images, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


class BuffersKept:
    """Puts a module's buffers back, changed or replaced: a forward pass in training moves BatchNorm's statistics.

    As they are now, by `put_back()`; or around a block, which can be entered again, as going backward twice does.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.__enter__()

    def __enter__(self) -> None:
        self.names = [(part._buffers, dict(part._buffers)) for part in self.module.modules()]
        own = (b for b in self.module.buffers() if b.layout != torch.strided or 0 not in b.squeeze().stride())
        self.saved = [(b, b.detach().clone()) for b in own if not b.is_inference()]  # nobody writes to the others

    @torch.no_grad()
    def put_back(self, *_) -> None:
        for there, before in self.names:
            for name, buffer in before.items():
                there[name] = buffer
        if self.saved:
            for buffer, value in ((b, v) for b, v in self.saved if b.shape != v.shape):
                buffer.resize_as_(value)
            buffers, values = zip(*self.saved, strict=True)
            torch._foreach_copy_(buffers, values)

    __exit__ = put_back
