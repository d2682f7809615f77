"""The data module that all algorithms share."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_offrl.data import sources
from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.local import COLLECTED_NAMESPACE, is_present
from lit_offrl.data.rewards import check_rule, shaped_rewards
from lit_offrl.data.transitions import BlockSampler, Transitions
from lit_offrl.errors import require


class D4RLDataModule(lightning.LightningDataModule):
    """Offline transitions as blocks of minibatches, sampled from a table on the training device.

    Args:
        dataset: Dataset id, e.g. `offrl/antmaze/umaze-v0`; a set of this package that is not there yet is collected.
        batch_size: Transitions per gradient step.
        block_size: Gradient steps per training block; affects speed only.
        steps_per_epoch: Gradient steps per epoch.
        reward: Reward rule: `raw` or `minus_one`.
        normalize_observations: Shift and scale each observation dimension to mean 0 and deviation 1; the figures
            travel with the checkpoint.
        seed: Seed of the minibatches (set from `seed_everything`).
    """

    # States per batch of `predict`: each may have a thousand candidate actions.
    PREDICTION_BATCH = 64
    # Dimensions that hardly vary (constant ones among them) are not blown up by the normalisation.
    SMALLEST_STD = 1e-3

    def __init__(
        self,
        dataset: str,
        batch_size: int = 256,
        block_size: int = 50,
        steps_per_epoch: int = 1000,
        reward: str = "raw",
        normalize_observations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "block_size": block_size, "steps_per_epoch": steps_per_epoch}
        for name, value in sizes.items():
            require(value >= 1, f"data.{name}", "at least 1", value)
        check_rule(reward)
        self.dataset = dataset
        self.batch_size = batch_size
        self.block_size = block_size
        self.steps_per_epoch = steps_per_epoch
        self.reward = reward
        self.normalize_observations = normalize_observations
        self.seed = seed
        self._loaded: tuple[Transitions, DatasetInfo] | None = None

    def load(self) -> tuple[Transitions, DatasetInfo]:
        """Return the dataset, read (and collected, where it is ours and missing) on the first call."""
        if self._loaded is None:
            self.prepare_data()
            self._loaded = sources.load(self.dataset)
        return self._loaded

    @property
    def transitions(self) -> Transitions:
        """The table as recorded."""
        return self.load()[0]

    @property
    def info(self) -> DatasetInfo:
        """What is known of the dataset besides its transitions."""
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
        """Collect a dataset of this package that is not there yet."""
        if self.dataset.startswith(COLLECTED_NAMESPACE) and not is_present(self.dataset):
            # The one step upwards in the import order: a dataset that makes itself on first use must call its maker.
            from lit_offrl.collect.recorder import collect_dataset

            collect_dataset(self.dataset)

    def setup(self, stage: str) -> None:
        """Read the data; when training, tell the algorithm the observation statistics that its networks will see."""
        self.load()
        if stage == "fit" and self.normalize_observations and self.trainer is not None:
            mean, std = self.observation_statistics
            module: Any = self.trainer.lightning_module
            module.observation_mean.copy_(mean)
            module.observation_std.copy_(std)

    @cached_property
    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the observations, each `[observation_dim]`."""
        observations = self.transitions.observations.astype(np.float64)
        std = np.maximum(observations.std(axis=0), self.SMALLEST_STD)
        return torch.as_tensor(observations.mean(axis=0)).float(), torch.as_tensor(std).float()

    def table(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return the fields of `Batch` side by side, `[n, width]`, and the width of each."""
        transitions = self.transitions
        observations = torch.from_numpy(transitions.observations)
        next_observations = torch.from_numpy(transitions.next_observations)
        if self.normalize_observations:
            mean, std = self.observation_statistics
            observations, next_observations = (observations - mean) / std, (next_observations - mean) / std
        fields = (
            observations,
            torch.from_numpy(transitions.actions).clamp(-1, 1),
            torch.from_numpy(shaped_rewards(transitions, self.reward))[:, None],
            next_observations,
            torch.from_numpy(transitions.terminals).float()[:, None],
        )
        return torch.cat(fields, dim=1), tuple(field.shape[1] for field in fields)

    def train_dataloader(self) -> BlockSampler:
        """Return the block sampler over the table, on the training device."""
        table, widths = self.table()
        assert self.trainer is not None
        return BlockSampler(
            table.to(self.trainer.strategy.root_device),
            widths,
            self.batch_size,
            self.block_size,
            self.steps_per_epoch,
            self.trainer.max_steps,
            self.seed,
        )

    def val_dataloader(self) -> DataLoader[int]:
        """Return one empty batch: rollouts need an occasion, not data."""
        return DataLoader(range(1), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return the dataset's raw observations in order, `[batch, observation_dim]` each."""
        observations = torch.split(torch.from_numpy(self.transitions.observations), self.PREDICTION_BATCH)
        return DataLoader(observations, batch_size=None)  # type: ignore[arg-type]
