"""Adapters from where data lies to `Transitions`: one function per source.

`load(dataset)` is the entrance. Only Minari datasets (among them those this package collects) are read so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.local import COLLECTED_NAMESPACE, FILE_SUFFIXES, is_present, minari_root, read_metadata
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, one_line

MINARI_ID = re.compile(r"^(?:[\w-]+/)*[\w-]+-v\d+$")


def load(dataset: str) -> tuple[Transitions, DatasetInfo]:
    """Read a dataset by its id.

    Raises:
        UserError: The id is malformed, nothing lies there, or what lies there is broken.
    """
    if Path(dataset).suffix in FILE_SUFFIXES:
        return load_minari_file(Path(dataset))
    if not MINARI_ID.match(dataset):
        raise UserError(
            f"data.dataset: '{dataset}' is not a dataset id; ids look like offrl/antmaze/umaze-v0 "
            "or D4RL/antmaze/umaze-v1 (`data list` shows them)"
        )
    return load_minari(dataset)


# ---------------------------------------------------------------------------------------------------------- Minari


def load_minari(dataset: str) -> tuple[Transitions, DatasetInfo]:
    """Read a Minari dataset (HDF5) from the local root, or download it there first.

    Dictionary observations become vectors: the values of `observation_keys` of the metadata, concatenated; where the
    metadata names none, see `_goal_observation_keys`. Episodes hold T + 1 observations, so the successor of every
    transition is the true one and none is dropped.

    Raises:
        UserError: The dataset is neither local nor to be had, or its file is broken.
    """
    if not is_present(dataset):
        download_minari(dataset)
    path = minari_root() / dataset / "data" / "main_data.hdf5"
    metadata = read_metadata(dataset)
    if not path.is_file():
        raise UserError(f"{dataset}: {path} is missing; only Minari's HDF5 format is read")
    keys = metadata.get("observation_keys")
    transitions, keys = _read_minari_hdf5(path, tuple(json.loads(keys)) if isinstance(keys, str) else keys)
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    collected = dataset.startswith(COLLECTED_NAMESPACE)
    return transitions, DatasetInfo(
        id=dataset,
        source="offrl" if collected else "minari",
        path=path,
        sha256=file_sha256(path),
        observation_keys=keys,
        environment=_environment(metadata),
        reference=None if low is None or high is None else (float(low), float(high)),
        metadata=metadata,
    )


def load_minari_file(path: Path) -> tuple[Transitions, DatasetInfo]:
    """Read an HDF5 file in Minari's layout that lies outside the local root: transitions without an environment."""
    if not path.is_file():
        raise UserError(f"data.dataset: no file {path}")
    transitions, keys = _read_minari_hdf5(path, None)
    return transitions, DatasetInfo(str(path), "file", path, file_sha256(path), observation_keys=keys)


def download_minari(dataset: str) -> None:
    """Download a Minari dataset into the local root.

    Raises:
        UserError: It does not exist or its host cannot be reached; says so within seconds.
    """
    if "/" not in dataset:
        raise UserError(
            f"data.dataset: '{dataset}' looks like an original D4RL id; those files are not read yet "
            "(a Minari id has slashes, e.g. D4RL/antmaze/umaze-v1)"
        )
    remedy = f"copy it to {minari_root() / dataset}, or choose another dataset (`data list`)"
    if dataset.startswith(COLLECTED_NAMESPACE):
        raise UserError(f"data.dataset: '{dataset}' has not been collected: run `data collect {dataset}`")
    if not _host_answers("huggingface.co"):
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


def _host_answers(host: str, seconds: float = 4.0) -> bool:
    # Minari's client retries a dead network for half a minute to two minutes; a connection attempt knows at once. It
    # runs beside us, because looking a name up knows no time limit. Behind a proxy only the client can tell.
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, 443), timeout=seconds):
            answered.set()

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return answered.is_set()


def _read_minari_hdf5(path: Path, keys: tuple[str, ...] | None) -> tuple[Transitions, tuple[str, ...] | None]:
    import h5py

    fields: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    }
    episode = "the file"
    try:
        with h5py.File(path, "r") as file:
            episodes = sorted(file, key=lambda name: int(name.rpartition("_")[2]))
            if not episodes:
                raise UserError(f"{path}: the dataset has no episodes")
            first = file[episodes[0]]["observations"]
            is_dictionary = isinstance(first, h5py.Group)
            keys = (keys or _goal_observation_keys(file, episodes)) if is_dictionary else None
            for episode in episodes:
                group = file[episode]
                stored = group["observations"]
                observations = (
                    np.concatenate([stored[key][()] for key in keys], axis=-1) if keys else stored[()]
                ).astype(np.float32)
                steps = len(group["rewards"])
                if len(observations) != steps + 1:
                    raise UserError(f"{path}: {episode} has {len(observations)} observations for {steps} rewards")
                terminations = group["terminations"][()].astype(bool)
                timeouts = group["truncations"][()].astype(bool) & ~terminations
                timeouts[-1] |= not terminations[-1]
                fields["observations"].append(observations[:-1])
                fields["next_observations"].append(observations[1:])
                fields["actions"].append(group["actions"][()].astype(np.float32))
                fields["rewards"].append(group["rewards"][()].astype(np.float32))
                fields["terminals"].append(terminations)
                fields["timeouts"].append(timeouts)
    except KeyError as error:
        raise UserError(f"{path}: {episode} lacks a key ({one_line(error)[:200]})") from error
    except TypeError as error:
        raise UserError(f"{path}: {episode} holds nested observations, which are not read yet") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not HDF5, at {episode} ({one_line(error)[:200]})") from error
    try:
        return Transitions(**{name: np.concatenate(parts) for name, parts in fields.items()}), keys
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: episodes disagree in shape ({one_line(error)[:200]})") from error


def _goal_observation_keys(file: Any, episodes: list[str]) -> tuple[str, ...]:
    """Return the keys that a goal environment's observation vector needs.

    `achieved_goal` comes first unless `observation` already begins with it; `desired_goal` comes last unless it is
    the same throughout (D4RL's conventions: 29 numbers in AntMaze, 4 in PointMaze).
    """
    first = file[episodes[0]]["observations"]
    if set(first) != {"observation", "achieved_goal", "desired_goal"}:
        return tuple(first)
    achieved, observation = first["achieved_goal"][()], first["observation"][()]
    keys = ["observation"]
    if not np.array_equal(observation[:, : achieved.shape[1]], achieved):
        keys.insert(0, "achieved_goal")
    goal = first["desired_goal"][0]
    if any(np.ptp(file[e]["observations"]["desired_goal"][()] - goal, axis=0).any() for e in episodes) or any(
        not np.array_equal(file[e]["observations"]["desired_goal"][0], goal) for e in episodes
    ):
        keys.append("desired_goal")
    return tuple(keys)


def _environment(metadata: dict[str, Any]) -> EnvironmentInfo | None:
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not spec:
        return None
    spec = json.loads(spec) if isinstance(spec, str) else spec
    return EnvironmentInfo(spec["id"], spec.get("kwargs") or {}, int(spec.get("max_episode_steps") or 1000))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of the file's bytes, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
