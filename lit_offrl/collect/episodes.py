"""One episode of a collected dataset: a pure function of the dataset's id, the seed and the episode's number."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_offrl.collect.catalog import CollectedDataset
from lit_offrl.data.info import EnvironmentInfo

if TYPE_CHECKING:
    import gymnasium

_PREFIX = "observations/"


@dataclass(frozen=True)
class Episode:
    """The record of one episode of T steps.

    Attributes:
        observations: Parts of the dictionary observation, `[T + 1, dim]` each; a vector is the part `observation`.
            OGBench's datasets have parts of the simulator's state beside it.
        actions: `[T, action_dim]`.
        rewards: `[T]`.
        terminations: `[T]`, true at the goal, or where the body fell and the environment ends the episode.
        truncations: `[T]`, true where the episode was cut off.
        kind: Behavior or policy of the episode, as the catalog names it.
        fell: Whether the body fell, which ends the episode.
    """

    observations: dict[str, NDArray[Any]]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    kind: str
    fell: bool

    @classmethod
    def of_steps(
        cls,
        observations: Sequence[Mapping[str, NDArray[np.float64]]],
        actions: Sequence[NDArray[np.float32]],
        rewards: Sequence[float],
        *,
        terminated: bool,
        truncated: bool,
        kind: str,
        fell: bool,
    ) -> Episode:
        """Return the episode of these steps; it ends at the last one, by a termination if it is both."""
        ends = np.zeros((2, len(rewards)), dtype=bool)
        ends[:, -1] = terminated, truncated and not terminated
        return cls(
            observations={key: np.stack([each[key] for each in observations]) for key in sorted(observations[0])},
            actions=np.stack(actions),
            rewards=np.array(rewards),
            terminations=ends[0],
            truncations=ends[1],
            kind=kind,
            fell=fell,
        )

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def success(self) -> bool:
        """Whether the goal was reached."""
        return bool(self.terminations[-1]) and not self.fell

    def cut(self, steps: int) -> Episode:
        """Return the first `steps` steps, truncated at the last one; the episode itself if it is not longer."""
        if steps >= len(self):
            return self
        truncations = self.truncations[:steps].copy()
        truncations[-1] = True
        return Episode(
            observations={key: part[: steps + 1] for key, part in self.observations.items()},
            actions=self.actions[:steps],
            rewards=self.rewards[:steps],
            terminations=self.terminations[:steps],
            truncations=truncations,
            kind=self.kind,
            fell=False,
        )

    def to_bytes(self) -> bytes:
        """Return the episode as an npz file, whose checksums detect damage."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            actions=self.actions,
            rewards=self.rewards,
            terminations=self.terminations,
            truncations=self.truncations,
            kind=np.array(self.kind),
            fell=np.array(self.fell),
            **{_PREFIX + key: part for key, part in self.observations.items()},  # type: ignore[arg-type]
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, record: bytes) -> Episode:
        """Return the episode that `to_bytes` wrote.

        Raises:
            ValueError: The record is damaged.
        """
        try:
            with np.load(io.BytesIO(record), allow_pickle=False) as file:
                arrays = dict(file)
            kind, fell = str(arrays.pop("kind")), bool(arrays.pop("fell"))
            parts = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_PREFIX)}
            return cls(
                {name.removeprefix(_PREFIX): part for name, part in parts.items()}, **arrays, kind=kind, fell=fell
            )
        except Exception as error:  # zipfile and numpy raise many kinds
            raise ValueError(f"no episode: {error}") from error


class Recorder(Protocol):
    """Records the episodes of a dataset, one at a time and in any order."""

    def record(self, index: int) -> Episode:
        """Return episode number `index`, from 0; it does not depend on the episodes recorded before."""

    def close(self) -> None:
        """Free the simulator."""


def episode_entropy(dataset: CollectedDataset, seed: int) -> tuple[int, int]:
    """Return the part of the random seed that all episodes of a dataset share."""
    return zlib.crc32(dataset.id.encode()), seed


def make_environment(dataset: CollectedDataset) -> gymnasium.Env[Any, Any]:
    """Return the environment of collection and evaluation."""
    from lit_offrl.envs.make import build_env

    return build_env(EnvironmentInfo(dataset.env_id, dataset.env_kwargs, dataset.max_episode_steps))
