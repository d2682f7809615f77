"""Code of other packages that uses the state of the whole process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def as_a_guest(generator: np.random.RandomState) -> Iterator[None]:
    """Call a package without traces: its warnings are dropped, and numpy's global generator comes back as it was.

    `ogbench` needs both: its mazes draw from the global generator, and its robot arm makes the action space anew for
    every reset, of which Gymnasium warns each time.

    Args:
        generator: What the global generator goes on with in between.
    """
    usual = np.random.get_state()  # noqa: NPY002 (the package's choice)
    np.random.set_state(generator.get_state())  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        generator.set_state(np.random.get_state())  # noqa: NPY002
        np.random.set_state(usual)  # noqa: NPY002
