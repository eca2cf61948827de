"""The multi-step GradICON network: coarse to fine, each step refines the map of those before it.

Architecture of GradICON (Tian et al. 2023, arXiv 2206.05897) as uniGradICON uses it (Tian et al. 2024,
arXiv 2403.05780), of any width, depth and number of levels, in 2-D and 3-D.
"""

import itertools
import pickle
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsam_lib.config import written_whole
from fmsam_lib.spatial import identity_map, sample

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVG_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

UNIGRADICON_DOWN = (16, 32, 64, 256, 512)
UNIGRADICON_UP = (16, 32, 64, 128, 256)


class Transform:
    """A map `phi` from the fixed grid into the moving image, kept as the steps' displacement fields.

    `phi(points)` maps any points `(N, D, *P)`, unit coordinates; `phi.map` is phi on the whole fixed
    grid, `(N, D, *S)`. Calling adds the newest step's displacement first, then looks up the older ones.
    """

    def __init__(self, shape: tuple[int, ...], displacements: tuple[Tensor, ...] = ()):
        self.shape = tuple(shape)
        self.displacements = displacements

    def __call__(self, points: Tensor) -> Tensor:
        for displacement in reversed(self.displacements):
            points = points + sample(displacement, points)
        return points

    def on_grid(self, shape: tuple[int, ...]) -> Tensor:
        """phi at every sample of a grid of `shape` over the same field of view, `(N, D, *shape)`."""
        newest, older = self.displacements[-1], self.displacements[:-1]
        points = identity_map(tuple(shape), newest.dtype, newest.device)
        if newest.shape[2:] == tuple(shape):  # the look-up would land on the samples themselves
            return Transform(self.shape, older)(points + newest)
        return self(points.expand(newest.shape[0], *points.shape[1:]))

    @cached_property
    def map(self) -> Tensor:
        return self.on_grid(self.shape)

    def then(self, displacement: Tensor) -> "Transform":
        """One step finer: this transform after `displacement`."""
        return Transform(self.shape, (*self.displacements, displacement))

    def __getitem__(self, batch: slice) -> "Transform":
        """The transforms of some of the batch's pairs."""
        return Transform(self.shape, tuple(u[batch] for u in self.displacements))


