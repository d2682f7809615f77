"""Reproduce a figure of a paper: train what each panel shows, draw all of them into one PNG, print what was measured.

    python tools/paper_figures.py {dtql6,bdpo11,eda3,guided6} [--root DIR] [--seed 0] [--sets S ...] [options of fit]
    python tools/paper_figures.py {eda5,eda6,aepo2} [--root DIR] [--seeds 0 1 2] [--dataset D] [--episodes 20]
                                  [options of fit]

`dtql6` is Figure 6 of DTQL: policies kept by the trust region (first row) and by the KL divergence (second row) on five
2-D sets. `bdpo11` is Figure 11 of BDPO (4 is two of its rows): on six sets, the data, then paths of denoising over the
value landscapes of the steps at which they begin, and samples over Q. `eda3` is Figures 3 and 8 of EDA: the data, the
densities of behavior model and aligned policy, the labels' Q, and the Q that the policy predicts at several times.
`eda5` and `eda6` are EDA's Figures 5 and 6 on one locomotion set, by conf/quick/eda_mujoco.yaml; under the same
`--root` they share behavior models and critics. `guided6` is samples of AEPO and QGPO on six sets, beside those of the
target. `aepo2` is AEPO's Figure 2 in miniature, cut by conf/quick/aepo_mujoco.yaml: one training, many ways to act.
A run that is finished is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_offrl import algorithms
from lit_offrl.algorithms import OfflineAlgorithm, vp_diffusion
from lit_offrl.callbacks import figures
from lit_offrl.callbacks.bandit import BanditTarget
from lit_offrl.cli import main as command_line
from lit_offrl.data.bandits import BanditData, find_bandit
from lit_offrl.run_folder import RunFolder
from lit_offrl.system.files import write_atomically

CONF = Path(__file__).parent.parent / "conf"


@dataclass(frozen=True)
class Panel:
    """One run on a 2-D set.

    Attributes:
        title: What the picture says above it.
        algorithm: Class name.
        dataset: Id.
        config: Name of the config file in `conf/`.
        beta: Inverse temperature where it is not the config file's.
    """

    title: str
    algorithm: str
    dataset: str
    config: str
    beta: float | None = None

    def root(self, options: argparse.Namespace) -> Path:
        """Return the root of the run."""
        return Path(options.root) / ("" if self.beta is None else f"beta_{self.beta:g}")

    def folder(self, options: argparse.Namespace) -> RunFolder:
        """Return where `fit` puts the run."""
        return RunFolder.of(self.root(options), self.algorithm.lower(), self.dataset, options.seed)


def fit(folder: RunFolder, words: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return results.json of the run of this folder, made by these flags (several of a list) unless it is finished."""
    if folder.results().get("status") != "finished":
        pairs = [
            (name, each) for name, value in words.items() for each in (value if isinstance(value, list) else [value])
        ]
        flags = [f"--{name}={value}" for name, value in pairs] + ["--overwrite=true"]
        code = command_line(["fit", *flags, *options.words])
        if code:
            sys.exit(code)
    return folder.results()


def train(panel: Panel, options: argparse.Namespace) -> dict[str, Any]:
    """Return results.json of the panel's run."""
    words = {
        "config": CONF / panel.config,
        "data.dataset": panel.dataset,
        "seed_everything": options.seed,
        "trainer.default_root_dir": panel.root(options),
    }
    if panel.beta is not None:
        words |= {"model.init_args.beta": panel.beta, "bandit.beta": panel.beta}
    return fit(panel.folder(options), words, options)


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
        for column in options.sets:
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


# ---------------------------------------------------------------- six sets, a row of maps each

SIX_SETS = ("8gaussians", "2spirals", "checkerboard", "moons", "rings", "swissroll")


def six_rows(options: argparse.Namespace, algorithm: str, config: str, shown: tuple[str, ...] = ("",)) -> None:
    """Train on the sets, draw of each the data and the maps whose titles begin as `shown` says, measure the samples."""
    pictures: list[list[Callable[[Axes], None]]] = []
    lines = []
    for name in options.sets:
        panel = Panel(name, algorithm, f"bandit/{name}", config)
        scores = train(panel, options)["bandit"]
        trained = load(panel, options)
        data = find_bandit(panel.dataset).draw()
        extent = 1.1 * float(np.abs(data.points).max())
        every = figures.action_maps(trained, extent)
        maps = {title: values for begin in shown for title, values in every.items() if title.startswith(begin)}
        paths = figures.action_paths(trained, torch.Generator().manual_seed(options.seed))
        pictures.append(
            [
                partial(draw_data, name=name, data=data, extent=extent),
                *(partial(draw_map, t, values=v, extent=extent, path=paths.get(t)) for t, v in maps.items()),
            ]
        )
        lines.append({"dataset": f"`{panel.dataset}`", **bandit_cells(scores)})
    picture = Path(options.root) / f"{options.figure}.png"
    draw(pictures, picture)
    print(f"{table(lines)}\n\n{picture}")


