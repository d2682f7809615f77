"""Datasets that this package collects in the real environments, by the behavior policies of `lit_offrl.collect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.sources.base import Listing
from lit_offrl.data.sources.minari import (
    COLLECTED_NAMESPACE,
    Minari,
    is_present,
    local_datasets,
    minari_root,
    read_metadata,
    size_mb,
)
from lit_offrl.data.sources.ogbench import (
    OGBENCH_NAMESPACE,
    SUCCESS,
    TASKS,
    collected_file,
    environment_name,
    file_name,
    load_task,
    task_name,
)
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lit_offrl.data.info import DatasetInfo, ScoreReference
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


class CollectedOGBench(Collected):
    """OGBench's robot arm: files in OGBench's format, which are read with the rewards of one task.

    `offrl/ogbench/cube-single-play-v0` is the file and means its default task; `...-play-singletask-task2-v0` names a
    task.
    The same data lie beside the files as a Minari dataset, with the rewards of the default task.
    """

    names: ClassVar[tuple[str, ...]] = ("offrl-ogbench",)

    def help(self) -> str:
        """Return how tasks are named."""
        return (
            f"{_OGBENCH}...: as OGBench's files, collected; cube-single-play-v0 has its default task, "
            "cube-single-play-singletask-task1-v0 to task5 another"
        )

    def matches(self, dataset: str) -> bool:
        """Return whether the id begins with `offrl/ogbench/`."""
        return dataset.startswith(_OGBENCH)

    def is_here(self, dataset: str) -> bool:
        """Return whether the file of the task has been collected."""
        return is_present(file_name(dataset))

    def prepare(self, dataset: str) -> None:
        """Collect the file of a task, which takes minutes."""
        self._check(dataset)
        super().prepare(file_name(dataset))

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read the file with the rewards of a task.

        Raises:
            UserError: It has not been collected, or there is no such task.
        """
        self._check(dataset)
        file = file_name(dataset)
        if not self.is_here(dataset):
            raise UserError(f"data.dataset: '{dataset}' has not been collected: run `data collect {file}`")
        name = dataset.removeprefix(_OGBENCH)
        environment = environment_name(task_name(name) if name == file_name(name) else name)
        path = collected_file(minari_root() / file / "data", dataset)
        return load_task(dataset, self.names[0], path, environment, read_metadata(file))

    def listing(self) -> Iterable[Listing]:
        """Return nothing: the files are in the listing of all collected datasets."""
        return ()

    def ids(self) -> Iterable[str]:
        """Return the tasks of all files; the files themselves are in the listing of all collected datasets."""
        from lit_offrl.collect.catalog import CATALOG

        for file in CATALOG:
            if self.matches(file):
                yield from (task_name(file, task) for task in range(TASKS + 1))

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return OGBench's score, the success rate."""
        return SUCCESS

    def _check(self, dataset: str) -> None:
        from lit_offrl.collect.catalog import CATALOG

        ids = [*CATALOG, *self.ids()]
        if dataset not in ids:
            raise UserError(
                f"data.dataset: '{dataset}' cannot be collected{did_you_mean(dataset, ids)}; see `data list`"
            )


_OGBENCH = COLLECTED_NAMESPACE + OGBENCH_NAMESPACE
