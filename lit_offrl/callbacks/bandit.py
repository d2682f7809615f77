"""Bandits: the distance between samples of the policy and the distribution that it should have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import lightning
import numpy as np
import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import find_datamodule, print_line
from lit_offrl.callbacks.checkpoint import stop_requested
from lit_offrl.callbacks.evaluation import Evaluation
from lit_offrl.callbacks.throughput import evaluation_mode
from lit_offrl.data.bandits import find_bandit
from lit_offrl.data.sources import source_of
from lit_offrl.ranges import NonNegative, Range, checked


@dataclass(frozen=True)
class BanditScores:
    """Measures of one actor's samples against the target p*(x) ~ q(x) exp(beta label(x)).

    Attributes:
        mean_label: Mean label of the samples; a sample has the label of the nearest data point.
        target_mean_label: The same under the target.
        mode_mass_error: Total variation distance, in [0, 1], between the shares of the modes in samples and target;
            None in sets without modes.
        energy_distance: 2 E|x - y| - E|x - x'| - E|y - y'| of samples x and target samples y, unbiased: 0 on average
            where they agree.
        off_mode_fraction: Share of samples away from the data, see `Bandit.off_mode_distance`.
        best_mode_fraction: Share of samples within the modes of the highest label; None in sets without modes.
    """

    mean_label: float
    target_mean_label: float
    mode_mass_error: float | None
    energy_distance: float
    off_mode_fraction: float
    best_mode_fraction: float | None

    def logged(self, prefix: str) -> dict[str, float]:
        """Return the known values under their tags."""
        return {f"{prefix}/{tag}": value for tag, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        """Return a human-readable summary."""
        parts = [
            f"mean label {self.mean_label:.3f} (target {self.target_mean_label:.3f})",
            f"energy distance {self.energy_distance:.3f}",
            f"off-mode {self.off_mode_fraction:.1%}",
        ]
        if self.best_mode_fraction is not None:
            parts.append(f"best mode {self.best_mode_fraction:.1%}")
        return ", ".join(parts)


class BanditTarget:
    """The distribution p*(x) ~ q(x) exp(beta label(x)) of a bandit, and the measures against it.

    Args:
        dataset: Id, e.g. `bandit/8gaussians`.
        beta: Inverse temperature; 0 is the data distribution itself.
        samples: Number of target samples.

    Attributes:
        data: The dataset.
        points: Target samples, `[samples, 2]`: points resampled from a larger draw than the dataset, by their weights.
    """

    DRAWN = 200_000  # points that the target is resampled from
    REFERENCE_POINTS = 10_000  # data points for nearest neighbors: their distances are below every off-mode distance

    def __init__(self, dataset: str, beta: float, samples: int) -> None:
        self.dataset = dataset
        self.beta = beta
        self.bandit = find_bandit(dataset)
        self.data = self.bandit.draw()
        self.weights = self.data.target_weights(beta)
        self.mean_label = float(self.weights @ self.data.labels)
        drawn = self.bandit.draw(self.DRAWN, seed=1)
        rows = np.random.default_rng(1).choice(len(drawn.points), samples, p=drawn.target_weights(beta))
        self.points = torch.from_numpy(drawn.points[rows]).float()
        every = max(len(self.data.points) // self.REFERENCE_POINTS, 1)
        self._reference = torch.from_numpy(self.data.points[::every]).float()
        self._labels, self._modes = self.data.labels[::every], self.data.modes[::every]

    def measure(self, points: Tensor) -> BanditScores:
        """Return the scores of samples `[n, 2]`, in the dataset's units."""
        bandit = self.bandit
        distance, nearest = _distances(points, self._reference).min(dim=1)
        labels, modes = self._labels[nearest.numpy()], self._modes[nearest.numpy()]
        if bandit.centers is not None:
            distance = _distances(points, torch.from_numpy(bandit.centers).float()).amin(dim=1)
        off_mode = distance.numpy() > bandit.off_mode_distance
        mode_mass_error = best_mode_fraction = None
        if bandit.mode_labels is not None:
            count = len(bandit.mode_labels)
            mass = np.bincount(modes, minlength=count) / len(points)
            target_mass = np.bincount(self.data.modes, weights=self.weights, minlength=count)
            mode_mass_error = float(np.abs(mass - target_mass).sum() / 2)
            best = np.isclose(bandit.mode_labels, bandit.mode_labels.max())
            best_mode_fraction = float((best[modes] & ~off_mode).mean())
        return BanditScores(
            mean_label=float(labels.mean()),
            target_mean_label=self.mean_label,
            mode_mass_error=mode_mass_error,
            energy_distance=energy_distance(points, self.points),
            off_mode_fraction=float(off_mode.mean()),
            best_mode_fraction=best_mode_fraction,
        )


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by squared norms, whose rounding errors are as large as small distances.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate of 2 E|x - y| - E|x - x'| - E|y - y'| from samples `[n, dim]` and `[m, dim]`.

    Szekely and Rizzo (2013), with the mean over distinct pairs where both come from the same sample.
    """
    n, m = len(x), len(y)
    within_x, within_y = _distances(x, x).sum() / (n * (n - 1)), _distances(y, y).sum() / (m * (m - 1))
    return float(2 * _distances(x, y).mean() - within_x - within_y)


class BanditEvaluation(Evaluation):
    """Replaces rollouts where the dataset is a bandit, at the same times: scores, a line, and figures.

    With other datasets it does nothing. Each evaluation draws its noise from its own stream, a function of the gradient
    step alone, so that evaluations change nothing about training.

    Args:
        beta: Inverse temperature of the target distribution q(x) exp(beta label(x)).
        samples: Samples of each actor, and of the target.
        figures: Whether to draw, into `figures/` of the run folder and to TensorBoard.
    """

    SCORES = BanditScores

    @checked("bandit")
    def __init__(
        self, beta: NonNegative = 3.0, samples: Annotated[int, Range(2, 20_000)] = 2000, figures: bool = True
    ) -> None:
        super().__init__()
        self.beta = beta
        self.samples = samples
        self.figures = figures
        self._target: BanditTarget | None = None

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Make the target, if the dataset is a bandit."""
        datamodule = find_datamodule(trainer)
        if stage != "predict" and datamodule is not None and not source_of(datamodule.info).plays_episodes:
            self._target = BanditTarget(datamodule.info.id, self.beta, self.samples)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Evaluate, unless Lightning validates only because the run is asked to stop."""
        if self._target is not None and not trainer.sanity_checking and not stop_requested(trainer):
            self._evaluate(trainer, algorithm, self._target)
            self.log_in_hook(algorithm)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Evaluate the final policy, where training did not end with a validation."""
        if self._target is None or stop_requested(trainer) or self.scored_step == algorithm.gradient_step:
            return
        self._evaluate(trainer, algorithm, self._target)
        self.log_directly(trainer, algorithm)

    on_fit_end = on_train_end  # of a run resumed with nothing left to train

    def _evaluate(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, target: BanditTarget) -> None:
        step = self.scored_step = algorithm.gradient_step
        with evaluation_mode(trainer, algorithm):
            generator = torch.Generator(device=algorithm.device).manual_seed(step)
            states = torch.zeros(self.samples, algorithm.observation_dim, device=algorithm.device)
            points = {name: algorithm.act(states, generator, name).float().cpu() for name in algorithm.actors()}
            self.scores = {name: target.measure(each) for name, each in points.items()}
            if trainer.state.fn == "fit":
                print_line(trainer, f"step {step}: {self.scores['policy'].line()}")
            if self.figures and trainer.is_global_zero:
                self._draw(trainer, algorithm, target, points)

    def _draw(
        self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, target: BanditTarget, points: dict[str, Tensor]
    ) -> None:
        from lit_offrl.callbacks import figures  # matplotlib is slow to import, and not needed elsewhere

        data, step = target.data, algorithm.gradient_step
        samples = {rf"target, $\beta$ = {target.beta:g}": target.points}
        for name, each in points.items():
            samples[f"{name}, {self.scores[name].off_mode_fraction:.1%} off-mode"] = each
        drawn = {"samples": figures.samples_figure(data.points, data.labels, samples, target.bandit.bound)}
        extent = 1.1 * float(np.abs(data.points).max())  # a wider map would show less of its region with data
        maps = figures.action_maps(algorithm, extent)
        if maps:
            paths = figures.action_paths(algorithm, torch.Generator(algorithm.device).manual_seed(step))
            drawn["maps"] = figures.maps_figure(data.points, data.labels, maps, extent, paths)
        for name, figure in drawn.items():
            figure.suptitle(f"{type(algorithm).__name__} on {target.dataset}, gradient step {step:,}")
            figures.publish(figure, name, trainer, step)

    def results(self) -> dict[str, Any]:
        """Return the entries `bandit`, `scored_step` and `bandit_comparison` of results.json, if this is a bandit."""
        if self._target is None:
            return {}
        scores = {name: asdict(each) for name, each in self.scores.items()}
        policy = scores.pop("policy", dict.fromkeys(BanditScores.__dataclass_fields__))
        return {
            "bandit": {"beta": self.beta, **policy},
            "scored_step": self.scored_step,
            "bandit_comparison": scores,
        }
