"""Matrix products by oneDNN, on processors for which the library behind `torch.mm` is slow.

PyTorch multiplies float32 matrices on a CPU by MKL, which does not use AVX-512 on AMD's processors; oneDNN, which is
part of PyTorch too, does: 226 GFLOP/s instead of 107 on one core for 256 x 256 matrices, and most of the time of a
gradient step is in products of that size. PyTorch has no switch for its choice of library, and `torch.compile` calls
the same kernels, so the kernels of `mm` and `addmm` are replaced here. Results differ by the order of summation.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

SWITCH = "LIT_OFFRL_ONEDNN"  # an environment variable; 0 leaves all products to PyTorch
# For smaller products, packing a matrix and calling Python cost more than oneDNN saves.
FEWEST_COLUMNS = 8
FEWEST_MULTIPLICATIONS = 1 << 19


def is_faster() -> bool:
    """Return whether oneDNN is the faster library on this machine: an AMD processor with AVX-512."""
    if os.environ.get(SWITCH) == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    information = Path("/proc/cpuinfo")
    amd = information.exists() and "AuthenticAMD" in information.read_text()
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def products_by_onednn() -> Iterator[None]:
    """Within, let oneDNN compute large products of float32 matrices on the CPU, eager and compiled, where it is faster.

    The whole process is affected. Each entry leaks some kilobytes in PyTorch's registry: enter once a run, not a step.
    """
    if not is_faster():
        yield
        return
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    kernels = {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm.out": _addmm_out}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _is_large(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape, b.shape[1]
    large = m * k * n >= FEWEST_MULTIPLICATIONS and min(m, k, n) >= FEWEST_COLUMNS
    return large and k == b.shape[0] and a.dtype is b.dtype is torch.float32


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # oneDNN copies its first matrix to rows, on one thread. Where `a` has columns and is large, as in gradients of
    # weights, the transposed product copies less.
    (m, k), n = a.shape, b.shape[1]
    if bias is None and not a.is_contiguous() and n * (k + m) < m * k:
        return _linear(b.t(), a).t()
    return _linear(a, b.t(), bias)


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(_dense(a), _dense(weight), bias, "none", [], ""))


def _dense(matrix: Tensor) -> Tensor:  # oneDNN is 1,000 times slower on matrices with gaps
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


# These kernels replace PyTorch's own, which cannot be called any more: small products are batches of one.
def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b) if _is_large(a, b) else torch.bmm(a[None], b[None])[0]


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _is_large(a, b):
        shape = (a.shape[0], b.shape[1])
        return torch.baddbmm(c.expand(shape)[None], a[None], b[None], beta=beta, alpha=alpha)[0]
    if beta == alpha == 1 and c.shape == b.shape[1:]:
        return _product(a, b, c)
    return _product(a, b).mul_(alpha).add_(c if beta else 0, alpha=beta)


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.resize_(len(a), b.shape[1]).copy_(_mm(a, b))


def _addmm_out(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return out.resize_(len(a), b.shape[1]).copy_(_addmm(c, a, b, beta=beta, alpha=alpha))
