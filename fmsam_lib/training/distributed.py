"""Several processes on one training, with gloo or NCCL: each computes a part of every batch.

Gradients, losses and BatchNorm's statistics are those of the whole batch: two processes train the network of one. In a
process alone the same functions do nothing. (torch's own SyncBatchNorm refuses the CPU, and its DistributedDataParallel
averages behind the scenes what SAM's first pass may want to leave apart.)
"""

import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fmsam_lib.parameters import Train


def count() -> int:
    """Processes at work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launch(run: Train) -> None:
    """Train `run` in as many new processes on this machine as it says; returns when they are done.

    Raises: RuntimeError when one fails (they say why on stderr).
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.processes)]
    command = [sys.executable, *torchrun, "-m", "fmsam_lib.training", run.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # they end with the pipe, so with this process
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the training in {run.out} failed in one of its {run.processes} processes: see above")


def average(tensors: list[Tensor]) -> None:
    """Replace every process's tensors by their mean over the processes, in place and in one message."""
    if count() == 1:
        return
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(message)
    message /= count()
    sizes = [tensor.numel() for tensor in tensors]
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(message.split(sizes), tensors, strict=True)])


def all_agree(yes: bool, device: torch.device) -> bool:
    """Whether every process says yes: who went another way than the others would leave them waiting."""
    if count() == 1:
        return yes
    vote = torch.tensor(float(yes), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    return bool(vote)


def share_batch_norm(net: nn.Module) -> None:
    """Let every BatchNorm see the batches of all processes; parameters and buffers stay the same tensors."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SharedBatchNorm


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm (Ioffe & Szegedy 2015) over the samples of all processes, which all have as many; `(N, C, *S)`."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        axes, each = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = Sum.apply(values.mean(axes)) / count()
        centred = values - mean.view(each)
        variance = Sum.apply((centred**2).mean(axes)) / count()  # of centred values: E[x^2] - E[x]^2 would round
        samples = count() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * samples / (samples - 1), self.momentum)
            self.num_batches_tracked += 1
        scaled = centred * (self.weight / torch.sqrt(variance + self.eps)).view(each)
        return (scaled + self.bias.view(each)).to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum over the processes. Its gradient is summed too: every process's loss depends on it."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return Sum.apply(gradient.contiguous())
