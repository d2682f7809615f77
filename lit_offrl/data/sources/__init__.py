"""From where data lies to `Transitions`: `load` is the entrance, one module per source behind it.

Importing this costs nothing; whatever reads files is imported when something is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.data.info import BANDIT_NAMESPACE
from lit_offrl.data.local import FILE_SUFFIXES, d4rl_folder, is_own_path, is_present, local_datasets
from lit_offrl.data.sources.d4rl_catalog import D4RL_FILES
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lit_offrl.data.info import DatasetInfo
    from lit_offrl.data.transitions import Transitions

_MINARI_ID = re.compile(r"^(?:[\w-]+/)+[\w-]+-v\d+$")


def is_here(dataset: str) -> bool:
    """Whether `load` needs neither a download nor a collection first; also true of what it does not know."""
    if dataset in D4RL_FILES:
        return (d4rl_folder() / Path(D4RL_FILES[dataset]).name).is_file()
    return is_present(dataset) or is_own_path(dataset) or not _MINARI_ID.match(dataset)


def load(dataset: str, d4rl_compat: bool = True) -> tuple[Transitions, DatasetInfo]:
    """Read a dataset by its id or path.

    Args:
        dataset: Path of an `.hdf5`, `.h5` or `.npz` file or of a folder of episodes (see `files`), name of an original
            D4RL dataset such as `hopper-medium-v2`, a Minari id such as `D4RL/antmaze/umaze-v1`, or a 2-D set such as
            `bandit/8gaussians` (see `lit_offrl.data.bandits`).
        d4rl_compat: Of original D4RL files: keep exactly the transitions that D4RL's `qlearning_dataset` keeps. False
            keeps the true ends of episodes instead.

    Raises:
        UserError: The id is unknown, nothing lies there, or what lies there is broken.
    """
    if is_own_path(dataset):
        from lit_offrl.data.sources.files import load_path

        return load_path(Path(dataset))
    if dataset in D4RL_FILES:
        from lit_offrl.data.sources.d4rl import load_d4rl

        return load_d4rl(dataset, d4rl_compat)
    if dataset.startswith(BANDIT_NAMESPACE):
        from lit_offrl.data.bandits import load_bandit

        return load_bandit(dataset)
    if is_present(dataset) or _MINARI_ID.match(dataset):
        from lit_offrl.data.sources.minari import load_minari

        return load_minari(dataset)
    suggestion = did_you_mean(dataset, [*D4RL_FILES, *local_datasets()])
    raise UserError(
        f"data.dataset: '{dataset}' is no dataset id{suggestion}; ids look like offrl/antmaze/umaze-v0, "
        "D4RL/antmaze/umaze-v1, hopper-medium-v2 or bandit/8gaussians (`data list` shows them), files of your own end "
        f"in {', '.join(FILE_SUFFIXES)}"
    )


def from_arrays(arrays: Mapping[str, ArrayLike]) -> Transitions:
    """Make a table of arrays in memory, with the keys and rules of a flat file (see `files`).

    Arrays of float32 may be used as they are, without a copy: do not change them afterwards.

    Raises:
        UserError: A key is missing, or an array has the wrong shape or values.
    """
    import numpy as np

    from lit_offrl.data.sources.arrays import flat_fields, read_columns, reading
    from lit_offrl.data.transitions import Transitions

    with reading("arrays"):
        return Transitions(**flat_fields(read_columns({name: np.asarray(array) for name, array in arrays.items()})))
