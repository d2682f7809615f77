"""LeRobot's folders, version 3: `meta/info.json` names the features, `data/chunk-*/file-*.parquet` holds the frames.

Observations are the features `observation...` that are vectors; images and videos are not read. `next.reward` and
`next.done` are rewards and terminals, as in LeRobot's own reinforcement learning; recordings of demonstrations have
neither. Folders of version 2, with a file per episode, have the same columns and are read, too.

Layout: https://huggingface.co/docs/lerobot/lerobot-dataset-v3
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_offrl.data.columns import LogColumns
from lit_offrl.data.formats.arrays import natural_order, reading
from lit_offrl.data.formats.cache import Table
from lit_offrl.data.formats.tables import Log, log_transitions
from lit_offrl.errors import UserError

_INFO = "meta/info.json"
_BOOKKEEPING = ("index", "frame_index", "timestamp", "task_index")
_NUMBERS = ("float", "int", "uint", "bool")


def is_lerobot(folder: Path) -> bool:
    """Whether a folder is in LeRobot's layout."""
    return (folder / _INFO).is_file()


def read_info(folder: Path) -> dict[str, Any]:
    """Return `features` (kind and shape by name) and the number of frames of a folder.

    Raises:
        UserError: The file is broken.
    """
    with reading(folder / _INFO):
        info = json.loads((folder / _INFO).read_text())
        features = {str(name): [str(each["dtype"]), list(each["shape"])] for name, each in info["features"].items()}
        return {"features": features, "frames": int(info["total_frames"])}


def read_lerobot(folder: Path, info: dict[str, Any], columns: LogColumns) -> Table:
    """Read the frames of a folder.

    Args:
        folder: The folder.
        info: See `read_info`.
        columns: Names features where the usual ones are not meant.

    Raises:
        UserError: A file is broken or missing, or a feature is missing.
    """
    import pyarrow
    from pyarrow import parquet

    features: dict[str, list[Any]] = info["features"]
    vectors = [name for name, (kind, shape) in features.items() if kind.startswith(_NUMBERS) and len(shape) == 1]
    with reading(folder):
        names = natural_order([path.relative_to(folder).as_posix() for path in folder.glob("data/*/*.parquet")])
        tables = []
        for name in names:
            with reading(name), parquet.ParquetFile(folder / name) as file:
                missing = [each for each in vectors if each not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"has no column '{missing[0]}', which {_INFO} names")
                tables.append(file.read(columns=vectors))
        rows = sum(table.num_rows for table in tables)
        if rows != info["frames"]:
            raise UserError(f"data/ holds {rows:,} frames, {_INFO} says {info['frames']:,}: are all files there?")
        log = Log(pyarrow.concat_tables(tables, promote_options="permissive"), is_text=False)
        table = log_transitions(log, columns, not_told=_BOOKKEEPING)
    if unread := [name for name in features if name not in vectors]:
        return table._replace(notes=(*table.notes, f"features that are no vectors are not read: {', '.join(unread)}"))
    return table
