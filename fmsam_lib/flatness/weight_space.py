"""A network as one point w in weight space, where its loss can be asked for anywhere around.

Everything that moves weights to measure does it here, on a copy: the network that is given stays as it is.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from fmsam_lib.model.network import BuffersKept, GradICON
from fmsam_lib.training.losses import Batch, objective

TERMS = ("total", "similarity", "regulariser")

TermsOf = Callable[[Any], Sequence[Tensor]]  # a network's TERMS, scalars


class WeightSpace:
    """A copy of a network whose weights are one vector w, `(n,)`, and which goes to `w + eps` and back.

    Whatever mode its parts are in, the copy is in eval mode as a whole, with training=True in training mode; whatever
    the memory layout of the network's weights, the copy's are parts of w, in the order of `net.parameters()`. It
    computes in `dtype` (None: the network's own), never in half precision.

    terms: a function from the copy to the loss's TERMS, for `values` and `gradient`.

    >>> space = WeightSpace(nn.Linear(2, 1))
    >>> with space.at(torch.ones(3), distance=0.5) as net:
    ...     torch.equal(vector(net), space.w + 0.5)
    True
    >>> torch.equal(vector(space.net), space.w)
    True
    """

    @torch.inference_mode(False)  # else its parameters would never have gradients
    def __init__(self, net: nn.Module, terms: TermsOf = lambda net: (), dtype=None, *, training=False):
        self.net = copy.deepcopy(net).train(training).requires_grad_(True)
        self.net.to(dtype=dtype)
        if isinstance(self.net, GradICON):
            self.net.precision = "float32"
        self.terms = terms
        self.params = list(self.net.parameters())
        self.w = vector(self.net)
        vector_to_parameters(self.w, self.params)

    @contextmanager
    def at(self, eps: Tensor | float = 0.0, distance=1.0, *, origin: Tensor | None = None) -> Iterator[nn.Module]:
        """Inside the block the copy stands at `origin + distance * eps` (origin: w); behind it at w, to the bit.

        So do its buffers: BatchNorm's statistics that were moved or replaced inside are put back.
        """
        vector_to_parameters(torch.add(self.w if origin is None else origin, eps, alpha=distance), self.params)
        try:
            with BuffersKept(self.net):
                yield self.net
        finally:
            vector_to_parameters(self.w, self.params)

    def values(self, eps: Tensor | float = 0.0) -> np.ndarray:
        """All TERMS at `w + eps`, `(3,)`; NaN where they are not finite."""
        with self.at(eps), torch.no_grad():
            values = np.array([float(term) for term in self.terms(self.net)])
        return np.where(np.isfinite(values), values, np.nan)

    @torch.inference_mode(False)  # whoever asks inside it or `no_grad` would get zeros
    def gradient(self, term: int, eps: Tensor | float = 0.0) -> tuple[float, Tensor]:
        """One of the TERMS at `w + eps` and its gradient, `(n,)`; NaN and all NaN where a term is not finite."""
        with self.at(eps):
            terms = self.terms(self.net)
            if not all(torch.isfinite(value) for value in terms):  # going back, torch's 2-D grid_sample crashes on NaN
                return math.nan, torch.full_like(self.w, math.nan)
            if not terms[term].requires_grad:  # a constant
                return float(terms[term]), torch.zeros_like(self.w)
            gradients = torch.autograd.grad(terms[term], self.params, materialize_grads=True)
            return float(terms[term].detach()), vector(gradients)


def vector(of: nn.Module | Iterable[Tensor]) -> Tensor:
    """A network's weights (without their graph), or tensors such as a direction's, in a row, `(n,)`."""
    tensors = [p.detach() for p in of.parameters()] if isinstance(of, nn.Module) else of
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def terms_on(batch: Batch, dtype: torch.dtype, **settings: Any) -> TermsOf:
    """The function from a network to its TERMS on `batch`, computed in `dtype`; settings: those of `objective`."""
    there = batch.to(dtype)
    return lambda net: objective(net, there, **settings)
