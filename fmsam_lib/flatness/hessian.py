"""The curvature of the loss at trained weights: eigenvalues, trace and spectrum of its Hessian.

Products `H v` are exact: backward through the gradient (Pearlmutter 1994), which works through `grid_sample`. The
interpolation's cells and LeakyReLU are kinks: the exact Hessian is that of the piece that w lies in, and need not
foretell a rise at a distance, which `sharpness` measures.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import nn
from tqdm.auto import tqdm

from fmsam_lib.flatness.sharpness import COLUMNS, mean_interval, row, sharpness
from fmsam_lib.flatness.weight_space import TERMS, TermsOf, WeightSpace, terms_on, vector
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Landscape
from fmsam_lib.training.losses import Batch

TOLERANCE = 1e-5  # of an eigenvalue's residual, relative to it; its own error is of the square
RESTARTS = 100  # of 10 to 20 products each, before an eigenvalue counts as not converged

Product = Callable[[np.ndarray], np.ndarray]  # v to H v, both (n,)


def measures(net: GradICON, batch: Batch, loss: dict, settings: Landscape) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure of flatness of a network on one batch: `sharpness` and `curvature` in one table, and the spectrum.

    Rises are measured in float64, where they may be a millionth of the loss; curvature in float32, which is several
    times as fast and gave the same largest eigenvalue but for 2e-5 of it.

    loss: the settings of `objective`, those of the network's training.
    """
    batch = batch.to(next(net.parameters()).device)
    first = sharpness(net, terms_on(batch, torch.float64, **loss), settings)
    second, spectrum = curvature(net, terms_on(batch, torch.float32, **loss), settings, torch.float32)
    return pd.concat([part for part in (first, second) if len(part)], ignore_index=True), spectrum


