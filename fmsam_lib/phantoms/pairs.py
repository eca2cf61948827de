"""Labelled image pairs of several "anatomies", made on the spot, with the true map known.

An anatomy is a list of soft shapes in canonical RAS coordinates `q` in [-1, 1]^3 (x left to right, y
posterior to anterior, z inferior to superior). A subject is a smooth invertible map `T` from its own
grid into that space, so that `image(x) = anatomy(T(x))`, and between two of them

    T_moving(phi(x)) = T_fixed(x)        phi: the true map, fixed to moving.

Inter-subject pairs have two independent `T`; intra-subject ones `T_fixed = motion o T_moving`.
A 2-D pair is one plane of the 3-D anatomy, deformed within itself, made by the same code.
"""

import functools
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fmsam_lib.pair import Pair
from fmsam_lib.phantoms.anatomies import DOMAINS, INF, Domain
from fmsam_lib.phantoms.appearance import acquire, new_look, normalise, paint, refine

Field = Callable[[Tensor], Tensor]  # from points (3, ...) in [-1, 1] to displacements of the same shape


def make_pair(domain: str, *, seed: int, index: int, shape: tuple[int, ...]) -> Pair:
    """The pair number `index` of a domain, the same each time; another seed is another data set.

    shape: `(X, Y)` or `(X, Y, Z)`, at least 16 each. In 2-D the axes are those of `DOMAINS[domain].plane`
    that remain, in order: `(y, z)` for the sagittal knee.

    >>> pair = make_pair("brain-mr", seed=0, index=3, shape=(32, 32, 32))
    >>> pair.name, tuple(pair.fixed.shape), pair.labels[3]
    ('brain-mr-0-3', (1, 32, 32, 32), 'ventricles')
    """
    return _one_thread(os.getpid()).submit(_make_pair, DOMAINS[domain], seed, index, tuple(shape)).result()


