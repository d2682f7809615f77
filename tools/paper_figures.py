"""Reproduce a figure of a paper: train each panel, draw all panels into one PNG, and print a table of measurements.

    python tools/paper_figures.py {dtql6,bdpo11,eda3,guided6,methods} [--root DIR] [--seed 0] [--sets S ...]
                                  [options of fit]
    python tools/paper_figures.py {eda5,eda6,aepo2} [--root DIR] [--seeds 0 1 2] [--dataset D] [--episodes 20]
                                  [options of fit]

On 2-D sets:
  dtql6    DTQL, Figure 6: samples of policies with the trust region (row 1) and with the KL divergence (row 2)
  bdpo11   BDPO, Figure 11 (Figure 4 is two of its rows): the data, denoising paths over the value at the step at which
           they begin, and samples over Q
  eda3     EDA, Figures 3 and 8: the data, densities of behavior model and aligned policy, labels, and the Q that the
           policy predicts at several times
  guided6  samples of AEPO, also with several points of expansion, and of QGPO beside samples of the target
  methods  samples of the policies of all other methods on one set (no paper's figure)
On one locomotion dataset, with the settings of conf/quick:
  eda5     EDA, Figure 5: score against the share of labelled states and against gradient steps
  eda6     EDA, Figure 6: score against the number of candidates K, for the value and the preference loss
  aepo2    AEPO, Figure 2: score against the guidance scale, with and without rescaling; one training per seed
Finished runs are reused. With the same --root, eda5 and eda6 share behavior models and critics.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

DrawPanel = Callable[[Axes], None]
Line = dict[str, str]  # of a table: cells by column


def run_command(command: str, flags: Mapping[str, Any], words: Sequence[str] = ()) -> None:
    """Run a command of lit_offrl; a list among the flags gives its flag several times. Exit if it fails."""
    pairs = [(name, each) for name, value in flags.items() for each in (value if isinstance(value, list) else [value])]
    if code := command_line([command, *(f"--{name}={value}" for name, value in pairs), *words]):
        sys.exit(code)


def fit(folder: RunFolder, flags: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return results.json of the run in this folder, after training it with these flags unless it is finished."""
    if folder.results().get("status") != "finished":
        run_command("fit", {**flags, "overwrite": "true"}, options.words)
    return folder.results()


