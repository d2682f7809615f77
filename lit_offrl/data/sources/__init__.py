"""The data sources. `load` reads a dataset of any of them by its id or path.

Importing this module imports neither numpy nor torch; each source imports its reader when it reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.sources.bandit import Bandits
from lit_offrl.data.sources.base import LONGEST_NAME, DataSource, Listing
from lit_offrl.data.sources.d4rl import OriginalD4RL
from lit_offrl.data.sources.files import FILE_SUFFIXES, OwnFiles
from lit_offrl.data.sources.minari import Minari
from lit_offrl.data.sources.offrl import Collected, CollectedOGBench
from lit_offrl.data.sources.ogbench import OGBench
from lit_offrl.data.sources.several import Several
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lit_offrl.data.info import DatasetInfo
    from lit_offrl.data.transitions import Transitions

__all__ = [
    "SOURCES",
    "DataSource",
    "Listing",
    "find_source",
    "from_arrays",
    "load",
    "source_of",
]

SOURCES: tuple[DataSource, ...] = (
    Several(),
    CollectedOGBench(),
    Collected(),
    OwnFiles(),
    OriginalD4RL(),
    OGBench(),
    Bandits(),
    Minari(),
)
"""Asked in this order: the first source that matches an id is the right one."""


def find_source(dataset: str) -> DataSource:
    """Return the source of an id or path.

    Raises:
        UserError: The id belongs to no source.
    """
    if len(dataset) > LONGEST_NAME and not SOURCES[0].matches(dataset):  # no file system has longer names of files
        raise UserError(f"data.dataset: '{dataset[:40]}...' is no dataset id: it has {len(dataset):,} characters")
    for source in SOURCES:
        if source.matches(dataset):
            return source
    suggestion = did_you_mean(dataset, [known for source in SOURCES for known in source.ids()])
    raise UserError(
        f"data.dataset: '{dataset}' is no dataset id{suggestion}; ids look like offrl/antmaze/umaze-v0, "
        "D4RL/antmaze/umaze-v1, hopper-medium-v2, ogbench/scene-play-singletask-v0 or bandit/8gaussians (`data list` "
        f"shows them), files of your own end in {', '.join(FILE_SUFFIXES)}"
    )


def source_of(info: DatasetInfo) -> DataSource:
    """Return the source that a loaded dataset came from."""
    return next(source for source in SOURCES if info.source in source.names)


def load(dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES) -> tuple[Transitions, DatasetInfo]:
    """Read a dataset by its id or path; download it first if it is not here.

    Args:
        dataset: Path of a `.csv`, `.parquet`, `.npz` or `.hdf5` file or of a folder of episodes, or an id such as
            `hopper-medium-v2` (original D4RL), `D4RL/antmaze/umaze-v1` (Minari), `offrl/antmaze/umaze-v0` (collected
            with this package), `ogbench/cube-single-play-singletask-v0` (OGBench) or `bandit/8gaussians` (2-D set).
            Several are named in brackets, `[a.npz, b.npz]`.
        d4rl_compat: Only for original D4RL files: keep exactly the transitions that D4RL's `qlearning_dataset` keeps.
            False keeps the true ends of episodes instead.
        columns: Only for logs of one's own: which columns hold what.

    Raises:
        UserError: The id is unknown, the dataset has not been collected, or its files are missing or broken.
    """
    source = find_source(dataset)
    if columns != USUAL_NAMES and not source.is_own:
        raise UserError(f"data.columns: {dataset} is no log of your own: leave it out")
    return source.load(dataset, d4rl_compat, columns)


def from_arrays(arrays: Mapping[str, ArrayLike]) -> Transitions:
    """Make a table of arrays in memory, with the keys and rules of a flat file (see `lit_offrl.data.formats.files`).

    Arrays of float32 may be used without a copy: do not change them afterwards.

    Raises:
        UserError: A key is missing, or an array has the wrong shape or values.
    """
    import numpy as np

    from lit_offrl.data.formats.arrays import flat_fields, read_columns, reading
    from lit_offrl.data.transitions import Transitions

    with reading("arrays"):
        return Transitions(**flat_fields(read_columns({name: np.asarray(array) for name, array in arrays.items()})))
