"""Sharpness-Aware Minimization: climb to the worst nearby weights, take the gradient there, come back.

Foret et al. 2021 (arXiv 2010.01412) minimise `max_{|eps| <= rho} L(w + eps)`, whose first-order
solution is `eps = rho g / |g|` with g the gradient at w. ASAM (Kwon et al. 2021, arXiv 2102.11600) measures eps
relative to the weights: `eps = rho w^2 g / |w g|`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SAM:
    """The perturbation of SAM beside any torch optimizer, which is left as it is.

        optimizer.zero_grad()
        objective(net, batch).backward()      # gradient at w
        with sam.perturbed():                 # at w + eps: the worst weights within rho
            optimizer.zero_grad()
            objective(net, batch).backward()  # its gradient is what moves w
        optimizer.step()

    params: tensors, or groups `{"params": tensors, "rho": radius}`; every group has its own rho (or
        the common one), all share one global gradient norm.
    rho: radius of the ball, in the weights' own units (adaptive: relative to each weight).
    net: its buffers (BatchNorm's running statistics) are put back after the block, so that the
        second pass leaves no trace in them.

    On every way out of the block, exceptions included, the weights are copied back from a saved
    clone: bit for bit what they were. Both passes must see the same loss: whatever is random in it
    belongs into the batch.
    """

    def __init__(self, params: Iterable, rho: float = 0.05, adaptive: bool = False, *, net: nn.Module | None = None):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.groups = [(list(group["params"]), float(group.get("rho", rho))) for group in groups]
        if not any(tensors for tensors, _ in self.groups):
            raise ValueError("expected parameters to perturb, got none")
        for _, radius in self.groups:
            if not (math.isfinite(radius) and radius >= 0):
                raise ValueError(f"expected rho to be a finite number >= 0, got {radius}")
        self.adaptive = adaptive
        self.net = net
        self.gradient_norm = math.nan  # of the last climb, at w
        self.step_norm = math.nan  # |eps| of the last climb

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Inside the block the parameters stand at `w + eps`; needs their gradients at w in `.grad`."""
        moved = [(p, radius) for tensors, radius in self.groups if radius > 0 for p in tensors if p.grad is not None]
        if not moved and any(radius > 0 for _, radius in self.groups):
            raise RuntimeError("no parameter has a gradient: call backward() before `with sam.perturbed()`")
        parameters = [p for p, _ in moved]
        buffers = list(self.net.buffers()) if self.net is not None else []
        saved = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
        try:
            self._climb(moved)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip((*parameters, *buffers), saved, strict=True):
                    tensor.copy_(value)

    @torch.no_grad()
    def _climb(self, moved: list[tuple[Tensor, float]]) -> None:
        # float32 at least: a half-precision sum of squares overflows
        gradients = [p.grad.to(torch.promote_types(p.dtype, torch.float32)) for p, _ in moved]
        scaled = [p.abs() * g if self.adaptive else g for (p, _), g in zip(moved, gradients, strict=True)]
        self.gradient_norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))) if moved else 0.0
        self.step_norm = 0.0
        if self.gradient_norm == 0:
            return
        steps = [
            (p.abs() * s if self.adaptive else s) * (radius / self.gradient_norm)
            for (p, radius), s in zip(moved, scaled, strict=True)
        ]
        self.step_norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps))))
        for (p, _), step in zip(moved, steps, strict=True):
            p.add_(step.to(p.dtype))