@dataclass(frozen=True)
class BanditRun:
    """One run on a 2-D set.

    Attributes:
        algorithm: Class name.
        config: Name of the config file in `conf/`.
        dataset: Id of the set.
        options: Options of the command.
        beta: Inverse temperature, if it differs from the config file.
        variant: Name of a variation, whose runs lie in a folder of this name.
        flags: Its options of `fit`.
    """

    algorithm: str
    config: str
    dataset: str
    options: argparse.Namespace
    beta: float | None = None
    variant: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Root folder of the run."""
        return Path(self.options.root) / ("" if self.beta is None else f"beta_{self.beta:g}") / self.variant

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder.of(self.root, self.algorithm.lower(), self.dataset, self.options.seed)

    def train(self) -> dict[str, Any]:
        """Train unless the run is finished; return its results.json."""
        flags = {
            "config": CONF / self.config,
            "data.dataset": self.dataset,
            "seed_everything": self.options.seed,
            "trainer.default_root_dir": self.root,
        }
        if self.beta is not None:
            flags |= {"model.init_args.beta": self.beta, "bandit.beta": self.beta}
        return fit(self.folder, {**flags, **self.flags}, self.options)

    def load(self) -> OfflineAlgorithm:
        """Return the trained algorithm."""
        cls: type[OfflineAlgorithm] = getattr(algorithms, self.algorithm)
        return cls.load_from_checkpoint(self.folder.last_checkpoint, map_location="cpu", weights_only=True)

    def sample(self, count: int) -> torch.Tensor:
        """Return actions of the trained policy, `[count, 2]`."""
        algorithm = self.load()
        states = torch.zeros(count, algorithm.observation_dim)
        return algorithm.act(states, torch.Generator().manual_seed(self.options.seed))


def axis_limit(data: BanditData) -> float:
    """Return the limit of both axes, a tenth beyond the data."""
    return 1.1 * float(np.abs(data.points).max())


def draw_samples(axis: Axes, title: str, data: BanditData, samples: torch.Tensor) -> None:
    """Draw the data colored by reward, and samples on top."""
    extent = axis_limit(data)
    axis.scatter(data.points[:, 0], data.points[:, 1], c=data.labels, s=2, linewidths=0)
    axis.scatter(samples[:, 0], samples[:, 1], s=5, color=figures.SAMPLE_COLOR, linewidths=0)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=title)


def draw_data(axis: Axes, title: str, data: BanditData) -> None:
    """Draw a 2-D set colored by reward."""
    extent = axis_limit(data)
    every = len(data.points) // figures.POINTS_DRAWN or 1
    figures.draw_data(axis, data.points[::every], data.labels[::every])
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=title)


def draw_map(axis: Axes, title: str, values: figures.Array, extent: float, path: figures.Array | None) -> None:
    """Draw a map over the action plane, and paths of actions on top."""
    figures.draw_map(axis, values, extent, path)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), title=title)


def show(panels: Sequence[Sequence[DrawPanel]], lines: Sequence[Line], options: argparse.Namespace) -> None:
    """Write the rows of panels into `<root>/<figure>.png`, and print the lines as a Markdown table."""
    width, height = figures.PANEL_INCHES
    figure = Figure(figsize=(width * len(panels[0]), height * len(panels)), dpi=figures.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for i, row in enumerate(panels):
        for j, draw_panel in enumerate(row):
            draw_panel(figure.add_subplot(len(panels), len(row), i * len(row) + j + 1))
    path = Path(options.root) / f"{options.figure}.png"
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    cells = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    print(f"{table}\n\n{path}")


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
COVERED = 0.01  # smallest share of the samples at which a mode counts as covered


def covered_modes(dataset: str, samples: torch.Tensor) -> str:
    """Return how many of the best modes the samples cover, e.g. "2 of 4"; "-" in sets without modes."""
    bandit = find_bandit(dataset)
    if bandit.centers is None or bandit.mode_labels is None:
        return "-"
    best = np.flatnonzero(np.isclose(bandit.mode_labels, bandit.mode_labels.max()))
    distances = torch.cdist(samples.double(), torch.from_numpy(bandit.centers[best]))
    shares = (distances < bandit.off_mode_distance).double().mean(0)
    return f"{int((shares >= COVERED).sum())} of {len(best)}"


def dtql6(options: argparse.Namespace) -> None:
    """Reproduce Figure 6 of DTQL."""
    panels: list[list[DrawPanel]] = []
    lines = []
    for name, algorithm, config in DTQL6_ROWS:
        panels.append([])
        for column in options.sets:
            run = BanditRun(algorithm, config, f"bandit/{column}", options)
            results = run.train()
            samples = run.sample(DTQL6_SAMPLES)
            data = find_bandit(run.dataset).draw()
            panels[-1].append(partial(draw_samples, title=f"{name}, {column}", data=data, samples=samples))
            scores = results["bandit"]
            best = scores["best_mode_fraction"]
            lines.append(
                {
                    "policy": name,
                    "dataset": f"`{run.dataset}`",
                    "on a best mode": "-" if best is None else f"{best:.1%}",
                    "off every mode": f"{scores['off_mode_fraction']:.1%}",
                    "best modes covered": covered_modes(run.dataset, samples),
                    "mean reward": f"{scores['mean_label']:.2f}",
                    "the data's": f"{results['dataset_return_mean']:.2f}",
                }
            )
    show(panels, lines, options)


# ---------------------------------------------------------------- maps on the six sets of QGPO

SIX_SETS = ("8gaussians", "2spirals", "checkerboard", "moons", "rings", "swissroll")


def bandit_cells(scores: Mapping[str, Any]) -> Line:
    """Return the cells of a table that say how close samples are to the target."""
    error = scores["mode_mass_error"]
    return {
        "mean label": f"{scores['mean_label']:.3f}",
        "exact": f"{scores['target_mean_label']:.3f}",
        "energy distance": f"{scores['energy_distance']:.3f}",
        "mode mass error": "-" if error is None else f"{error:.3f}",
        "off the data": f"{scores['off_mode_fraction']:.1%}",
    }


def draw_maps(
    options: argparse.Namespace, run_on: Callable[[str, argparse.Namespace], BanditRun], titles: tuple[str, ...] = ("",)
) -> None:
    """Train on each set; draw its data and the algorithm's maps whose titles begin with one of `titles`."""
    panels: list[list[DrawPanel]] = []
    lines = []
    for name in options.sets:
        run = run_on(f"bandit/{name}", options)
        results = run.train()
        scores = results["bandit"]
        trained = run.load()
        data = find_bandit(run.dataset).draw()
        extent = axis_limit(data)
        maps = figures.action_maps(trained, extent)
        paths = figures.action_paths(trained, torch.Generator().manual_seed(options.seed))
        shown = [title for begin in titles for title in maps if title.startswith(begin)]
        row: list[DrawPanel] = [partial(draw_data, title=f"{name}, by reward", data=data)]
        row += [partial(draw_map, title=t, values=maps[t], extent=extent, path=paths.get(t)) for t in shown]
        panels.append(row)
        behavior = results["bandit_comparison"]["behavior"]["off_mode_fraction"]
        lines.append({"dataset": f"`{run.dataset}`", **bandit_cells(scores), "its behavior model": f"{behavior:.1%}"})
    show(panels, lines, options)


