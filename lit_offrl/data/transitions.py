"""The table of transitions, and the sampler that draws blocks of minibatches from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.batch import Batch
from lit_offrl.errors import UserError


@dataclass(frozen=True)
class Transitions:
    """All transitions of a dataset in the order of recording, one episode after another.

    Attributes:
        observations: float32 `[n, observation_dim]`.
        actions: float32 `[n, action_dim]`.
        rewards: float32 `[n]`, as recorded.
        next_observations: float32 `[n, observation_dim]`; the true successor also at the end of an episode.
        terminals: bool `[n]`, the step led to a terminal state: values do not bootstrap beyond it.
        timeouts: bool `[n]`, the episode was cut after this step: values bootstrap beyond it.
        ends: bool `[n]`, the last step of an episode, for episodes that go on after a terminal step, because they were
            recorded without the task whose rewards they have (OGBench); None where an episode ends at each terminal
            step and each timeout.

    Raises:
        UserError: Shapes disagree, the table is empty, or it holds values that are not finite.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    terminals: NDArray[np.bool_]
    timeouts: NDArray[np.bool_]
    ends: NDArray[np.bool_] | None = None

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
            "ends": (n,),
        }
        for name, array in self.arrays().items():
            expected = shapes[name]
            if array.shape != expected:
                raise UserError(f"'{name}' has shape {array.shape}, but {expected} is needed beside {n} rewards")
            row = first_row_not_finite(array)
            if row is not None:
                raise UserError(
                    f"'{name}' holds NaN or infinity, first in transition {row}: repair or drop that episode"
                )

    def __len__(self) -> int:
        return len(self.rewards)

    def arrays(self) -> dict[str, Any]:
        """Return the fields that are there, by their names."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in every.items() if array is not None}

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
        """Whether each transition is the last one of its episode, bool `[n]`; always true for the last of the table."""
        ends = self.terminals | self.timeouts if self.ends is None else self.ends.copy()
        ends[-1] = True
        return ends

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """Index of the first transition of each episode, `[episodes]`."""
        ends = np.flatnonzero(self.episode_ends)
        return np.concatenate([[0], ends[:-1] + 1])

    def episode_lengths(self) -> NDArray[np.int64]:
        """Number of transitions of each episode."""
        return np.diff(self.episode_starts, append=len(self))

    def episode_returns(self) -> NDArray[np.float64]:
        """Return the undiscounted sum of recorded rewards of each episode, `[episodes]`."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.episode_starts)


def concatenate(tables: Sequence[Transitions]) -> Transitions:
    """Return one table of several with the same widths; the last transition of each ends its episode."""
    names = [each.name for each in fields(Transitions) if each.name != "ends"]
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
    last = np.cumsum([len(table) for table in tables]) - 1
    columns["timeouts"][last] |= ~columns["terminals"][last]
    if any(table.ends is not None for table in tables):
        columns["ends"] = np.concatenate([table.episode_ends for table in tables])
    return Transitions(**columns)


def first_row_not_finite(array: NDArray[Any], rows_at_a_time: int = 65_536) -> int | None:
    """Return the first row that holds NaN or infinity, if any; checks pieces of the table to save memory."""
    if array.dtype.kind != "f":
        return None
    for start in range(0, len(array), rows_at_a_time):
        finite = np.isfinite(array[start : start + rows_at_a_time])
        if not finite.all():
            return start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
    return None


class Episodes(NamedTuple):
    """Where each row of a table stands in its episode.

    Attributes:
        last_rows: The last row of its episode, int64 `[n]`.
        timesteps: Its place in its episode, from 0, int64 `[n]`.
        returns_to_go: Sum of the rewards from this row to the end of its episode, or to its first terminal step, after
            which nothing counts, float32 `[n]`.
    """

    last_rows: Tensor
    timesteps: Tensor
    returns_to_go: Tensor

    @classmethod
    def of(cls, rewards: Tensor, ends: Tensor, terminals: Tensor) -> Episodes:
        """Return where rows stand.

        Args:
            rewards: `[n]`.
            ends: Whether each row is the last of its episode, `[n]`, on the same device.
            terminals: Whether each row is terminal, `[n]`, likewise.
        """
        last_rows = _next_of(ends)
        first_rows = torch.searchsorted(last_rows, last_rows)
        timesteps = torch.arange(len(last_rows), device=last_rows.device) - first_rows
        # In float64, because a sum over the table has more digits than one over an episode; on the CPU, because a sum
        # on a GPU may have other last digits in a resumed run.
        own = rewards.cpu().double()
        until = own.cumsum(0)
        returns_to_go = (until[_next_of(ends | terminals.bool()).cpu()] - until + own).float()
        return cls(last_rows, timesteps, returns_to_go.to(rewards.device))


def _next_of(flags: Tensor) -> Tensor:
    """Return the first row at or after each row that has the flag, `[n]`; the last row has it."""
    flagged = flags.nonzero()[:, 0]
    return flagged[torch.searchsorted(flagged, torch.arange(len(flags), device=flags.device))]


