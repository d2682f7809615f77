"""A trained policy in use: from raw observations to raw actions, without trainer, dataset or environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.algorithms.base import Memory, OfflineAlgorithm
from lit_offrl.algorithms.checkpoints import load_algorithm
from lit_offrl.errors import UserError, did_you_mean, require

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class PolicySpec:
    """What a policy takes and gives, and where it comes from.

    Attributes:
        algorithm: Name of the class, e.g. `DTQL`.
        actor: Which of the algorithm's actors acts.
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        action_low: Smallest action, in the environment's units, `[action_dim]`.
        action_high: Largest action, `[action_dim]`.
        dataset: Id of the training data; None in checkpoints of scripts.
        dataset_sha256: Digest of the training data.
        gradient_steps: How long it was trained.
    """

    algorithm: str
    actor: str
    observation_dim: int
    action_dim: int
    action_low: Array
    action_high: Array
    dataset: str | None
    dataset_sha256: str | None
    gradient_steps: int


class Policy:
    """Acts as one of the actors of a trained algorithm.

    Everything between the environment's units is inside: normalization, candidates and the choice among them, clamping.
    Noise comes from a stream of the policy's own.

    Args:
        algorithm: The trained algorithm, on the device on which it is to act.
        actor: One of its actors.
        seed: Seed of the noise.

    Attributes:
        algorithm: The algorithm.
        spec: What the policy takes and gives.

    Raises:
        UserError: The algorithm has no such actor.
    """

    def __init__(self, algorithm: OfflineAlgorithm, actor: str = "policy", seed: int = 0) -> None:
        actors = algorithm.actors()
        if actor not in actors:
            raise UserError(f"actor: {type(algorithm).__name__} has no {actor}{did_you_mean(actor, actors)}")
        self.algorithm = algorithm.eval()
        units, trained_on = algorithm.units, algorithm.trained_on or {}
        limit = units.limit.expand(algorithm.action_dim)
        low, high = units.restore_actions(-limit), units.restore_actions(limit)
        self.spec = PolicySpec(
            type(algorithm).__name__,
            actor,
            algorithm.observation_dim,
            algorithm.action_dim,
            low.cpu().numpy(),
            high.cpu().numpy(),
            trained_on.get("id"),
            trained_on.get("sha256"),
            algorithm.gradient_step,
        )
        self._generator = torch.Generator(algorithm.device)
        self._memories: list[Memory] = []
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Begin new episodes: forget what a policy with a memory has kept, and with a seed start its noise anew."""
        self._memories = []
        if seed is not None:
            self._generator.manual_seed(seed)

    @overload
    def act(self, observations: Array, rewards: Array | float | None = None) -> NDArray[np.float32]: ...

    @overload
    def act(self, observations: Tensor, rewards: Tensor | float | None = None) -> Tensor: ...

    def act(self, observations: Any, rewards: Any = None) -> Any:
        """Return the actions at some observations, in the environment's units.

        A policy with a memory (`QC`, `DecisionTransformer`) takes each row for the next step of an episode of its own:
        call `reset` when the episodes begin anew.

        Args:
            observations: `[observation_dim]` or `[n, observation_dim]`, of NumPy or torch.
            rewards: Of the step before, a number or `[n]`; the Decision Transformer conditions on them.

        Returns:
            Actions of the same kind, `[action_dim]` or `[n, action_dim]`.

        Raises:
            UserError: Observations are of another width or number, or not finite.
        """
        is_tensor = isinstance(observations, Tensor)
        given = observations if is_tensor else torch.from_numpy(np.asarray(observations, dtype=np.float32))
        rows = given.reshape(1, -1) if given.ndim == 1 else given
        width = self.spec.observation_dim
        fits = rows.ndim == 2 and rows.shape[1] == width
        require(fits, "observations", f"of shape [{width}] or [n, {width}]", tuple(given.shape))
        require(bool(rows.isfinite().all()), "observations", "finite", "with a value that is not")
        memories = self._memories_of(len(rows), rewards) if self.algorithm.has_memory else None
        actions = self.algorithm.act(rows.to(self.algorithm.device), self._generator, self.spec.actor, memories)
        actions = actions.to(given.device).reshape(*given.shape[:-1], self.spec.action_dim)
        return actions if is_tensor else actions.numpy()

    def _memories_of(self, rows: int, rewards: Any) -> list[Memory]:
        if not self._memories:
            self._memories = [{} for _ in range(rows)]
            return self._memories
        episodes = len(self._memories)
        require(rows == episodes, "observations", f"{episodes} rows, as many as episodes (reset begins others)", rows)
        if rewards is not None:
            each = np.broadcast_to(np.asarray(rewards, dtype=np.float64), (rows,))
            for memory, reward in zip(self._memories, each, strict=True):
                memory["reward"] = float(reward)
        return self._memories


def load_policy(
    path: str | Path,
    actor: str = "policy",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    trust: bool = False,
) -> Policy:
    """Return the policy of a checkpoint.

        policy = lit_offrl.load_policy("runs/iql/log/seed_0/checkpoints/last.ckpt")
        action = policy.act(observation)

    Args:
        path: The checkpoint.
        actor: Which of the algorithm's actors acts, e.g. `behavior`.
        device: Where it computes.
        seed: Seed of its noise.
        trust: Import the algorithm's class also where it is not of this package and its module has not been imported
            yet, which runs that module's code.

    Raises:
        UserError: The file is no checkpoint of this package, its class cannot be imported or is not trusted, or there
            is no such actor.
    """
    return Policy(load_algorithm(path, trust).to(device), actor, seed)