def bdpo11(options: argparse.Namespace) -> None:
    """Reproduce Figure 11 of BDPO."""
    draw_maps(options, partial(BanditRun, "BDPO", "bdpo_bandit.yaml"))


# At one learning rate to its end the noise network of `checkerboard` puts 9% of its samples off the data, after 5,000
# and after 10,000 updates; 2,000 updates at a tenth of that rate, of a batch of 1,024, leave 1.3%.
EDA3_STAGES = (
    ("behavior", {"model.init_args.pretrain_steps": 10_000, "trainer.max_steps": 10_000}),
    (
        "behavior_slower",
        {
            "model.init_args.pretrain_steps": 3_000,
            "trainer.max_steps": 3_000,
            "model.init_args.diffusion.learning_rate": 1e-4,
            "data.batch_size": 1024,
        },
    ),
    ("", {"model.init_args.pretrain_steps": 0, "trainer.max_steps": 3_500}),
)


def aligned(dataset: str, options: argparse.Namespace) -> BanditRun:
    """Return the last of three runs of EDA: its behavior model is that of the two before, which are trained."""
    pretrained: Mapping[str, Any] = {}
    for variant, stage in EDA3_STAGES:
        run = BanditRun("EDA", "eda_bandit.yaml", dataset, options, None, variant, {**stage, **pretrained})
        if variant:
            run.train()
            pretrained = {"model.init_args.pretrained": run.folder.last_checkpoint}
    return run


def eda3(options: argparse.Namespace) -> None:
    """Reproduce Figures 3 and 8 of EDA.

    The densities are of slightly noisy actions: at the last time the slope of f is so steep that the error of the slope
    dominates its integral from one place to another.
    """
    early = f"t = {vp_diffusion.FIGURE_TIMES[1]:g}"
    draw_maps(options, aligned, (rf"$\mu$, {early}", rf"$\pi$, {early}", "labels", r"$\beta"))


# ---------------------------------------------------------------- AEPO and QGPO on the six sets

