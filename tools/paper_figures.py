"""Reproduce a figure of a paper: train what each panel shows, draw all of them into one PNG, print what was measured.

    python tools/paper_figures.py dtql6 [--root runs/dtql6] [--seed 0] [--columns 25gaussians-far ...] [options of fit]
    python tools/paper_figures.py bdpo11 [--root runs/bdpo11] [--seed 0] [--sets 8gaussians ...] [options of fit]

`dtql6` is Figure 6 of DTQL: policies kept by the trust region (first row) and by the KL divergence (second row) on five
2-D sets. `bdpo11` is Figure 11 of BDPO (4 is two of its rows): on six sets, the data, then paths of denoising over the
value landscapes of the steps at which they begin, and samples over Q.
A set whose run is finished is not trained again; all are drawn from their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_offrl import algorithms
from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.callbacks import figures
from lit_offrl.cli import main as command_line
from lit_offrl.data.bandits import BanditData, find_bandit
from lit_offrl.run_folder import RunFolder, write_atomically

CONF = Path(__file__).parent.parent / "conf"


@dataclass(frozen=True)
class Panel:
    """One run on a 2-D set.

    Attributes:
        title: What the picture says above it.
        algorithm: Class name.
        dataset: Id.
        config: Name of the config file in `conf/`.
    """

    title: str
    algorithm: str
    dataset: str
    config: str

    def folder(self, options: argparse.Namespace) -> RunFolder:
        """Return where `fit` puts the run."""
        return RunFolder.of(options.root, self.algorithm.lower(), self.dataset, options.seed)


def train(panel: Panel, options: argparse.Namespace) -> dict[str, Any]:
    """Return results.json of the panel's run, which is made unless it is there and finished."""
    path = panel.folder(options).path / "results.json"
    if not path.is_file() or json.loads(path.read_text())["status"] != "finished":
        words = {
            "config": CONF / panel.config,
            "data.dataset": panel.dataset,
            "seed_everything": options.seed,
            "trainer.default_root_dir": options.root,
            "overwrite": "true",
        }
        code = command_line(["fit", *(f"--{name}={value}" for name, value in words.items()), *options.words])
        if code:
            sys.exit(code)
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def load(panel: Panel, options: argparse.Namespace) -> OfflineAlgorithm:
    """Return the trained algorithm."""
    cls: type[OfflineAlgorithm] = getattr(algorithms, panel.algorithm)
    checkpoint = panel.folder(options).last_checkpoint
    return cls.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)


def sample(panel: Panel, options: argparse.Namespace, count: int) -> torch.Tensor:
    """Return actions of the trained policy, `[count, 2]`."""
    algorithm = load(panel, options)
    states = torch.zeros(count, algorithm.observation_dim)
    return algorithm.act(states, torch.Generator().manual_seed(options.seed))


def draw_samples(axis: Axes, panel: Panel, samples: torch.Tensor) -> None:
    """Draw the data colored by reward, and samples on top."""
    data = find_bandit(panel.dataset).draw()
    extent = 1.1 * float(np.abs(data.points).max())
    axis.scatter(data.points[:, 0], data.points[:, 1], c=data.labels, s=2, linewidths=0)
    axis.scatter(samples[:, 0], samples[:, 1], s=5, color=figures.SAMPLE_COLOR, linewidths=0)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=panel.title)


def draw_data(axis: Axes, name: str, data: BanditData, extent: float) -> None:
    """Draw a 2-D set colored by reward."""
    every = len(data.points) // figures.POINTS_DRAWN or 1
    figures.draw_data(axis, data.points[::every], data.labels[::every])
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=f"{name}, by reward")


def draw_map(title: str, axis: Axes, values: figures.Array, extent: float, path: figures.Array | None) -> None:
    """Draw a map over the action plane, and the ways of actions upon it."""
    figures.draw_map(axis, values, extent, path)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), title=title)


