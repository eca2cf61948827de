"""The peers that fmsam is compared with, as `make` installs them: without the dependencies we never call."""

import importlib
import importlib.metadata
import sys
import types

import torch

# Imported by the peers at their top, used only by parts of them that we leave alone. (torchvision would bring a
# CUDA build of torch, itk 300 MB.)
UNUSED = ("footsteps", "itk", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")


class Absent(types.ModuleType):
    """Has what the peers' annotations name (`itk.Image`), and nothing that works."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def icon_registration():
    """icon-registration's package; ImportError where it is not installed."""
    return _import("icon_registration")


def unigradicon():
    """unigradicon's package; ImportError where it is not installed."""
    return _import("unigradicon")


def _import(name: str):
    for module in UNUSED:
        try:
            importlib.import_module(module)
        except ImportError:
            sys.modules[module] = Absent(module)
    return importlib.import_module(name)


version = importlib.metadata.version


def network(dim: int, down, up, *, levels: int = 3, last_step: bool = True):
    """icon-registration's module for the network that `GradICON(dim, down=, up=, levels=, last_step=)` is."""
    icon = icon_registration()

    def step():
        unet = importlib.import_module("icon_registration.networks").UNet2(len(down), [[2, *down], [*up]], dim)
        return icon.FunctionFromVectorField(unet)

    net = step()
    for _ in range(levels - 1):
        net = icon.TwoStepRegistration(icon.DownsampleRegistration(net, dimension=dim), step())
    return icon.TwoStepRegistration(net, step()) if last_step else net


def with_loss(net, shape, *, lmbda: float, similarity):
    """uniGradICON's module: `net` with its loss, for images `(1, 1, *shape)`."""
    module = unigradicon().GradientICONSparse(net, similarity, lmbda)
    module.assign_identity_map([1, 1, *shape])
    return module


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights away from the untrained identity, BatchNorm statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("lastConv.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
        elif name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