@functools.cache
def _one_thread(process: int) -> ThreadPoolExecutor:
    """Where pairs are made: torch has a number of threads for each thread, and this one's is 1.

    Hundreds of small operations: a second thread gains little, costs much on a busy machine, may change bits. Whoever
    asks for a pair keeps the number that it has. (A forked process has none of its parent's threads.)
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "pairs", initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(torch.get_num_threads).result()  # starts it, and torch in it, which takes the number that was set last
    torch.set_num_threads(threads)  # what threads to come begin with
    return pool


def _make_pair(d: Domain, seed: int, index: int, shape: tuple[int, ...]) -> Pair:
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(d.name.encode()), seed, index]))
    across, level = d.plane if len(shape) == 2 else (None, 0.0)
    axes = [axis for axis in range(3) if axis != across]
    grid = list(shape)
    if across is not None:
        grid.insert(across, 1)  # from here on a plane is a volume of one slice

    moving_subject, moving_look = _subject(rng, d.variation, axes), new_look(rng)
    if breath_or_beat := d.motion:
        fixed_subject, fixed_look, strength = moving_subject, moving_look, rng.uniform(0.8, 1.2)
        motion = _within(axes, lambda q: strength * breath_or_beat(q))
    else:
        fixed_subject, fixed_look = _subject(rng, d.variation, axes), new_look(rng)
        motion = torch.zeros_like

    # The maps are so smooth that it is enough to know them on a coarse lattice; cubic splines do the rest.
    nodes = [torch.linspace(-1, 1, 24) if n > 1 else torch.tensor([float(level)]) for n in grid]
    x = torch.stack(torch.meshgrid(*nodes, indexing="ij"))
    q_moving, q_fixed = x + moving_subject(x), x + fixed_subject(x)
    q_fixed = q_fixed + motion(q_fixed)
    phi = _solve(moving_subject, q_fixed)
    q_moving, q_fixed, phi = refine(q_moving, grid), refine(q_fixed, grid), refine(phi, grid)

    landmarks = _landmarks(d, across, level)
    moving_landmarks = _solve(moving_subject, landmarks, 30)
    fixed_landmarks = _solve(fixed_subject, _solve(motion, landmarks, 30), 30)
    seen = (torch.cat([moving_landmarks, fixed_landmarks]).abs() < 1).all(dim=0)

    moving, moving_label = paint(d, q_moving, moving_look, second=False)
    fixed, fixed_label = paint(d, q_fixed, fixed_look, second=d.pairing == "intra-subject")
    moving, fixed = (normalise(acquire(image, d, rng), d.modality) for image in (moving, fixed))

    spacing = tuple(d.field_of_view[axis] / (n - 1) for axis, n in zip(axes, shape, strict=True))
    return Pair(
        name=f"{d.name}-{seed}-{index}",
        moving=moving.view(1, *shape),
        fixed=fixed.view(1, *shape),
        moving_label=moving_label.view(1, *shape),
        fixed_label=fixed_label.view(1, *shape),
        labels=dict(d.labels),
        spacing=spacing,
        affine=_affine(d, axes, spacing, across, level),
        true_map=(phi[axes].view(len(axes), *shape) + 1) / 2,
        moving_landmarks=(moving_landmarks[axes][:, seen].T + 1) / 2,
        fixed_landmarks=(fixed_landmarks[axes][:, seen].T + 1) / 2,
    )


def _subject(rng: np.random.Generator, variation: float, axes: list[int]) -> Field:
    """A random displacement `u(x) = (L x + shift) + sum_k a_k sin(w_k . x + p_k)`.

    Its gradient is below `|L| + sum_k |a_k| |w_k| < 1` everywhere, so `x + u(x)` cannot fold.
    """
    linear, shift = rng.uniform(-0.07, 0.07, (3, 3)), rng.uniform(-0.06, 0.06, (3, 1))
    direction = rng.standard_normal((5, 3))
    w = direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(1.5, 4.0, (5, 1))
    p = rng.uniform(0, 2 * np.pi, (5, 1))
    a = rng.standard_normal((3, 5)) / np.linalg.norm(w, axis=1)
    a *= variation / (np.linalg.norm(a, axis=0) * np.linalg.norm(w, axis=1)).sum()
    L, t, W, P, A = (torch.tensor(m, dtype=torch.float32) for m in (linear, shift, w, p, a))

    return _within(axes, lambda x: L @ x.flatten(1) + t + A @ torch.sin(W @ x.flatten(1) + P))


def _within(axes: list[int], displacement: Field) -> Field:
    """A plane deforms within itself: no displacement across."""
    keep = torch.tensor([float(axis in axes) for axis in range(3)])
    return lambda x: displacement(x).view_as(x) * keep.view(3, *[1] * (x.dim() - 1))


def _solve(displacement: Field, target: Tensor, iterations: int = 12) -> Tensor:
    """The points `y` with `y + displacement(y) = target`, both `(3, ...)`, by fixed-point iteration."""
    y = target
    for _ in range(iterations):
        y = target - displacement(y)
    return y


def _landmarks(d: Domain, across: int | None, level: float) -> Tensor:
    """Centre and the ends of the axes of every labelled part, `(3, L)` canonical, well inside the grid."""
    points = []
    for part in d.parts:
        if part.name not in d.labels.values() or part.keep:
            continue
        centre, radii = np.array(part.centre), np.array(part.radii)
        radii[radii == INF] = 0
        if across is not None:  # the plane cuts an ellipsoid in an ellipse
            square = 1 - ((level - centre[across]) / part.radii[across]) ** 2
            if square <= 0:
                continue
            centre[across], radii = level, radii * np.sqrt(square)
            radii[across] = 0
        points += [centre, *(centre + np.diag(radii)[radii > 0]), *(centre - np.diag(radii)[radii > 0])]
    inside = [point for point in points if (np.abs(point) < 0.8).all()]
    return torch.tensor(np.array(inside).T, dtype=torch.float32)


def _affine(d: Domain, axes: list[int], spacing: tuple[float, ...], across: int | None, level: float) -> Tensor:
    """Index to mm, `(4, 4)`, the field of view's centre at the origin; a plane's third column is across it."""
    affine = np.zeros((4, 4))
    affine[axes, range(len(axes))] = spacing
    affine[:3, 3] = -np.array(d.field_of_view) / 2
    affine[3, 3] = 1
    if across is not None:
        affine[across, 2:] = 1, level * d.field_of_view[across] / 2
    return torch.from_numpy(affine)
