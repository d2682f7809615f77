"""OGBench's own files of a collected dataset, one for training and one for validation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.collect.catalog import ManipulationDataset
from lit_offrl.collect.episodes import Episode
from lit_offrl.collect.journal import Journal
from lit_offrl.data.sources.ogbench import collected_file


def write_ogbench(folder: Path, dataset: ManipulationDataset, journal: Journal, steps: int) -> None:
    """Write `<name>.npz` with the journal's first `steps` steps and `<name>-val.npz` with the episodes after them.

    Args:
        folder: Where the files go.
        dataset: The dataset.
        journal: At least `dataset.recorded_steps(steps)` steps.
        steps: Number of transitions in the file for training.
    """
    path = collected_file(folder, dataset.id)
    _write(path, journal.read(steps))
    later = islice(journal.read(dataset.recorded_steps(steps)), dataset.training_episodes(steps), None)
    _write(path.with_name(f"{path.stem}-val.npz"), later)


def _write(path: Path, episodes: Iterable[Episode]) -> None:
    # A row for each of the T + 1 states of an episode; `terminals` marks the last one. No action was performed there,
    # so its action is zero. The package drops it.
    columns: dict[str, list[NDArray[Any]]] = {}
    for episode in episodes:
        rows = len(episode) + 1
        parts = {
            "actions": np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]),
            "terminals": np.arange(rows) == rows - 1,
            **{name.replace("observation", "observations"): part for name, part in episode.observations.items()},
        }
        for name, part in parts.items():
            columns.setdefault(name, []).append(part.astype(np.float32) if part.dtype == np.float64 else part)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
