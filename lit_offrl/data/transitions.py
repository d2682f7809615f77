"""The table of transitions, and the sampler that turns it into blocks of minibatches on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.batch import Batch
from lit_offrl.errors import UserError


@dataclass(frozen=True)
class Transitions:
    """All transitions of a dataset in the order they were recorded, episode after episode.

    Attributes:
        observations: float32 `[n, observation_dim]`.
        actions: float32 `[n, action_dim]`.
        rewards: float32 `[n]`, as recorded.
        next_observations: float32 `[n, observation_dim]`; the true successor also at the end of an episode.
        terminals: bool `[n]`, the episode ended in a terminal state: no bootstrapping beyond it.
        timeouts: bool `[n]`, the episode was cut here without a terminal state: bootstrapping goes on.

    Raises:
        UserError: Shapes disagree, the table is empty, or it holds values that are not finite.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    terminals: NDArray[np.bool_]
    timeouts: NDArray[np.bool_]

    def __post_init__(self) -> None:
        n = len(self.rewards)
        if n == 0:
            raise UserError("the dataset has no transitions")
        shapes = {
            "observations": (n, self.observation_dim),
            "actions": (n, self.action_dim),
            "rewards": (n,),
            "next_observations": (n, self.observation_dim),
            "terminals": (n,),
            "timeouts": (n,),
        }
        for name, expected in shapes.items():
            array = getattr(self, name)
            if array.shape != expected:
                raise UserError(f"'{name}' has shape {array.shape}, but {expected} is needed beside {n} rewards")
            row = first_row_not_finite(array)
            if row is not None:
                raise UserError(
                    f"'{name}' holds NaN or infinity, first in transition {row}: repair or drop that episode"
                )

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return int(self.observations.shape[-1])

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return int(self.actions.shape[-1])

    @property
    def episode_ends(self) -> NDArray[np.bool_]:
        """Whether each transition is its episode's last one, bool `[n]`; the table's last one always is."""
        ends = self.terminals | self.timeouts
        ends[-1] = True
        return ends

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """Index of the first transition of each episode, `[episodes]`."""
        ends = np.flatnonzero(self.episode_ends)
        return np.concatenate([[0], ends[:-1] + 1])

    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted sum of recorded rewards of each episode, `[episodes]`."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.episode_starts)

    def monte_carlo_returns(self, discount: float) -> NDArray[np.float32]:
        """Discounted sum of rewards from each transition to the end of its episode, `[n]`.

        Where an episode was cut (`timeouts`) the sum lacks what would have followed.
        """
        ends = self.episode_ends
        returns = np.empty(len(self), np.float64)
        following = 0.0
        for i in range(len(self) - 1, -1, -1):
            following = float(self.rewards[i]) + discount * (0.0 if ends[i] else following)
            returns[i] = following
        return returns.astype(np.float32)


def first_row_not_finite(array: NDArray[Any], rows_at_a_time: int = 65_536) -> int | None:
    """Return the first row that holds NaN or infinity, if any; looks at pieces, so that no mask of the table arises."""
    if array.dtype.kind != "f":
        return None
    for start in range(0, len(array), rows_at_a_time):
        finite = np.isfinite(array[start : start + rows_at_a_time])
        if not finite.all():
            return start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
    return None


class BlockSampler:
    """Endless minibatches from a table that lives on the training device, in blocks of several updates.

    One pass over the sampler is one epoch of exactly `steps_per_epoch` gradient steps; where `max_steps` falls into
    it, the pass ends there. A minibatch is drawn uniformly with replacement. The stream of indices is the sampler's
    own and does not depend on how updates are grouped into blocks, so that a run that was stopped and resumed sees
    the minibatches of one that was not.

    Args:
        table: `[n, width]`, the fields of `Batch` side by side, on the device that samples.
        widths: Width of each field of `Batch` in the table.
        batch_size: Transitions per update, of all ranks together.
        block_size: Largest number of updates per block.
        steps_per_epoch: Updates per epoch.
        max_steps: Updates in all, or -1 for no limit.
        seed: Seed of the index stream.
        rank: Which of the processes that share each minibatch this is.
        ranks: Their number. Each draws the whole minibatch and keeps its rows `rank`, `rank + ranks`, ...
    """

    def __init__(
        self,
        table: Tensor,
        widths: tuple[int, ...],
        batch_size: int,
        block_size: int,
        steps_per_epoch: int,
        max_steps: int = -1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.table = table
        self.widths = widths
        self.batch_size = batch_size
        self.block_size = block_size
        self.steps_per_epoch = steps_per_epoch
        self.max_steps = max_steps
        self.rank = rank
        self.ranks = ranks
        self.generator = torch.Generator(device=table.device).manual_seed(seed)
        self.step = 0  # updates handed out, over all epochs
        self.blocks_in_epoch = 0

    @property
    def observations(self) -> Tensor:
        """All observations of the table, `[n, observation_dim]`."""
        return self.table[:, : self.widths[0]]

    @property
    def next_observations(self) -> Tensor:
        """All next observations of the table, `[n, observation_dim]`."""
        start = sum(self.widths[:3])
        return self.table[:, start : start + self.widths[3]]

    @property
    def _steps_left(self) -> int:
        """Updates that are still to be handed out in the present epoch."""
        end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        return (end if self.max_steps < 0 else min(end, self.max_steps)) - self.step

    def __len__(self) -> int:
        """Blocks of the present epoch, those already handed out included."""
        return self.blocks_in_epoch + -(-self._steps_left // self.block_size)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning stops at the last block of a sized loader without asking for more, so nothing may be left to do
        # after the last `yield`: all state is advanced before it.
        last = self._steps_left <= 0
        while not last:
            steps = min(self.block_size, self._steps_left)
            rows = torch.stack([self._draw_rows() for _ in range(steps)])
            self.step += steps
            epoch_ends = self.step % self.steps_per_epoch == 0
            last = epoch_ends or self.step == self.max_steps
            self.blocks_in_epoch = 0 if epoch_ends else self.blocks_in_epoch + 1
            yield self._block(rows[:, self.rank :: self.ranks])

    def _draw_rows(self) -> Tensor:
        # One draw per update, never one per block: see the class docstring.
        return torch.randint(len(self.table), (self.batch_size,), generator=self.generator, device=self.table.device)

    def _block(self, rows: Tensor) -> Batch:
        observations, actions, rewards, next_observations, terminals = torch.split(
            self.table[rows], list(self.widths), dim=-1
        )
        return Batch(observations, actions, rewards.squeeze(-1), next_observations, terminals.squeeze(-1), rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the index stream; Lightning stores it with the checkpoint."""
        return {"step": self.step, "blocks_in_epoch": self.blocks_in_epoch, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.step = state["step"]
        self.blocks_in_epoch = state["blocks_in_epoch"]
        self.generator.set_state(state["generator"].cpu())
