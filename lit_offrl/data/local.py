"""Where datasets lie on this machine. Light: no torch, no numpy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_offrl.errors import UserError

COLLECTED_NAMESPACE = "offrl/"
SHARED_TABLES = "LIT_OFFRL_SHARED_TABLES"  # environment variable: folder of tables that several processes map
FILE_SUFFIXES = (".h5", ".hdf5", ".npz")


def minari_root() -> Path:
    """Return Minari's local root: MINARI_DATASETS_PATH, or .minari/datasets in the home folder."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def d4rl_folder() -> Path:
    """Return where D4RL's files are kept: D4RL_DATASET_DIR, or .d4rl/datasets in the home folder, as D4RL does."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def is_present(dataset: str) -> bool:
    """Whether the Minari dataset lies in the local root."""
    return (minari_root() / dataset / "data" / "metadata.json").is_file()


def is_own_path(dataset: str) -> bool:
    """Whether the dataset is a file or a folder of one's own rather than an id."""
    path = Path(dataset)
    return path.suffix in FILE_SUFFIXES or path.is_file() or (path.is_dir() and not is_present(dataset))


def read_metadata(dataset: str) -> dict[str, Any]:
    """Return the metadata of a local Minari dataset.

    Raises:
        UserError: The file is missing or broken.
    """
    path = minari_root() / dataset / "data" / "metadata.json"
    try:
        metadata: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable ({error}): remove {path.parent.parent} and get it again") from error
    return metadata


def local_datasets() -> Iterator[str]:
    """Yield the ids of the Minari datasets in the local root."""
    root = minari_root()
    for path in sorted(root.glob("**/data/metadata.json")):
        dataset = path.parent.parent.relative_to(root)
        if not any(part.startswith(".") for part in dataset.parts):  # a collection under way hides what it builds
            yield dataset.as_posix()
