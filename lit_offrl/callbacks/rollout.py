"""Scores: episodes of the policy in the dataset's environment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lit_offrl.algorithms.base import Memory, OfflineAlgorithm
from lit_offrl.callbacks.base import find_callback, find_datamodule, print_line, print_note
from lit_offrl.callbacks.checkpoint import RunCheckpoint, agree_to_stop, stop_received, stop_requested
from lit_offrl.callbacks.distributed import gather_objects
from lit_offrl.callbacks.evaluation import Evaluation, best_of_behavior
from lit_offrl.callbacks.throughput import evaluation_mode
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.info import EnvironmentInfo, ScoreReference
from lit_offrl.data.sources import source_of
from lit_offrl.envs.make import environment_for, make_env
from lit_offrl.envs.protocol import Protocol, protocol_of
from lit_offrl.envs.rollout import Episode, Rollouts, StoppedEarly
from lit_offrl.envs.scores import reference_for
from lit_offrl.errors import RunFailure, SimulatorFailure, UserError, one_line
from lit_offrl.ranges import Count, Range, Seed, checked
from lit_offrl.run_folder import GrowingCSV

COLUMNS = ("step", "stage", "actor", "seed", "return", "length", "success", "normalized_score")  # of eval.csv
RANK_STREAM = 1_000_000_007  # times the rank: beyond the seeds of any other evaluation of a run


@dataclass(frozen=True)
class Scores:
    """Scores of a set of episodes; None where unknown.

    Attributes:
        normalized: 100 * (value - minimum) / (maximum - minimum) by the dataset's reference, where the value is
            `return_mean`, or `success_rate` if the reference says so.
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
    def of(cls, episodes: Sequence[Episode], reference: ScoreReference | None) -> Scores:
        """Return the scores of one or more episodes, normalized by `reference`."""
        returns = [episode.episode_return for episode in episodes]
        successes = [episode.success for episode in episodes if episode.success is not None]
        mean = float(np.mean(returns))
        success_rate = float(np.mean(successes)) if successes else None
        return cls(
            normalized=None if reference is None else reference.score(mean, success_rate),
            return_mean=mean,
            return_std=float(np.std(returns)),
            success_rate=success_rate,
            episodes=len(episodes),
            episode_length_mean=float(np.mean([episode.length for episode in episodes])),
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


class RolloutEvaluation(Evaluation):
    """Plays episodes with fixed seeds whenever Lightning validates or tests, and at the end of training.

    Every environment step is one batched call of the policy. Each evaluation draws its noise from its own stream, a
    function of the seed and the gradient step, so that evaluations change nothing about training.

    Of W ranks, rank r plays the episodes r, r + W, ... with its own stream, as an action's noise depends on which
    episodes share the call of the policy. So the seeds of the environments do not depend on W, but the scores of a
    policy that needs noise do, as they do on the seed.

    Args:
        episodes: Episodes per evaluation during training.
        final_episodes: Episodes at the end of training, and in `validate` and `test`.
        num_envs: Environments that step together, on each rank.
        processes: Let the environments step in processes of their own; pays for heavy simulators.
        seed: Seed of the first episode; episode i of every evaluation has seed + i.
        compare: Also evaluate the algorithm's other actors (e.g. the behavior policy) in the final evaluation.
        best_of: With `compare`, also evaluate the best of so many actions of the behavior model by the policy's Q. It
            shows what selection does without a policy. 0 for none.
        max_episode_steps: Time limit of an episode, in place of the environment's own. An environment without any has
            the length of the dataset's longest episode.
        mujoco2_contacts: In D4RL's own environments, compute contacts as MuJoCo 2 did, with which published scores were
            made; false leaves them to the installed MuJoCo. Other environments are as they are.
        enabled: Whether to evaluate at all; false for datasets without an environment. Bandits need no option:
            `BanditEvaluation` evaluates them.
    """

    SCORES = Scores

    @checked("evaluation")
    def __init__(
        self,
        episodes: Count = 10,
        final_episodes: Count = 100,
        num_envs: Count = 10,
        processes: bool = False,
        seed: Seed = 10_000,
        compare: bool = True,
        best_of: Annotated[int, Range(0, 4096)] = 0,
        max_episode_steps: Count | None = None,
        mujoco2_contacts: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.episodes = episodes
        self.final_episodes = final_episodes
        self.num_envs = num_envs
        self.processes = processes
        self.seed = seed
        self.compare = compare
        self.best_of = best_of
        self.max_episode_steps = max_episode_steps
        self.mujoco2_contacts = mujoco2_contacts
        self.enabled = enabled
        self.environment: EnvironmentInfo | None = None
        self.protocol: Protocol | None = None
        self.reference: ScoreReference | None = None
        self._finished = False  # the final evaluation is complete
        self._rollouts: Rollouts | None = None
        self._file: GrowingCSV | None = None

    def prepare(self, datamodule: D4RLDataModule) -> None:
        """Find environment and reference, and check that they fit the dataset. The command line calls this first.

        Raises:
            UserError: The dataset has no environment, or one of other dimensions.
        """
        self.enabled &= source_of(datamodule.info).plays_episodes
        if not self.enabled or self._rollouts is not None:
            return
        environment = environment_for(datamodule.info, self.mujoco2_contacts)
        self.protocol = protocol_of(datamodule.info, environment)
        self.reference = reference_for(datamodule.info)
        keys = datamodule.info.observation_keys
        probe = make_env(environment, keys)
        limit = environment.max_episode_steps or (probe.spec.max_episode_steps if probe.spec else None)
        if not limit and not self.max_episode_steps:
            limit = int(datamodule.transitions.episode_lengths().max())
            reason = f"episodes end after {limit} steps, the longest of the data: there is no time limit"
            self.protocol = replace(self.protocol, differences=(*self.protocol.differences, reason))
        self.environment = replace(environment, max_episode_steps=self.max_episode_steps or limit)
        make = partial(make_env, self.environment, keys)
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
        self._rollouts = Rollouts(make, self.num_envs, self.processes)

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Build the environments, except in `predict`."""
        if stage == "predict":
            return
        datamodule = find_datamodule(trainer)
        if datamodule is None:
            raise UserError("RolloutEvaluation needs a D4RLDataModule to know the environment")
        self.prepare(datamodule)

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Start eval.csv, or drop the rows that came after the checkpoint that the run resumes from."""
        self._finished = False
        checkpoint = find_callback(trainer, RunCheckpoint)
        nothing_left = algorithm.gradient_step >= trainer.max_steps  # then the final evaluation is played again
        comes_again = nothing_left or (checkpoint is not None and checkpoint.validation_due)
        resumed = trainer.ckpt_path is not None
        self._open_file(trainer, keep_until=algorithm.gradient_step - comes_again if resumed else None)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Evaluate; during training with the smaller number of episodes, unless training ends here."""
        training = trainer.state.fn == "fit"
        if not self.enabled or trainer.sanity_checking or (training and algorithm.gradient_step >= trainer.max_steps):
            return  # the final evaluation comes in on_train_end
        if self._evaluate(trainer, algorithm, final=not training):
            self.log_in_hook(algorithm)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Make the final evaluation when all steps are done."""
        if self._finished or not self.enabled or algorithm.gradient_step < trainer.max_steps or stop_requested(trainer):
            return
        if self._evaluate(trainer, algorithm, final=True):
            self._finished = True
            self.log_directly(trainer, algorithm)

    on_fit_end = on_train_end  # of a resumed run without a step left, e.g. one that was stopped in its final evaluation

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Close the environments."""
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None

    def _evaluate(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *, final: bool) -> bool:
        """Play episodes, keep their scores and write them; return False, and keep nothing, if asked to stop.

        Where the environment fails while training, a line says so, and the training goes on without these scores.

        Raises:
            RunFailure: The environment fails in the final evaluation; all that was trained is in the checkpoint.
        """
        episodes = self.final_episodes if final else self.episodes
        actors = list(algorithm.actors())
        algorithm.control_actors = best_of_behavior(algorithm, self.best_of)
        actors = [*actors, *algorithm.control_actors] if final and self.compare else actors[:1]
        played: dict[str, list[Episode]] = {}
        try:
            with evaluation_mode(trainer, algorithm), suppress(StoppedEarly):
                played = self.play(algorithm, actors, episodes, trainer)
        except SimulatorFailure as error:
            if final:
                remedy = "the checkpoint is complete: repeat the evaluation alone with validate --ckpt_path"
                raise RunFailure(f"{error}: {remedy}") from error
            print_note(trainer, f"note: no scores at step {algorithm.gradient_step}: {one_line(error)}")
            return False
        if agree_to_stop(trainer):
            return False
        self.scores, self.scored_step = {}, algorithm.gradient_step
        for name, own in played.items():
            shares = gather_objects(own)
            every = [shares[i % len(shares)][i // len(shares)] for i in range(episodes)]
            self.scores[name] = Scores.of(every, self.reference)
            self._write(trainer, algorithm.gradient_step, name, every)
            if not final:
                print_line(trainer, f"step {algorithm.gradient_step}: {self.scores[name].line()}")
        return True

    def play(
        self, algorithm: OfflineAlgorithm, actors: Sequence[str], episodes: int, trainer: lightning.Trainer
    ) -> dict[str, list[Episode]]:
        """Return this rank's share of `episodes` episodes of each of the algorithm's `actors`, with the same seeds.

        All are played together. Each actor has its own stream of noise, so that the other actors do not change its
        episodes.
        """
        assert self._rollouts is not None
        rank, ranks = trainer.global_rank, trainer.world_size
        seed = self.seed + algorithm.gradient_step + RANK_STREAM * rank
        own_seeds = range(self.seed, self.seed + episodes)[rank::ranks]
        generators = {name: torch.Generator(device=algorithm.device).manual_seed(seed) for name in actors}
        memories: dict[int, Memory] = defaultdict(dict)  # of each episode, by its place

        def policy(observations: NDArray[np.float32], places: Sequence[int]) -> NDArray[np.float32]:
            names = [actors[place // len(own_seeds)] for place in places]
            kept = [memories[place] for place in places]
            actions = algorithm.act_each(torch.from_numpy(observations).to(algorithm.device), names, generators, kept)
            return np.asarray(actions.float().cpu())

        seeds = [*own_seeds] * len(actors)
        played = self._rollouts.run(policy, seeds, lambda: stop_received(trainer), memories=memories)
        count = len(own_seeds)
        return {name: played[i * count : (i + 1) * count] for i, name in enumerate(actors)}

    def _open_file(self, trainer: lightning.Trainer, keep_until: float | None) -> None:
        if self.enabled and trainer.is_global_zero:
            self._file = GrowingCSV(Path(trainer.default_root_dir) / "eval.csv", COLUMNS, keep_until)

    def _write(self, trainer: lightning.Trainer, step: int, actor: str, episodes: Sequence[Episode]) -> None:
        if self._file is None:
            self._open_file(trainer, keep_until=math.inf)  # `validate` and `test` keep all rows
        if self._file is None:
            return
        reference = self.reference
        scores = [reference and reference.score(each.episode_return, each.success) for each in episodes]
        self._file.extend(
            {
                "step": step,
                "stage": trainer.state.fn,
                "actor": actor,
                "seed": episode.seed,
                "return": episode.episode_return,
                "length": episode.length,
                "success": "" if episode.success is None else int(episode.success),
                "normalized_score": "" if score is None else score,
            }
            for episode, score in zip(episodes, scores, strict=True)
        )

    def results(self) -> dict[str, Any]:
        """Return `scores`, `scored_step`, `score_reference`, `protocol` and `comparison` of results.json."""
        scores = {name: asdict(each) for name, each in self.scores.items()}
        reference = self.reference
        return {
            "scores": scores.pop("policy", dict.fromkeys(Scores.__dataclass_fields__)),
            "scored_step": self.scored_step,
            "score_reference": {
                "name": None if reference is None else reference.name,
                "min": None if reference is None else reference.minimum,
                "max": None if reference is None else reference.maximum,
                "measure": None if reference is None else reference.measure,
            },
            "protocol": None if self.protocol is None else asdict(self.protocol),
            "comparison": scores,
        }
