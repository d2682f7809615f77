"""Playing several actors in one rollout."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import lightning
import numpy as np
import torch

from lit_offrl.algorithms import DTQL
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.envs.rollout import Rollouts


class Drift(gym.Env[np.ndarray, np.ndarray]):
    """Sums up the actions; an episode lasts 2 to 6 steps, as its seed says."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None
        self.left = 2 + seed % 5
        self.position = 0.0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.array([self.position, self.left], np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        self.position += float(action[0])
        return self.observe(), float(action[0]), self.left == 0, False, {}


def test_an_actor_plays_the_same_alone_and_among_others():
    torch.manual_seed(0)
    algorithm = DTQL(2, 1, hidden_dim=8, acting={"candidates": 2})
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    evaluation = RolloutEvaluation()
    with Rollouts(Drift, 3) as rollouts:
        evaluation._rollouts = rollouts
        alone = evaluation.play(algorithm, ["policy"], 7, trainer)
        both = evaluation.play(algorithm, ["policy", "behavior"], 7, trainer)
    assert list(both) == ["policy", "behavior"]
    assert [each.seed for each in both["behavior"]] == [each.seed for each in both["policy"]]
    # As in any batch of another size, the last digits of a row's product may differ.
    for one, other in zip(alone["policy"], both["policy"], strict=True):
        assert one.length == other.length
        np.testing.assert_allclose(one.episode_return, other.episode_return, atol=1e-5)
    differences = [a.episode_return - b.episode_return for a, b in zip(both["policy"], both["behavior"], strict=True)]
    assert min(np.abs(differences)) > 1e-3
