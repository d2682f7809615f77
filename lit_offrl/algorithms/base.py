"""The contract of an algorithm: what its author defines, and what its author uses."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.acting import Units
from lit_offrl.algorithms.acting import draw_noise as draw_noise  # algorithms find all they need here
from lit_offrl.algorithms.acting import select as select
from lit_offrl.algorithms.loop import Info as Info
from lit_offrl.algorithms.loop import Phase as Phase
from lit_offrl.algorithms.module import TrainingModule
from lit_offrl.algorithms.optimizers import OptimizerSpec as OptimizerSpec
from lit_offrl.algorithms.targets import Target as Target
from lit_offrl.batch import Batch
from lit_offrl.errors import UserError
from lit_offrl.ranges import Seed, Steps

M = TypeVar("M", bound=nn.Module)
Actor = Callable[..., Tensor]  # see `OfflineAlgorithm.sample_actions`
Memory = dict[str, Any]  # what a policy keeps within one episode, see `OfflineAlgorithm.sample_actions`


class OfflineAlgorithm(TrainingModule):
    """An offline reinforcement-learning algorithm with several optimizers, trained on blocks of minibatches.

    A subclass builds its networks in `__init__` and defines `optimizer_specs`, `update` and `sample_actions`; where it
    has them, also `targets`, `phases` and further `actors`. Inside `update` it calls `minimize` for each loss and draws
    noise from `self.noise` only. The arguments of its constructor are checked against their annotations
    (`lit_offrl.ranges`) and stored as `self.hparams` before the constructor runs.

    One gradient step is one `update(batch)`: `max_steps`, schedules, checkpoint names and every x axis count these.

    Attributes:
        noise: The noise of training, see `NoiseStream`.
        units: The units of the dataset, see `Units`; the arguments of all methods below are in units of the networks.
        dataset_observations: All observations of the training data, `[n, observation_dim]`, in the order that
            `Batch.rows` counts; set when training starts.
        dataset_next_observations: All next observations, likewise.
        dataset_rewards: All rewards, `[n]`, likewise.
        dataset_terminals: All terminals, `[n]`, likewise.
        dataset_episode_ends: Whether each transition is the last of its episode, bool `[n]`, likewise.
        gradient_step: Number of updates performed.
        main_start: The gradient step at which the main phase begins.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        pretrain_steps: Gradient steps of pretraining; `max_steps` includes them.
        pretrained: Checkpoint of another run whose networks of the same names and shapes start this one.
        seed: Seed of the training noise (set from `seed_everything`).
    """

    segment_length = (
        1  # transitions per row of a minibatch: above 1 `Batch` has fields `[batch, steps, ...]` and a mask
    )
    has_memory = False  # whether actors keep a `Memory` per episode (history, action chunk), see `sample_actions`

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        pretrain_steps: Steps = 0,
        pretrained: str | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(seed, Units(observation_dim, action_dim))
        if pretrained is not None and not Path(pretrained).is_file():
            raise UserError(f"model.init_args.pretrained: no checkpoint at {pretrained}")
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.pretrain_steps = pretrain_steps
        self.pretrained = pretrained
        self.seed = seed

    # ---------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def optimizer_specs(self) -> Mapping[str, OptimizerSpec]:
        """Return the optimizers by the names that `minimize` uses."""

    @abstractmethod
    def update(self, batch: Batch) -> Info:
        """Perform one gradient step on every network; return detached scalars to log."""

    def pretrain_update(self, batch: Batch) -> Info:
        """Perform one gradient step of pretraining."""
        raise NotImplementedError(f"{type(self).__name__} has no pretraining phase")

    def begin_main(self) -> None:
        """Prepare the main phase, e.g. start the policy as a copy of the behavior model."""

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of the training in their order; the last is the main one.

        By default there are two, or one where `pretrain_update` is not defined.
        """
        main = Phase("training", self.update, begin=self.begin_main)
        if type(self).pretrain_update is OfflineAlgorithm.pretrain_update:
            return (main,)
        return (Phase("pretraining", self.pretrain_update, self.pretrain_steps), main)

    def targets(self) -> tuple[Target, ...]:
        """Return the pairs of online and target networks that the `EMATargets` callback maintains."""
        return ()

    def active_at(self, main_step: int) -> tuple[str, ...]:
        """Return what is active at step `main_step` of the main phase, counted from 1: by default, which optimizers.

        An update may depend on the gradient step through `self.active` only: updates at which the same is active run
        the same operations, and are compiled or captured once.
        """
        return self.optimizer_set.stepping_at(main_step)

    def validation_losses(self, batch: Batch) -> Info:
        """Return losses on transitions that training does not see; nothing is updated."""
        return {}

    @abstractmethod
    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return actions `[batch, action_dim]` at `observations` `[batch, observation_dim]`; `act` clamps them.

        Where `has_memory`, actors have a third parameter `memories`: a `Memory` per row, to read and to write. The
        memory of an episode is empty at its first step and is passed again at its later steps, when whoever plays the
        episode has written the reward of the step before, the environment's own, into it as `memory["reward"]`.
        """

    def actors(self) -> dict[str, Actor]:
        """Return what can act, by name; the score of the first, the policy, is the run's score."""
        return {"policy": self.sample_actions}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """Return the critic's value of each action, `[batch]`; None without a critic. Histograms show the values."""
        return None

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Return functions of the action to draw for a 2-D bandit, by title, each `[batch]`: by default, the value."""
        q = self.value_of(observations, actions)
        return {} if q is None else {"Q": q}

    def figure_paths(self, observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return paths of actions to draw on the maps of the same titles, `[points, batch, action_dim]` each."""
        return {}

    # ---------------------------------------------------------------- what an algorithm uses

    def minimize(self, name: str, loss: Tensor) -> None:
        """Step the optimizer `name` on `loss`, with gradients for that optimizer's own parameters and no others."""
        self.optimizer_set.minimize(name, loss)

    def minimize_in_turn(self, losses: Mapping[str, Callable[[Batch], tuple[Tensor, Info]]], batch: Batch) -> Info:
        """Step optimizers one after the other, each on its loss of the batch; return all that the losses report."""
        info: Info = {}
        for name, loss_of in losses.items():
            loss, reported = loss_of(batch)
            self.minimize(name, loss)
            info |= reported
        return info

    @property
    def active(self) -> tuple[str, ...]:
        """What is active at the present update, see `active_at`."""
        if self.traced_active is not None:
            return self.traced_active
        return self.active_at(self.gradient_step - self.main_start + 1)

    def first_rows(self, batch: Batch, count: int) -> Batch:
        """Return this rank's share of the first `count` transitions of a batch, or of all where there are fewer."""
        return batch.head(count // self.noise.ranks)

    # ---------------------------------------------------------------- acting

    @torch.no_grad()
    def act(
        self,
        observations: Tensor,
        generator: torch.Generator | None = None,
        actor: str = "policy",
        memories: Sequence[Memory] | None = None,
    ) -> Tensor:
        """Return actions in the dataset's units at observations in the environment's units.

        Args:
            observations: `[batch, observation_dim]`.
            generator: Stream of the policy's noise; the global one where None.
            actor: One of `actors()`.
            memories: One per row, kept by the caller from step to step, who sets `memory["reward"]` after each step;
                None where every row begins an episode.

        Returns:
            Actions, `[batch, action_dim]`.
        """
        return self.act_each(observations, [actor] * len(observations), {actor: generator}, memories)

    @torch.no_grad()
    def act_each(
        self,
        observations: Tensor,
        actors: Sequence[str],
        generators: Mapping[str, torch.Generator | None],
        memories: Sequence[Memory] | None = None,
    ) -> Tensor:
        """Return actions as `act` does, each row by the actor that is named for it, with noise of that actor's own."""
        memories = [{} for _ in actors] if memories is None else memories
        # One call may serve all of `actors()`, but not the controls of an evaluation.
        controlled = not self.control_actors.keys().isdisjoint(actors)
        sample = partial(OfflineAlgorithm.sample_each, self) if controlled else self.sample_each
        actions = sample(self.units.normalize(observations), actors, generators, memories)
        return self.units.restore_actions(self.units.clamp(actions))

    def sample_each(
        self,
        observations: Tensor,
        actors: Sequence[str],
        generators: Mapping[str, torch.Generator | None],
        memories: Sequence[Memory] = (),
    ) -> Tensor:
        """Return the actions of several actors, one for each row; overridden where one call can serve all actors."""
        by_name, names = {**self.actors(), **self.control_actors}, [*dict.fromkeys(actors)]
        if len(names) == 1:  # rows need not be sorted out
            return by_name[names[0]](observations, generators[names[0]], *((memories,) if self.has_memory else ()))
        actions = observations.new_empty(len(observations), self.action_dim)
        for name in names:
            rows = [i for i, each in enumerate(actors) if each == name]
            kept = ([memories[i] for i in rows],) if self.has_memory else ()
            actions[rows] = by_name[name](observations[rows], generators[name], *kept)
        return actions


def frozen_copy(module: M) -> M:
    """Return a deep copy of `module` that takes no gradients: a target network."""
    return copy.deepcopy(module).requires_grad_(False)