class UNet(nn.Module):
    """One step: from moving and fixed `(N, 1, *S)` to a displacement `(N, D, *S)` in unit coordinates.

    Residuals pass by average pooling on the way down and by linear upsampling on the way up; the last
    convolution starts at zero, so an untrained network is the identity.

    down: channels after each halving. up: channels after each doubling, from the finest.
    """

    def __init__(self, dim: int, down: tuple[int, ...], up: tuple[int, ...]):
        super().__init__()
        self.dim = dim
        channels = (2, *down)
        above = (*up[1:], 0)  # what comes up from the next coarser depth, beside its skip
        self.down = nn.ModuleList(
            CONV[dim](i, o, kernel_size=3, padding=1, stride=2) for i, o in itertools.pairwise(channels)
        )
        self.up = nn.ModuleList(
            CONV_TRANSPOSE[dim](skip + coarse, out, kernel_size=4, padding=1, stride=2)
            for skip, coarse, out in zip(down, above, up, strict=True)
        )
        self.norm = nn.ModuleList(BATCH_NORM[dim](out) for out in up)
        self.last = CONV[dim](2 + up[0], dim, kernel_size=3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        # channels last is the layout that CPU convolutions and upsampling are quickest in
        x = torch.cat([moving, fixed], 1).contiguous(memory_format=CHANNELS_LAST[self.dim])
        skips = []
        for conv in self.down:
            skips.append(x)
            y = conv(F.leaky_relu(x))
            x = y + fit_channels(AVG_POOL[self.dim](x, 2, ceil_mode=True), y.shape[1])
        for conv, norm in zip(reversed(self.up), reversed(self.norm), strict=True):
            skip = skips.pop()
            y = conv(F.leaky_relu(x))
            x = norm(y + F.interpolate(fit_channels(x, y.shape[1]), scale_factor=2, mode=LINEAR[self.dim]))
            x = x[(..., *[slice(0, n) for n in skip.shape[2:]])]  # odd sizes come back one too large
            x = torch.cat([x, skip], 1)
        return self.last(x) / 10


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
    """

    def __init__(
        self,
        dim: int = 3,
        *,
        down: tuple[int, ...] = UNIGRADICON_DOWN,
        up: tuple[int, ...] | None = None,
        levels: int = 3,
        last_step: bool = True,
    ):
        super().__init__()
        up = down if up is None else up
        if dim not in CONV:
            raise ValueError(f"expected dim 2 or 3, got {dim}")
        if len(up) != len(down) or min(*down, *up, levels) < 1:
            raise ValueError(
                f"expected levels >= 1 and as many `up` as `down` channels, all positive; "
                f"got levels={levels}, down={tuple(down)}, up={tuple(up)}"
            )
        self.settings = {"dim": dim, "down": list(down), "up": list(up), "levels": levels, "last_step": last_step}
        self.dim, self.levels = dim, levels
        self.scales = [*reversed(range(levels)), *([0] if last_step else [])]  # halvings before each step
        self.steps = nn.ModuleList(UNet(dim, tuple(down), tuple(up)) for _ in self.scales)

    def forward(self, moving: Tensor, fixed: Tensor) -> Transform:
        """moving, fixed: `(N, 1, *S)` in [0, 1], the same shape, 16 samples or more along each axis."""
        self.check_shapes(moving, fixed)
        pyramid = [(moving, fixed)]
        for _ in range(self.levels - 1):
            pyramid.append(tuple(AVG_POOL[self.dim](image, 2, ceil_mode=True) for image in pyramid[-1]))
        phi = Transform(fixed.shape[2:])
        for unet, scale in zip(self.steps, self.scales, strict=True):
            coarse_moving, coarse_fixed = pyramid[scale]
            if phi.displacements:
                coarse_moving = sample(coarse_moving, phi.on_grid(coarse_fixed.shape[2:]))
            phi = phi.then(unet(coarse_moving, coarse_fixed))
        return phi

    def check_shapes(self, moving: Tensor, fixed: Tensor) -> None:
        expected = f"expected moving and fixed images of one shape (N, 1, {'X, Y, Z'[: 3 * self.dim - 2]})"
        if moving.shape != fixed.shape or fixed.dim() != self.dim + 2 or fixed.shape[1] != 1:
            raise ValueError(f"{expected}, got {tuple(moving.shape)} and {tuple(fixed.shape)}")
        if min(fixed.shape[2:]) < 16:
            raise ValueError(
                f"{expected} with at least 16 samples a side, got {tuple(fixed.shape[2:])}; resample or pad the images"
            )

    def save(self, path: Path | str) -> None:
        """Settings and weights in one file, written whole or not at all."""
        with written_whole(path) as partial:
            torch.save({"settings": self.settings, "weights": self.state_dict()}, partial)


def load(path: Path | str) -> GradICON:
    """The network of a file that `GradICON.save` wrote, in eval mode.

    Raises: ValueError for a file that is missing, damaged, or something else.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        net = GradICON(**saved["settings"])
        net.load_state_dict(saved["weights"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"expected weights saved by fmsam in {path}, got: {error}; train or copy them anew") from error
    return net.eval()


def unigradicon(weights: Path | str | None = None, *, dim: int = 3, last_step: bool = True) -> GradICON:
    """uniGradICON's own network: 70.7 M parameters in 3-D with the last step.

    weights: a file that `GradICON.save` wrote, None for an untrained network. (The official .trch files cannot
    be read yet.) Raises ValueError for any other file or another architecture's.
    """
    net = GradICON(dim, down=UNIGRADICON_DOWN, up=UNIGRADICON_UP, levels=3, last_step=last_step)
    if weights is None:
        return net
    loaded = load(weights)
    if loaded.settings != net.settings:
        raise ValueError(f"expected weights of {net.settings} in {weights}, got those of {loaded.settings}")
    return loaded