def gather(table: Tensor, widths: Sequence[int], rows: Tensor, episodes: Episodes | None, segment_length: int) -> Batch:
    """Return the transitions at some rows of a table, or the segments that begin there, see `Batch`.

    Args:
        table: `[n, width]`, the fields of `Batch` side by side.
        widths: Width of each field.
        rows: Numbers of rows, `[...]`.
        episodes: Of the table; needed for segments only.
        segment_length: Consecutive transitions; 1 for no segments.
    """
    taken = rows
    of_segments: tuple[Tensor, ...] = ()
    if segment_length > 1:
        assert episodes is not None, "segments need the ends of the episodes"
        steps = rows[..., None] + torch.arange(segment_length, device=rows.device)
        ends = episodes.last_rows[rows][..., None]
        taken = torch.minimum(steps, ends)
        of_segments = (steps <= ends).float(), episodes.returns_to_go[taken], episodes.timesteps[taken]
    observations, actions, rewards, next_observations, terminals = torch.split(table[taken], list(widths), dim=-1)
    return Batch(
        observations, actions, rewards.squeeze(-1), next_observations, terminals.squeeze(-1), rows, *of_segments
    )


class BlockSampler:
    """Blocks of minibatches from a table on the training device, one minibatch per gradient step.

    One pass over the sampler is one epoch of `steps_per_epoch` gradient steps, and ends earlier at `max_steps`.
    Minibatches are drawn uniformly with replacement, by a generator of the sampler's own. The indices do not depend on
    the grouping into blocks, so that a resumed run sees the same minibatches as an uninterrupted run.

    DTQL's authors draw with replacement, too. The authors of BDPO, EDA and QGPO go through shuffled permutations. In as
    many draws as there are transitions a permutation shows each of them once; draws with replacement leave out 1/e =
    37% of them. The expectation of a loss over minibatches is the same.

    Args:
        table: `[n, width]`, the fields of `Batch` side by side, on the device that samples.
        widths: Width of each field of `Batch` in the table.
        batch_size: Transitions per gradient step, over all ranks.
        block_size: Largest number of gradient steps per block.
        steps_per_epoch: Gradient steps per epoch.
        max_steps: Gradient steps of the run, or -1 for no limit.
        seed: Seed of the indices.
        rank: Number of this process among those that share each minibatch.
        ranks: Number of processes. Each draws the whole minibatch and keeps the rows `rank`, `rank + ranks`, ...
        episode_ends: Whether each row is the last of its episode, bool `[n]`; needed for segments and returns.

    Attributes:
        segment_length: Consecutive transitions per row of a minibatch. Above 1 the fields are `[updates, batch,
            segment_length, ...]` with a mask, see `Batch`; a segment never crosses the end of its episode.
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
        episode_ends: Tensor | None = None,
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
        self.episode_ends = episode_ends
        self.segment_length = 1
        self.step = 0  # gradient steps drawn, over all epochs
        self.blocks_in_epoch = 0

    @property
    def observations(self) -> Tensor:
        """All observations of the table, `[n, observation_dim]`."""
        return self.table[:, : self.widths[0]]

    @property
    def rewards(self) -> Tensor:
        """All rewards of the table, `[n]`."""
        return self.table[:, sum(self.widths[:2])]

    @property
    def next_observations(self) -> Tensor:
        """All next observations of the table, `[n, observation_dim]`."""
        start = sum(self.widths[:3])
        return self.table[:, start : start + self.widths[3]]

    @property
    def terminals(self) -> Tensor:
        """All terminals of the table, `[n]`."""
        return self.table[:, -1]

    @cached_property
    def episodes(self) -> Episodes:
        """The episodes of the table."""
        assert self.episode_ends is not None, "segments need the ends of the episodes"
        return Episodes.of(self.rewards, self.episode_ends, self.terminals)

    @property
    def _steps_left(self) -> int:
        """Gradient steps left in the current epoch."""
        end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        return (end if self.max_steps < 0 else min(end, self.max_steps)) - self.step

    def __len__(self) -> int:
        """Return the number of blocks of the current epoch, including those that were drawn."""
        return self.blocks_in_epoch + -(-self._steps_left // self.block_size)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning does not advance the iterator after the last block of an epoch: code after the last `yield` would
        # not run, so all state is updated before it.
        last = self._steps_left <= 0
        while not last:
            steps = min(self.block_size, self._steps_left)
            rows = torch.stack([self._draw_rows() for _ in range(steps)])
            self.step += steps
            epoch_ends = self.step % self.steps_per_epoch == 0
            last = epoch_ends or self.step == self.max_steps
            self.blocks_in_epoch = 0 if epoch_ends else self.blocks_in_epoch + 1
            own_rows = rows[:, self.rank :: self.ranks]
            episodes = self.episodes if self.segment_length > 1 else None
            yield gather(self.table, self.widths, own_rows, episodes, self.segment_length)

    def _draw_rows(self) -> Tensor:
        # One draw per gradient step: a draw per block would make the indices depend on the grouping into blocks.
        return torch.randint(len(self.table), (self.batch_size,), generator=self.generator, device=self.table.device)

    def state_dict(self) -> dict[str, Any]:
        """Return position and generator; Lightning stores them in the checkpoint."""
        return {"step": self.step, "blocks_in_epoch": self.blocks_in_epoch, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore position and generator."""
        self.step = state["step"]
        self.blocks_in_epoch = state["blocks_in_epoch"]
        self.generator.set_state(state["generator"].cpu())
