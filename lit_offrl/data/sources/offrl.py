"""Datasets that this package collects in the real environments, by the behavior policies of `lit_offrl.collect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.sources.base import Listing
from lit_offrl.data.sources.minari import COLLECTED_NAMESPACE, Minari, local_datasets, size_mb
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lit_offrl.data.info import DatasetInfo
    from lit_offrl.data.transitions import Transitions


class Collected(Minari):
    """Minari datasets below `offrl/`, which `prepare` collects instead of downloading them."""

    names: ClassVar[tuple[str, ...]] = ("offrl",)
    reference_name = "local"  # measured with this package, in the environment of evaluation

    def help(self) -> str:
        """Return when datasets are collected."""
        return "offrl/...: collected on first use by `fit`, or with another number of steps by `data collect ID`"

    def matches(self, dataset: str) -> bool:
        """Return whether this is a Minari id that begins with `offrl/`."""
        return dataset.startswith(COLLECTED_NAMESPACE) and super().matches(dataset)

    def prepare(self, dataset: str) -> None:
        """Collect a dataset that is not here; takes seconds to minutes."""
        if not self.is_here(dataset):
            from lit_offrl.collect.recorder import collect_dataset

            collect_dataset(dataset)

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a dataset from Minari's local root.

        Raises:
            UserError: It has not been collected: loading never starts a collection.
        """
        if not self.is_here(dataset):
            ids = [*self.ids()]
            suggestion = "" if dataset in ids else did_you_mean(dataset, ids)
            raise UserError(
                f"data.dataset: '{dataset}' has not been collected: run `data collect {dataset}`{suggestion}"
            )
        return super().load(dataset, d4rl_compat, columns)

    def listing(self) -> Iterable[Listing]:
        """Return the catalog, and what else lies below `offrl/`."""
        from lit_offrl.collect.catalog import CATALOG

        for row in CATALOG.values():
            yield Listing(row.id, row.description, size_mb(row.id), row.steps, row.license.partition(",")[0])
        for dataset in local_datasets():
            if self.matches(dataset) and dataset not in CATALOG:
                yield Listing(dataset, "Minari dataset", size_mb(dataset))
