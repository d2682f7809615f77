"""Scores: episodes of the policy in the dataset's environment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torchmetrics import MeanMetric, SumMetric

from lit_offrl.algorithms.base import Memory, OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback, evaluation_mode, say
from lit_offrl.callbacks.checkpoint import agree_to_stop, stop_received, stop_requested
from lit_offrl.callbacks.distributed import gather_objects
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.sources import source_of
from lit_offrl.envs.make import environment_for, make_env
from lit_offrl.envs.rollout import Episode, Rollouts, StoppedEarly
from lit_offrl.envs.scores import ScoreReference, reference_for
from lit_offrl.errors import UserError
from lit_offrl.ranges import Count, Seed, checked
from lit_offrl.run_folder import GrowingCSV

RANK_STREAM = 1_000_000_007  # times the rank: beyond the seeds of any other evaluation of a run


@dataclass(frozen=True)
class Scores:
    """What a set of episodes amounts to; None where unknown.

    Attributes:
        normalized: 100 * (return_mean - minimum) / (maximum - minimum) by the dataset's reference.
        return_mean: Mean undiscounted return.
        return_std: Standard deviation of the return over episodes.
        success_rate: Share of successful episodes.
        episodes: Number of episodes.
        episode_length_mean: Mean length, in environment steps.
    """

    normalized: float | None
    return_mean: float
    return_std: float
    success_rate: float | None
    episodes: int
    episode_length_mean: float

    @classmethod
    def of(
        cls, episodes: Sequence[Episode], reference: ScoreReference | None, device: torch.device | str = "cpu"
    ) -> Scores:
        """Reduce episodes to scores; where several ranks have some each, to those of all of them, on each rank.

        Args:
            episodes: This rank's.
            reference: What returns are normalized by.
            device: Where ranks exchange tensors.
        """
        means = {name: MeanMetric().set_dtype(torch.float64).to(device) for name in ("return", "square", "length")}
        success, count = MeanMetric().set_dtype(torch.float64).to(device), SumMetric().to(device)
        for episode in episodes:
            means["return"].update(episode.episode_return)
            means["square"].update(episode.episode_return**2)
            means["length"].update(episode.length)
            success.update(float(bool(episode.success)), weight=float(episode.success is not None))
            count.update(1)
        # Every rank computes every metric, whatever its own episodes know: each is an exchange with the others.
        mean, square, length = (float(metric.compute()) for metric in means.values())
        success_rate = float(success.compute())
        return cls(
            normalized=None if reference is None else reference.normalize(mean),
            return_mean=mean,
            return_std=max(square - mean**2, 0.0) ** 0.5,
            success_rate=None if math.isnan(success_rate) else success_rate,
            episodes=int(count.compute()),
            episode_length_mean=length,
        )

    def logged(self, prefix: str) -> dict[str, float]:
        """Return the known values under their tags."""
        tags = {
            "normalized_score": self.normalized,
            "return_mean": self.return_mean,
            "success_rate": self.success_rate,
            "episode_length": self.episode_length_mean,
        }
        return {f"{prefix}/{tag}": value for tag, value in tags.items() if value is not None}

    def line(self) -> str:
        """Return a human-readable summary."""
        parts = [] if self.normalized is None else [f"score {self.normalized:.1f}"]
        parts.append(f"return {self.return_mean:.2f} +- {self.return_std:.2f}")
        if self.success_rate is not None:
            parts.append(f"success {self.success_rate:.2f}")
        return ", ".join([*parts, f"length {self.episode_length_mean:.0f}", f"{self.episodes} episodes"])


class RolloutEvaluation(AlgorithmCallback):
    """Plays episodes with fixed seeds whenever Lightning validates or tests, and at the end of training.

    Every environment step is one batched call of the policy. Each evaluation draws its noise from a stream of its
    own, a function of the seed and the gradient step, so evaluating changes nothing about training.

    Of W ranks, rank r plays the episodes r, r + W, ... with a stream of its own, as an action's noise depends on which
    episodes share the call of the policy. So the seeds of the environments do not depend on W, but the scores of a
    policy that needs noise do, as they do on the seed.

    Args:
        episodes: Episodes per evaluation during training.
        final_episodes: Episodes at the end of training and behind `validate` and `test`.
        num_envs: Environments that step together, on each rank.
        processes: Let the environments step in processes of their own; pays for heavy simulators.
        seed: Seed of the first episode; episode i of every evaluation has seed + i.
        compare: Also evaluate the algorithm's other actors (e.g. the behavior policy) in the final evaluation.
        enabled: Whether to evaluate at all; false for datasets without an environment. Bandits have none and need no
            word: `BanditEvaluation` takes over.
    """

    @checked("evaluation")
    def __init__(
        self,
        episodes: Count = 10,
        final_episodes: Count = 100,
        num_envs: Count = 10,
        processes: bool = False,
        seed: Seed = 10_000,
        compare: bool = True,
        enabled: bool = True,
    ) -> None:
        self.episodes = episodes
        self.final_episodes = final_episodes
        self.num_envs = num_envs
        self.processes = processes
        self.seed = seed
        self.compare = compare
        self.enabled = enabled
        self.reference: ScoreReference | None = None
        self.scores: dict[str, Scores] = {}
        self.scored_step: int | None = None
        self._finished = False  # the final evaluation is done
        self._due = False  # an evaluation was broken off by a request to stop
        self._rollouts: Rollouts | None = None
        self._file: GrowingCSV | None = None

    def prepare(self, datamodule: D4RLDataModule) -> None:
        """Look up environment and reference, and check that they fit the dataset. The command line calls it first.

        Raises:
            UserError: The dataset has no environment, or one of other dimensions.
        """
        self.enabled &= source_of(datamodule.info).plays_episodes
        if not self.enabled or self._rollouts is not None:
            return
        environment = environment_for(datamodule.info)
        self.reference = reference_for(datamodule.info)
        keys = datamodule.info.observation_keys
        probe = make_env(environment, keys)
        spaces = probe.observation_space, probe.action_space
        probe.close()
        for what, space in zip(("observations", "actions"), spaces, strict=True):
            if not isinstance(space, Box):
                raise UserError(
                    f"{environment.env_id} has {what} of kind {type(space).__name__}; this package trains on state "
                    "vectors and continuous actions only"
                )
        shapes = tuple(space.shape for space in spaces)
        expected = ((datamodule.observation_dim,), (datamodule.action_dim,))
        if shapes != expected:
            raise UserError(
                f"{environment.env_id} has observations and actions of shapes {shapes}, the dataset {expected}; "
                "train with --evaluation.enabled false"
            )
        self._rollouts = Rollouts(partial(make_env, environment, keys), self.num_envs, self.processes)

    # ---------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Build the environments, unless only predictions are asked for."""
        if stage != "predict":
            self.prepare(_datamodule(trainer))

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Drop the rows of eval.csv that came after the checkpoint that the run resumes from."""
        nothing_left = algorithm.gradient_step >= trainer.max_steps  # but the final evaluation, which is played again
        resumed = trainer.ckpt_path is not None
        self._open_file(trainer, keep_until=algorithm.gradient_step - nothing_left if resumed else None)

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Make up for an evaluation that a request to stop broke off."""
        if self._due and self._evaluate(trainer, algorithm, final=False):
            log_directly(trainer, algorithm, self.scores)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Evaluate; during training with the smaller number of episodes, unless training ends here."""
        training = trainer.state.fn == "fit"
        if not self.enabled or trainer.sanity_checking or (training and algorithm.gradient_step >= trainer.max_steps):
            return  # on_train_end follows with the final evaluation
        if training and stop_requested(trainer):
            # Lightning validates before it stops, wherever in the epoch that is.
            self._due = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            return
        if self._evaluate(trainer, algorithm, final=not training):
            log_in_hook(algorithm, self.scores)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Evaluate for good when all steps are done."""
        self._finish(trainer, algorithm)

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """The same for a run resumed with nothing left to train, e.g. one that was stopped in its final evaluation."""
        if not self._finished:
            self._finish(trainer, algorithm)

    def _finish(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        wanted = self.enabled and algorithm.gradient_step >= trainer.max_steps and not stop_requested(trainer)
        if wanted and self._evaluate(trainer, algorithm, final=True):
            self._finished = True
            log_directly(trainer, algorithm, self.scores)

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Close the environments."""
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None

    def state_dict(self) -> dict[str, Any]:
        """Return the latest scores, and whether an evaluation is due."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {"scores": scores, "scored_step": self.scored_step, "due": self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of the checkpoint."""
        self.scores = {name: Scores(**score) for name, score in state_dict["scores"].items()}
        self.scored_step, self._due = state_dict["scored_step"], state_dict["due"]

    # ---------------------------------------------------------------- the work

    def _evaluate(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *, final: bool) -> bool:
        """Play, keep the scores and write the episodes down; False, and nothing is kept, if asked to stop."""
        episodes = self.final_episodes if final else self.episodes
        actors = list(algorithm.actors()) if final and self.compare else list(algorithm.actors())[:1]
        played: dict[str, list[Episode]] = {}
        with evaluation_mode(trainer, algorithm), suppress(StoppedEarly):
            played = self.play(algorithm, actors, episodes, trainer)
        if agree_to_stop(trainer):
            self._due = not final
            return False
        device = algorithm.device if trainer.world_size > 1 else "cpu"
        self.scores = {name: Scores.of(each, self.reference, device) for name, each in played.items()}
        self.scored_step, self._due = algorithm.gradient_step, False
        for name, each in played.items():
            shares = gather_objects(trainer, each)
            ranks = len(shares)
            self._write(
                trainer, algorithm.gradient_step, name, [shares[i % ranks][i // ranks] for i in range(episodes)]
            )
            if not final:
                say(trainer, f"step {algorithm.gradient_step}: {self.scores[name].line()}")
        return True

    def play(
        self, algorithm: OfflineAlgorithm, actors: Sequence[str], episodes: int, trainer: lightning.Trainer
    ) -> dict[str, list[Episode]]:
        """Return this rank's of `episodes` episodes of each of the algorithm's `actors`, with the same seeds.

        They are played together. Each actor has a stream of noise of its own: what else is played does not change its
        episodes.
        """
        assert self._rollouts is not None
        rank, ranks = trainer.global_rank, trainer.world_size
        seed = self.seed + algorithm.gradient_step + RANK_STREAM * rank
        own_seeds = range(self.seed, self.seed + episodes)[rank::ranks]
        generators = {name: torch.Generator(device=algorithm.device).manual_seed(seed) for name in actors}

        memories: dict[int, Memory] = defaultdict(dict)  # by the place of the episode: one for each

        def policy(observations: NDArray[np.float32], places: Sequence[int]) -> NDArray[np.float32]:
            names = [actors[place // len(own_seeds)] for place in places]
            kept = [memories[place] for place in places]
            actions = algorithm.act_each(torch.from_numpy(observations).to(algorithm.device), names, generators, kept)
            return np.asarray(actions.float().cpu())

        played = self._rollouts.run(policy, [*own_seeds] * len(actors), should_stop=lambda: stop_received(trainer))
        count = len(own_seeds)
        return {name: played[i * count : (i + 1) * count] for i, name in enumerate(actors)}

    def _open_file(self, trainer: lightning.Trainer, keep_until: float | None) -> None:
        if self.enabled and trainer.is_global_zero:
            columns = ("step", "stage", "actor", "seed", "return", "length", "success", "normalized_score")
            self._file = GrowingCSV(Path(trainer.default_root_dir) / "eval.csv", columns, keep_until)

    def _write(self, trainer: lightning.Trainer, step: int, actor: str, episodes: Sequence[Episode]) -> None:
        if self._file is None:
            self._open_file(trainer, keep_until=math.inf)  # `validate` and `test` add to what is there
        if self._file is None:
            return
        self._file.extend(
            {
                "step": step,
                "stage": trainer.state.fn,
                "actor": actor,
                "seed": episode.seed,
                "return": episode.episode_return,
                "length": episode.length,
                "success": "" if episode.success is None else int(episode.success),
                "normalized_score": "" if self.reference is None else self.reference.normalize(episode.episode_return),
            }
            for episode in episodes
        )

    def results(self) -> dict[str, Any]:
        """Return the entries `scores`, `scored_step`, `score_reference` and `comparison` of results.json."""
        names = list(Scores.__dataclass_fields__)
        policy = self.scores.get("policy")
        return {
            "scores": dict.fromkeys(names) if policy is None else asdict(policy),
            "scored_step": self.scored_step,
            "score_reference": {
                "name": None if self.reference is None else self.reference.name,
                "min": None if self.reference is None else self.reference.minimum,
                "max": None if self.reference is None else self.reference.maximum,
            },
            "comparison": {name: asdict(scores) for name, scores in self.scores.items() if name != "policy"},
        }


def _datamodule(trainer: lightning.Trainer) -> D4RLDataModule:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, D4RLDataModule):
        raise UserError("RolloutEvaluation needs a D4RLDataModule to know the environment")
    return datamodule


# ---------------------------------------------------------------- what every evaluation needs


class Loggable(Protocol):
    """The outcome of evaluating one actor."""

    def logged(self, prefix: str) -> dict[str, float]:
        """Return the known values under their tags."""


def log_in_hook(algorithm: OfflineAlgorithm, scores: Mapping[str, Loggable]) -> None:
    """Log the scores of each actor from a hook in which a LightningModule may."""
    for name, each in scores.items():
        algorithm.log_dict(each.logged(_prefix(name)))
    algorithm.log("step", float(algorithm.gradient_step))


def log_directly(trainer: lightning.Trainer, algorithm: OfflineAlgorithm, scores: Mapping[str, Loggable]) -> None:
    """Log the scores of each actor outside of such hooks."""
    for logger in trainer.loggers:
        for name, each in scores.items():
            logger.log_metrics(each.logged(_prefix(name)), step=algorithm.gradient_step)
        logger.save()


def _prefix(actor: str) -> str:
    return "eval" if actor == "policy" else f"eval_{actor}"
