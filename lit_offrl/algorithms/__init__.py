"""Algorithms, one file each."""

from lit_offrl.algorithms.aepo import AEPO
from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.bdpo import BDPO
from lit_offrl.algorithms.bdpo_ablations import BDPODeterministic, BDPOGaussian
from lit_offrl.algorithms.dtql import DTQL, DTQLKL
from lit_offrl.algorithms.eda import EDA
from lit_offrl.algorithms.qgpo import QGPO

__all__ = ["AEPO", "BDPO", "DTQL", "DTQLKL", "EDA", "QGPO", "BDPODeterministic", "BDPOGaussian", "OfflineAlgorithm"]
