"""Files and folders of one's own, given by their path."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.sources.base import LONGEST_NAME, DataSource
from lit_offrl.data.sources.minari import is_present
from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

ARRAY_SUFFIXES = (".h5", ".hdf5", ".npz")
TABLE_SUFFIXES = (".csv", ".parquet")
FILE_SUFFIXES = (*TABLE_SUFFIXES, *ARRAY_SUFFIXES)


class OwnFiles(DataSource):
    """A table (CSV, Parquet), flat arrays, Minari's or robomimic's HDF5, LeRobot's folder, or a folder of episodes.

    `lit_offrl.data.formats.files` describes what a file holds. Arrays in memory (`DatasetInfo.source` is `arrays`) have
    the same keys, and the same rules hold for them. `columns` says which columns of a log hold what.
    """

    names = ("file", "arrays")
    is_own = True

    def help(self) -> str:
        """Return how files are named."""
        return "files and folders of your own, by path (log.csv, log.parquet, log.npz, log.hdf5, episodes/)"

    def matches(self, dataset: str) -> bool:
        """Return whether this is a path: it has a known suffix, or a file or folder lies there."""
        path = Path(dataset)
        if len(path.name) > LONGEST_NAME:
            return False
        return path.suffix in FILE_SUFFIXES or path.is_file() or (path.is_dir() and not is_present(dataset))

    def run_name(self, dataset: str) -> str:
        """Return the stem of the file or folder."""
        return Path(dataset).absolute().stem

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a file or folder."""
        from lit_offrl.data.formats.cache import cached, source_sha256
        from lit_offrl.data.formats.files import episode_files, read_file, read_folder
        from lit_offrl.data.formats.lerobot import is_lerobot, read_info, read_lerobot

        options = {} if columns == USUAL_NAMES else {"columns": asdict(columns)}
        path = Path(dataset)
        if not path.name:  # `.`, which a cache cannot lie beside
            path = path.absolute()
        if is_lerobot(path):  # its videos are no part of the data
            facts = read_info(path)
            table, digest = cached(path / "data", {**options, **facts}, lambda: read_lerobot(path, facts, columns))
        elif path.is_dir():
            episode_files(path)  # raises for a folder of other things, which may be large
            table, digest = cached(path, options, lambda: read_folder(path, columns))
        elif not path.is_file():
            raise UserError(f"data.dataset: no file {path}")
        elif path.suffix not in FILE_SUFFIXES:
            raise UserError(f"{path}: files of your own end in {', '.join(FILE_SUFFIXES)}")
        elif path.suffix == ".npz":  # reading it is as fast as reading a cache
            table, digest = read_file(path, columns), source_sha256(path)
        else:
            table, digest = cached(path, options, lambda: read_file(path, columns))
        return table.transitions, DatasetInfo(
            id=str(path),
            source="file",
            path=path,
            sha256=digest,
            observation_keys=table.observation_keys,
            environment_note="files of one's own name no environment",
            notes=table.notes,
        )
