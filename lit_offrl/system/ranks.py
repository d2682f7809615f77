"""Which of several processes of a training this is, before any of them knows the others."""

from __future__ import annotations

import os

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun's, Lightning's own launcher's, SLURM's


def launched_rank() -> int:
    """Return the rank that a launcher gave this process; 0 where there is none."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0"))