def draw(rows: Sequence[Sequence[Callable[[Axes], None]]], path: Path) -> None:
    """Write a PNG of panels, each drawn by a function of its axes."""
    width, height = figures.PANEL_INCHES
    figure = Figure(figsize=(width * len(rows[0]), height * len(rows)), dpi=figures.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for i, row in enumerate(rows):
        for j, draw_panel in enumerate(row):
            draw_panel(figure.add_subplot(len(rows), len(row), i * len(row) + j + 1))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return a Markdown table with the keys as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------- DTQL, Figure 6

DTQL6_ROWS = (("trust region", "DTQL", "dtql_bandit.yaml"), ("KL", "DTQLKL", "dtqlkl_bandit.yaml"))
DTQL6_COLUMNS = (
    "25gaussians-far",
    "25gaussians-near",
    "25gaussians-hard",
    "dtql-swissroll-near",
    "dtql-swissroll-far",
)
DTQL6_SAMPLES = 1000  # the authors' number
# A mode with fewer of the samples is not counted as one that the policy covers.
COVERED = 0.01


def covered_modes(panel: Panel, samples: torch.Tensor) -> str:
    """Return how many of the best modes the policy covers, e.g. "2 of 4"; "-" in sets without modes."""
    bandit = find_bandit(panel.dataset)
    if bandit.centers is None or bandit.mode_labels is None:
        return "-"
    best = np.flatnonzero(np.isclose(bandit.mode_labels, bandit.mode_labels.max()))
    distances = torch.cdist(samples.double(), torch.from_numpy(bandit.centers[best]))
    shares = (distances < bandit.off_mode_distance).double().mean(0)
    return f"{int((shares >= COVERED).sum())} of {len(best)}"


def dtql6(options: argparse.Namespace) -> None:
    """Train, draw and measure Figure 6 of DTQL."""
    pictures: list[list[Callable[[Axes], None]]] = []
    lines = []
    for name, algorithm, config in DTQL6_ROWS:
        pictures.append([])
        for column in options.columns or DTQL6_COLUMNS:
            panel = Panel(f"{name}, {column}", algorithm, f"bandit/{column}", config)
            results = train(panel, options)
            samples = sample(panel, options, DTQL6_SAMPLES)
            pictures[-1].append(lambda axis, panel=panel, samples=samples: draw_samples(axis, panel, samples))
            scores = results["bandit"]
            best = scores["best_mode_fraction"]
            lines.append(
                {
                    "policy": name,
                    "dataset": f"`{panel.dataset}`",
                    "on a best mode": "-" if best is None else f"{best:.1%}",
                    "off every mode": f"{scores['off_mode_fraction']:.1%}",
                    "best modes covered": covered_modes(panel, samples),
                    "mean reward": f"{scores['mean_label']:.2f}",
                    "the data's": f"{results['dataset_return_mean']:.2f}",
                }
            )
    picture = Path(options.root) / "dtql6.png"
    draw(pictures, picture)
    print(f"{table(lines)}\n\n{picture}")


# ---------------------------------------------------------------- BDPO, Figures 4 and 11

BDPO11_SETS = ("8gaussians", "2spirals", "checkerboard", "moons", "rings", "swissroll")


def bdpo11(options: argparse.Namespace) -> None:
    """Train, draw and measure Figure 11 of BDPO."""
    pictures: list[list[Callable[[Axes], None]]] = []
    lines = []
    for name in options.sets or BDPO11_SETS:
        panel = Panel(name, "BDPO", f"bandit/{name}", "bdpo_bandit.yaml")
        scores = train(panel, options)["bandit"]
        algorithm = load(panel, options)
        data = find_bandit(panel.dataset).draw()
        extent = 1.1 * float(np.abs(data.points).max())
        maps = figures.action_maps(algorithm, extent)
        paths = figures.action_paths(algorithm, torch.Generator().manual_seed(options.seed))
        pictures.append(
            [
                partial(draw_data, name=name, data=data, extent=extent),
                *(partial(draw_map, t, values=v, extent=extent, path=paths.get(t)) for t, v in maps.items()),
            ]
        )
        error = scores["mode_mass_error"]
        lines.append(
            {
                "dataset": f"`{panel.dataset}`",
                "mean label": f"{scores['mean_label']:.3f}",
                "exact": f"{scores['target_mean_label']:.3f}",
                "energy distance": f"{scores['energy_distance']:.3f}",
                "mode mass error": "-" if error is None else f"{error:.3f}",
                "off the data": f"{scores['off_mode_fraction']:.1%}",
            }
        )
    picture = Path(options.root) / "bdpo11.png"
    draw(pictures, picture)
    print(f"{table(lines)}\n\n{picture}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    command = commands.add_parser("dtql6", help="DTQL, Figure 6: trust region and KL on five 2-D sets")
    command.add_argument("--columns", nargs="+", choices=DTQL6_COLUMNS, help="only these")
    command.set_defaults(run=dtql6)
    command = commands.add_parser("bdpo11", help="BDPO, Figures 4 and 11: paths and value landscapes on six 2-D sets")
    command.add_argument("--sets", nargs="+", choices=BDPO11_SETS, help="only these")
    command.set_defaults(run=bdpo11)
    for name, command in commands.choices.items():
        command.add_argument("--root", default=f"runs/{name}", help="where runs and picture go")
        command.add_argument("--seed", type=int, default=0)
    options, options.words = parser.parse_known_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
