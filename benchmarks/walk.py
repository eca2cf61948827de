"""The animation of the README: a walk over the loss surface, from Adam's solution to SAM's and around.

    python benchmarks/walk.py

Trains both networks for `STEPS` steps from one start (brain-mr, 64 x 64, seed 0) and writes
figures/landscape_walk.gif, in about three minutes on a quiet core. Notebook 30 is where you walk yourself.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from PIL import Image, ImageSequence

from fmsam_lib.flatness.mode_connectivity import from_one_start
from fmsam_lib.images.domains import open_domain
from fmsam_lib.plotting import slices
from fmsam_lib.records import PROJECT
from fmsam_lib.training.loop import train
from fmsam_lib.widgets.landscape_walker import Walk

STEPS, POINTS, FRAMES = 200, 31, 18
FPS, DPI, COLOURS = 2, 85, 64


def way(ground: Walk) -> np.ndarray:
    """Points `(FRAMES, 2)`: from Adam to SAM, on to the start, up the wall behind, and back to Adam."""
    adam, sam, start = (np.array(ground.places[name]) for name in ("Adam", "SAM", "the start"))
    beyond = (adam + sam - start) * [0.95, 0.95]  # opposite the start, where the loss is high
    stations = np.array([adam, sam, start, (adam + sam) / 2, beyond, adam])
    legs = np.linalg.norm(np.diff(stations, axis=0), axis=1)
    at = np.linspace(0, legs.sum(), 2 * FRAMES)[::2]  # the end, which is the beginning, comes once
    return np.stack([np.interp(at, np.r_[0, legs.cumsum()], axis) for axis in stations.T], 1)


def animate(ground: Walk, file: Path) -> None:
    """Each frame: the surface with the point, the warped image with outlines, the deformation grid, the numbers."""
    figure, surface = ground.picture()
    figure.set_size_inches(9, 3.7)
    grid = figure.add_gridspec(1, 3, width_ratios=[1.45, 1, 1])
    surface.set_subplotspec(grid[0])
    axes = [surface, *(figure.add_subplot(grid[n]) for n in (1, 2))]
    (point,) = axes[0].plot([], [], "o", color="#D55E00", markeredgecolor="white", markersize=11, markeredgewidth=1.5)
    (trail,) = axes[0].plot([], [], ":", color="white", linewidth=1.2)
    places = way(ground)

    def frame(i: int) -> list:
        phi, facts = ground.at(*places[i])
        cut = slices.cut(ground.pair, phi)
        point.set_data(*places[i : i + 1].T)
        trail.set_data(*places[: i + 1].T)
        for ax in axes[1:]:
            ax.clear()
            slices.show(ax, cut, cut.warped)
        slices.outline(axes[1], cut, cut.fixed_label, slices.FIXED_LINE)
        slices.outline(axes[1], cut, cut.warped_label, slices.WARPED_LINE)
        slices.deformed_grid(axes[2], cut)
        axes[1].set_title(f"warped; total loss {facts['total loss']:5.2f}", fontsize=10)
        axes[2].set_title(f"deformation grid; Dice {facts['mean Dice']:.2f}", fontsize=10)
        return []

    slices.contour_legend(figure, "warped")
    FuncAnimation(figure, frame, FRAMES).save(file, PillowWriter(fps=FPS), dpi=DPI)
    with Image.open(file) as recorded:  # again, with few colours: a third of the size
        frames = [
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            for picture in ImageSequence.Iterator(recorded)
        ]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, optimize=True)


def main() -> None:
    torch.set_num_threads(1)
    domain = open_domain("brain-mr", shape=(64, 64))
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / name / "seed0" for name in ("adam", "sam")]
        for run in runs:
            train(domain, optimizer=run.parent.name, steps=STEPS, lr=0.004, out=run)
        _, (trained, _), (start, adam, sam) = from_one_start(*map(str, runs))
    ground = Walk({"Adam": adam, "SAM": sam}, domain.test_pair(0), start, points=POINTS, **trained.loss())
    file = PROJECT / "figures" / "landscape_walk.gif"
    animate(ground, file)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
