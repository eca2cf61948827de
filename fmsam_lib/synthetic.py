"""Labelled image pairs of several "anatomies", made on the spot, with the true map known.

An anatomy is a list of soft shapes in canonical RAS coordinates `q` in [-1, 1]^3 (x left to right, y
posterior to anterior, z inferior to superior). A subject is a smooth invertible map `T` from its own
grid into that space, so that `image(x) = anatomy(T(x))`, and between two of them

    T_moving(phi(x)) = T_fixed(x)        phi: the true map, fixed to moving.

Inter-subject pairs have two independent `T`; intra-subject ones `T_fixed = motion o T_moving`.
A 2-D pair is one plane of the 3-D anatomy, deformed within itself, made by the same code.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class Pair:
    """A moving and a fixed image of one grid, and what is known about them.

    moving, fixed: `(1, *S)` float32 in [0, 1].
    moving_label, fixed_label: `(1, *S)` uint8, 0 is background; None where there are no labels.
    labels: the structures' names by number, without the background.
    true_map: `(D, *S)`, where a point of the fixed grid lies in the moving image, unit coordinates.
    moving_landmarks, fixed_landmarks: `(L, D)` corresponding points, unit coordinates.
    affine: `(4, 4)` of the fixed grid, index to mm (RAS); spacing: mm per sample along each axis.
    unit: of the spacing: "voxel" (of the file) where its millimetres are not known.
    """

    name: str
    moving: Tensor
    fixed: Tensor
    moving_label: Tensor | None = None
    fixed_label: Tensor | None = None
    labels: dict[int, str] = field(default_factory=dict)
    spacing: tuple[float, ...] = ()
    affine: Tensor | None = None
    true_map: Tensor | None = None
    moving_landmarks: Tensor | None = None
    fixed_landmarks: Tensor | None = None
    unit: str = "mm"


class Part(NamedTuple):
    """One shape of an anatomy, painted over those before it: `|(q - centre) / radii|_power < 1`."""

    name: str  # a label's name, or a description; "{side}" makes a left (x < 0) and a right one
    value: float  # HU, or arbitrary units of MR
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]  # INF: a tube or a slab along that axis
    power: int = 2  # 2: ellipsoid, 4: boxy
    tilt: tuple[int, float] = (0, 0.0)  # turned about this axis by so many degrees
    cut: tuple[int, float, float] | None = None  # only where low < q[axis] < high
    wave: tuple[float, float] | None = None  # the surface folded: amplitude, radians per unit
    texture: float = 0.0  # amplitude of the random pattern inside, in the units of value
    vessels: float = 0.0  # how much brighter a vessel in it is
    keep: bool = False  # paint the image, not the label
    change: float = 0.0  # added to value in the second image of an intra-subject pair


@dataclass(frozen=True)
class Domain:
    """A kind of images: its anatomy, how a pair of them differs, how they are acquired."""

    name: str
    modality: str  # "MR" or "CT"
    pairing: str  # "inter-subject" or "intra-subject"
    labels: dict[int, str]
    held_out: bool
    parts: tuple[Part, ...]
    field_of_view: tuple[float, float, float]  # mm
    plane: tuple[int, float]  # the 2-D image is where this axis has this value
    air: float  # what surrounds the parts
    noise: float  # standard deviation, in the units of value
    variation: float  # bound on the gradient of a subject's smooth deformation; all of it must stay below 1
    motion: Callable[[Tensor], Tensor] | None = None  # the displacement of intra-subject pairs


def make_pair(domain: str, *, seed: int, index: int, shape: tuple[int, ...]) -> Pair:
    """The pair number `index` of a domain, the same each time; another seed is another data set.

    shape: `(X, Y)` or `(X, Y, Z)`, at least 16 each. In 2-D the axes are those of `DOMAINS[domain].plane`
    that remain, in order: `(y, z)` for the sagittal knee.

    >>> pair = make_pair("brain-mr", seed=0, index=3, shape=(32, 32, 32))
    >>> pair.name, tuple(pair.fixed.shape), pair.labels[3]
    ('brain-mr-0-3', (1, 32, 32, 32), 'ventricles')

    Raises ValueError for an unknown domain, a shape that is too small or neither 2-D nor 3-D, or a
    negative index or seed.
    """
    _check(domain, seed, index, shape)
    # Hundreds of small operations: a second thread gains little, costs much on a busy machine, may change bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _make_pair(DOMAINS[domain], seed, index, tuple(shape))
    finally:
        torch.set_num_threads(threads)


def _make_pair(d: Domain, seed: int, index: int, shape: tuple[int, ...]) -> Pair:
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(d.name.encode()), seed, index]))
    across, level = d.plane if len(shape) == 2 else (None, 0.0)
    axes = [axis for axis in range(3) if axis != across]
    grid = list(shape)
    if across is not None:
        grid.insert(across, 1)  # from here on a plane is a volume of one slice

    moving_subject, moving_look = _subject(rng, d.variation, axes), _look(rng)
    if d.pairing == "inter-subject":
        fixed_subject, fixed_look, motion = _subject(rng, d.variation, axes), _look(rng), torch.zeros_like
    else:
        fixed_subject, fixed_look, motion = moving_subject, moving_look, _motion(rng, d, axes)

    # The maps are so smooth that it is enough to know them on a coarse lattice; cubic splines do the rest.
    nodes = [torch.linspace(-1, 1, 24) if n > 1 else torch.tensor([float(level)]) for n in grid]
    x = torch.stack(torch.meshgrid(*nodes, indexing="ij"))
    q_moving = x + moving_subject(x)
    q_fixed = x + fixed_subject(x)
    q_fixed = q_fixed + motion(q_fixed)
    phi = _solve(moving_subject, q_fixed)
    q_moving, q_fixed, phi = _refine(q_moving, grid), _refine(q_fixed, grid), _refine(phi, grid)

    landmarks = _landmarks(d, across, level)
    moving_landmarks = _solve(moving_subject, landmarks, 30)
    fixed_landmarks = _solve(fixed_subject, _solve(motion, landmarks, 30), 30)
    seen = (torch.cat([moving_landmarks, fixed_landmarks]).abs() < 1).all(dim=0)

    moving, moving_label = _paint(d, q_moving, moving_look, second=False)
    fixed, fixed_label = _paint(d, q_fixed, fixed_look, second=d.pairing == "intra-subject")
    moving, fixed = (_normalise(_acquire(image, d, rng), d.modality) for image in (moving, fixed))

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


# --- maps: functions from points (3, ...) in [-1, 1] to displacements of the same shape


def _subject(rng: np.random.Generator, variation: float, axes: list[int]) -> Callable[[Tensor], Tensor]:
    """A random displacement `u(x) = (L x + shift) + sum_k a_k sin(w_k . x + p_k)`.

    Its gradient is below `|L| + sum_k |a_k| |w_k| < 1` everywhere, so `x + u(x)` cannot fold.
    """
    linear = rng.uniform(-0.07, 0.07, (3, 3))
    shift = rng.uniform(-0.06, 0.06, (3, 1))
    direction = rng.standard_normal((5, 3))
    w = direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(1.5, 4.0, (5, 1))
    p = rng.uniform(0, 2 * np.pi, (5, 1))
    a = rng.standard_normal((3, 5)) / np.linalg.norm(w, axis=1)
    a *= variation / (np.linalg.norm(a, axis=0) * np.linalg.norm(w, axis=1)).sum()
    linear, shift, w, p, a = (torch.tensor(m, dtype=torch.float32) for m in (linear, shift, w, p, a))

    def displacement(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return linear @ x + shift + a @ torch.sin(w @ x + p)

    return _within(axes, displacement)


def _motion(rng: np.random.Generator, d: Domain, axes: list[int]) -> Callable[[Tensor], Tensor]:
    """One breath or beat of the domain's, weaker or stronger."""
    strength = rng.uniform(0.8, 1.2)
    return _within(axes, lambda q: strength * d.motion(q))


