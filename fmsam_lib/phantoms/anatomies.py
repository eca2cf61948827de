"""The synthetic anatomies as tables: soft shapes in canonical RAS coordinates, later ones painted over earlier ones.

`DOMAINS` says what each stands for, how two images of it differ and how they are acquired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

INF = float("inf")


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
    parts: tuple[Part, ...]
    field_of_view: tuple[float, float, float]  # mm
    plane: tuple[int, float]  # the 2-D image is where this axis has this value
    air: float  # what surrounds the parts
    noise: float  # standard deviation, in the units of value
    variation: float  # bound on the gradient of a subject's smooth deformation; all of it must stay below 1
    motion: Callable[[Tensor], Tensor] | None = None  # the displacement of intra-subject pairs


def _both(*parts: Part) -> list[Part]:
    """Every part on the right as written, and its mirror image on the left."""
    pairs = []
    for part in parts:
        x, y, z = part.centre
        axis, degrees = part.tilt
        mirrored = part._replace(centre=(-x, y, z), tilt=(axis, degrees if axis == 0 else -degrees))
        pairs += [p._replace(name=p.name.format(side=side)) for p, side in ((part, "right"), (mirrored, "left"))]
    return pairs


def _rim(parts: list[Part], name: str, value: float, width: float, **changes) -> list[Part]:
    """A layer around the union of `parts`: the same ones, larger, to be painted before them."""
    changes |= {"name": name, "value": value, "texture": 0.0}
    return [p._replace(radii=(a + width, b + width, c + width), **changes) for p in parts for a, b, c in [p.radii]]


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
        parts=BRAIN, field_of_view=(180, 216, 180), plane=(1, -0.2), air=0, noise=2.5, variation=0.6),
    Domain("lung-ct", "CT", "intra-subject",
        {1: "left lung", 2: "right lung", 3: "heart", 4: "liver", 5: "spine"}, motion=_breathe,
        parts=LUNG, field_of_view=(340, 260, 320), plane=(1, -0.2), air=-1000, noise=15, variation=0.4),
    Domain("knee-mr", "MR", "inter-subject",
        {1: "femur", 2: "tibia", 3: "femoral cartilage", 4: "tibial cartilage", 5: "patella"},
        parts=KNEE, field_of_view=(140, 140, 160), plane=(0, 0.2), air=0, noise=5, variation=0.5),
    Domain("abdomen-ct", "CT", "inter-subject",
        {1: "liver", 2: "spleen", 3: "left kidney", 4: "right kidney", 5: "stomach", 6: "aorta"},
        parts=ABDOMEN, field_of_view=(380, 290, 300), plane=(2, 0), air=-1000, noise=15, variation=0.6),
    Domain("heart-mr", "MR", "intra-subject", {1: "RV", 2: "myocardium", 3: "LV"}, motion=_beat,
        parts=HEART, field_of_view=(240, 220, 120), plane=(2, 0), air=0, noise=5, variation=0.4),
)}
