"""Algorithms, one file each. To add one, import it here: the command line, the tests and `lit_offrl.NAME` follow."""

from lit_offrl.algorithms.aepo import AEPO as AEPO
from lit_offrl.algorithms.awac import AWAC as AWAC
from lit_offrl.algorithms.base import OfflineAlgorithm as OfflineAlgorithm
from lit_offrl.algorithms.bc import BC as BC
from lit_offrl.algorithms.bcq import BCQ as BCQ
from lit_offrl.algorithms.bdpo import BDPO as BDPO
from lit_offrl.algorithms.bdpo_ablations import BDPODeterministic as BDPODeterministic
from lit_offrl.algorithms.bdpo_ablations import BDPOGaussian as BDPOGaussian
from lit_offrl.algorithms.cql import CQL as CQL
from lit_offrl.algorithms.dac import DAC as DAC
from lit_offrl.algorithms.decision_transformer import DecisionTransformer as DecisionTransformer
from lit_offrl.algorithms.dql import DQL as DQL
from lit_offrl.algorithms.dtql import DTQL as DTQL
from lit_offrl.algorithms.dtql import DTQLKL as DTQLKL
from lit_offrl.algorithms.eda import EDA as EDA
from lit_offrl.algorithms.edp import EDP as EDP
from lit_offrl.algorithms.fql import FQL as FQL
from lit_offrl.algorithms.idql import IDQL as IDQL
from lit_offrl.algorithms.ifql import IFQL as IFQL
from lit_offrl.algorithms.iql import IQL as IQL
from lit_offrl.algorithms.qc import QC as QC
from lit_offrl.algorithms.qgpo import QGPO as QGPO
from lit_offrl.algorithms.rebrac import ReBRAC as ReBRAC
from lit_offrl.algorithms.sfbc import SfBC as SfBC
from lit_offrl.algorithms.srpo import SRPO as SRPO
from lit_offrl.algorithms.td3bc import TD3BC as TD3BC

ALGORITHMS: dict[str, type[OfflineAlgorithm]] = {
    name: each
    for name, each in sorted(globals().items())
    if isinstance(each, type) and issubclass(each, OfflineAlgorithm) and each is not OfflineAlgorithm
}
