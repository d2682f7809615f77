"""Several datasets as one, e.g. `[a.npz, b.npz]`."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo, ScoreReference
from lit_offrl.data.sources.base import LONGEST_NAME, DataSource
from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

T = TypeVar("T")


class Several(DataSource):
    """Datasets in brackets, whose transitions make one table in the order of their names.

    They must have the same widths, observation keys, bounds of actions and, where they name one, environment of
    evaluation. The digest is that of their digests. Scores have a reference if all have the same.
    """

    names: ClassVar[tuple[str, ...]] = ("several",)
    is_own: ClassVar[bool] = True

    def help(self) -> str:
        """Return how several datasets are named."""
        return "several as one, in brackets: '[a.npz, b.npz]'"

    def matches(self, dataset: str) -> bool:
        """Return whether the name stands in brackets."""
        return dataset.startswith("[") and dataset.endswith("]")

    def is_here(self, dataset: str) -> bool:
        """Return whether all of them are here."""
        return all(source.is_here(part) for part, source in _parts(dataset))

    def prepare(self, dataset: str) -> None:
        """Download or collect those that are not here."""
        for part, source in _parts(dataset):
            source.prepare(part)

    def run_name(self, dataset: str) -> str:
        """Return the names of all with a plus between them, or the first and how many there are."""
        names = [source.run_name(part).replace("/", "-") for part, source in _parts(dataset)]
        name = "+".join(names)
        return name if len(name) <= LONGEST_NAME else f"{names[0]}+{len(names) - 1}_more"

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read all of them.

        Raises:
            UserError: They do not go together.
        """
        from lit_offrl.data.sources import load
        from lit_offrl.data.transitions import concatenate

        tables, infos = zip(*(load(part, d4rl_compat, columns) for part, _ in _parts(dataset)), strict=True)
        widths = [f"{table.observation_dim} observation and {table.action_dim} action dimensions" for table in tables]
        _agreed("has", infos, widths)
        keys = _agreed("has the observation keys", infos, [info.observation_keys for info in infos])
        unit = ((-1.0,) * tables[0].action_dim, (1.0,) * tables[0].action_dim)
        bounds = _agreed("has actions within", infos, [info.action_bounds or unit for info in infos])
        environments = [_environment(info) for info in infos]
        named = [(info, each) for info, each in zip(infos, environments, strict=True) if each is not None]
        environment = _agreed("is evaluated in", *zip(*named, strict=True)) if named else None
        return concatenate(tables), DatasetInfo(
            id=dataset,
            source=self.names[0],
            path=Path(dataset),
            sha256=sha256("\n".join(str(info.sha256) for info in infos).encode()).hexdigest(),
            observation_keys=keys,
            action_bounds=bounds,
            environment=environment,
            environment_note=infos[0].environment_note,
            parts=infos,
            notes=tuple(f"{info.id}: {note}" for info in infos for note in info.notes),
        )

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return the reference that all of them have."""
        from lit_offrl.data.sources import source_of

        first, *others = [source_of(part).reference(part) for part in info.parts]
        return first if all(other == first for other in others) else None


def _parts(dataset: str) -> list[tuple[str, DataSource]]:
    """Return the datasets in brackets, and their sources.

    Raises:
        UserError: One is named twice, is a 2-D set, or belongs to no source.
    """
    from lit_offrl.data.sources import find_source

    parts = [part.strip().strip("'\"") for part in dataset[1:-1].split(",")]
    if len(parts) < 2 or "" in parts or len(set(parts)) < len(parts):
        raise UserError(f"data.dataset: '{dataset[:200]}' must name two datasets or more, each of them once")
    found = [(part, find_source(part)) for part in parts]
    for part, source in found:
        if not source.plays_episodes:
            raise UserError(f"data.dataset: {part} is a 2-D set, which is trained on alone")
    return found


def _environment(info: DatasetInfo) -> EnvironmentInfo | None:
    from lit_offrl.data.sources import source_of

    return source_of(info).environment(info)


def _agreed(what: str, infos: tuple[DatasetInfo, ...], values: list[T] | tuple[T, ...]) -> T:
    """Return the value that all have.

    Raises:
        UserError: One has another.
    """
    for info, value in zip(infos, values, strict=True):
        if value != values[0]:
            first, other = (getattr(each, "env_id", each) for each in (values[0], value))
            raise UserError(f"data.dataset: {infos[0].id} {what} {first}, {info.id} {other}: train on them one by one")
    return values[0]
