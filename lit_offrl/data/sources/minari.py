"""Minari datasets: those in the local root, and those that Minari's client downloads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo, ScoreReference
from lit_offrl.data.sources.base import DataSource, Listing
from lit_offrl.errors import UserError, one_line
from lit_offrl.system.files import home_folder

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

FORMATS = ("hdf5", "arrow", "parquet")
COLLECTED_NAMESPACE = "offrl/"
_ID = re.compile(r"^(?:[\w-]+/)+[\w-]+-v\d+$")
_REMOTE = "https://huggingface.co"
_D4RL_NAMESPACE = "D4RL/"


# ------------------------------------------------------------------------------------------------- the local root


def minari_root() -> Path:
    """Return Minari's local root: MINARI_DATASETS_PATH, or .minari/datasets in the home folder."""
    variable = "MINARI_DATASETS_PATH"
    return Path(os.environ.get(variable) or home_folder(variable) / ".minari" / "datasets")


def is_present(dataset: str) -> bool:
    """Return whether the dataset lies in the local root."""
    return (minari_root() / dataset / "data" / "metadata.json").is_file()


def read_metadata(dataset: str) -> dict[str, Any]:
    """Return the metadata of a dataset in the local root.

    Raises:
        UserError: The file is missing or broken.
    """
    path = minari_root() / dataset / "data" / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable ({error}): remove {path.parent.parent} and get it again") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} holds no table of names and values: remove {path.parent.parent} and get it again")
    return metadata


def local_datasets() -> Iterator[str]:
    """Yield the ids of the datasets in the local root."""
    root = minari_root()
    for path in sorted(root.glob("**/data/metadata.json")):
        dataset = path.parent.parent.relative_to(root)
        if not any(part.startswith(".") for part in dataset.parts):  # an unfinished collection lies in a hidden folder
            yield dataset.as_posix()


def size_mb(dataset: str) -> float | None:
    """Return the size of a dataset's files, without the cache; None where the dataset is not here."""
    if not is_present(dataset):
        return None
    files = (minari_root() / dataset / "data").rglob("*")
    return sum(path.stat().st_size for path in files if "cache" not in path.name) / 1e6


# ------------------------------------------------------------------------------------------------------ the source


