"""One training step: the gradient at w, SAM's at w + eps, the update."""

import functools

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fmsam_lib.model.network import BuffersKept, GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.training import distributed as parallel
from fmsam_lib.training.checkpoint import State
from fmsam_lib.training.losses import Batch, Loss, objective
from fmsam_lib.training.sam import SAM

BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, parallel.SharedBatchNorm)


def perturbation(net: GradICON, run: Train) -> SAM | None:
    """What `run.optimizer` puts beside Adam: nothing, SAM, or one of its variants (see `sam.py`)."""
    options: dict = {
        "sam": {"by_layer": run.climb == "layer"},
        "asam": {"adaptive": True},
        "sam-every": {"every": run.every},
        "looksam": {"every": run.every, "alpha": run.alpha},
        "random": {"random_seed": run.seed},
    }
    norms = [p for module in net.modules() if isinstance(module, BATCH_NORMS) for p in module.parameters()]
    params = norms if run.climb == "norms" else net.parameters()
    return SAM(params, run.rho, net=net, **options[run.optimizer]) if run.optimizer in options else None


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: cuBLAS keeps 32 MB for each


class Recorded:
    """The loss of a batch and the way back through it as one CUDA graph a kind of batch, played again for every other.

    A small network's step is a thousand short kernels, for which the processor takes five times as long to ask as the
    GPU to compute. Another kind: of other shapes, with masks or without, in uniGradICON's first stage. Belongs to
    a network that stays where it is in memory, as `fit` leaves it.
    """

    def __init__(self, net: GradICON, run: Train):
        self.net, self.run, self.pool = net, run, torch.cuda.graph_pool_handle()
        self.kinds: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, Tensor, Tensor, dict[nn.Parameter, Tensor]]] = {}

    def __call__(self, batch: Batch, factor: float) -> Tensor:
        """The loss's three numbers; the gradient of `factor` times the loss is added to `.grad`."""
        kind = (self.net.first_stage, *(part if part is None else part.shape for part in batch))
        if kind not in self.kinds:
            self.kinds[kind] = self.record(batch)
        graph, given, factors, loss, gradients = self.kinds[kind]
        for there, now in zip(given, batch, strict=True):
            if now is not None:
                there.copy_(now)
        factors.fill_(factor)
        before = [p.grad.clone() for p in gradients if p.grad is not None]
        graph.replay()
        if before:
            torch._foreach_add_([*gradients.values()], before)
        for p, gradient in gradients.items():
            p.grad = gradient
        return loss.clone()

    def record(self, batch: Batch):
        batch = Batch._make(part if part is None else part.clone() for part in batch)
        factors, params = torch.ones((), device=batch.moving.device), [*self.net.parameters()]
        before = [p.grad for p in params]
        self.net.zero_grad()

        def both_ways() -> Tensor:
            loss = objective(self.net, batch, joint=self.run.joint, **self.run.loss())
            (loss.total * factors).backward()
            return torch.stack([part.detach() for part in loss])

        stream = side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with BuffersKept(self.net), torch.cuda.stream(stream):  # what is made once, and cuDNN's choices
            for _ in range(2):
                both_ways()
        torch.cuda.current_stream().wait_stream(stream)
        self.net.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = both_ways()
        gradients = {p: p.grad for p in params if p.grad is not None}
        for p, gradient in zip(params, before, strict=True):
            p.grad = gradient
        return graph, batch, factors, loss, gradients


def train_step(
    net: GradICON,
    micro: list[Batch],
    run: Train,
    optimizer: Optimizer,
    sam: SAM | None,
    state: State,
    *,
    recorded: Recorded | None = None,
) -> Loss:
    """One update; the loss at w. Where something is not finite, weights and buffers stay, and `state` counts it.

    micro: the parts of the batch, one after the other; the gradient is that of their mean, and of all processes'.
    recorded: what computes the network's gradients on a GPU.
    """
    statistics = BuffersKept(net)
    if sam and sam.due and state.step >= run.late * run.updates:
        loss, finite = climbing(net, micro, run, optimizer, sam, state, recorded)
    else:
        loss, finite = gradient(net, micro, run, optimizer, state, recorded)
        if sam and finite:
            sam.between()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    finite = finite and bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
    if finite:
        if run.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), run.clip)
        optimizer.step()
    else:
        statistics.put_back()  # BatchNorm's running statistics have seen what is not finite
    state.skipped, state.in_a_row = (state.skipped, 0) if finite else (state.skipped + 1, state.in_a_row + 1)
    if run.precision == "fp16":
        rescale(state, finite)
    return loss


def climbing(
    net: GradICON,
    micro: list[Batch],
    run: Train,
    optimizer: Optimizer,
    sam: SAM,
    state: State,
    recorded: Recorded | None = None,
) -> tuple[Loss, bool]:
    """As `gradient`, but `.grad` is that at the worst weights within rho; the loss is still that at w.

    Of the whole batch; with `run.climb` "part" each part climbs by its own gradient, `eps_i = rho g_i / |g_i|`, and
    `.grad` is the mean of those found there: m-sharpness (Foret et al. 2021). A mixture deals its domains in turn, so
    that with parts of one pair each domain climbs by itself.
    """
    before, parts = state.gradients, [[batch] for batch in micro] if run.climb == "part" else [micro]
    numbers: list[Tensor] = []
    total: dict[nn.Parameter, Tensor] = {}
    for part in parts:
        loss, finite = gradient(net, part, run, optimizer, state, recorded, share=run.sync_climb)  # at w
        if not finite:
            break
        with sam.perturbed():  # at w + eps
            there, finite = gradient(net, part, run, optimizer, state, recorded)
        sam.rise = rise = there.total - loss.total
        if not finite:
            break
        numbers.append(torch.stack([*loss, rise]))
        if len(parts) > 1:
            found = {p: p.grad / len(parts) for p in net.parameters() if p.grad is not None}
            total = {p: total[p] + grad if total else grad for p, grad in found.items()}
    else:
        for p, summed in total.items():
            p.grad = summed
        *means, sam.rise = torch.stack(numbers).mean(0)
        loss = Loss(*means)
    state.gradients = before + min(2, state.gradients - before)  # of whole batches
    return loss, finite


def gradient(
    net: GradICON,
    micro: list[Batch],
    run: Train,
    optimizer: Optimizer,
    state: State,
    recorded: Recorded | None = None,
    *,
    share: bool = True,
) -> tuple[Loss, bool]:
    """Fill `.grad` at the weights where the network stands; the loss there, and whether it was finite.

    share: average over the processes. Where SAM's first pass does not (`run.sync_climb` is False), each climbs by
    its own part of the batch: m-sharpness (Foret et al. 2021), another objective than SAM's of the whole batch, from
    which a little comes in by BatchNorm's statistics, shared even then.
    """
    optimizer.zero_grad()
    scale = state.scale if run.precision == "fp16" else 1.0
    losses, finite = [], True
    for batch in micro:
        if recorded:
            losses.append(recorded(batch, scale / len(micro)))
            finite = bool(losses[-1][0].isfinite())
        else:
            loss = objective(net, batch, joint=run.joint, **run.loss())
            losses.append(torch.stack([part.detach() for part in loss]))
            finite = parallel.all_agree(bool(torch.isfinite(loss.total)), loss.total.device)
            if finite:  # going back through NaN, torch's 2-D grid_sample crashes on a processor
                (loss.total * (scale / len(micro))).backward()
        if not finite:
            break
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
