"""What a data source defines. Importing a source imports neither numpy nor torch: `data list` must answer at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo, ScoreReference

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

LONGEST_NAME = 255  # of a file


@dataclass(frozen=True)
class Listing:
    """One row of `data list`.

    Attributes:
        dataset: The id.
        description: One line.
        size_mb: Size of the files on this machine; None where there are none.
        steps: Number of transitions; None where unknown.
        license: License of the data.
    """

    dataset: str
    description: str
    size_mb: float | None = None
    steps: int | None = None
    license: str = ""


class DataSource(ABC):
    """A kind of dataset: where it comes from, and how policies trained on it are evaluated.

    To add a source, write a subclass in a file of its own and name it in `lit_offrl.data.sources.SOURCES`.

    Attributes:
        names: Values of `DatasetInfo.source` for datasets of this source.
        plays_episodes: Policies are evaluated by episodes in an environment. False: samples of the policy are compared
            with a known distribution.
        is_own: Data of the user's own: other data may get the same name later, and `columns` says what columns hold.
    """

    names: ClassVar[tuple[str, ...]]
    plays_episodes: ClassVar[bool] = True
    is_own: ClassVar[bool] = False

    @abstractmethod
    def help(self) -> str:
        """Return one line for `data list`: how datasets are named, and where their files lie."""

    @abstractmethod
    def matches(self, dataset: str) -> bool:
        """Return whether the source is responsible for an id or path, also if there is no such dataset."""

    def is_here(self, dataset: str) -> bool:
        """Return whether the dataset can be loaded without a download or a collection."""
        return True

    def run_name(self, dataset: str) -> str:
        """Return the name of the folder of runs on the dataset."""
        return dataset

    def prepare(self, dataset: str) -> None:  # noqa: B027 (most sources have nothing to do)
        """Download or collect a dataset that is not here.

        Raises:
            UserError: The dataset does not exist or cannot be reached.
        """

    @abstractmethod
    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a dataset.

        Args:
            dataset: The id or path.
            d4rl_compat: See `OriginalD4RL`; other sources ignore it.
            columns: See `OwnFiles`; other sources ignore it.

        Raises:
            UserError: There is no such dataset, or its files are broken.
        """

    def listing(self) -> Iterable[Listing]:
        """Return the rows of `data list`."""
        return ()

    def ids(self) -> Iterable[str]:
        """Return the known ids, for suggestions when an id is misspelled."""
        return (row.dataset for row in self.listing())

    def environment(self, info: DatasetInfo) -> EnvironmentInfo | None:
        """Return the environment in which policies are evaluated; None where it is unknown."""
        return info.environment

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return the reference of normalized scores; None where returns are all that can be reported."""
        return None
