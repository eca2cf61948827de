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


def perturbation(net: GradICON, run: Train) -> SAM | None:
    """What `run.optimizer` puts beside Adam: nothing, SAM, or one of its variants (see `sam.py`)."""
    options: dict = {
        "sam": {"by_layer": run.climb == "layer"},
        "asam": {"adaptive": True},
        "sam-every": {"every": run.every},
        "looksam": {"every": run.every, "alpha": run.alpha},
        "random": {"random_seed": run.seed},
    }
    norms = [p for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    params = norms if run.climb == "norms" else net.parameters()
    return SAM(params, run.rho, net=net, **options[run.optimizer]) if run.optimizer in options else None


class Recorded:
    """A batch's loss and gradient as one CUDA graph, played again for every batch of its kind.

    A small network's step is a thousand kernels, and asking for them takes up to ten times as long as they do. Kinds
    differ in shapes and masks; the first stage's graphs end with it. The network has to stay where it is in memory.
    """

    side = staticmethod(functools.cache(torch.cuda.Stream))  # one stream for all: cuBLAS keeps 32 MB for each

    def __init__(self, net: GradICON, run: Train):
        self.net, self.run, self.kinds, self.pool = net, run, dict[tuple, tuple](), torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, factor: float) -> Tensor:
        """The loss's three numbers; the gradient of `factor` times the loss is added to `.grad`."""
        kind = (self.net.first_stage, *(part if part is None else part.shape for part in batch))
        if kind not in self.kinds:
            self.kinds = {other: kept for other, kept in self.kinds.items() if other[0] == kind[0]}
            self.kinds[kind] = self.record(batch)
        graph, given, factors, loss, gradients = self.kinds[kind]
        for there, now in zip(given, batch, strict=True):
            if now is not None:
                there.copy_(now)
        factors.fill_(factor)
        before = [p.grad.clone() for p in gradients if p.grad is not None]  # of the batch's parts so far
        graph.replay()
        if before:
            torch._foreach_add_([*gradients.values()], before)
        for p, gradient in gradients.items():
            p.grad = gradient
        return loss.clone()

    def record(self, batch: Batch) -> tuple:
        """The graph, the tensors that it reads, and what it leaves: numbers and gradients by parameter."""
        given, factors = Batch._make(p if p is None else p.clone() for p in batch), batch.points.new_ones(())
        before, stream = {p: p.grad for p in self.net.parameters()}, self.side(batch.points.device)

        def both_ways() -> Tensor:
            self.net.zero_grad()
            loss = objective(self.net, given, joint=self.run.joint, **self.run.loss())
            (loss.total * factors).backward()
            return torch.stack([part.detach() for part in loss])

        with BuffersKept(self.net):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # before: bands and grids are made, cuDNN chooses
                    both_ways()
            torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=self.pool):
            loss = both_ways()
        gradients = {p: p.grad for p in before if p.grad is not None}
        for p, gradient in before.items():
            p.grad = gradient
        return graph, given, factors, loss, gradients

    def __deepcopy__(self, _) -> None:
        """A copy of the network lies elsewhere in memory."""


def train_step(
    net: GradICON, micro: list[Batch], run: Train, optimizer: Optimizer, sam: SAM | None, state: State
) -> Loss:
    """One update; the loss at w. Where something is not finite, weights and buffers stay, and `state` counts it.

    micro: the parts of the batch, one after the other; the gradient is that of their mean, and of all processes'.
    """
    statistics = BuffersKept(net)
    if sam and sam.due and state.step >= run.late * run.updates:
        loss, finite = climbing(net, micro, run, optimizer, sam, state)
    else:
        loss, finite = gradient(net, micro, run, optimizer, state)
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
    if run.precision == "fp16":  # as torch's GradScaler, which unscales once an update, where SAM has two passes
        state.scaled_well = state.scaled_well + 1 if finite else 0
        if not finite:
            state.scale /= 2
        elif state.scaled_well == 2000:
            state.scale, state.scaled_well = state.scale * 2, 0
    return loss


def climbing(
    net: GradICON, micro: list[Batch], run: Train, optimizer: Optimizer, sam: SAM, state: State
) -> tuple[Loss, bool]:
    """As `gradient`, but `.grad` is that at the worst weights within rho; the loss is still that at w.

    Of the whole batch; with `run.climb` "part" each part climbs by its own gradient, `eps_i = rho g_i / |g_i|`, and
    `.grad` is the mean of those found there: m-sharpness (Foret et al. 2021). A mixture deals its domains in turn, so
    that with parts of one pair each domain climbs by itself.
    """
    before, parts = state.gradients, [[batch] for batch in micro] if run.climb == "part" else [micro]
    numbers, total = list[Tensor](), dict[nn.Parameter, Tensor]()
    for part in parts:
        loss, finite = gradient(net, part, run, optimizer, state, share=run.sync_climb)  # at w
        if not finite:
            break
        with sam.perturbed():  # at w + eps
            there, finite = gradient(net, part, run, optimizer, state)
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
    net: GradICON, micro: list[Batch], run: Train, optimizer: Optimizer, state: State, *, share: bool = True
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
        if net.recorded:
            losses.append(net.recorded(batch, scale / len(micro)))
        else:
            loss = objective(net, batch, joint=run.joint, **run.loss())
            losses.append(torch.stack([part.detach() for part in loss]))
        finite = parallel.all_agree(bool(losses[-1][0].isfinite()), losses[-1].device)
        if not finite:
            break
        if not net.recorded:  # only now: going back through NaN, torch's 2-D grid_sample crashes
            (loss.total * (scale / len(micro))).backward()
    state.gradients += 1
    mean = torch.stack(losses).mean(0)
    parallel.average([mean])
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if finite and scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
    if finite and share:
        parallel.average(gradients)
    return Loss(*mean), finite
