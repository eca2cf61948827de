"""Sharpness-Aware Minimization: climb to the worst nearby weights, take the gradient there, come back.

Foret et al. 2021 (arXiv 2010.01412) minimise `max_{|eps| <= rho} L(w + eps)`, whose first-order
solution is `eps = rho g / |g|` with g the gradient at w. ASAM (Kwon et al. 2021, arXiv 2102.11600) measures eps
relative to the weights: `eps = rho w^2 g / |w g|`. LookSAM (Liu et al. 2022, arXiv 2203.02714) climbs every k-th step
only, and in between adds to g what the last climb found beside it.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmsam_lib.checking import plain
from fmsam_lib.model.network import BuffersKept
from fmsam_lib.training.interruption import undoing

FULL = (torch.float32, torch.float64)  # half precision is climbed and measured in float32


class SAM:
    """The perturbation of SAM beside any torch optimizer, which is left as it is.

        optimizer.zero_grad()
        my_loss(net, batch).backward()        # gradient at w
        with sam.perturbed():                 # at w + eps: the worst weights within rho
            optimizer.zero_grad()
            my_loss(net, batch).backward()    # its gradient is what moves w
        optimizer.step()

    params: what torch's optimizers take: tensors, `named_parameters()`, or groups `{"params": tensors, "rho": radius}`,
        such as an optimizer's own. Group i moves by `rho_i g_i / |g|`, |g| over all groups: a group of rho 0 stays
        where it is, and counts in |g|. `sam.groups[i]["rho"]` may be changed from step to step, as an optimizer's "lr".
    rho: radius of the ball, in the weights' own units (adaptive: relative to each weight, ASAM).
    by_layer: each tensor on its own, `eps_l = rho |w_l| g_l / |g_l|`: rho is relative to its length (as LARS has it,
        You et al. 2017, arXiv 1708.03888).
    net: its buffers (BatchNorm's running statistics) are put back after the block, whether the second pass changed or
        replaced them, so that it leaves no trace in them.
    random_seed: a control: climb in a random direction of the same radius, `eps = rho u / |u|` with u normal
        (adaptive: `eps = rho w u / |u|`); depends on this seed and the step alone, in a stream of its own.

    every, alpha: climb in one step of `every`, when `sam.due` (alpha = 0: plain steps in between, SAM-k of Liu et al.;
        alpha > 0: LookSAM); in the others call `sam.between()`, with which LookSAM bends the gradient in `.grad`.

    On every way out of the block, exceptions and any number of Ctrl-C included, the weights are copied back from a
    saved clone, in place: bit for bit what they were. The clone (LookSAM: and the kept direction) is the only copy of
    the weights, half precision apart. Where the loss draws random numbers, see `remember`.

    Gradient accumulation: all micro-batches before the block, then all of them inside. A loss scaled by a
    GradScaler climbs the same eps (the logged norms of gradients are then scaled too). Where a gradient is not
    finite there is no climb, and all gradients are NaN after the block, so the scaler skips the step. Clip after it.

    Raises: ValueError for impossible arguments; RuntimeError where no parameter has a gradient, or one that is complex
    or sparse.
    """

    def __init__(
        self,
        params: Iterable,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        by_layer: bool = False,
        net: nn.Module | None = None,
        every: int = 1,
        alpha: float = 0.0,
        random_seed: int | None = None,
    ):
        try:  # torch itself reads them, of copies: it writes into the groups
            given = params if isinstance(params, Tensor) else [dict(g) if isinstance(g, dict) else g for g in params]
            groups = torch.optim.SGD(given, lr=0.0).param_groups
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"expected parameters as torch's optimizers take them, got {error!r}") from error
        self.groups: list[dict] = [{"params": g["params"], "rho": number("rho", g.get("rho", rho))} for g in groups]
        self.params: list[Tensor] = [p for group in self.groups for p in group["params"]]
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError("expected every parameter once, got one twice")
        if by_layer and (adaptive or random_seed is not None):
            raise ValueError("expected by_layer alone, got it with adaptive or random_seed")
        self.adaptive, self.by_layer, self.net = adaptive, by_layer, net
        self.every, self.alpha = number("every", every, 1, whole=True), number("alpha", alpha)
        self.random_seed = None if random_seed is None else number("random_seed", random_seed, whole=True)
        self.steps = 0  # done, with a climb or without
        self.vertical: list[Tensor | None] | None = None  # LookSAM's g_v, beside self.params
        # Of the last climb: |g| at w, |g| at w + eps, |eps|, and |eps| / |w| of the parameters with a gradient.
        self.gradient_norm = self.gradient_norm_there = self.step_norm = self.step_ratio = math.nan
        self._rise: float | Tensor | None = None  # None: not set since the last climb
        self._random: list[Tensor] | None = None

    @property
    def due(self) -> bool:
        """Whether this step climbs; LookSAM also does where it has no direction to go on with."""
        return self.steps % self.every == 0 or (self.alpha > 0 and self.vertical is None)

    @property
    def rise(self) -> float | Tensor:
        """L(w + eps) - L(w): the loop sets it, which knows the losses. NaN where it was not set.

        Set to what is not finite, it drops LookSAM's direction: the second pass may have stopped with half a gradient.
        """
        return math.nan if self._rise is None else self._rise

    @rise.setter
    def rise(self, value: float | Tensor) -> None:
        self._rise = value = value.detach() if isinstance(value, Tensor) else value
        if self.vertical is not None and not math.isfinite(value):
            self.vertical = None

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Inside the block the parameters stand at `w + eps`; needs their gradients at w in `.grad`."""
        moved = [p for p in self.params if p.requires_grad and p.grad is not None]
        if not moved:
            raise RuntimeError("no parameter has a gradient: call backward() before `with sam.perturbed()`")
        if len({p.data_ptr() or id(p) for p in moved}) < len(moved):
            raise RuntimeError("expected parameters with memory of their own, got two that share it: tie them as one")
        for grad in (p.grad for p in moved if p.grad is not None):
            if grad.is_complex() or grad.layout != torch.strided:
                got = f"{grad.layout} of {grad.dtype}, shape {tuple(grad.shape)}"
                todo = "for complex weights train torch.view_as_real of them, and give layers sparse=False"
                raise RuntimeError(f"expected real, dense gradients, got {got}: {todo}")
        first, self._random = self._random, None
        generators = _generators(self.params) if first else []
        after = [generator.get_state() for generator in generators]
        buffers = BuffersKept(nn.Module() if self.net is None else self.net)
        weights = [p.detach().clone() for p in moved]

        @torch.no_grad()
        def put_back() -> None:
            torch._foreach_copy_(moved, weights)
            torch.clear_autocast_cache()  # the weights in half precision, which a block around both passes keeps
            for generator, state in zip(generators, after, strict=True):
                generator.set_state(state)
            buffers.put_back()

        with undoing(put_back):
            gradients = self._climb(moved, weights)
            torch.clear_autocast_cache()
            for generator, state in zip(generators, first or [], strict=True):
                generator.set_state(state)
            yield
        if math.isnan(self.step_norm) and any(p.grad is not None for p in moved):  # there was no climb
            torch._foreach_mul_([p.grad for p in moved if p.grad is not None], math.nan)
        weights.clear()  # their memory goes before LookSAM takes some
        self.gradient_norm_there = norm([p.grad for p in moved if p.grad is not None])
        went_wrong = self._rise is not None and not math.isfinite(self._rise)  # as the loop said inside the block
        if gradients is not None and 0 < self.gradient_norm_there < math.inf and not went_wrong:
            self._look(moved, gradients)
        self.steps += 1

    @torch.no_grad()
    def _climb(self, moved: list[Tensor], weights: list[Tensor]) -> list[Tensor] | None:
        """Move to w + eps; returns the gradients at w where LookSAM needs them after the block.

        eps takes shape in the parameters' own storage, as `weights` has their values: no further copy.
        """
        gradients = [p.grad for p in moved if p.grad is not None]
        self.vertical = self._rise = None  # its memory goes to the next one
        keep = [g.clone() for g in gradients] if self.alpha > 0 and self.every > 1 else None
        eps = [p if p.dtype in FULL else torch.empty_like(p, dtype=torch.float32) for p in moved]
        self.gradient_norm = length = norm(gradients)
        if self.random_seed is not None:
            hashed = np.random.SeedSequence([self.random_seed, self.steps]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(hashed[0]))  # hashed: nobody else draws from this stream
            for e in eps:  # drawn on the CPU: the same direction on every device
                e.copy_(torch.randn(e.shape, generator=generator, dtype=e.dtype))
        else:
            torch._foreach_copy_(eps, gradients)
            if self.adaptive:
                torch._foreach_mul_(eps, weights)  # w g
        if self.adaptive or self.random_seed is not None:
            length = norm(eps)
        if self.adaptive:
            torch._foreach_mul_(eps, weights)  # w^2 g: w's sign does not matter
        finite = math.isfinite(length) and math.isfinite(self.gradient_norm)
        if not finite:  # weights of NaN would crash torch's 2-D grid_sample on its way back
            torch._foreach_zero_(eps)
        rho = {id(p): group["rho"] for group in self.groups for p in group["params"]}
        scales = [rho[id(p)] / length if finite and length else 0.0 for p in moved]
        if self.by_layer:
            own = [w.to(e.dtype) for w, e in zip(weights, eps, strict=True)]  # norms overflow in half precision
            sizes, lengths = (torch.stack(torch._foreach_norm(tensors)).tolist() for tensors in (own, eps))
            each = zip(scales, sizes, lengths, strict=True)
            scales = [scale * length * size / slope if slope else 0.0 for scale, size, slope in each]
        torch._foreach_mul_(eps, scales)
        self.step_norm, size = norm(eps) if finite else math.nan, norm(weights)
        self.step_ratio = self.step_norm / size if size else math.nan
        torch._foreach_add_(eps, weights)
        torch._foreach_copy_(moved, eps)  # of half precision; a copy to itself does nothing
        return keep

    @torch.no_grad()
    def _look(self, moved: list[Tensor], gradients: list[Tensor]) -> None:
        """Keep what of SAM's gradient g_s is vertical to g (Liu et al. 2022).

        `g_v = g_s - |g_s| cos(theta) g / |g|`, that is `g_s - (g . g_s / |g|^2) g`, over all parameters as one vector.
        """
        sams = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        square = dot(gradients, gradients)
        torch._foreach_mul_(gradients, -dot(gradients, sams) / square if square else 0.0)
        torch._foreach_add_(gradients, sams)
        vertical = {id(p): g for p, g in zip(moved, gradients, strict=True)}
        self.vertical = [vertical.get(id(p)) for p in self.params] if math.isfinite(norm(gradients)) else None

    @torch.no_grad()
    def between(self) -> None:
        """A step without a climb. LookSAM: g becomes `g + alpha |g| / |g_v| g_v` (Liu et al. 2022)."""
        self._random = None
        if self.vertical is not None:
            pairs = zip(self.params, self.vertical, strict=True)
            found = [(p.grad, v) for p, v in pairs if p.requires_grad and p.grad is not None]
            length = norm([v for _, v in found if v is not None])
            scale = self.alpha * norm([gradient for gradient, _ in found]) / length if length > 0 else 0.0
            for gradient, v in found:
                if v is not None:
                    gradient.add_(v.to(gradient.dtype), alpha=scale)
        self.steps += 1

    def remember(self) -> None:
        """Call before the first pass where the loss draws random numbers: the block draws the same ones again.

        Replays torch's generators of the CPU and of the parameters' GPUs, not Python's, numpy's or your own. Behind the
        block they go on as if there had been no second pass.
        """
        self._random = [generator.get_state() for generator in _generators(self.params)]

    def logged(self) -> dict[str, Any]:
        """What is worth a line in the log, of the last climb."""
        rho = [group["rho"] for group in self.groups]
        numbers = ("gradient_norm", "gradient_norm_there", "step_norm", "step_ratio", "rise")
        return {"rho": rho[0] if len(rho) == 1 else rho} | {name: float(getattr(self, name)) for name in numbers}

    def state_dict(self) -> dict:
        """What going on to the same weights needs beside the optimizer's own state."""
        rho = [group["rho"] for group in self.groups]
        return {"steps": self.steps, "rho": rho, "vertical": self.vertical, "last": self.logged()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the number of groups, or LookSAM's kept direction, does not fit the parameters."""
        vertical = state["vertical"]
        fits = vertical is None or len(vertical) == len(self.params)
        fits = fits and all(v is None or v.shape == p.shape for v, p in zip(vertical or [], self.params, strict=False))
        if len(state["rho"]) != len(self.groups) or not fits:
            raise ValueError("expected the state of a SAM over the same parameters, got one over others")
        self.steps = state["steps"]
        for group, rho in zip(self.groups, state["rho"], strict=True):
            group["rho"] = rho
        for name, value in state["last"].items():  # before the direction, which a rise of NaN drops
            if name != "rho":
                setattr(self, name, value)
        self.vertical = vertical and [
            v if v is None else v.to(p.device, copy=True) for v, p in zip(vertical, self.params, strict=True)
        ]


def number(name: str, value: Any, least: int = 0, *, whole: bool = False) -> Any:
    """An argument's value; ValueError where it is no such number."""
    found = plain(value)
    fits = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found) and found >= least
    if not fits or (whole and found != int(found)):
        raise ValueError(f"expected {name} to be a {'whole' if whole else 'finite'} number >= {least}, got {value!r}")
    return int(found) if whole else float(found)


def norm(tensors: list[Tensor]) -> float:
    """The length of all tensors as one vector, in float32 at least: a half-precision sum of squares overflows."""
    return float(nn.utils.get_total_norm([t.detach() if t.dtype in FULL else t.detach().float() for t in tensors]))


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float(torch.sum(x.double() * y.double())) for x, y in zip(a, b, strict=True))


def _generators(params: list[Tensor]) -> list[torch.Generator]:
    """The CPU's and those of the parameters' GPUs."""
    gpus = sorted({p.device.index for p in params if p.device.type == "cuda"})
    return [torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)]
