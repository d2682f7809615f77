"""What sequence methods and action chunks need: segments with a mask, and a memory per episode while acting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, Memory, OfflineAlgorithm, OptimizerSpec, Phase
from lit_offrl.batch import Batch
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import UserError

LENGTHS = (3, 1, 5, 2)  # of episodes


def arrays() -> dict[str, Any]:
    """Return transitions whose observation and reward are the number of the row."""
    n = sum(LENGTHS)
    ends = np.isin(np.arange(n), np.cumsum(LENGTHS) - 1)
    return {
        "observations": np.arange(n, dtype=np.float32)[:, None],
        "next_observations": np.arange(n, dtype=np.float32)[:, None] + 1,
        "actions": np.zeros((n, 1)),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": ends & (np.arange(n) < 9),
        "timeouts": ends & (np.arange(n) >= 9),
    }


def sampler(segment_length: int, rank: int = 0, ranks: int = 1) -> BlockSampler:
    data = D4RLDataModule.from_arrays(arrays())
    table, widths = data.table()
    ends = torch.from_numpy(data.transitions.episode_ends)
    loader = BlockSampler(table, widths, 32, 5, 10, 20, seed=1, rank=rank, ranks=ranks, episode_ends=ends)
    loader.segment_length = segment_length
    return loader


def test_a_segment_never_crosses_the_end_of_its_episode():
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    last = np.cumsum(LENGTHS) - 1
    (block, *_) = sampler(4)
    assert block.observations.shape == (5, 32, 4, 1)
    assert block.rewards.shape == block.mask.shape == block.terminals.shape == (5, 32, 4)
    seen = set()
    for row, rewards, mask in zip(
        block.rows.flatten().tolist(), block.rewards.flatten(0, 1), block.mask.flatten(0, 1), strict=True
    ):
        real = rewards[mask == 1].int().tolist()
        assert real == list(range(row, row + len(real)))
        assert {episode[each] for each in real} == {episode[row]}
        assert len(real) == min(4, last[episode[row]] - row + 1)
        assert set(rewards[mask == 0].int().tolist()) <= {last[episode[row]]}
        seen.add(len(real))
    assert seen == {1, 2, 3, 4}


def test_segments_begin_where_single_transitions_would():
    """The stream of rows is the same, so are resuming and the shares of ranks."""
    for one, many in zip(sampler(1), sampler(3), strict=True):
        assert torch.equal(one.rows, many.rows)
        assert torch.equal(one.observations, many.observations[:, :, 0])
        assert one.mask is None
    (whole, *_), (first, *_), (second, *_) = sampler(3), sampler(3, 0, 2), sampler(3, 1, 2)
    assert torch.equal(torch.stack([first.mask, second.mask], 2).flatten(1, 2), whole.mask)


class Chunks(OfflineAlgorithm):
    """Fits the mean action of segments; acts by chunks of three actions: -1, 0 and 1 in turn."""

    segment_length = 3
    has_memory = True

    def __init__(self, observation_dim: int, action_dim: int, **common: Any) -> None:
        super().__init__(observation_dim, action_dim, **common)
        self.network = nn.Linear(observation_dim, action_dim)
        self.seen: list[Batch] = []

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("training", self.update),)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        return {"network": OptimizerSpec((self.network,), 1e-3)}

    def update(self, batch: Batch) -> Info:
        self.seen.append(batch)
        assert batch.mask is not None
        error = (self.network(batch.observations) - batch.actions).square().sum(-1)
        loss = (batch.mask * error).sum() / batch.mask.sum()
        self.minimize("network", loss)
        return {"loss": loss.detach()}

    def sample_actions(
        self, observations: Tensor, generator: torch.Generator | None, memories: Sequence[Memory] = ()
    ) -> Tensor:
        actions = []
        for memory in memories:
            chunk = memory.setdefault("chunk", [])
            if not chunk:
                chunk += [-1.0, 0.0, 1.0]
            actions.append([chunk.pop(0)])
        return torch.tensor(actions)


def fit(algorithm: OfflineAlgorithm, data: D4RLDataModule, folder: Path, *callbacks: lightning.Callback) -> None:
    trainer = lightning.Trainer(
        max_steps=4,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(algorithm, datamodule=data)


def test_an_algorithm_asks_for_segments(tmp_path: Path):
    algorithm = Chunks(1, 1)
    fit(algorithm, D4RLDataModule.from_arrays(arrays(), batch_size=7, steps_per_epoch=4), tmp_path)
    assert [batch.observations.shape for batch in algorithm.seen] == [(7, 3, 1)] * 4


class Corridor(gym.Env[Any, Any]):
    """Ends after as many steps as its seed says, at most 9; the reward is the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 1 + (seed or 0) % 9
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return np.zeros(1, np.float32), float(action[0]), self.left <= 0, False, {}


class Switches(Corridor):
    action_space = gym.spaces.Discrete(2)  # type: ignore[assignment]


gym.register("Corridor-v0", Corridor)
gym.register("Switches-v0", Switches)


def test_a_memory_lasts_for_one_episode_of_several_played_at_once(tmp_path: Path):
    """Episodes of 1 to 9 steps in two environments: each begins a chunk of its own, so its return is known."""
    evaluation = RolloutEvaluation(final_episodes=9, num_envs=2, seed=0, max_episode_steps=20)
    data = D4RLDataModule.from_arrays(arrays(), environment="Corridor-v0", steps_per_epoch=4)
    fit(Chunks(1, 1), data, tmp_path, evaluation)
    lines = (tmp_path / "eval.csv").read_text().splitlines()[1:]
    returns = {int(line.split(",")[5]): float(line.split(",")[4]) for line in lines}  # by length
    assert returns == {length: -1.0 if length % 3 else 0.0 for length in range(1, 10)}


def test_discrete_actions_are_refused_in_one_line(tmp_path: Path):
    data = D4RLDataModule.from_arrays(arrays(), environment="Switches-v0", steps_per_epoch=4)
    with pytest.raises(UserError, match="Switches-v0 has actions of kind Discrete; this package trains on"):
        fit(Chunks(1, 1), data, tmp_path, RolloutEvaluation())