def _within(axes: list[int], displacement: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A plane deforms within itself: no displacement across."""
    keep = torch.tensor([float(axis in axes) for axis in range(3)])
    return lambda x: displacement(x).view_as(x) * keep.view(3, *[1] * (x.dim() - 1))


def _solve(displacement: Callable[[Tensor], Tensor], target: Tensor, iterations: int = 12) -> Tensor:
    """The points `y` with `y + displacement(y) = target`, both `(3, ...)`, by fixed-point iteration."""
    y = target
    for _ in range(iterations):
        y = target - displacement(y)
    return y


@functools.lru_cache(maxsize=64)
def _spline(coarse: int, fine: int) -> Tensor:
    """The matrix `(fine, coarse)` that interpolates samples of [0, 1] by a cubic spline."""
    if coarse == 1:
        return torch.ones(1, 1)
    weights = CubicSpline(np.linspace(0, 1, coarse), np.eye(coarse))(np.linspace(0, 1, fine))
    return torch.tensor(weights, dtype=torch.float32)


def _refine(lattice: Tensor, grid: list[int]) -> Tensor:
    """Values `(C, *lattice)` on a finer grid, `(C, *grid)`."""
    for n in grid:  # always the first axis of those left: what is done goes last
        lattice = torch.tensordot(lattice, _spline(lattice.shape[1], n), dims=([1], [1]))
    return lattice


# --- images: q is (3, *grid), the canonical coordinates of every sample


class Look(NamedTuple):
    """What differs between two people of the same shape: each part's brightness, and the texture inside."""

    brightness: np.ndarray  # (parts,)
    waves: Tensor  # (4, 3), radians per unit
    phases: Tensor  # (4, 1)


def _look(rng: np.random.Generator) -> Look:
    waves, phases = rng.choice([-1, 1], (4, 3)) * rng.uniform(4, 9, (4, 3)), rng.uniform(0, 2 * np.pi, (4, 1))
    return Look(rng.standard_normal(99), *(torch.tensor(m, dtype=torch.float32) for m in (waves, phases)))


def _texture(q: Tensor, look: Look) -> Tensor:
    """A blotchy pattern carried along by the anatomy: two waves, each with its phase modulated by another."""
    a, b, c, d = look.waves @ q.flatten(1) + look.phases
    return ((a + 1.5 * b.sin()).sin() * (c + 1.5 * d.sin()).sin()).mul_(2).view(q.shape[1:])


def _paint(d: Domain, q: Tensor, look: Look, second: bool) -> tuple[Tensor, Tensor]:
    """The anatomy at `q`: intensities before acquisition and labels, each `(*grid)`."""
    grid = q.shape[1:]
    image, label = torch.full(grid, float(d.air)), torch.zeros(grid, dtype=torch.uint8)
    texture = _texture(q, look)
    edge = 2 / (max(grid) - 1)  # a sample's width: boundaries are as soft as partial volume makes them
    numbers = {name: number for number, name in d.labels.items()}
    # Painting a part only where it can be: the range of q[axis] in each slice across each axis.
    ranges = [
        [f(q[axis], dim=[a for a in range(3) if a != axis]).numpy() for f in (torch.amin, torch.amax)]
        for axis in range(3)
    ]
    for part, brightness, box in zip(d.parts, look.brightness, _boxes(d.parts, ranges, edge), strict=False):
        if box is None:
            continue
        here = q[:, *box]
        depth = _outside(part, here)
        value = torch.tensor(float(part.value + d.noise * brightness + part.change * second))
        if part.texture:
            value = value + part.texture * texture[box]
        if part.vessels:
            value = value + part.vessels * _vessels(here)
        image[box].lerp_(value, (0.5 - depth / edge).clamp_(0, 1))
        if not part.keep:
            label[box].masked_fill_(depth < 0, numbers.get(part.name, 0))
    return image, label


def _boxes(parts: tuple[Part, ...], ranges: list, edge: float) -> list[tuple[slice, ...] | None]:
    """For every part the slices of the grid that it can touch; None if there are none."""
    centres, reach = np.array([part.centre for part in parts]), np.array([part.radii for part in parts])
    for r, part in zip(reach, parts, strict=True):
        if part.wave:
            r *= 1 + 1.5 * part.wave[0]
        if part.tilt[1]:
            r[np.arange(3) != part.tilt[0]] = max(np.delete(r, part.tilt[0]))
    bounds, empty = [], np.zeros(len(parts), dtype=bool)
    for (low, high), centre, r in zip(ranges, centres.T[..., None], reach.T[..., None] + edge, strict=True):
        touched = (high > centre - r) & (low < centre + r)  # (parts, n)
        bounds.append((touched.argmax(axis=1).tolist(), (len(low) - touched[:, ::-1].argmax(axis=1)).tolist()))
        empty |= ~touched.any(axis=1)
    return [
        None if nothing else tuple(slice(first[k], last[k]) for first, last in bounds)
        for k, nothing in enumerate(empty)
    ]


def _outside(part: Part, q: Tensor) -> Tensor:
    """About how far `q` is outside a part, negative inside; exact to first order across the thinnest axis."""
    p = [q[axis] - part.centre[axis] for axis in range(3)]
    axis, degrees = part.tilt
    if degrees:
        i, j = (axis + 1) % 3, (axis + 2) % 3
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        p[i], p[j] = c * p[i] + s * p[j], c * p[j] - s * p[i]
    level = sum((x / r).square_() ** (part.power // 2) for x, r in zip(p, part.radii, strict=True) if r < INF)
    level = (level.sqrt_() if part.power == 2 else level.sqrt_().sqrt_()) - 1
    if part.wave:
        amplitude, frequency = part.wave
        level = level + amplitude * _gyroid(frequency * q)
    depth = level * min(part.radii)
    if part.cut:
        axis, low, high = part.cut
        depth = torch.maximum(depth, torch.maximum(low - q[axis], q[axis] - high))
    return depth


def _gyroid(p: Tensor) -> Tensor:
    """A wavy field that folds in every direction, like a cortex: values in [-1.5, 1.5], period 2 pi."""
    s, c = p.sin(), p.cos()
    return s[0] * c[1] + s[1] * c[2] + s[2] * c[0]


def _vessels(q: Tensor) -> Tensor:
    """1 along a network of curves, where two gyroids vanish together, falling to 0 beside them."""
    return torch.exp(-8 * (_gyroid(8 * q).square() + _gyroid(7 * q.flip(0) + 1).square()))


def _acquire(image: Tensor, d: Domain, rng: np.random.Generator) -> Tensor:
    """What a scanner makes of the anatomy: noise, and for MR a bias field and a magnitude (Rician noise)."""
    noise = d.noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    if d.modality == "CT":
        return (image + noise).clamp(-1000, 1000)
    coarse = rng.standard_normal((1, *[4 if n > 1 else 1 for n in image.shape]), dtype=np.float32)
    bias = torch.exp(0.1 * _refine(torch.from_numpy(coarse), list(image.shape))[0])
    # The imaginary channel's noise is the real one's from the far side: unrelated, and no second draw.
    return torch.hypot(image * bias + noise, noise.flip(0, 1, 2))


def _normalise(image: Tensor, modality: str) -> Tensor:
    """To [0, 1]: CT from [-1000, 1000] HU, MR from its minimum to its 99th percentile."""
    low, high = (-1000, 1000) if modality == "CT" else (float(image.min()), float(np.percentile(image, 99)))
    return ((image - low) / (high - low)).clamp(0, 1)


def _landmarks(d: Domain, across: int | None, level: float) -> Tensor:
    """Centre and the ends of the axes of every labelled part, `(3, L)` canonical, well inside the grid."""
    points = []
    for part in d.parts:
        if part.name not in d.labels.values() or part.keep:
            continue
        centre, radii = np.array(part.centre), np.array(part.radii)
        radii[radii == INF] = 0
        if across is not None:  # the plane cuts an ellipsoid in an ellipse
            inside = 1 - ((level - centre[across]) / part.radii[across]) ** 2
            if inside <= 0:
                continue
            centre[across], radii = level, radii * np.sqrt(inside)
            radii[across] = 0
        points += [centre, *(centre + np.diag(radii)[radii > 0]), *(centre - np.diag(radii)[radii > 0])]
    points = np.array(points)
    return torch.tensor(points[(np.abs(points) < 0.8).all(axis=1)].T, dtype=torch.float32)


def _affine(d: Domain, axes: list[int], spacing: tuple[float, ...], across: int | None, level: float) -> Tensor:
    """Index to mm, `(4, 4)`, the field of view's centre at the origin; a plane's third column is across it."""
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[3, 3] = 1
    for column, (axis, mm) in enumerate(zip(axes, spacing, strict=True)):
        affine[axis, column] = mm
        affine[axis, 3] = -d.field_of_view[axis] / 2
    if across is not None:
        affine[across, 2] = 1
        affine[across, 3] = level * d.field_of_view[across] / 2
    return affine


def _check(domain: str, seed: int, index: int, shape: tuple[int, ...]) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"expected a domain out of {', '.join(DOMAINS)}, got {domain!r}: choose one of them")
    if len(shape) not in (2, 3) or min(shape) < 16:
        raise ValueError(
            f"expected a shape of 2 or 3 sides of at least 16, got {tuple(shape)}: give (64, 64) or (64, 64, 64)"
        )
    if index < 0 or seed < 0:
        raise ValueError(f"expected index and seed from 0 on, got index {index}, seed {seed}: count pairs from 0")


# --- anatomies: later parts cover earlier ones


def _both(*parts: Part) -> list[Part]:
    """Every part on the right as written, and its mirror image on the left."""
    pairs = []
    for part in parts:
        x, y, z = part.centre
        axis, degrees = part.tilt
        mirrored = part._replace(centre=(-x, y, z), tilt=(axis, degrees if axis == 0 else -degrees))
        pairs += [
            half._replace(name=part.name.format(side=side)) for half, side in ((part, "right"), (mirrored, "left"))
        ]
    return pairs


def _rim(parts: list[Part], name: str, value: float, width: float, **changes) -> list[Part]:
    """A layer around the union of `parts`: the same ones, larger, to be painted before them."""
    return [
        part._replace(name=name, value=value, radii=tuple(r + width for r in part.radii), texture=0.0, **changes)
        for part in parts
    ]


# fmt: off

BRAIN = (
    Part("cortex", 62, (0, 0, 0.14), (0.80, 0.90, 0.70), wave=(0.07, 15), texture=4),
    *_both(
        Part("cortex", 62, (0.47, 0.02, -0.28), (0.30, 0.55, 0.30), wave=(0.10, 15), texture=4),
        Part("white matter", 100, (0.36, -0.02, 0.14), (0.30, 0.72, 0.47), wave=(0.24, 15), texture=3),
        Part("white matter", 100, (0.47, 0.02, -0.24), (0.17, 0.42, 0.19), wave=(0.25, 15), texture=3),
        Part("sylvian fissure", 12, (0.68, 0.05, -0.08), (0.24, 0.40, 0.035), tilt=(1, -25)),
    ),
    Part("interhemispheric fissure", 12, (0, 0, 0.72), (0.035, 1.0, 0.46)),
    Part("white matter", 104, (0, -0.05, 0.27), (0.24, 0.45, 0.08)),  # corpus callosum
    *_both(
        Part("striatum", 72, (0.36, 0.02, 0.0), (0.11, 0.36, 0.19), tilt=(1, -12), texture=3),
        Part("striatum", 72, (0.24, 0.10, 0.19), (0.07, 0.36, 0.11), texture=3),
        Part("thalamus", 80, (0.14, -0.15, 0.0), (0.135, 0.22, 0.13), texture=3),
        Part("ventricles", 14, (0.12, -0.02, 0.17), (0.10, 0.44, 0.085), tilt=(1, 20)),
    ),
    Part("ventricles", 14, (0, -0.08, -0.02), (0.03, 0.17, 0.14)),
    *_both(
        Part("cistern", 12, (0.26, -0.46, -0.54), (0.41, 0.42, 0.30)),
        Part("cerebellum", 66, (0.25, -0.46, -0.56), (0.38, 0.39, 0.27), texture=3),
        Part("cerebellum", 94, (0.2, -0.42, -0.56), (0.22, 0.22, 0.13), wave=(0.35, 22), keep=True),
    ),
    Part("cistern", 12, (0, -0.16, -0.45), (0.19, 0.20, 0.38)),
    Part("brainstem", 92, (0, -0.18, -0.47), (0.155, 0.17, 0.42), texture=3),
)

LUNG = (
    Part("subcutaneous fat", -100, (0, 0, 0), (0.95, 0.86, INF), 4, texture=15),
    Part("muscle", 50, (0, 0, 0), (0.88, 0.77, INF), 4, texture=15),
    *[Part("rib", 420, (0, 0, z), (0.82, 0.72, 0.05), tilt=(0, -12)) for z in np.linspace(-0.7, 0.9, 7).round(2)],
    Part("chest wall", 45, (0, 0, 0), (0.76, 0.66, INF)),
    *_both(Part("{side} lung", -840, (0.40, -0.04, 0.02), (0.33, 0.58, 0.84), texture=30, vessels=650, change=130)),
    Part("mediastinum", 30, (0, 0.0, 0.30), (0.13, 0.40, 0.75), texture=15),
    Part("liver", 75, (0.34, 0.0, -0.85), (0.50, 0.62, 0.52), texture=20, vessels=60),
    Part("stomach", 30, (-0.42, 0.0, -0.92), (0.42, 0.55, 0.46), texture=15),
    Part("gas", -850, (-0.40, 0.05, -0.72), (0.16, 0.25, 0.10)),
    Part("heart", 60, (-0.16, 0.08, -0.24), (0.32, 0.38, 0.28), tilt=(1, 30), texture=15),
    Part("heart chamber", 160, (-0.18, 0.0, -0.24), (0.20, 0.28, 0.13), tilt=(1, 30), keep=True),
    Part("aorta", 170, (-0.14, -0.28, 0.1), (0.075, 0.075, INF), cut=(2, -1, 0.45)),
    *_both(
        Part("hilum", 120, (0.20, -0.12, 0.06), (0.16, 0.10, 0.06), tilt=(1, 35)),
        Part("bronchus", -950, (0.10, -0.16, 0.20), (0.15, 0.06, 0.045), tilt=(1, 40)),
    ),
    Part("trachea", -980, (0, -0.14, 0.75), (0.065, 0.08, 0.52)),
    Part("spine", 260, (0.02, -0.42, 0), (0.19, 0.25, INF), texture=40),
    *[Part("disc", 90, (0.02, -0.42, z), (0.18, 0.24, 0.03), keep=True) for z in np.linspace(-0.8, 0.8, 6).round(2)],
)


def _breathe(q: Tensor) -> Tensor:
    """Breathing out: the point of an exhale lies lower, and further out, in the inhale; the spine stays."""
    x, y, z = q
    below = torch.sigmoid((0.25 - z) / 0.22) * torch.tanh((1 + z) / 0.7)  # most at the diaphragm
    front = torch.sigmoid((y + 0.38) / 0.12)
    side = torch.exp(-((x / 0.8) ** 4))
    return torch.stack([0.08 * x * front, 0.12 * (y + 0.4) * front, -0.42 * below * front * side])


CONDYLES = [
    *_both(Part("femur", 190, (0.32, -0.10, 0.16), (0.34, 0.44, 0.32), texture=14)),
    Part("femur", 190, (0, 0.06, 0.75), (0.34, 0.24, 0.70), texture=14),
    Part("femur", 190, (0, 0.08, 0.22), (0.45, 0.32, 0.24), texture=14),
]
TIBIA = [
    Part("tibia", 190, (0, -0.06, -0.66), (0.68, 0.48, 0.21), 4, texture=14),
    Part("tibia", 190, (0, 0.0, -0.95), (0.36, 0.28, 0.5), texture=14),
]
KNEE = (
    Part("skin", 90, (0, 0, 0), (0.94, 0.94, INF)),
    Part("subcutaneous fat", 230, (0, 0, 0), (0.91, 0.91, INF), texture=12),
    Part("muscle", 75, (0, -0.08, 0), (0.80, 0.72, INF), texture=10),
    Part("fat pad", 215, (0, 0.48, -0.12), (0.40, 0.26, 0.36), texture=15),
    Part("popliteal fat", 215, (0, -0.56, 0.2), (0.5, 0.12, 0.5), texture=15),
    Part("popliteal artery", 20, (0.15, -0.58, 0.0), (0.05, 0.05, INF)),
    *_both(Part("tibial cartilage", 155, (0.34, -0.08, -0.39), (0.36, 0.46, 0.16))),
    *_rim(CONDYLES[:2], "femoral cartilage", 130, 0.13, cut=(2, -1, 0.12)),
    *_rim(CONDYLES, "cortical bone", 12, 0.035),
    *CONDYLES,
    *_both(*[Part("meniscus", 15, (0.34, y, -0.29), (0.3, 0.12, 0.08)) for y in (-0.50, 0.32)]),
    *_rim(TIBIA, "cortical bone", 12, 0.035),
    *TIBIA,
    Part("tendon", 15, (0, 0.66, 0.1), (0.22, 0.055, 0.85), tilt=(0, 6)),
    Part("patellar cartilage", 140, (0, 0.55, 0.28), (0.32, 0.12, 0.22)),
    Part("cortical bone", 12, (0, 0.65, 0.30), (0.36, 0.155, 0.285)),
    Part("patella", 195, (0, 0.65, 0.30), (0.32, 0.12, 0.25), texture=14),
)

ABDOMEN = (
    Part("subcutaneous fat", -105, (0, 0, 0), (0.94, 0.90, INF), texture=15),
    Part("muscle", 55, (0, -0.02, 0), (0.84, 0.78, INF), texture=20),
    *_both(*[
        Part("rib", 450, (x, y, 0), (0.09, 0.045, 0.8), tilt=(2, degrees))
        for x, y, degrees in ((0.78, 0.12, 90), (0.72, -0.34, 60), (0.5, -0.62, 20), (0.62, 0.45, -50))
    ]),
    Part("visceral fat", -95, (0, 0.02, 0), (0.77, 0.70, INF), texture=15),
    Part("bowel", 35, (0, 0.30, -0.35), (0.66, 0.36, 0.65), wave=(0.35, 11), texture=30),
    Part("bowel gas", -700, (0.1, 0.46, -0.4), (0.4, 0.1, 0.4), wave=(0.5, 13)),
    *_both(
        Part("psoas", 58, (0.22, -0.38, -0.4), (0.10, 0.13, 0.6), texture=12),
        Part("back muscle", 55, (0.24, -0.66, 0), (0.22, 0.14, INF), texture=15),
    ),
    Part("pancreas", 75, (0.0, 0.06, 0.02), (0.3, 0.09, 0.2), tilt=(2, -20), wave=(0.2, 20), texture=15),
    Part("liver", 110, (0.40, 0.05, 0.18), (0.36, 0.52, 0.58), 4, (2, 8), texture=18, vessels=70),
    Part("liver", 110, (0.10, 0.36, 0.28), (0.42, 0.22, 0.32), tilt=(2, -12), texture=18, vessels=70),
    Part("spleen", 130, (-0.58, -0.26, 0.16), (0.16, 0.32, 0.36), tilt=(2, -20), texture=18),
    Part("stomach", 40, (-0.36, 0.28, 0.16), (0.30, 0.24, 0.36), tilt=(2, 25), texture=18),
    Part("gas", -900, (-0.38, 0.37, 0.2), (0.2, 0.1, 0.22), tilt=(2, 15), keep=True),
    *_both(
        Part("{side} kidney", 190, (0.38, -0.38, -0.08), (0.16, 0.19, 0.38), tilt=(2, -25), texture=20),
        Part("renal sinus", -30, (0.34, -0.35, -0.08), (0.07, 0.07, 0.18), tilt=(2, -25), keep=True),
    ),
    Part("vena cava", 150, (0.13, -0.16, 0), (0.10, 0.07, INF)),
    Part("vertebra", 250, (0, -0.42, 0), (0.17, 0.15, INF), texture=50),
    Part("vertebral arch", 350, (0, -0.62, 0), (0.12, 0.10, 0.7)),
    Part("spinous process", 400, (0, -0.72, 0), (0.04, 0.13, 0.7)),
    Part("spinal canal", 30, (0, -0.6, 0), (0.075, 0.06, INF)),
    Part("aorta", 200, (-0.07, -0.18, 0), (0.10, 0.10, INF)),
)

HEART = (
    Part("subcutaneous fat", 210, (0, 0, 0), (0.98, 0.94, INF), 4, texture=12),
    Part("chest wall", 75, (0, -0.04, 0), (0.90, 0.82, INF), 4, texture=9),
    *_both(Part("lung", 14, (0.55, -0.1, 0.0), (0.36, 0.66, INF), texture=4)),
    Part("mediastinum", 110, (0.02, 0.05, 0), (0.55, 0.60, INF), texture=15),
    Part("liver", 95, (0.30, -0.62, 0), (0.60, 0.32, INF), texture=12, vessels=50),
    Part("spine", 130, (0.10, -0.92, 0), (0.20, 0.2, INF), texture=15),
    Part("aorta", 220, (-0.12, -0.72, 0), (0.09, 0.09, INF)),
    Part("pericardial fat", 190, (0.06, 0.04, 0), (0.56, 0.46, 0.95), texture=15),
    Part("RV wall", 75, (0.26, 0.06, 0.05), (0.33, 0.38, 0.84), tilt=(2, -20)),
    Part("RV", 205, (0.26, 0.06, 0.08), (0.28, 0.33, 0.78), tilt=(2, -20), texture=10),
    Part("myocardium", 70, (-0.10, 0.0, 0.05), (0.34, 0.34, 0.88), texture=8),
    Part("LV", 220, (-0.10, 0.0, 0.12), (0.175, 0.175, 0.76), texture=8),
    Part("papillary muscle", 80, (-0.20, 0.08, 0), (0.045, 0.045, 0.4), keep=True),
    Part("papillary muscle", 80, (-0.14, -0.11, 0), (0.045, 0.045, 0.4), keep=True),
)


def _beat(q: Tensor) -> Tensor:
    """Filling: the point of an end-diastolic heart lies further in at end-systole; far away nothing moves."""
    x, y, z = q
    along = torch.exp(-((z / 0.9) ** 4))
    left = -0.38 * torch.exp(-((((x + 0.10) ** 2 + y**2) / 0.36**2) ** 2)) * along
    right = -0.25 * torch.exp(-((((x - 0.30) ** 2 + (y - 0.06) ** 2) / 0.3**2) ** 2)) * along
    dx = left * (x + 0.10) + right * (x - 0.20)
    dy = left * y + right * (y - 0.06)
    return torch.stack([dx, dy, 0.08 * along * torch.exp(-(x**2 + y**2) / 0.4**2)])


# These stand in for uniGradICON's four training sets (HCP, COPDGene, OAI, Learn2Reg's AbdomenCTCT) and for
# a fifth that it never saw (ACDC, with its label numbers). The heart's z is its long axis: an x-y slice is short-axis.
DOMAINS = {d.name: d for d in (
    Domain("brain-mr", "MR", "inter-subject",
        {1: "cortex", 2: "white matter", 3: "ventricles", 4: "thalamus", 5: "striatum",
         6: "cerebellum", 7: "brainstem"},
        held_out=False, parts=BRAIN, field_of_view=(180, 216, 180), plane=(1, -0.2), air=0, noise=2.5, variation=0.6),
    Domain("lung-ct", "CT", "intra-subject",
        {1: "left lung", 2: "right lung", 3: "heart", 4: "liver", 5: "spine"}, motion=_breathe,
        held_out=False, parts=LUNG, field_of_view=(340, 260, 320), plane=(1, -0.2), air=-1000, noise=15, variation=0.4),
    Domain("knee-mr", "MR", "inter-subject",
        {1: "femur", 2: "tibia", 3: "femoral cartilage", 4: "tibial cartilage", 5: "patella"},
        held_out=False, parts=KNEE, field_of_view=(140, 140, 160), plane=(0, 0.2), air=0, noise=5, variation=0.5),
    Domain("abdomen-ct", "CT", "inter-subject",
        {1: "liver", 2: "spleen", 3: "left kidney", 4: "right kidney", 5: "stomach", 6: "aorta"},
        held_out=False, parts=ABDOMEN, field_of_view=(380, 290, 300), plane=(2, 0), air=-1000, noise=15, variation=0.6),
    Domain("heart-mr", "MR", "intra-subject", {1: "RV", 2: "myocardium", 3: "LV"}, motion=_beat,
        held_out=True, parts=HEART, field_of_view=(240, 220, 120), plane=(2, 0), air=0, noise=5, variation=0.4),
)}
