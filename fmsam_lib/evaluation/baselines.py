"""Registrations to compare networks with: a classical one, and instance optimisation, with training or without.

Each takes a `Pair` and returns two maps `(1, D, *S)` in unit coordinates: of the pair, and of the swapped pair.
"""

import importlib
import os
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmsam_lib.checking import ConfigError
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.pair import Pair
from fmsam_lib.parameters import Train
from fmsam_lib.training.instance import optimise
from fmsam_lib.training.loop import starting

Maps = tuple[Tensor, Tensor | None]


def ants_syn(pair: Pair) -> Maps:
    """ANTs' SyN with its affine start and its defaults (Avants et al. 2008), by antspyx; one thread, seeded.

    The images are handed over with the pair's spacing, so that steps and smoothing are in its unit. Raises ConfigError
    where antspyx is not installed; ValueError where ANTs gives up (two images of one value, say).
    """
    itk = ants()
    spacing = tuple(float(s) for s in pair.spacing) or (1.0,) * (pair.fixed.dim() - 1)
    fixed, moving = (itk.from_numpy(image[0].numpy(), spacing=spacing) for image in (pair.fixed, pair.moving))
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = itk.registration(fixed, moving, type_of_transform="SyN", outprefix=f"{folder}/", random_seed=1)
        except RuntimeError as error:
            raise ValueError(f"expected ANTs to register {pair.name}, got: {error}; look at its images") from error

        def composed(target, source, transforms: list[str], **options) -> Tensor:
            path = itk.apply_transforms(target, source, transforms, compose=f"{folder}/composed", **options)
            # ants counts in mm from the first sample, axes along the array's
            mm = np.moveaxis(itk.image_read(path).numpy(), -1, 0)
            shape = tuple(pair.fixed.shape[1:])
            extent = torch.tensor([s * (n - 1) for s, n in zip(spacing, shape, strict=True)])
            unit = torch.from_numpy(mm.copy()).float() / extent.view(-1, *[1] * len(shape))
            return identity_map(shape) + unit[None]

        there = composed(fixed, moving, found["fwdtransforms"])
        # for points of the moving grid: first the inverse warp's affine, undone, then the inverse warp
        back = composed(moving, fixed, found["invtransforms"], whichtoinvert=[True, False])
    return there, back


def ants():
    """antspyx's module; ConfigError where it is not installed."""
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")  # read at the import: threads change the sums
    try:
        return importlib.import_module("ants")
    except ImportError as error:
        raise ConfigError(f"expected antspyx for ants-syn, got: {error}; pip install 'fmsam[ants]'") from error


def untrained(run: Train) -> GradICON:
    """A network of the form of the training `run`: random weights of seed 0, the identity; in eval mode."""
    form = starting(run).settings if run.weights else {}
    return starting(run.model_copy(update={**form, "weights": "", "seed": 0})).eval()


def instance_optimised(net: GradICON, pair: Pair, run: Train, *, steps: int, lr: float) -> Maps:
    """`net` after `steps` of Adam on this very pair, by the loss of the training `run`; the best iterate counts."""
    options: dict[str, Any] = {"steps": steps, "lr": lr, "progress": False, **run.loss()}
    if pair.moving_mask is not None and pair.fixed_mask is not None:
        options |= {"masks": (pair.moving_mask[None], pair.fixed_mask[None])}
    phi, *_, back = optimise(net, pair.moving[None], pair.fixed[None], **options)
    return phi.map, back.map
