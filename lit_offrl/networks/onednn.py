"""Matrix products by oneDNN, on processors for which the library behind `torch.mm` is not at its best.

PyTorch leaves float32 products on a CPU to MKL, which on AMD's processors makes no use of AVX-512; oneDNN, which comes
with PyTorch too, does: 226 GFLOP/s instead of 107 on one core at 256 x 256 x 256, and most of the time of a gradient
step is in products of that size. Results differ by the order of sums.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "LIT_OFFRL_ONEDNN"  # an environment variable: 0 leaves everything to PyTorch
# Below, packing a matrix and the way through Python cost more than they save.
FEWEST_ROWS = 16
FEWEST_COLUMNS = 8
FEWEST_MULTIPLICATIONS = 1 << 19

_library: torch.library.Library | None = None  # of the kernels in use


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

    A switch rather than a context: memory would grow by kilobytes with each that is entered, and there is one a step.

    Args:
        rows: Of most products that are to come: where there are few, each would pay for the detour and none gain.
    """
    global _library
    wanted = rows >= FEWEST_ROWS and is_faster()
    if wanted and _library is None:
        _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, kernel in KERNELS.items():
                _library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    elif not wanted and _library is not None:
        _library._destroy()  # type: ignore[no-untyped-call]
        _library = None


def _pays(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape, b.shape[1]
    large = m * k * n >= FEWEST_MULTIPLICATIONS and min(m, k, n) >= FEWEST_COLUMNS
    return large and a.dtype is b.dtype is torch.float32


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # oneDNN wants its first matrix by rows, and one thread brings it there. Where `a` is by columns and large, as in
    # gradients of weights, the transposed product leaves it less to move.
    if bias is None and not a.is_contiguous():
        (m, k), n = a.shape, b.shape[1]
        if n * (k + m) < m * k:
            return _linear(b.t(), a).t()
    return _linear(a, b.t(), bias)


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(_dense(a), _dense(weight), bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Return the matrix without gaps, by rows or by columns: others oneDNN multiplies 1,000 times more slowly."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


# What follows stands in for PyTorch's own kernels of these names, which are out of reach meanwhile: products that are
# left to PyTorch are batches of one.


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b) if _pays(a, b) else torch.bmm(a[None], b[None])[0]


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _pays(a, b):
        shape = (a.shape[0], b.shape[1])
        return torch.baddbmm(c.expand(shape)[None], a[None], b[None], beta=beta, alpha=alpha)[0]
    if beta == alpha == 1 and c.shape == b.shape[1:]:
        return _product(a, b, c)
    result = _product(a, b)
    if alpha != 1:
        result.mul_(alpha)
    return result.add_(c, alpha=beta) if beta else result


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return _written(_mm(a, b), out)


def _addmm_out(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return _written(_addmm(c, a, b, beta=beta, alpha=alpha), out)


def _written(result: Tensor, out: Tensor) -> Tensor:
    return (out if out.shape == result.shape else out.resize_(result.shape)).copy_(result)


KERNELS = {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm.out": _addmm_out}
