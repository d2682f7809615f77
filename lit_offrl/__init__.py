"""Offline reinforcement learning with diffusion policies on PyTorch Lightning.

Public names: every algorithm, e.g. `lit_offrl.DTQL`, `OfflineAlgorithm`, `D4RLDataModule`, `load_policy` and `main`.
They are imported when they are first used, so that `import lit_offrl` and `--help` take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_offrl.algorithms import *  # noqa: F403
    from lit_offrl.cli import main as main
    from lit_offrl.data.datamodule import D4RLDataModule as D4RLDataModule
    from lit_offrl.policy import load_policy as load_policy

__version__ = "0.1.0"
_MODULES = {
    "D4RLDataModule": "lit_offrl.data.datamodule",
    "load_policy": "lit_offrl.policy",
    "main": "lit_offrl.cli",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "__all__" or name[0].isupper():
        module = import_module("lit_offrl.algorithms")
        algorithms = {"OfflineAlgorithm": module.OfflineAlgorithm, **module.ALGORITHMS}
        if name == "__all__":
            return [*_MODULES, *algorithms, "__version__"]
        if name in algorithms:
            return algorithms[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__")]
