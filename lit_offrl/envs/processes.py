"""Worker processes that start clean, whatever program they are started from."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@contextlib.contextmanager
def clean_spawn() -> Iterator[None]:
    """Within this context, processes of multiprocessing's `spawn` method start single-threaded and without `__main__`.

    By default a spawned process imports the main script again. One without `if __name__ == "__main__"` would then
    start its training a second time. One thread each keeps results independent of the number of cores.
    """
    main, kept = sys.modules["__main__"], {name: os.environ.get(name) for name in _THREADS}
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
