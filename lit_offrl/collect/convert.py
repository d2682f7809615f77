"""Writes transitions as a Minari dataset (`data convert log.csv mine/log-v0`)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_offrl.collect.recorder import HIDDEN, at_minari_root, publish
from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.sources.minari import is_present, minari_root
from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions


def write_minari(transitions: Transitions, info: DatasetInfo, dataset: str) -> None:
    """Write a Minari dataset into the local root; it names no environment.

    Args:
        transitions: The table. An episode of T steps is stored with T + 1 observations, the last being its successor.
        info: The dataset that they are of; its bounds become the action space, which else has none.
        dataset: Id of the new dataset, e.g. `mine/log-v0`.

    Raises:
        UserError: There is such a dataset.
    """
    import minari
    from gymnasium.spaces import Box

    if is_present(dataset):
        raise UserError(f"{dataset} exists in {minari_root()}: remove it or choose another id")
    low, high = info.action_bounds or ((-np.inf,) * transitions.action_dim, (np.inf,) * transitions.action_dim)
    root = minari_root()
    building = root / HIDDEN / f"convert-{dataset.replace('/', '-')}"
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    building.mkdir(parents=True)
    try:
        with at_minari_root(building), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for an e-mail address
            minari.create_dataset_from_buffers(
                dataset,
                _episodes(transitions),
                observation_space=Box(-np.inf, np.inf, (transitions.observation_dim,), np.float32),
                action_space=Box(np.array(low, np.float32), np.array(high, np.float32)),
                description=f"made of {info.path.name}",
                data_format="hdf5",
            )
        publish(building, root, dataset, building / "replaced")
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _episodes(transitions: Transitions) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for start, length in zip(transitions.episode_starts, transitions.episode_lengths(), strict=True):
        rows, last = slice(start, start + length), slice(start + length - 1, start + length)
        yield EpisodeBuffer(
            observations=np.concatenate([transitions.observations[rows], transitions.next_observations[last]]),
            actions=transitions.actions[rows],
            rewards=transitions.rewards[rows],
            terminations=transitions.terminals[rows],
            truncations=transitions.timeouts[rows],
        )
