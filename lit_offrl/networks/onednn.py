"""Matrix products by oneDNN, on processors for which the library behind `torch.mm` is not at its best.

PyTorch leaves float32 products on a CPU to MKL, which on AMD's processors makes no use of AVX-512; oneDNN, which comes
with PyTorch too, does: 226 GFLOP/s instead of 107 on one core at 256 x 256 x 256, and most of the time of a gradient
step is in products of that size. Results differ by the order of sums. The kernels are in native/kernels.cpp.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from lit_offrl import native

SWITCH = "LIT_OFFRL_ONEDNN"  # an environment variable: 0 leaves everything to PyTorch
# Below, packing a matrix costs more than it saves.
FEWEST_ROWS = 16
FEWEST_COLUMNS = 8
FEWEST_MULTIPLICATIONS = 1 << 19


@cache
def is_faster() -> bool:
    """Return whether products are to be oneDNN's on this machine."""
    if os.environ.get(SWITCH) == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    processors = Path("/proc/cpuinfo")
    amd = processors.exists() and "AuthenticAMD" in processors.read_text()
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use(rows: int) -> None:
    """Let oneDNN compute the large products of float32 matrices from now on, in all of this process, or no longer.

    A switch rather than a context: there is one a step.

    Args:
        rows: Of most products that are to come: where there are few, each would pay for the detour and none gain.
    """
    if native.available():
        wanted = rows >= FEWEST_ROWS and is_faster()
        torch.ops.lit_offrl_native.use_onednn(wanted, FEWEST_COLUMNS, FEWEST_MULTIPLICATIONS)
