"""Averages of the weights along a training: next to free, and they tend to lie in flatter places than the last ones."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from fmsam_lib.model.network import GradICON

NEW, TAIL = 0.001, 0.25


class Averages(nn.ModuleDict):
    """Two averages of a network's weights; its `state_dict` is what going on needs.

    ema: `w' <- (1 - s) w' + s w` after every step, `s = max(0.001, 9 / (10 + n))` after n steps, so that little is
    left of the first ones. tail: the mean over the last quarter of the steps, as SWAD's without its window (Cha et al.
    2021, arXiv 2102.08604).
    """

    def __init__(self, net: GradICON, updates: int):
        ema = AveragedModel(net, multi_avg_fn=lambda a, w, n: torch._foreach_lerp_(a, w, max(NEW, 9 / (10 + int(n)))))
        super().__init__({"ema": ema, "tail": AveragedModel(net)})
        self.first = min(round((1 - TAIL) * updates), updates - 1)  # steps before the tail begins

    def follow(self, net: GradICON, step: int) -> None:
        """After `step` steps."""
        cast(AveragedModel, self["ema"]).update_parameters(net)
        if step > self.first:
            cast(AveragedModel, self["tail"]).update_parameters(net)

    def networks(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, GradICON]:
        """The averaged networks by name, on the CPU, BatchNorm's statistics gathered from these training pairs."""
        found = {name: cast(GradICON, average.module) for name, average in self.items()}
        for net in found.values():
            net.precision = "float32"
            gather_statistics(net, pairs)
            net.eval().cpu()
        return found


def gather_statistics(net: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gather BatchNorm's running statistics anew: plain means over batches of pairs, both directions of each together.

    pairs: moving and fixed images, `(N, 1, *S)` each.
    """
    both = (torch.stack([torch.cat([moving, fixed]), torch.cat([fixed, moving])]) for moving, fixed in pairs)
    with net.register_forward_pre_hook(lambda net, given: tuple(given[0])):  # `update_bn` hands on one tensor
        update_bn(both, net, device=next(net.parameters()).device)
