"""OGBench's datasets with the rewards of one task, e.g. `ogbench/cube-single-play-singletask-task2-v0`.

The facts are those of the package `ogbench` 1.2, whose own functions read the files and compute rewards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo, ScoreReference
from lit_offrl.data.sources.base import DataSource, Listing
from lit_offrl.errors import UserError, did_you_mean
from lit_offrl.system.files import home_folder

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

OGBENCH_NAMESPACE = "ogbench/"
"""Namespace of OGBench's datasets, and of its environments, see `lit_offrl.envs.ogbench`."""

INSTALL = "pip install 'lit_offrl[ogbench]'"
"""What a user without the package does."""

SUCCESS = ScoreReference("ogbench", 0, 1, measure="success")
"""OGBench's score: the share of successful episodes, in percent."""

_BASE_URL = "https://rail.eecs.berkeley.edu/datasets/ogbench/"


class OGBench(DataSource):
    """OGBench's state-based datasets of mazes and manipulation, with the rewards of one of five tasks.

    Files are found in the package's folder or downloaded there. The files of validation are left alone.
    """

    names = ("ogbench",)

    def help(self) -> str:
        """Return how datasets are named."""
        return (
            f"OGBench, by task (ogbench/cube-single-play-singletask-v0, ...-singletask-task1-v0 to task5): "
            f"{len(OGBENCH_FILES)} files; in {ogbench_folder()} (OGBENCH_DATASET_DIR), else downloaded there"
        )

    def matches(self, dataset: str) -> bool:
        """Return whether the id begins with `ogbench/`."""
        return dataset.startswith(OGBENCH_NAMESPACE)

    def is_here(self, dataset: str) -> bool:
        """Return whether the file is in OGBench's folder."""
        return file_path(dataset).is_file()

    def prepare(self, dataset: str) -> None:
        """Download the file; a broken download is continued by the next call."""
        check_name(dataset)
        if not self.is_here(dataset):
            from lit_offrl.data.download import download

            download(_url(dataset), file_path(dataset))

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a file with the rewards of a task; download it first if it is not here."""
        self.prepare(dataset)
        name = environment_name(dataset.removeprefix(OGBENCH_NAMESPACE))
        return load_task(dataset, self.names[0], file_path(dataset), name, {"url": _url(dataset)})

    def listing(self) -> Iterable[Listing]:
        """Return the files that are here, by their default tasks."""
        for name in OGBENCH_FILES:
            dataset = OGBENCH_NAMESPACE + task_name(name)
            if self.is_here(dataset):
                size = file_path(dataset).stat().st_size / 1e6
                yield Listing(dataset, "OGBench file, also -task1 to -task5", size)

    def ids(self) -> Iterable[str]:
        """Return all tasks of all files."""
        return (OGBENCH_NAMESPACE + task_name(name, task) for name in OGBENCH_FILES for task in range(TASKS + 1))

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return OGBench's score, the success rate."""
        return SUCCESS


def load_task(
    dataset: str, source: str, path: Path, environment: str, metadata: Mapping[str, Any]
) -> tuple[Transitions, DatasetInfo]:
    """Read a file in OGBench's format with the rewards of a task.

    Args:
        dataset: The id.
        source: `DatasetInfo.source`.
        path: The `.npz` file.
        environment: The package's name of the environment of the task, e.g. `cube-single-singletask-task2-v0`.
        metadata: `DatasetInfo.metadata`.

    Raises:
        UserError: The package is missing, or the file is missing, broken or of another environment.
    """
    from lit_offrl.data.formats.cache import source_sha256
    from lit_offrl.data.formats.ogbench import read_ogbench

    transitions = read_ogbench(path, environment)
    is_solved = bool(transitions.terminals.any())
    return transitions, DatasetInfo(
        id=dataset,
        source=source,
        path=path,
        sha256=source_sha256(path),
        environment=EnvironmentInfo(OGBENCH_NAMESPACE + environment, {}, None),
        metadata=metadata,
        notes=() if is_solved else (f"the task is solved in no state of {path}",),
    )


