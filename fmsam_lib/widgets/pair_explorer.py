"""An image pair and its registrations, explored by hand: linked planes, a crosshair that reads out, eight views.

The browser gets the volumes once, as bytes, and does the rest itself, `pair_explorer.js`: a move asks nothing of the
kernel. It warps the planes in view alone, so any strength of a transform is as quick as the whole.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import Image
from matplotlib import colormaps, image
from torch import Tensor

from fmsam_lib.checking import ConfigError
from fmsam_lib.model.spatial import identity_map, voxels
from fmsam_lib.model.transform import Transform
from fmsam_lib.pair import Pair
from fmsam_lib.plotting import slices
from fmsam_lib.widgets.sliders import in_a_notebook

SIDE_BY_SIDE = "side by side"
OF_IMAGES = (SIDE_BY_SIDE, "checkerboard", "overlay", "difference", "blend", "flicker")
OF_MAPS = ("deformation grid", "Jacobian")
ALL = "all three"
Map = Transform | Tensor


def explore(
    pair: Pair, phi: Map | Mapping[str, Map] | None = None, *, interactive: bool | None = None
) -> "Explorer | Image":
    """An explorer of a pair, which shows itself at the end of a cell; without a kernel it is a still picture.

    phi: a `Transform`, its map `(1, D, *S)`, several of them by name, or None for the images alone.
    interactive: whether there is an explorer; unless given, as `sliders.in_a_notebook` decides.
    Raises ValueError when a map is not on the pair's grid, or not finite.

    >>> explore(pair, phi)                            # doctest: +SKIP
    >>> explore(pair, {"Adam": phi_a, "SAM": phi_b})  # doctest: +SKIP
    """
    named = phi if isinstance(phi, Mapping) else {} if phi is None else {"warped": phi}
    maps = {name: slices.check_map(pair, p.map if isinstance(p, Transform) else p) for name, p in named.items()}
    return Explorer(pair, maps) if in_a_notebook(interactive) else Image(still(pair, maps))


def still(pair: Pair, maps: Mapping[str, Tensor]) -> bytes:
    """The middle plane under each map `(1, D, *S)`, one below the other, as a PNG."""
    figures = [slices.registration(pair, phi_map) for phi_map in maps.values()] or [slices.registration(pair)]
    for figure, name in zip(figures, maps if len(maps) > 1 else (), strict=False):
        figure.suptitle(f"{figure.get_suptitle()}: {name}", fontsize=11)
    pictures = [image.imread(io.BytesIO(slices.png(figure, compression=1))) for figure in figures]
    image.imsave(buffer := io.BytesIO(), np.concatenate(pictures), format="png")
    return buffer.getvalue()


class Explorer(anywidget.AnyWidget):
    """What the browser shows, both ways: set `explorer.strength = 0.5`, or read `explorer.at` after a click.

    at: the crosshair's sample along each axis. strength: how much of the maps is applied, `id + strength (phi - id)`.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    facts = traitlets.Dict().tag(sync=True)
    volumes = traitlets.Dict().tag(sync=True)
    view = traitlets.Enum((*OF_IMAGES, *OF_MAPS), SIDE_BY_SIDE).tag(sync=True)
    plane = traitlets.Enum((ALL, *slices.PLANES), ALL).tag(sync=True)
    at = traitlets.List(traitlets.Int()).tag(sync=True)
    strength = traitlets.Float(1.0, min=0, max=1).tag(sync=True)
    squares = traitlets.Int(8, min=2, max=24).tag(sync=True)
    blend = traitlets.Float(0.5, min=0, max=1).tag(sync=True)
    labels = traitlets.Bool(True).tag(sync=True)
    crosshair = traitlets.Bool(True).tag(sync=True)

    def __init__(self, pair: Pair, maps: Mapping[str, Tensor]):
        shape = tuple(pair.fixed.shape[1:])
        images = {"fixed": pair.fixed, "moving": pair.moving}
        volumes = {name: (image.clamp(0, 1) * 255).round().byte().numpy().tobytes() for name, image in images.items()}
        labels = {"fixed_label": pair.fixed_label, "moving_label": pair.moving_label}
        given = {name: label.numpy() for name, label in labels.items() if label is not None}
        numbers = np.unique(np.concatenate([[0], *(label.ravel() for label in given.values())]))
        numbers = np.concatenate([[0], numbers[numbers != 0]])  # the browser gets ranks, so any number will do
        for name, label in given.items():
            rank = np.argsort(numbers)[np.searchsorted(np.sort(numbers), label)]
            volumes[name] = rank.astype(np.min_scalar_type(len(numbers) - 1)).tobytes()
        scales = []
        for n, (name, phi_map) in enumerate(maps.items()):
            if not phi_map.isfinite().all():
                raise ConfigError(f"map {name!r}: expected finite numbers, got nan or inf: register the pair again")
            steps = voxels(phi_map - identity_map(shape), shape)[0].numpy()  # (D, *S) in samples
            scales.append(max(float(np.abs(steps).max()), 1e-6) / 32767)
            volumes[str(n)] = np.rint(steps / scales[-1]).astype(np.int16).tobytes()
        facts: dict[str, Any] = {
            "title": pair.title,
            "shape": shape,
            "spacing": pair.spacing or (1.0,) * len(shape),
            "moving_spacing": pair.moving_spacing or pair.spacing or (1.0,) * len(shape),
            "unit": pair.unit if pair.spacing else "voxel",
            "ends": [slices.ends_of(pair.affine, axis).strip() for axis in range(len(shape))],
            "names": ["background"] + [pair.labels.get(int(n), f"label {n}") for n in numbers[1:]],
            "maps": list(maps),
            "scales": scales,  # samples a step of the maps' integers
            "planes": slices.PLANES if len(shape) == 3 else (),
            "views": (*OF_IMAGES, *OF_MAPS) if maps else OF_IMAGES,
            "colours": (colormaps["PuOr_r"](np.arange(256))[:, :3] * 255).round().astype(int).tolist(),
        }
        super().__init__(facts=facts, volumes=volumes, at=[n // 2 for n in shape])
        self._still = (pair, maps)

    @traitlets.validate("view")
    def _offered(self, proposal: Any) -> str:
        if proposal.value not in (views := self.facts["views"]):
            raise ConfigError(f"expected a view out of {', '.join(views)}, got {proposal.value!r}: give maps to see it")
        return proposal.value

    @traitlets.validate("at")
    def _inside(self, proposal: Any) -> list[int]:
        at, shape = proposal.value, self.facts["shape"]
        if len(at) != len(shape) or not all(0 <= i < n for i, n in zip(at, shape, strict=True)):
            raise ConfigError(f"expected at to be a sample of the grid {shape}, counted from 0, got {at}: choose one")
        return at

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and the still picture for whoever has no kernel to show it."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"image/png": base64.b64encode(still(*self._still)).decode()}, metadata