def curvature(
    net: nn.Module, terms: TermsOf, settings: Landscape, dtype: torch.dtype = torch.float64
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the Hessian H of each of the loss's TERMS tells at a network's weights; rows of `COLUMNS`, and the spectrum.

    - eigenvalue_1 ... of the `eigenvalues` largest; 0: none. NaN, with a warning, where one does not converge. (The
      smallest takes ten times as many products, and a spurious 0 comes first where the search ends early: see the
      spectrum instead.)
    - trace: Hutchinson's estimate from `probes` random signs, with its 95 % t-interval; 0: neither this nor the
      spectrum
    - the spectrum, rows of `spectral_density` and their term, from as many probes of `lanczos_steps`

    dtype: what the products are computed in; `terms` must suit it. A term that is constant or linear has zeros, one
    that is not finite NaN. The graph of the gradient is kept while a term is measured, several times as large as a
    training step's, beside 20 (more eigenvalues: more) or `lanczos_steps` vectors of all weights.
    """
    space, seed, probes = WeightSpace(net, terms, dtype), settings.direction_seed, settings.probes
    n, eigenvalues, steps = len(space.w), settings.eigenvalues, settings.lanczos_steps
    rows, spectra = [], []
    for i, term in enumerate(tqdm(TERMS, desc="Hessian", unit="term", leave=False)):
        product = hessian(space, i)
        values = largest_eigenvalues(product, n, eigenvalues, seed=seed) if eigenvalues else []
        rows += [row(f"eigenvalue_{k}", value, term) for k, value in enumerate(values, start=1)]
        if probes:
            mean, low, high = trace(product, n, probes, seed=seed)
            rows.append(row("trace", mean, term, low=low, high=high, n=probes))
        spectra.append(spectral_density(product, n, probes, steps, seed=seed).assign(term=term))
    return pd.DataFrame(rows, columns=COLUMNS), pd.concat(spectra, ignore_index=True)


@torch.inference_mode(False)  # whoever asks inside it or `no_grad` would get zeros
def hessian(space: WeightSpace, term: int) -> Product:
    """The exact product `v -> H v` of one of the TERMS at w, all NaN where a term or its gradient is not finite.

    The gradient's graph is built once, here; a product is one way back through it.
    """
    values = space.terms(space.net)
    finite, gradient = all(torch.isfinite(value) for value in values), values[term]
    if finite and gradient.requires_grad:  # not a constant; a parameter that it does not depend on gets zeros
        gradient = vector(torch.autograd.grad(gradient, space.params, create_graph=True, materialize_grads=True))
    if not (finite and torch.isfinite(gradient).all()):
        return lambda v: np.full_like(v, np.nan)
    if not gradient.requires_grad:  # of a constant or linear term
        return np.zeros_like

    def product(v: np.ndarray) -> np.ndarray:
        along = torch.from_numpy(v).to(gradient)
        products = torch.autograd.grad(gradient, space.params, along, retain_graph=True, materialize_grads=True)
        return vector(products).cpu().double().numpy()

    return product


def largest_eigenvalues(product: Product, n: int, count: int, *, seed: int = 0) -> list[float]:
    """The `count` largest eigenvalues of a symmetric matrix of n rows, falling, by ARPACK.

    NaN, with a warning, for those that don't converge; NaN for all where a product is not finite.
    """
    start = np.random.default_rng(seed).standard_normal(n)
    how = {"v0": start, "rng": np.random.default_rng(seed), "maxiter": RESTARTS, "tol": TOLERANCE}
    matrix = LinearOperator((n, n), matvec=lambda v: np.asarray_chkfinite(product(v.ravel())), dtype=float)
    try:
        if not matrix.matvec(start).any():  # a matrix of zeros, which ARPACK does not take
            return [0.0] * count
        found = eigsh(matrix, count, which="LA", return_eigenvectors=False, **how)
    except ValueError:  # of asarray_chkfinite
        return [math.nan] * count
    except ArpackNoConvergence as problem:
        found = problem.eigenvalues
        said = f"{count - len(found)} of the {count} largest eigenvalues did not converge in {RESTARTS} restarts"
        warnings.warn(f"{said} and are NaN: measure fewer, or look at the spectrum", stacklevel=2)
    return [*np.sort(found)[::-1].tolist(), *[math.nan] * (count - len(found))]


def trace(product: Product, n: int, probes: int, *, seed: int = 0) -> tuple[float, float, float]:
    """Hutchinson's estimate of a matrix's trace: the mean of `z^T H z` over random signs z, and its 95 % t-interval."""
    random = np.random.default_rng(seed)
    signs = (random.choice([-1.0, 1.0], n) for _ in range(probes))
    return mean_interval([float(z @ product(z)) for z in signs])


def spectral_density(product: Product, n: int, probes: int, steps: int, *, seed: int = 0) -> pd.DataFrame:
    """How the eigenvalues of a symmetric matrix of n rows are spread, by stochastic Lanczos quadrature.

    Rows probe, node, weight: for a normal random vector, `sum of weight f(node)` estimates the mean of f over all
    eigenvalues, its weights adding up to 1 (Ghorbani et al. 2019, arXiv 1901.10159). At most `steps` nodes a probe,
    fewer where the matrix has fewer different eigenvalues; one of NaN where products are not finite.
    """
    random, rows = np.random.default_rng(seed), []
    for probe in range(probes):
        nodes, weights = lanczos(product, random.standard_normal(n), steps)
        rows += [(probe, node, weight) for node, weight in zip(nodes, weights, strict=True)]
    return pd.DataFrame(rows, columns=["probe", "node", "weight"])


def lanczos(product: Product, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss quadrature that `steps` products make of a symmetric matrix, seen from `start`.

    Every vector is made orthogonal to all before it, twice: rounding otherwise brings found eigenvalues back as new.
    """
    basis = np.empty((steps, len(start)))
    diagonal, off, scale = [], [], 0.0
    vector = start / np.linalg.norm(start)
    for step in range(steps):
        basis[step] = vector
        vector = product(vector)
        diagonal.append(float(basis[step] @ vector))
        if not math.isfinite(diagonal[-1]):
            return np.array([np.nan]), np.array([np.nan])
        scale = max(scale, float(np.linalg.norm(vector)))
        for _ in range(2):
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        rest = float(np.linalg.norm(vector))
        if step == steps - 1 or rest <= 1e-10 * scale:  # nothing new in it: all that `start` reaches is found
            break
        off.append(rest)
        vector = vector / rest
    nodes, vectors = eigh_tridiagonal(diagonal, off)
    return nodes, vectors[0] ** 2
