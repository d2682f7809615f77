"""The CPU cores of this process."""

from __future__ import annotations

import os

SHARE_OF_CORES = "LIT_OFFRL_SHARE_OF_CORES"
"""Environment variable beside OMP_NUM_THREADS: the number is a job's share of the cores, not the user's choice."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
