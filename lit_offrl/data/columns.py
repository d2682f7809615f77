"""Which columns of a log hold what, as a user names them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

SUCCESS_AT_END = "success_at_end"
"""In place of a reward column: the last step of every episode pays 1 and is terminal, other steps pay 0."""


@dataclass(frozen=True)
class LogColumns:
    """Columns of CSV and Parquet logs, features of LeRobot folders, observation keys of robomimic files.

    What is not named is found by its usual name, see `lit_offrl.data.formats.tables`.

    Attributes:
        observations: Columns of an observation, in this order; a `*` stands for any letters.
        actions: Columns of an action, in this order.
        next_observations: Columns of the next observation, in the order of `observations`.
        rewards: Column of the reward, or success_at_end: the last step of every episode pays 1 and is terminal.
        terminals: Column of the flag that the step led to a terminal state.
        timeouts: Column of the flag that the episode was cut after the step.
        episode: Column that names the episode of a row.
        step: Column that counts the steps of an episode, or holds their time.
    """

    observations: list[str] | str | None = None
    actions: list[str] | str | None = None
    next_observations: list[str] | str | None = None
    rewards: str | None = None
    terminals: str | None = None
    timeouts: str | None = None
    episode: str | None = None
    step: str | None = None


USUAL_NAMES = LogColumns()
"""No column is named: all are found by their usual names."""
