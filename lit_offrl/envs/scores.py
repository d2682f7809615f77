"""Normalized scores: which return scores 0, which 100, and who measured the two."""

from __future__ import annotations

from dataclasses import dataclass

from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.sources import source_of


@dataclass(frozen=True)
class ScoreReference:
    """A scale for returns. Scores of references with different names must not be compared.

    Attributes:
        name: Origin: `d4rl`, `minari`, or `local` (measured with this package, in the environment of evaluation).
        minimum: Return that scores 0, usually of a random policy.
        maximum: Return that scores 100, usually of an expert.
    """

    name: str
    minimum: float
    maximum: float

    def normalize(self, episode_return: float) -> float:
        """Return the normalized score, `100 (return - minimum) / (maximum - minimum)`; not clipped."""
        return 100 * (episode_return - self.minimum) / (self.maximum - self.minimum)


def reference_for(info: DatasetInfo) -> ScoreReference | None:
    """Return the reference that the dataset's own source gives; None where that is unknown or its range is empty."""
    reference = source_of(info).reference(info)
    if reference is None:
        return None
    name, minimum, maximum = reference
    return ScoreReference(name, minimum, maximum) if minimum < maximum else None