def bandit_cells(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return cells of a table of how close samples are to the target."""
    error = scores["mode_mass_error"]
    return {
        "mean label": f"{scores['mean_label']:.3f}",
        "exact": f"{scores['target_mean_label']:.3f}",
        "energy distance": f"{scores['energy_distance']:.3f}",
        "mode mass error": "-" if error is None else f"{error:.3f}",
        "off the data": f"{scores['off_mode_fraction']:.1%}",
    }


def bdpo11(options: argparse.Namespace) -> None:
    """Train, draw and measure Figure 11 of BDPO."""
    six_rows(options, "BDPO", "bdpo_bandit.yaml")


def eda3(options: argparse.Namespace) -> None:
    """Train, draw and measure Figures 3 and 8 of EDA: densities and predicted Q, that at several times.

    Densities are those of slightly noisy actions. At the last t the slope of f is a hundred times steeper than the
    set is wide, and what adds up along the way from one place to another is mostly the error of the slope.
    """
    early = f"t = {vp_diffusion.FIGURE_TIMES[1]:g}"
    shown = (rf"$\mu$, {early}", rf"$\pi$, {early}", "labels", r"$\beta")
    six_rows(options, "EDA", "eda_bandit.yaml", shown)


# ---------------------------------------------------------------- AEPO and QGPO on the six sets

GUIDED_BETAS = (3.0, 10.0)
GUIDED_SAMPLES = 2000


def guided6(options: argparse.Namespace) -> None:
    """Train AEPO and QGPO on the six sets at two temperatures; draw samples beside the target's."""
    pictures: list[list[Callable[[Axes], None]]] = []
    lines = []
    for name in options.sets:
        pictures.append([])
        dataset = f"bandit/{name}"
        for beta in GUIDED_BETAS:
            target = BanditTarget(dataset, beta, GUIDED_SAMPLES)
            panels = [
                Panel(rf"{each}, $\beta$ = {beta:g}", each, dataset, f"{each.lower()}_bandit.yaml", beta)
                for each in ("AEPO", "QGPO")
            ]
            drawn = {Panel(rf"target, $\beta$ = {beta:g}", "", dataset, ""): target.points}
            for panel in panels:
                scores = train(panel, options)["bandit"]
                drawn[panel] = sample(panel, options, GUIDED_SAMPLES)
                lines.append(
                    {
                        "dataset": f"`{dataset}`",
                        "beta": f"{beta:g}",
                        "algorithm": panel.algorithm,
                        **bandit_cells(scores),
                    }
                )
            pictures[-1] += [partial(draw_samples, panel=panel, samples=samples) for panel, samples in drawn.items()]
    picture = Path(options.root) / "guided6.png"
    draw(pictures, picture)
    print(f"{table(lines)}\n\n{picture}")


# ---------------------------------------------------------------- EDA, Figures 5 and 6, in miniature

EDA_STAGES = {"pretrain_steps": 4000, "critic.steps": 6000}  # those of conf/quick/eda_mujoco.yaml
EDA_ALIGNMENT = {"trainer.max_steps": 1500, "data.steps_per_epoch": 500, "trainer.check_val_every_n_epoch": 1}
FINAL_SCORE_ALONE = {"trainer.check_val_every_n_epoch": 1000, "evaluation.compare": "false"}
EDA5_FRACTIONS = (0.01, 0.1, 1.0)
EDA6_CANDIDATES = (2, 4, 8)


def aligned(
    options: argparse.Namespace,
    seed: int,
    *,
    loss: str = "value",
    candidates: int = 8,
    fraction: float = 0.1,
    flags: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], RunFolder]:
    """Return results.json and folder of an alignment from the seed's behavior model and critic.

    Acting takes one sample and no critic, as in the paper's curves.
    """
    words: dict[str, Any] = {
        "config": CONF / "quick" / "eda_mujoco.yaml",
        "data.dataset": options.dataset,
        "seed_everything": seed,
        "model.init_args.acting.candidates": 1,
        "evaluation.episodes": options.episodes,
        "evaluation.final_episodes": options.episodes,
        "evaluation.num_envs": options.episodes,
    }
    root = Path(options.root) / "stages"
    stages = RunFolder.of(root, "eda", options.dataset, seed)
    steps = {f"model.init_args.{stage}": count for stage, count in EDA_STAGES.items()}
    early = {"trainer.max_steps": sum(EDA_STAGES.values()), "trainer.default_root_dir": root}
    fit(stages, words | steps | early | {"evaluation.enabled": "false"}, options)
    root = Path(options.root) / f"{loss}_{candidates}_labels_{fraction:g}"
    folder = RunFolder.of(root, "eda", options.dataset, seed)
    late = {
        "model.init_args.pretrained": stages.last_checkpoint,
        "model.init_args.loss": loss,
        "model.init_args.candidates_per_state": candidates,
        "model.init_args.label_fraction": fraction,
        "trainer.default_root_dir": root,
    }
    late |= dict.fromkeys(steps, 0)
    return fit(folder, words | EDA_ALIGNMENT | late | {**flags}, options), folder


