"""The data module of all algorithms."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lit_offrl.data import sources
from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.rewards import reward_rule
from lit_offrl.data.shared_tables import share_table
from lit_offrl.data.transitions import BlockSampler, Episodes, Transitions, gather
from lit_offrl.errors import UserError, require
from lit_offrl.ranges import Count, Fraction, Positive, ProperFraction, Seed, checked
from lit_offrl.system.memory import memory_bytes
from lit_offrl.system.ranks import launched_rank


class D4RLDataModule(lightning.LightningDataModule):
    """Offline transitions as blocks of minibatches from a table on the training device.

    Args:
        dataset: Dataset id, e.g. `offrl/antmaze/umaze-v0` (collected with this package), `D4RL/pen/human-v2`
            (Minari), `hopper-medium-v2` (original D4RL file), `ogbench/scene-play-singletask-v0` (OGBench), or the path
            of a file or folder of one's own. Several are named in brackets, `[a.npz, b.npz]`.
        batch_size: Transitions per gradient step, over all devices.
        block_size: Gradient steps per training block; affects speed only.
        steps_per_epoch: Gradient steps per epoch.
        reward: Reward rule: `raw`, `minus_one` (sparse mazes), `cql_antmaze` (4 (r - 0.5)), `times_100`, `sparse` (-1
            unless the reward is 0: OGBench), `return_range` (r * 1000 / range of returns: locomotion), `standardize`,
            or `affine:SCALE:BIAS`.
        normalize_observations: Shift and scale each observation dimension to mean 0 and standard deviation 1; the
            checkpoint holds the statistics.
        action_bounds: Lowest and highest action of every dimension, e.g. `[-2, 2]`; networks see actions scaled to
            [-1, 1]. Dimensions of different units: all lowest, then all highest, `[[0, 20], [100, 90]]`.
            Default: the bounds of the dataset's action space (Minari), or -1 and 1.
        action_limit: Networks see actions scaled to [-limit, limit] instead. For 2-D sets the bound of their points, 6
            or 16, keeps the units that the noise schedules of the papers were made for.
        d4rl_compat: Read original D4RL files as D4RL's `qlearning_dataset` does, which drops the last transition of
            episodes that ran into the time limit; false keeps the true episode ends.
        columns: Which columns of a log of one's own hold what.
        environment: Gymnasium id of the environment of evaluation, e.g. `Hopper-v5`, for datasets that name none.
        validation_fraction: Share of the episodes that training does not see; algorithms log their losses on them as
            `val/...` whenever Lightning validates. All seeds hold out the same episodes.
        best_episodes: Share of the episodes that is kept, those of the highest recorded returns (0.1 is "10% BC").
        episode_fraction: Share of the episodes that training sees, drawn at random, the same ones for every seed. The
            held-out ones do not depend on it, and a smaller share is part of a larger one.
        sha256: Digest that the dataset's file must have, in hexadecimal (`data info` prints it).
        seed: Seed of the minibatches (set from `seed_everything`).
    """

    # States per batch of `predict`: each may have a thousand candidate actions.
    PREDICTION_BATCH = 64
    HELD_OUT_BATCH = 4096
    SECONDS_BETWEEN_LOOKS = 1.0
    # Smallest divisor of the normalization, so that (almost) constant dimensions stay small.
    SMALLEST_STD = 1e-3
    # Options that the table depends on.
    TABLE_OPTIONS = (
        *("dataset", "d4rl_compat", "columns", "validation_fraction", "best_episodes", "episode_fraction", "reward"),
        *("normalize_observations", "action_bounds", "action_limit"),
    )

    @checked("data")
    def __init__(
        self,
        dataset: str,
        batch_size: Count = 256,
        block_size: Count = 50,
        steps_per_epoch: Count = 1000,
        reward: str = "raw",
        normalize_observations: bool = False,
        action_bounds: tuple[float, float] | tuple[list[float], list[float]] | None = None,
        action_limit: Positive = 1.0,
        d4rl_compat: bool = True,
        columns: LogColumns = USUAL_NAMES,
        environment: str | None = None,
        validation_fraction: ProperFraction = 0.0,
        best_episodes: Fraction = 1.0,
        episode_fraction: Fraction = 1.0,
        sha256: str | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        reward_rule(reward)  # raises for an unknown rule
        if action_bounds is not None:
            low, high = map(np.atleast_1d, action_bounds)
            is_range = low.shape == high.shape and bool((low < high).all())
            require(is_range, "data.action_bounds", "[low, high], numbers or a list of each", list(action_bounds))
        self.dataset = dataset
        self.batch_size = batch_size
        self.block_size = block_size
        self.steps_per_epoch = steps_per_epoch
        self.reward = reward
        self.normalize_observations = normalize_observations
        self.action_bounds = action_bounds
        self.action_limit = action_limit
        self.d4rl_compat = d4rl_compat
        self.columns = columns
        self.environment = environment
        self.validation_fraction = validation_fraction
        self.best_episodes = best_episodes
        self.episode_fraction = episode_fraction
        self.sha256 = sha256
        self.seed = seed
        self._loaded: tuple[Transitions, DatasetInfo] | None = None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike], **options: Any) -> D4RLDataModule:
        """Return a data module over arrays in memory.

        Args:
            arrays: `observations`, `actions`, `rewards`, `terminals`, `timeouts` and `next_observations`, see
                `lit_offrl.data.sources.from_arrays`.
            **options: The other arguments of the class, e.g. `environment="Hopper-v5"`.

        Raises:
            UserError: An array is missing, or its shape or values are wrong.
        """
        module = cls(dataset="arrays", **options)
        info = DatasetInfo("arrays", source="arrays", path=Path("arrays"), sha256=None)
        module._loaded = module._checked(sources.from_arrays(arrays), info)
        return module

    def load(self) -> tuple[Transitions, DatasetInfo]:
        """Return the dataset, which is read on the first call.

        Raises:
            UserError: The dataset is of this package and has not been collected (`prepare_data` or `data collect ID`
                does so), or it cannot be read.
        """
        if self._loaded is None:
            transitions, info = sources.load(self.dataset, self.d4rl_compat, self.columns)
            if self.sha256 is not None and info.sha256 != self.sha256.lower():
                raise UserError(f"data.sha256: {info.path} has the digest {info.sha256}, not {self.sha256}")
            self._loaded = self._checked(transitions, info)
        return self._loaded

    def _checked(self, transitions: Transitions, info: DatasetInfo) -> tuple[Transitions, DatasetInfo]:
        """Return the dataset with the environment of the options, after a check that the options fit it."""
        widths = {np.size(bound) for bound in self.action_bounds or ()}
        if not widths <= {1, transitions.action_dim}:
            raise UserError(
                f"data.action_bounds: bounds of {max(widths)} dimensions do not fit actions of {transitions.action_dim}"
            )
        return transitions, self._with_environment(info)

    def _with_environment(self, info: DatasetInfo) -> DatasetInfo:
        if self.environment is None:
            return info
        if not sources.source_of(info).plays_episodes:
            raise UserError(f"data.environment: {info.id} is a 2-D set, in which no episodes are played: leave it out")
        if info.environment is not None:
            raise UserError(
                f"data.environment: {info.id} is evaluated in {info.environment.env_id}; the option is for datasets "
                "that name no environment"
            )
        return replace(info, environment=EnvironmentInfo(self.environment, {}, max_episode_steps=None))

    @property
    def transitions(self) -> Transitions:
        """The recorded transitions."""
        return self.load()[0]

    @property
    def info(self) -> DatasetInfo:
        """Facts about the dataset besides its transitions."""
        return self.load()[1]

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return self.transitions.observation_dim

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self.transitions.action_dim

    def prepare_data(self) -> None:
        """Collect or download the dataset if it is not here; ranks other than the first wait for it.

        Lightning calls this hook before `setup`. A script that reads the dataset before `Trainer.fit`, e.g. its
        dimensions, calls it first.

        Raises:
            UserError: The id is unknown, or the dataset can neither be collected nor downloaded.
        """
        if self._loaded is not None:  # e.g. arrays in memory
            return
        source = sources.find_source(self.dataset)
        while launched_rank() > 0 and not source.is_here(self.dataset):
            time.sleep(self.SECONDS_BETWEEN_LOOKS)
        source.prepare(self.dataset)

    def setup(self, stage: str) -> None:
        """Read the data. The algorithm takes `action_units` and `observation_statistics` from here."""
        self.load()

    @property
    def action_units(self) -> tuple[Tensor, Tensor]:
        """Zero and unit of the actions that networks see, in units of the dataset, each `[action_dim]`."""
        bounds = self.action_bounds or self.info.action_bounds or (-1.0, 1.0)
        low, high = torch.tensor(bounds).float().reshape(2, -1).expand(2, self.action_dim)
        return (low + high) / 2, (high - low) / (2 * self.action_limit)

    @cached_property
    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the observations of training, each `[observation_dim]`."""
        kept = self.kept()
        observations = self.transitions.observations if kept is None else self.transitions.observations[kept]
        mean = observations.mean(axis=0, dtype=np.float64)
        # In pieces, because the whole table in double precision would take twice the memory of the table.
        pieces = np.array_split(observations, -(-len(observations) // 65_536))
        variance = sum(((piece - mean) ** 2).sum(axis=0) for piece in pieces) / len(observations)
        std = np.maximum(np.sqrt(variance), self.SMALLEST_STD)
        return torch.as_tensor(mean).float(), torch.as_tensor(std).float()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each field of `Batch` in the table."""
        return self.observation_dim, self.action_dim, 1, self.observation_dim, 1

    @cached_property
    def held_out(self) -> NDArray[np.bool_] | None:
        """Mask of the held-out transitions, bool `[n]`; None where none are held out.

        Raises:
            UserError: No episode is left for training.
        """
        return self._rows_of(self._shuffled_episodes()[0]) if self.validation_fraction else None

    @cached_property
    def drawn(self) -> NDArray[np.bool_] | None:
        """Mask of the transitions of the episodes that `episode_fraction` leaves to training, bool `[n]`; None for all.

        Raises:
            UserError: No episode is left for training.
        """
        if self.episode_fraction == 1:
            return None
        _, training = self._shuffled_episodes()
        return self._rows_of(training[: max(round(self.episode_fraction * len(training)), 1)])

    def _shuffled_episodes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the held-out episodes and of the others, both in an order that is always the same."""
        episodes = np.random.default_rng(0).permutation(len(self.transitions.episode_starts))
        count = max(round(self.validation_fraction * len(episodes)), 1) if self.validation_fraction else 0
        if count >= len(episodes):
            raise UserError(
                f"data.validation_fraction: {self.validation_fraction} of {len(episodes)} episodes leaves none"
            )
        return episodes[:count], episodes[count:]

    @cached_property
    def best(self) -> NDArray[np.bool_] | None:
        """Mask of the transitions of the best episodes, bool `[n]`; None where all are kept."""
        if self.best_episodes == 1:
            return None
        returns = self.transitions.episode_returns()
        count = max(int(self.best_episodes * len(returns)), 1)
        return self._rows_of(np.argsort(-returns, kind="stable")[:count])

    def _rows_of(self, episodes: NDArray[np.int64]) -> NDArray[np.bool_]:
        chosen = np.zeros(len(self.transitions.episode_starts), bool)
        chosen[episodes] = True
        return np.repeat(chosen, self.transitions.episode_lengths())

    def kept(self, held_out: bool = False) -> NDArray[np.bool_] | None:
        """Return the mask of the transitions of training, or of the held-out ones, bool `[n]`; None for all.

        Raises:
            UserError: There are none left.
        """
        masks = [] if self.best is None else [self.best]
        if self.held_out is not None:
            masks.append(self.held_out == held_out)
        if self.drawn is not None and not held_out:
            masks.append(self.drawn)
        if not masks:
            return None
        kept: NDArray[np.bool_] = np.logical_and.reduce(masks)
        if not kept.any():
            raise UserError(
                f"data.best_episodes: of the best {self.best_episodes:g} of the episodes, validation_fraction "
                f"{self.validation_fraction:g} and episode_fraction {self.episode_fraction:g} leaves none"
            )
        return kept

    def table(self, held_out: bool = False) -> tuple[Tensor, tuple[int, ...]]:
        """Return the fields of `Batch` side by side, `[n, width]`, and the width of each.

        Args:
            held_out: Return the held-out transitions instead of those of training.
        """
        transitions, widths = self.transitions, self.widths
        table = torch.empty(len(transitions), sum(widths))
        # Filled and normalized in place, so that memory holds one copy besides the recorded data.
        observations, actions, rewards, next_observations, terminals = torch.split(table, list(widths), dim=1)
        observations.copy_(torch.from_numpy(transitions.observations))
        next_observations.copy_(torch.from_numpy(transitions.next_observations))
        if self.normalize_observations:
            mean, std = self.observation_statistics
            observations.sub_(mean).div_(std)
            next_observations.sub_(mean).div_(std)
        center, scale = self.action_units
        actions.copy_(torch.from_numpy(transitions.actions)).sub_(center).div_(scale)
        actions.clamp_(-self.action_limit, self.action_limit)
        rewards.copy_(torch.from_numpy(reward_rule(self.reward)(transitions))[:, None])
        terminals.copy_(torch.from_numpy(transitions.terminals)[:, None])
        kept = self.kept(held_out)
        return table if kept is None else table[torch.from_numpy(kept)], widths

    def episode_ends(self, held_out: bool = False) -> Tensor:
        """Return whether each row of `table` is the last of its episode, bool `[n]`."""
        kept, ends = self.kept(held_out), self.transitions.episode_ends
        return torch.from_numpy(ends if kept is None else ends[kept])

    def check_block_fits(self) -> None:
        """Check that a block of minibatches fits into the memory of this machine.

        Raises:
            UserError: It does not.
        """
        transitions = self.batch_size * self.block_size
        needed, there = transitions * (8 + 4 * sum(self.widths)), memory_bytes()  # an index, and the fields as float32
        if there is not None and needed > there:
            raise UserError(
                f"data.batch_size: {self.batch_size:,} transitions in each of the {self.block_size} minibatches of a "
                f"block take {needed / 1e9:.1f} GB ({needed:,} bytes), this machine has {there / 1e9:.1f} GB: make it, "
                "or data.block_size, smaller"
            )

    def shared_table(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return the table of training, in memory shared with other processes where `SHARED_TABLES` names a folder."""
        widths = self.widths
        options = [getattr(self, name) for name in self.TABLE_OPTIONS]
        return share_table(lambda: self.table()[0], sum(widths), options), widths

    def train_dataloader(self) -> BlockSampler:
        """Return the block sampler over the table, on the training device."""
        table, widths = self.shared_table()
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        return BlockSampler(
            table.to(device),
            widths,
            self.batch_size,
            self.block_size,
            self.steps_per_epoch,
            self.trainer.max_steps,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.episode_ends().to(device),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out transitions in batches; without any, one empty batch, so that rollouts take place."""
        if self.held_out is None:
            return self.test_dataloader()
        table, widths = self.table(held_out=True)
        length = 1 if self.trainer is None else getattr(self.trainer.lightning_module, "segment_length", 1)
        rewards, terminals = table[:, sum(widths[:2])], table[:, -1]
        episodes = Episodes.of(rewards, self.episode_ends(held_out=True), terminals) if length > 1 else None
        pieces = torch.split(torch.arange(len(table)), self.HELD_OUT_BATCH)
        # Rows of this table are not rows of the table of training, so they are not told.
        batches = [gather(table, widths, rows, episodes, length)._replace(rows=None) for rows in pieces]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        """Return one empty batch: a test consists of rollouts."""
        return DataLoader(range(1), batch_size=None)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return the dataset's raw observations in order, `[batch, observation_dim]` each."""
        observations = torch.split(torch.from_numpy(self.transitions.observations), self.PREDICTION_BATCH)
        return DataLoader(observations, batch_size=None)  # type: ignore[arg-type]