GUIDED_BETAS = (3.0, 10.0)
GUIDED_SAMPLES = 2000
# The Taylor series at one point, as AEPO prints it, is wrong where Q differs between modes; several points are not.
SEVERAL_POINTS = MappingProxyType({"model.init_args.expansion": "support", "model.init_args.support_actions": 256})
GUIDED = (
    ("AEPO", "", MappingProxyType({})),
    ("AEPO", "several_points", SEVERAL_POINTS),
    ("QGPO", "", MappingProxyType({})),
)


def guided6(options: argparse.Namespace) -> None:
    """Train AEPO, as printed and with several points of expansion, and QGPO on the six sets at two temperatures.

    Draws their samples beside samples of the target.
    """
    panels: list[list[DrawPanel]] = []
    lines = []
    for name in options.sets:
        panels.append([])
        dataset = f"bandit/{name}"
        for beta in GUIDED_BETAS:
            target = BanditTarget(dataset, beta, GUIDED_SAMPLES)
            samples = {"target": target.points}
            for algorithm, variant, flags in GUIDED:
                run = BanditRun(algorithm, f"{algorithm.lower()}_bandit.yaml", dataset, options, beta, variant, flags)
                scores = run.train()["bandit"]
                title = f"{algorithm}, {variant.replace('_', ' ')}" if variant else algorithm
                samples[title] = run.sample(GUIDED_SAMPLES)
                line = {"dataset": f"`{dataset}`", "beta": f"{beta:g}", "algorithm": title}
                lines.append({**line, **bandit_cells(scores)})
            for title, each in samples.items():
                title = rf"{title}, $\beta$ = {beta:g}"
                panels[-1].append(partial(draw_samples, title=title, data=target.data, samples=each))
    show(panels, lines, options)


METHODS = (
    *("BC", "TD3BC", "ReBRAC", "AWAC", "IQL", "CQL", "BCQ", "DQL"),
    *("EDP", "IDQL", "SfBC", "SRPO", "DAC", "IFQL", "FQL", "DTQL"),
)
METHODS_IN_A_ROW = 4


def methods(options: argparse.Namespace) -> None:
    """Train every method on a set with its file of conf; draw the samples of its policy over the data."""
    panels: list[list[DrawPanel]] = []
    lines = []
    for name in options.sets:
        data = find_bandit(f"bandit/{name}").draw()
        drawn: list[DrawPanel] = []
        for algorithm in METHODS:
            run = BanditRun(algorithm, f"{algorithm.lower()}_bandit.yaml", f"bandit/{name}", options)
            scores = run.train()["bandit"]
            samples = run.sample(1000)
            drawn.append(partial(draw_samples, title=algorithm, data=data, samples=samples))
            lines.append({"dataset": f"`{run.dataset}`", "algorithm": algorithm, **bandit_cells(scores)})
        panels += [drawn[i : i + METHODS_IN_A_ROW] for i in range(0, len(drawn), METHODS_IN_A_ROW)]
    show(panels, lines, options)


# ---------------------------------------------------------------- EDA, Figures 5 and 6

EDA_STAGES = {"pretrain_steps": 4000, "critic.steps": 12000}  # as in conf/quick/eda_mujoco.yaml
EDA_ALIGNMENT = {"trainer.max_steps": 1500, "data.steps_per_epoch": 500, "trainer.check_val_every_n_epoch": 1}
FINAL_SCORE_ONLY = {"trainer.check_val_every_n_epoch": 1000, "evaluation.compare": "false"}
EDA5_FRACTIONS = (0.01, 0.1, 1.0)
EDA6_CANDIDATES = (2, 4, 8)