def curve(folder: RunFolder) -> dict[int, float]:
    """Return the mean score at each evaluated gradient step of a training."""
    scores: dict[int, list[float]] = {}
    with (folder.path / "eval.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["actor"] == "policy" and row["stage"] == "fit":
                scores.setdefault(int(row["step"]), []).append(float(row["normalized_score"]))
    return {step: float(np.mean(each)) for step, each in scores.items()}


def mean_and_spread(values: Sequence[float]) -> str:
    """Return "mean +- standard deviation over seeds (each)"."""
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread} ({', '.join(f'{value:.1f}' for value in values)})"


def eda5(options: argparse.Namespace) -> None:
    """Align with labels of 1%, 10% and all of the states; draw score against share of labels and gradient steps."""
    lines, curves, finals = [], {}, {}
    cloning: list[float] = []
    for fraction in EDA5_FRACTIONS:
        runs = [aligned(options, seed, fraction=fraction) for seed in options.seeds]
        finals[fraction] = [results["scores"]["normalized"] for results, _ in runs]
        cloning = [results["comparison"]["behavior"]["normalized"] for results, _ in runs]
        each = [curve(folder) for _, folder in runs]
        curves[fraction] = {step: [scores[step] for scores in each] for step in each[0]}
        lines.append({"labelled states": f"{fraction:.0%}", "score": mean_and_spread(finals[fraction])})
    lines.append({"labelled states": "none: behavior cloning", "score": mean_and_spread(cloning)})

    def draw_fractions(axis: Axes) -> None:
        means, spreads = (reduce_by([finals[each] for each in EDA5_FRACTIONS]) for reduce_by in (row_means, row_stds))
        axis.errorbar([100 * each for each in EDA5_FRACTIONS], means, spreads, marker="o", capsize=3)
        axis.axhline(float(np.mean(cloning)), color="0.5", linestyle=":", label="behavior cloning")
        axis.set(xscale="log", xlabel="labelled states", ylabel="normalized score", title="labels")
        axis.set_xticks([100 * each for each in EDA5_FRACTIONS], [f"{each:.0%}" for each in EDA5_FRACTIONS])
        axis.minorticks_off()
        axis.legend()

    def draw_steps(axis: Axes) -> None:
        for fraction, scores in curves.items():
            steps = [0, *scores]
            each = [cloning, *scores.values()]
            means, spreads = row_means(each), row_stds(each)
            axis.plot(steps, means, marker=".", label=f"{fraction:.0%} labelled")
            axis.fill_between(steps, means - spreads, means + spreads, alpha=0.2, linewidth=0)
        axis.set(xlabel="gradient steps of alignment", ylabel="normalized score", title="steps")
        axis.legend()

    picture = Path(options.root) / "eda5.png"
    draw([[draw_fractions, draw_steps]], picture)
    print(f"{table(lines)}\n\n{picture}")


def eda6(options: argparse.Namespace) -> None:
    """Align by value, by preference and by DPO with several numbers of candidates; draw score against them."""
    lines = []
    finals: dict[str, dict[int, list[float]]] = {"value": {}, "preference": {}}
    for count in EDA6_CANDIDATES:
        for kind, scores in finals.items():
            loss = "dpo" if kind == "preference" and count == 2 else kind  # Eq. 16 is Eq. 15 with two candidates
            flags = {} if (loss, count) == ("value", 8) else FINAL_SCORE_ALONE  # the first is one of eda5's
            runs = [aligned(options, seed, loss=loss, candidates=count, flags=flags)[0] for seed in options.seeds]
            scores[count] = [results["scores"]["normalized"] for results in runs]
            lines.append({"loss": loss, "K": str(count), "score": mean_and_spread(scores[count])})

    def draw_candidates(axis: Axes) -> None:
        for kind, scores in finals.items():
            each = list(scores.values())
            axis.errorbar(list(scores), row_means(each), row_stds(each), marker="o", capsize=3, label=kind)
        axis.set(xlabel="candidates K (preference at 2 is DPO)", ylabel="normalized score", xscale="log")
        axis.set_xticks(EDA6_CANDIDATES, [str(count) for count in EDA6_CANDIDATES])
        axis.minorticks_off()
        axis.legend()

    picture = Path(options.root) / "eda6.png"
    draw([[draw_candidates]], picture)
    print(f"{table(lines)}\n\n{picture}")


