"""Offline reinforcement learning with diffusion policies on PyTorch Lightning.

Public names are imported when they are first used, so that `import lit_offrl` and `--help` take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_offrl.algorithms import (
        AEPO,
        BDPO,
        DTQL,
        DTQLKL,
        EDA,
        QGPO,
        BDPODeterministic,
        BDPOGaussian,
        OfflineAlgorithm,
    )
    from lit_offrl.algorithms.checkpoints import load_policy
    from lit_offrl.cli import main
    from lit_offrl.data.datamodule import D4RLDataModule

__version__ = "0.1.0"
__all__ = [
    "AEPO",
    "BDPO",
    "DTQL",
    "DTQLKL",
    "EDA",
    "QGPO",
    "BDPODeterministic",
    "BDPOGaussian",
    "D4RLDataModule",
    "OfflineAlgorithm",
    "__version__",
    "load_policy",
    "main",
]
_MODULES = {
    "D4RLDataModule": "lit_offrl.data.datamodule",
    "load_policy": "lit_offrl.algorithms.checkpoints",
    "main": "lit_offrl.cli",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "lit_offrl.algorithms")), name)


def __dir__() -> list[str]:
    return __all__
