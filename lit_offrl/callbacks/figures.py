"""Figures of 2-D bandits: data, samples and maps over the action plane.

They use matplotlib's objects with the Agg canvas, which need no display and no global state of pyplot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import tensorboard_writers
from lit_offrl.system.files import write_atomically

DPI = 100
PANEL_INCHES = (3.3, 2.9)
TITLE_INCHES = 0.5
MOST_COLUMNS = 4
POINTS_DRAWN = 5000  # more of them hide each other
GRID = 50  # points of a map in each direction
DATA_COLOR = "0.8"
SAMPLE_COLOR = "#d62728"
START_COLOR = "#2ca02c"
PATHS_DRAWN = 300

Array = NDArray[np.float64]


def samples_figure(points: Array, labels: Array, samples: Mapping[str, Tensor], extent: float) -> Figure:
    """Return the data colored by reward, then each set of samples over it.

    Args:
        points: Data, `[n, 2]`.
        labels: Rewards, `[n]`.
        samples: `[m, 2]` each, by title.
        extent: Axes show [-extent, extent].
    """
    figure, data, axes = _panels(points, labels, [*samples], extent)
    for axis, each in zip(axes, samples.values(), strict=True):
        axis.scatter(data[:, 0], data[:, 1], s=2, color=DATA_COLOR, linewidths=0)
        axis.scatter(each[:, 0].numpy(), each[:, 1].numpy(), s=5, color=SAMPLE_COLOR, alpha=0.5, linewidths=0)
    return figure


def action_maps(algorithm: OfflineAlgorithm, extent: float) -> dict[str, Array]:
    """Return the algorithm's `figure_maps` on a grid over [-extent, extent]^2, `[GRID, GRID]` each, row 0 lowest."""
    ticks = torch.linspace(-extent, extent, GRID, device=algorithm.device)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    actions = algorithm.units.normalize_actions(torch.stack([x, y], dim=-1).reshape(-1, 2))
    observations = torch.zeros(len(actions), algorithm.observation_dim, device=algorithm.device)
    with torch.no_grad():
        maps = algorithm.figure_maps(observations, actions)
    return {title: each.double().cpu().numpy().reshape(GRID, GRID) for title, each in maps.items()}


def action_paths(algorithm: OfflineAlgorithm, generator: torch.Generator) -> dict[str, Array]:
    """Return the algorithm's `figure_paths`, `[points of a path, PATHS_DRAWN, 2]` each, in the dataset's units."""
    observations = torch.zeros(PATHS_DRAWN, algorithm.observation_dim, device=algorithm.device)
    with torch.no_grad():
        paths = algorithm.figure_paths(observations, generator)
    return {title: algorithm.units.restore_actions(each).double().cpu().numpy() for title, each in paths.items()}


def maps_figure(
    points: Array, labels: Array, maps: Mapping[str, Array], extent: float, paths: Mapping[str, Array] | None = None
) -> Figure:
    """Return the data colored by reward, then each map, with paths of actions over it.

    Args:
        points: Data, `[n, 2]`.
        labels: Rewards, `[n]`.
        maps: `[GRID, GRID]` each, row 0 lowest, by title.
        extent: Axes show [-extent, extent].
        paths: `[points of a path, m, 2]` each, by title: from a green dot to a red one.
    """
    figure, _, axes = _panels(points, labels, [*maps], extent)
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        draw_map(axis, values, extent, (paths or {}).get(title))
    return figure


def publish(figure: Figure, name: str, trainer: lightning.Trainer, step: int) -> None:
    """Write `figures/step_0002000_<name>.png` of the run folder, and log the picture to TensorBoard."""
    file = Path(trainer.default_root_dir) / "figures" / f"step_{step:07d}_{name}.png"
    write_atomically(file, lambda path: figure.savefig(path, format="png"))
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    for writer in tensorboard_writers(trainer):
        writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")


def _panels(points: Array, labels: Array, titles: Sequence[str], extent: float) -> tuple[Figure, Array, Sequence[Axes]]:
    """Return a figure with the data in its first panel, the points drawn there, and an empty panel for each title."""
    rows = -(-(1 + len(titles)) // MOST_COLUMNS)
    columns = -(-(1 + len(titles)) // rows)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + TITLE_INCHES), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = []
    for index, title in enumerate(["", *titles]):
        axis = figure.add_subplot(rows, columns, index + 1, title=title, aspect="equal")
        axis.set(xlim=(-extent, extent), ylim=(-extent, extent))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axes.append(axis)
    every = -(-len(points) // POINTS_DRAWN)
    draw_data(axes[0], points[::every], labels[::every])
    return figure, points[::every], axes[1:]


def draw_data(axis: Axes, points: Array, labels: Array) -> None:
    """Draw points `[n, 2]`, colored by their rewards `[n]`."""
    _add_color_bar(axis, axis.scatter(points[:, 0], points[:, 1], c=labels, s=2, linewidths=0))
    axis.set_title("data, by reward")


def draw_map(axis: Axes, values: Array, extent: float, path: Array | None = None) -> None:
    """Draw a map `[GRID, GRID]` over [-extent, extent]^2, and paths `[points of a path, m, 2]` over it."""
    image = axis.imshow(values, origin="lower", extent=(-extent, extent) * 2, interpolation="bilinear")
    _add_color_bar(axis, image)
    if path is None:
        return
    if len(path) > 1:
        axis.plot(path[:, :, 0], path[:, :, 1], color="0.7", linewidth=0.3)
        axis.scatter(path[0, :, 0], path[0, :, 1], s=2, color=START_COLOR, linewidths=0, zorder=2)
    axis.scatter(path[-1, :, 0], path[-1, :, 1], s=2, color=SAMPLE_COLOR, linewidths=0, zorder=2)


def _add_color_bar(axis: Axes, values: ScalarMappable) -> None:
    assert axis.figure is not None
    axis.figure.colorbar(values, ax=axis, fraction=0.046, pad=0.04)  # as high as a square panel
