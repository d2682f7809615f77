"""Algorithms, one file each."""

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.bdpo import BDPO
from lit_offrl.algorithms.bdpo_ablations import BDPODeterministic, BDPOGaussian
from lit_offrl.algorithms.dtql import DTQL, DTQLKL
from lit_offrl.algorithms.eda import EDA

__all__ = ["BDPO", "DTQL", "DTQLKL", "EDA", "BDPODeterministic", "BDPOGaussian", "OfflineAlgorithm"]
