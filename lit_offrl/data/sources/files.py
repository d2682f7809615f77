"""Files and folders of one's own, given by their path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.sources.base import DataSource
from lit_offrl.data.sources.minari import is_present
from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

FILE_SUFFIXES = (".h5", ".hdf5", ".npz")
LONGEST_NAME = 255  # of a file


class OwnFiles(DataSource):
    """A file of flat arrays, a file in Minari's layout, or a folder with a file per episode.

    `lit_offrl.data.formats.files` describes what a file holds. Arrays in memory (`DatasetInfo.source` is `arrays`) have
    the same keys, and the same rules hold for them.
    """

    names = ("file", "arrays")

    def help(self) -> str:
        """Return how files are named."""
        return "files and folders of your own, by path (log.npz, log.hdf5, episodes/)"

    def matches(self, dataset: str) -> bool:
        """Return whether this is a path: it has a known suffix, or a file or folder lies there."""
        path = Path(dataset)
        if len(path.name) > LONGEST_NAME:
            return False
        return path.suffix in FILE_SUFFIXES or path.is_file() or (path.is_dir() and not is_present(dataset))

    def load(self, dataset: str, d4rl_compat: bool = True) -> tuple[Transitions, DatasetInfo]:
        """Read a file or folder."""
        from lit_offrl.data.formats.cache import cached, source_sha256
        from lit_offrl.data.formats.files import episode_files, read_file, read_folder

        path = Path(dataset)
        if not path.name:  # `.`, which a cache cannot lie beside
            path = path.absolute()
        if path.is_dir():
            episode_files(path)  # raises for a folder of other things, which may be large
            transitions, keys, digest = cached(path, {}, lambda: (read_folder(path), None))
        elif not path.is_file():
            raise UserError(f"data.dataset: no file {path}")
        elif path.suffix not in FILE_SUFFIXES:
            raise UserError(f"{path}: files of your own end in {', '.join(FILE_SUFFIXES)}")
        elif path.suffix == ".npz":  # reading it is as fast as reading a cache
            transitions, keys, digest = *read_file(path), source_sha256(path)
        else:
            transitions, keys, digest = cached(path, {}, lambda: read_file(path))
        return transitions, DatasetInfo(
            id=str(path),
            source="file",
            path=path,
            sha256=digest,
            observation_keys=keys,
            environment_note="files of one's own name no environment",
        )