def align(
    options: argparse.Namespace,
    seed: int,
    *,
    loss: str = "value",
    candidates: int = 8,
    fraction: float = 0.1,
    flags: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], RunFolder]:
    """Align the behavior model of a seed, which is trained once with its critic; return results.json and the folder.

    The policy acts by one sample without the critic, as in the paper's curves.
    """
    common: dict[str, Any] = {
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
    fit(stages, common | steps | early | {"evaluation.enabled": "false"}, options)
    root = Path(options.root) / f"{loss}_{candidates}_labels_{fraction:g}"
    folder = RunFolder.of(root, "eda", options.dataset, seed)
    late = {
        "model.init_args.pretrained": stages.last_checkpoint,
        "model.init_args.loss": loss,
        "model.init_args.candidates_per_state": candidates,
        "model.init_args.label_fraction": fraction,
        "trainer.default_root_dir": root,
        **dict.fromkeys(steps, 0),
    }
    return fit(folder, common | EDA_ALIGNMENT | late | {**flags}, options), folder


def curve(folder: RunFolder) -> dict[int, float]:
    """Return the policy's mean score by the gradient step of the evaluation."""
    scores: dict[int, list[float]] = {}
    with (folder.path / "eval.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["actor"] == "policy" and row["stage"] == "fit":
                scores.setdefault(int(row["step"]), []).append(float(row["normalized_score"]))
    return {step: float(np.mean(each)) for step, each in scores.items()}


def format_scores(scores: Sequence[float]) -> str:
    """Return "mean +- standard deviation over seeds (each score)"."""
    spread = f" +- {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{spread} ({', '.join(f'{score:.1f}' for score in scores)})"


def mean_and_std(scores: Mapping[Any, Sequence[float]]) -> tuple[figures.Array, figures.Array]:
    """Return means and standard deviations over seeds, `[settings]` each; 0 where there is one seed."""
    stds = [np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in scores.values()]
    return np.array([np.mean(each) for each in scores.values()]), np.array(stds)


def draw_scores(axis: Axes, curves: Mapping[str, Mapping[float, Sequence[float]]], ticks: bool, **labels: str) -> None:
    """Draw scores with error bars over a setting, a curve for each name; with `ticks` on a logarithmic axis."""
    for name, scores in curves.items():
        means, stds = mean_and_std(scores)
        axis.errorbar(list(scores), means, stds, marker="o", capsize=3, label=name)
    axis.set(ylabel="normalized score", **labels)
    if ticks:
        settings = list(next(iter(curves.values())))
        axis.set_xscale("log")
        axis.set_xticks(settings, [f"{each:g}" for each in settings])
        axis.minorticks_off()
    axis.legend()


def eda5(options: argparse.Namespace) -> None:
    """Reproduce Figure 5 of EDA: score against the share of labelled states and against gradient steps."""
    lines, curves, finals = [], {}, {}
    cloning: list[float] = []
    for fraction in EDA5_FRACTIONS:
        runs = [align(options, seed, fraction=fraction) for seed in options.seeds]
        finals[100 * fraction] = [results["scores"]["normalized"] for results, _ in runs]
        cloning = [results["comparison"]["behavior"]["normalized"] for results, _ in runs]
        by_seed = [curve(folder) for _, folder in runs]
        curves[fraction] = {0: cloning, **{step: [scores[step] for scores in by_seed] for step in by_seed[0]}}
        lines.append({"labelled states": f"{fraction:.0%}", "score": format_scores(finals[100 * fraction])})
    lines.append({"labelled states": "none: behavior cloning", "score": format_scores(cloning)})

    def draw_fractions(axis: Axes) -> None:
        axis.axhline(float(np.mean(cloning)), color="0.5", linestyle=":", label="behavior cloning")
        draw_scores(axis, {"aligned": finals}, ticks=True, xlabel="labelled states (%)", title="labels")

    def draw_steps(axis: Axes) -> None:
        for fraction, scores in curves.items():
            means, stds = mean_and_std(scores)
            axis.plot(list(scores), means, marker=".", label=f"{fraction:.0%} labelled")
            axis.fill_between(list(scores), means - stds, means + stds, alpha=0.2, linewidth=0)
        axis.set(xlabel="gradient steps of alignment", ylabel="normalized score", title="steps")
        axis.legend()

    show([[draw_fractions, draw_steps]], lines, options)


def eda6(options: argparse.Namespace) -> None:
    """Reproduce Figure 6 of EDA: score against the number of candidates, for the value and the preference loss."""
    lines = []
    finals: dict[str, dict[float, list[float]]] = {"value": {}, "preference": {}}
    for count in EDA6_CANDIDATES:
        for kind, scores in finals.items():
            loss = "dpo" if kind == "preference" and count == 2 else kind  # Eq. 16 is Eq. 15 with two candidates
            flags = {} if (loss, count) == ("value", 8) else FINAL_SCORE_ONLY  # eda5 uses the run with ("value", 8)
            runs = [align(options, seed, loss=loss, candidates=count, flags=flags)[0] for seed in options.seeds]
            scores[count] = [results["scores"]["normalized"] for results in runs]
            lines.append({"loss": loss, "K": str(count), "score": format_scores(scores[count])})
    labels = {"xlabel": "candidates K (preference at 2 is DPO)"}
    show([[partial(draw_scores, curves=finals, ticks=True, **labels)]], lines, options)


# ---------------------------------------------------------------- AEPO, Figure 2

AEPO2_SCALES = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0)  # omega; the behavior model has omega = 0


def score_scales(options: argparse.Namespace, seed: int, rescale: str) -> dict[float, float]:
    """Return the score at each omega. The run of a seed is trained once: rescaling changes only how it acts."""
    flags = {
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
        fit(folder, flags, options)
        acting = {
            "ckpt_path": folder.last_checkpoint,
            "model.init_args.rescale": rescale,
            "evaluation.enabled": "true",
            "evaluation.final_episodes": options.episodes,
            "evaluation.num_envs": options.episodes * len(AEPO2_SCALES),
        }
        run_command("validate", acting)
        shutil.copyfile(folder.path / "results.json", path)
    scores = json.loads(path.read_text())["comparison"]
    return {scale: scores[f"omega_{scale:g}" if scale else "behavior"]["normalized"] for scale in (0.0, *AEPO2_SCALES)}


def aepo2(options: argparse.Namespace) -> None:
    """Reproduce Figure 2 of AEPO: score against the guidance scale, with and without rescaling."""
    lines, curves = [], {}
    for rescale in ("none", "sample", "batch"):
        runs = [score_scales(options, seed, rescale) for seed in options.seeds]
        curves[rescale] = {scale: [run[scale] for run in runs] for scale in runs[0]}
        cells = {f"omega {scale:g}": format_scores(each) for scale, each in curves[rescale].items()}
        lines.append({"rescale": rescale, **cells})
    labels = {"xlabel": r"guidance scale $\omega$", "title": "rescale"}
    show([[partial(draw_scores, curves=curves, ticks=False, **labels)]], lines, options)


# With the sets of each.
BANDIT_FIGURES = {
    dtql6: DTQL6_COLUMNS,
    bdpo11: SIX_SETS,
    eda3: SIX_SETS,
    guided6: SIX_SETS,
    methods: SIX_SETS,
}  # with the sets of each
LOCOMOTION_FIGURES = (eda5, eda6, aepo2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    for run in (*BANDIT_FIGURES, *LOCOMOTION_FIGURES):
        command = commands.add_parser(run.__name__, help=(run.__doc__ or "").partition("\n")[0])
        command.set_defaults(run=run)
        command.add_argument("--root", default=f"runs/{run.__name__}", help="folder of the runs and the picture")
        if run in BANDIT_FIGURES:
            sets = BANDIT_FIGURES[run]
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--sets", nargs="+", choices=sets, default=sets, help="use only these sets")
        else:
            command.add_argument("--dataset", default="offrl/halfcheetah/medium-replay-v0")
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--episodes", type=int, default=20, help="number of episodes of each evaluation")
    options, options.words = parser.parse_known_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
