"""The rank of this process in a distributed training, before the training starts."""

from __future__ import annotations

import os

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun's, Lightning's own launcher's, SLURM's


def launched_rank() -> int:
    """Return the rank that the launcher gave to this process; 0 without a launcher."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0"))
