"""Algorithms, one file each."""

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.dtql import DTQL

__all__ = ["DTQL", "OfflineAlgorithm"]
