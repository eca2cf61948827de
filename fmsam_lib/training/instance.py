"""Instance optimisation: the network trained further on one pair, for that pair alone."""

import copy

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmsam_lib.model.network import GradICON, give_back_memory
from fmsam_lib.model.transform import Transform
from fmsam_lib.training.losses import Batch, jittered_points, objective

LARGE = 128**3  # samples; optimising on more computes activations twice rather than keep them


@torch.enable_grad()
def optimise(
    net: GradICON, moving: Tensor, fixed: Tensor, *, steps: int, lr: float, seed=0, masks=(), progress=True, **how
) -> tuple[Transform, list[float], int, Transform]:
    """The network's transform of one pair `(1, 1, *S)` after `steps` of Adam on that pair's own loss.

    masks: the moving and the fixed image's, `(1, 1, *S)` each, or none. how: lmbda, sigma and whatever else
    `objective` takes. A copy of the network is optimised, with BatchNorm's statistics fixed (as uniGradICON does) and
    frozen weights, too, unless all are. Returns the transform of the step with the lowest loss, on the CPU, the losses
    of steps 0 (the network as it came) to `steps`, which was lowest, and the transform of the swapped pair at that
    step. A loss that is not finite ends it early; where the first one is not, ValueError is raised.
    """
    device = next(net.parameters()).device
    net, moving, fixed = copy.deepcopy(net).eval(), moving.to(device), fixed.to(device)
    masks = [mask.to(device) for mask in masks]
    if not steps:
        with torch.no_grad():
            return _kept(net(moving, fixed)), [], 0, _kept(net(fixed, moving))
    if fixed.numel() > LARGE:
        net.save_memory = True
        give_back_memory()
    weights = [p for p in net.parameters() if p.requires_grad] or [*net.requires_grad_().parameters()]
    optimizer, generator = torch.optim.Adam(weights, lr=lr), torch.Generator().manual_seed(seed)
    # The loss runs the network itself, on both directions in one batch, moving to fixed first. This hook gets hold of
    # the transform, so that keeping the best costs neither another run nor a copy of the weights.
    found = []
    net.register_forward_hook(lambda module, images, phi: found.append(phi))
    best, losses, best_step = list[Transform](), [], 0
    bar = tqdm(range(steps + 1), desc="instance optimisation", unit="step", disable=not progress)
    for step in bar:
        found.clear()
        batch = Batch(moving, fixed, jittered_points(tuple(fixed.shape[2:]), generator).to(device), *masks)
        loss = objective(net, batch, **how).total
        if not loss.isfinite():
            break
        losses.append(loss.item())
        if losses[-1] <= losses[best_step]:
            best, best_step = [_kept(phi) for phi in found], step
        bar.set_postfix(loss=f"{losses[-1]:.4f}", best=f"{losses[best_step]:.4f}", refresh=False)
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if not best:
        raise ValueError("expected a finite loss before instance optimisation, got NaN or infinity: damaged weights?")
    return best[0][:1], losses, best_step, best[-1][-1:]  # of one batch, or of two


def _kept(phi: Transform) -> Transform:
    return phi.with_fields(u.detach().to("cpu", torch.float32, copy=True) for u in phi.fields)