def check_name(dataset: str) -> None:
    """Check that an id below `ogbench/` is one of a task.

    Raises:
        UserError: It is not; the line says why, or what was meant.
    """
    name = dataset.removeprefix(OGBENCH_NAMESPACE)
    if name.startswith(("visual-", "powderworld-")):
        raise UserError(f"data.dataset: '{dataset}' has images: this package trains on state vectors only")
    file = name.replace("-oraclerep-", "-")
    if file in OGBENCH_FILES:
        raise UserError(
            f"data.dataset: '{dataset}' is goal-conditioned, which is out of this package's scope: name one of its "
            f"tasks, e.g. {OGBENCH_NAMESPACE}{task_name(file)}"
        )
    ids = [*OGBench().ids()]
    if dataset not in ids:
        raise UserError(
            f"data.dataset: OGBench has no '{dataset}'{did_you_mean(dataset, ids)}; ids look like "
            "ogbench/cube-single-play-singletask-v0 (its default task) or ...-singletask-task1-v0 to task5"
        )


def ogbench_folder() -> Path:
    """Return where OGBench's files are kept: OGBENCH_DATASET_DIR, or .ogbench/data in the home folder, as it does."""
    variable = "OGBENCH_DATASET_DIR"
    return Path(os.environ.get(variable) or home_folder(variable) / ".ogbench" / "data")


def file_path(dataset: str) -> Path:
    """Return the file of a dataset."""
    return ogbench_folder() / f"{file_name(dataset.removeprefix(OGBENCH_NAMESPACE))}.npz"


def _url(dataset: str) -> str:
    """Return the address of a file; the environment variable LIT_OFFRL_OGBENCH_URL names a mirror."""
    return (os.environ.get("LIT_OFFRL_OGBENCH_URL") or _BASE_URL).rstrip("/") + "/" + file_path(dataset).name


# ------------------------------------------------------------------------------------------------ names and files

TASKS = 5  # of each environment


def _files() -> Iterator[str]:
    """Yield the name of every state-based file."""
    for maze in ("medium", "large", "giant", "teleport"):
        for body in ("pointmaze", "antmaze", "humanoidmaze"):
            if (body, maze) != ("humanoidmaze", "teleport"):
                yield from (f"{body}-{maze}-{kind}-v0" for kind in ("navigate", "stitch"))
        if maze != "giant":
            yield f"antmaze-{maze}-explore-v0"
    yield from (f"antsoccer-{field}-{kind}-v0" for field in ("arena", "medium") for kind in ("navigate", "stitch"))
    cubes = (f"cube-{number}" for number in ("single", "double", "triple", "quadruple"))
    puzzles = (f"puzzle-{size}" for size in ("3x3", "4x4", "4x5", "4x6"))
    yield from (f"{table}-{kind}-v0" for table in (*cubes, "scene", *puzzles) for kind in ("play", "noisy"))


OGBENCH_FILES: tuple[str, ...] = tuple(sorted(_files()))
"""Names of the state-based files without `.npz`, e.g. `cube-single-play-v0`."""


_DEFAULT_TASKS = (
    (r"antsoccer|puzzle-(3x3|4x4)", 4),
    (r"cube|scene|puzzle", 2),
    (r"", 1),
)


def task_name(file: str, task: int = 0) -> str:
    """Return the name of a task of a file, e.g. `cube-single-play-singletask-task2-v0`; task 0 is its default task."""
    return file.replace("-v0", f"-singletask{f'-task{task}' if task else ''}-v0")


def with_task_number(dataset: str) -> str:
    """Return the id with the number of its task where it means the default task; other ids as they are."""
    if not dataset.startswith(OGBENCH_NAMESPACE) or not dataset.endswith("-singletask-v0"):
        return dataset
    name = dataset.removeprefix(OGBENCH_NAMESPACE)
    default = next(task for pattern, task in _DEFAULT_TASKS if re.match(pattern, name))
    return dataset.replace("-singletask-", f"-singletask-task{default}-")


def file_name(name: str) -> str:
    """Return the name of the file of a task: `cube-single-play-v0` of `cube-single-play-singletask-task2-v0`."""
    return re.sub(r"-singletask(-task\d)?(?=-v0$)", "", name)


def collected_file(folder: Path, dataset: str) -> Path:
    """Return the file for training of a dataset that this package collects, e.g. `cube-single-play-v0.npz`.

    Args:
        folder: Where the files of the dataset lie.
        dataset: The id, with or without a task, e.g. `offrl/ogbench/cube-single-play-v0`.
    """
    return folder / f"{file_name(dataset.rpartition('/')[2])}.npz"


def environment_name(name: str) -> str:
    """Return the package's name of the environment of a task: `cube-single-singletask-task2-v0` of a play file."""
    return re.sub(r"-[a-z]+(?=-singletask)", "", name)