class Minari(DataSource):
    """Datasets by their Minari id, e.g. `D4RL/antmaze/umaze-v1`.

    Dictionary observations become vectors, see `lit_offrl.data.formats.minari`.

    In PointMaze data with moving goals the first observation of an episode still shows the goal of the episode before.
    Where `desired_goal` is part of the vector, the goal of the second observation replaces it.
    """

    names: ClassVar[tuple[str, ...]] = ("minari",)
    reference_name = "minari"

    def help(self) -> str:
        """Return how Minari's datasets are named."""
        return (
            "Minari's datasets, by id (D4RL/antmaze/umaze-v1); "
            f"in {minari_root()} (MINARI_DATASETS_PATH), else downloaded there"
        )

    def matches(self, dataset: str) -> bool:
        """Return whether the id has Minari's form, `namespace/.../name-vN`, or lies in the local root."""
        return bool(_ID.match(dataset)) or is_present(dataset)

    def is_here(self, dataset: str) -> bool:
        """Return whether the dataset lies in the local root."""
        return is_present(dataset)

    def prepare(self, dataset: str) -> None:
        """Download a dataset into the local root; where the remote cannot be reached, fail within seconds."""
        from lit_offrl.data.download import host_answers

        if self.is_here(dataset):
            return
        remedy = f"copy it to {minari_root() / dataset}, or choose another dataset (`data list`)"
        # Minari's client retries a dead network for half a minute to two minutes.
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or not host_answers(_REMOTE):
            raise UserError(
                f"data.dataset: '{dataset}' is not in {minari_root()} and its remote cannot be reached: {remedy}"
            )
        import minari

        try:
            minari.download_dataset(dataset)
        except Exception as error:  # the client's exceptions share no base class
            raise UserError(
                f"data.dataset: '{dataset}' could not be downloaded ({one_line(error)[:200]}): {remedy}"
            ) from error

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a dataset from the local root; download it first if it is not there."""
        from lit_offrl.data.formats.arrays import reading
        from lit_offrl.data.formats.cache import cached
        from lit_offrl.data.formats.minari import read_minari

        self.prepare(dataset)
        folder = minari_root() / dataset / "data"
        metadata = read_metadata(dataset)
        with reading(folder / "metadata.json"):
            facts = _Facts.of(metadata)
        path = folder / "main_data.hdf5" if facts.data_format == "hdf5" else folder
        if not path.exists():
            raise UserError(f"{dataset}: {path} is missing: remove {folder.parent} and get the dataset again")
        environment = facts.environment
        keys, repair = facts.observation_keys, environment is not None and environment.env_id.startswith("PointMaze")
        table, digest = cached(
            path,
            {"observation_keys": keys, "repair_goals": repair},
            lambda: read_minari(path, tuple(keys) if keys else None, repair),
        )
        return table.transitions, DatasetInfo(
            id=dataset,
            source=self.names[0],
            path=path,
            sha256=digest,
            observation_keys=table.observation_keys,
            action_bounds=facts.action_bounds,
            environment=environment,
            environment_note="" if environment else "the dataset's metadata names no environment",
            reference=facts.reference,
            metadata=metadata,
        )

    def listing(self) -> Iterable[Listing]:
        """Return the datasets in the local root, except those that this package collects."""
        datasets = (dataset for dataset in local_datasets() if not dataset.startswith(COLLECTED_NAMESPACE))
        return (Listing(dataset, "Minari dataset", size_mb(dataset)) for dataset in datasets)

    def environment(self, info: DatasetInfo) -> EnvironmentInfo | None:
        """Return the environment of the metadata, with D4RL's rules for the datasets below `D4RL/`."""
        if info.environment is None or not info.id.startswith(_D4RL_NAMESPACE):
            return info.environment
        return _with_d4rl_rules(info.id.removeprefix(_D4RL_NAMESPACE), info.environment)

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return the reference of the metadata."""
        return None if info.reference is None else ScoreReference(self.reference_name, *info.reference)


# ---------------------------------------------------------------------------------------------------- the metadata


@dataclass(frozen=True)
class _Facts:
    """What the package needs of a dataset's metadata.json, checked: the file may come from anywhere."""

    data_format: str
    observation_keys: list[str] | None
    environment: EnvironmentInfo | None
    action_bounds: tuple[tuple[float, ...], tuple[float, ...]] | None
    reference: tuple[float, float] | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _Facts:
        """Check the entries.

        Raises:
            UserError: One has a wrong type or value; the message names it.
        """
        data_format = metadata.get("data_format") or "hdf5"
        if data_format not in FORMATS:
            raise UserError(f"'data_format' is {_short(data_format)}; {', '.join(FORMATS)} are read")
        keys = _entry(metadata, "observation_keys", list)
        if not all(isinstance(key, str) for key in keys):
            raise UserError(f"'observation_keys' must be a list of names, not {_short(keys)}")
        return cls(data_format, keys or None, _environment(metadata), _action_bounds(metadata), _reference(metadata))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _entry(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return an entry of the metadata, decoded where Minari stored JSON within JSON; empty where it is missing."""
    value = metadata.get(name)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{name}' is no JSON ({error})") from error
    if value in (None, "", {}, []):
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"'{name}' must be a {kind.__name__}, not {_short(value)}")
    return value


def _environment(metadata: Mapping[str, Any]) -> EnvironmentInfo | None:
    name = "eval_env_spec" if _entry(metadata, "eval_env_spec", dict) else "env_spec"
    spec = _entry(metadata, name, dict)
    if not spec:
        return None
    env_id, kwargs, limit = spec.get("id"), spec.get("kwargs") or {}, spec.get("max_episode_steps")
    if not isinstance(env_id, str) or not env_id:
        raise UserError(f"'{name}' must name an environment as 'id', not {_short(env_id)}")
    if ":" in env_id:  # Gymnasium would import the module before the colon
        raise UserError(f"'{name}' names code, {_short(env_id)}: a dataset may name environments that are registered")
    if not isinstance(kwargs, dict):
        raise UserError(f"'kwargs' in '{name}' must be a dict, not {_short(kwargs)}")
    if limit is not None and not (type(limit) is int and limit > 0):
        raise UserError(f"'max_episode_steps' in '{name}' must be a positive number of steps, not {_short(limit)}")
    return EnvironmentInfo(env_id, kwargs, limit or 1000)


def _action_bounds(metadata: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    import numpy as np

    space = _entry(metadata, "action_space", dict)
    if not space:
        return None
    if space.get("type") != "Box":
        raise UserError(
            f"actions are of kind {_short(space.get('type'))}: this package trains on continuous actions only"
        )
    try:
        low, high = (np.asarray(space[bound], np.float64) for bound in ("low", "high"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'action_space' has no valid low and high ({one_line(error)})") from error
    if low.ndim != 1 or low.shape != high.shape or not len(low) or not (low < high).all():
        raise UserError("'action_space' must be a box of vectors, low below high in each dimension")
    if not np.isfinite([low, high]).all() or (np.all(low == -1) and np.all(high == 1)):
        return None
    return tuple(low.tolist()), tuple(high.tolist())


def _reference(metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = (metadata.get(name) for name in ("ref_min_score", "ref_max_score"))
    if low is None or high is None:
        return None
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (low, high)):
        raise UserError(f"'ref_min_score' and 'ref_max_score' must be numbers, not {_short([low, high])}")
    if not low < high:
        raise UserError(f"'ref_min_score' must be below 'ref_max_score', not {low:g} and {high:g}")
    return float(low), float(high)


# ----------------------------------------------------------------------------------------- D4RL's goals and limits

_FIXED_GOAL = {"continuing_task": True, "reset_target": False}
_EPISODIC = {"continuing_task": False, "reset_target": False}
_RULES: tuple[tuple[str, dict[str, Any], int | None], ...] = (
    # dataset, keyword arguments of the environment, time limit (None: as the dataset says). The environments stored
    # with Minari's D4RL datasets are those that recorded the data: goals move, episodes go on at the goal, and
    # PointMaze's last a million steps. The limits are those that D4RL registers its own environments with.
    # A dense reward is positive everywhere, so that ending at the goal would punish reaching it: D4RL does not.
    (r"pointmaze/(open|umaze)-dense", _FIXED_GOAL, 300),
    (r"pointmaze/medium-dense", _FIXED_GOAL, 600),
    (r"pointmaze/large-dense", _FIXED_GOAL, 800),
    (r"pointmaze/(open|umaze)", _EPISODIC, 300),
    (r"pointmaze/medium", _EPISODIC, 600),
    (r"pointmaze/large", _EPISODIC, 800),
    (r"antmaze/umaze", _EPISODIC, 700),
    (r"antmaze/(medium|large)", _EPISODIC, 1000),
    (r"pen/", {}, 100),  # D4RL's reference returns are of 100 steps; AdroitHandPen-v1 allows 200
    (r"kitchen/", {"remove_task_when_completed": True}, None),  # else a task pays in every step after its completion
)


def _with_d4rl_rules(name: str, environment: EnvironmentInfo) -> EnvironmentInfo:
    """Return the environment with the goals and the time limit of D4RL's evaluation, see `_RULES`.

    Args:
        name: Id of the dataset without the namespace, e.g. `antmaze/umaze-v1`.
        environment: The environment as the dataset names it.
    """
    for pattern, kwargs, limit in _RULES:
        if re.match(pattern, name):
            limit = limit or environment.max_episode_steps
            return replace(environment, kwargs={**environment.kwargs, **kwargs}, max_episode_steps=limit)
    return environment
