"""Facts about a dataset besides its transitions. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class EnvironmentInfo:
    """The environment of evaluation, in plain values.

    Attributes:
        env_id: Gymnasium id, e.g. `AntMaze_UMaze-v4`.
        kwargs: Keyword arguments of `gymnasium.make` besides the id and the time limit.
        max_episode_steps: Time limit of one episode, in environment steps; None for the environment's own.
    """

    env_id: str
    kwargs: Mapping[str, Any]
    max_episode_steps: int | None


@dataclass(frozen=True)
class DatasetInfo:
    """Identity of a dataset, and how policies that were trained on it are evaluated.

    Attributes:
        id: Id or path as the user gave it, e.g. `offrl/antmaze/umaze-v0`.
        source: One of the `names` of its source, see `lit_offrl.data.sources`.
        path: File or folder of the data.
        sha256: Digest of the data files; None for arrays in memory and for 2-D sets, which are generated.
        observation_keys: Keys of a dictionary observation whose values are concatenated, in this order, into the
            observation vector; None where observations are plain vectors.
        action_bounds: Lowest and highest action, each `[action_dim]`; None for -1 and 1.
        environment: The environment that the dataset names; None where it names none.
        environment_note: Why there is no environment.
        reference: Returns that score 0 and 100, from the metadata of the dataset; None where unknown.
        metadata: Other facts of the source, e.g. the behavior of a collected dataset.
        parts: The datasets that this one was put together of.
        notes: What a user should know about the reading of a file, a line each, e.g. what was left out.
    """

    id: str
    source: str
    path: Path
    sha256: str | None
    observation_keys: tuple[str, ...] | None = None
    action_bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    environment: EnvironmentInfo | None = None
    environment_note: str = ""
    reference: tuple[float, float] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[DatasetInfo, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreReference:
    """A scale for returns or success rates. Scores of references with different names must not be compared.

    Attributes:
        name: Origin: `d4rl`, `minari`, `ogbench`, or `local` (measured with this package, in the environment of
            evaluation).
        minimum: Value that scores 0, usually the return of a random policy.
        maximum: Value that scores 100, usually the return of an expert.
        measure: What the values are: the mean return, or the share of successful episodes.
    """

    name: str
    minimum: float
    maximum: float
    measure: Literal["return", "success"] = "return"

    def normalize(self, value: float) -> float:
        """Return the normalized score, `100 (value - minimum) / (maximum - minimum)`; not clipped."""
        return 100 * (value - self.minimum) / (self.maximum - self.minimum)

    def score(self, mean_return: float, success_rate: float | None) -> float | None:
        """Return the normalized score of episodes; None where it is of their successes, which are unknown."""
        value = mean_return if self.measure == "return" else success_rate
        return None if value is None else self.normalize(value)