# ---------------------------------------------------------------- AEPO, Figure 2, in miniature

AEPO2_SCALES = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0)  # omega; the behavior model is 0


def swept(options: argparse.Namespace, seed: int, rescale: str) -> dict[float, float]:
    """Return the score at each omega of the seed's run, which is trained once: rescaling is a matter of acting."""
    words = {
        "config": CONF / "quick" / "aepo_mujoco.yaml",
        "data.dataset": options.dataset,
        "seed_everything": seed,
        "model.init_args.sweep": json.dumps(AEPO2_SCALES),
        "trainer.default_root_dir": options.root,
        "evaluation.enabled": "false",
    }
    folder = RunFolder.of(options.root, "aepo", options.dataset, seed)
    path = folder.path / f"rescale_{rescale}.json"
    if not path.is_file():
        fit(folder, words, options)
        flags = {
            "ckpt_path": folder.last_checkpoint,
            "model.init_args.rescale": rescale,
            "evaluation.enabled": "true",
            "evaluation.final_episodes": options.episodes,
            "evaluation.num_envs": options.episodes * len(AEPO2_SCALES),
        }
        code = command_line(["validate", *(f"--{name}={value}" for name, value in flags.items())])
        if code:
            sys.exit(code)
        shutil.copyfile(folder.path / "results.json", path)
    scores = json.loads(path.read_text())["comparison"]
    return {scale: scores[f"omega_{scale:g}" if scale else "behavior"]["normalized"] for scale in (0.0, *AEPO2_SCALES)}


def aepo2(options: argparse.Namespace) -> None:
    """Act with several scales of guidance, with and without rescaling; draw score against the scale."""
    lines, curves = [], {}
    for rescale in ("none", "sample", "batch"):
        runs = [swept(options, seed, rescale) for seed in options.seeds]
        curves[rescale] = {scale: [run[scale] for run in runs] for scale in runs[0]}
        cells = {f"omega {scale:g}": mean_and_spread(each) for scale, each in curves[rescale].items()}
        lines.append({"rescale": rescale, **cells})

    def draw_scales(axis: Axes) -> None:
        for rescale, scores in curves.items():
            each = list(scores.values())
            axis.errorbar(list(scores), row_means(each), row_stds(each), marker="o", capsize=3, label=rescale)
        axis.set(xlabel=r"guidance scale $\omega$", ylabel="normalized score", title="rescale")
        axis.legend()

    picture = Path(options.root) / "aepo2.png"
    draw([[draw_scales]], picture)
    print(f"{table(lines)}\n\n{picture}")


def row_means(rows: Sequence[Sequence[float]]) -> figures.Array:
    """Return the mean of each row."""
    return np.array([np.mean(row) for row in rows])


def row_stds(rows: Sequence[Sequence[float]]) -> figures.Array:
    """Return the standard deviation of each row, 0 where there is one value."""
    return np.array([np.std(row, ddof=1) if len(row) > 1 else 0.0 for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    for run, text in (
        (dtql6, "DTQL, Figure 6: trust region and KL on five 2-D sets"),
        (bdpo11, "BDPO, Figures 4 and 11: paths and value landscapes on six 2-D sets"),
        (eda3, "EDA, Figures 3 and 8: densities and predicted Q on six 2-D sets"),
        (guided6, "AEPO and QGPO on six 2-D sets at two temperatures"),
        (eda5, "EDA, Figure 5 in miniature: score against labels and against steps"),
        (eda6, "EDA, Figure 6 in miniature: value and preference with K candidates"),
        (aepo2, "AEPO, Figure 2 in miniature: score against guidance scale, with and without rescaling"),
    ):
        command = commands.add_parser(run.__name__, help=text)
        command.set_defaults(run=run)
        command.add_argument("--root", default=f"runs/{run.__name__}", help="where runs and picture go")
        if run in (eda5, eda6, aepo2):
            command.add_argument("--dataset", default="offrl/halfcheetah/medium-replay-v0")
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--episodes", type=int, default=20, help="of each final evaluation")
        else:
            command.add_argument("--seed", type=int, default=0)
            every = DTQL6_COLUMNS if run is dtql6 else SIX_SETS
            command.add_argument("--sets", nargs="+", choices=every, default=every, help="only these")
    options, options.words = parser.parse_known_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
