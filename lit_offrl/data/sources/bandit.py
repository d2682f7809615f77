"""2-D sets, which are generated when they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.sources.base import DataSource, Listing

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

NAMESPACE = "bandit/"


class Bandits(DataSource):
    """The 2-D sets of the papers as bandits: points are actions, labels are rewards (see `lit_offrl.data.bandits`)."""

    names = ("bandit",)
    plays_episodes = False

    def help(self) -> str:
        """Return how 2-D sets are named."""
        return f"2-D sets, generated when they are loaded: {NAMESPACE}NAME"

    def matches(self, dataset: str) -> bool:
        """Return whether the id begins with `bandit/`."""
        return dataset.startswith(NAMESPACE)

    def listing(self) -> Iterable[Listing]:
        """Return all sets."""
        from lit_offrl.data.bandits import BANDITS

        return (Listing(NAMESPACE + name, "2-D set", steps=bandit.size) for name, bandit in BANDITS.items())

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Generate a set."""
        from lit_offrl.data.bandits import bandit_transitions, find_bandit

        bandit = find_bandit(dataset)
        return bandit_transitions(bandit), DatasetInfo(
            id=dataset,
            source="bandit",
            path=Path(dataset),
            sha256=None,
            action_bounds=((-bandit.bound,) * 2, (bandit.bound,) * 2),
            environment_note="none: samples of the policy are compared with the target distribution",
        )
