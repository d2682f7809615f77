"""Groups of options that several algorithms share, each described and bounded once.

A constructor has a group as one parameter, `critic: ImplicitQ = ImplicitQ(expectile=0.9)`; on the command line its
options are `--model.init_args.critic.expectile 0.9`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_offrl.ranges import Count, Fraction, NonNegative, OpenUnitInterval, Positive, Steps, UnitInterval, Width


@dataclass(frozen=True)
class Acting:
    """How an action is chosen.

    Attributes:
        candidates: Actions sampled per state, of which the critic selects one.
        selection_temperature: Temperature of the softmax over Q that selects; 0 takes the candidate of the highest Q.
    """

    candidates: Count = 1
    selection_temperature: NonNegative = 0.0


@dataclass(frozen=True)
class CriticOptions:
    """A critic.

    Attributes:
        discount: Discount factor.
        target_rate: Rate at which the target networks move.
        learning_rate: Step size.
        hidden_dim: Width of the hidden layers.
    """

    discount: UnitInterval = 0.99
    target_rate: Fraction = 0.005
    learning_rate: Positive = 3e-4
    hidden_dim: Width = 256


@dataclass(frozen=True)
class EnsembleCritic(CriticOptions):
    """An ensemble of critics.

    Attributes:
        members: Networks in each ensemble.
        layer_norm: Whether Q has LayerNorm.
    """

    members: Count = 10
    layer_norm: bool = False


@dataclass(frozen=True)
class ImplicitQ(CriticOptions):
    """The critic of implicit Q-learning.

    Attributes:
        expectile: Expectile tau of the value regression.
    """

    expectile: OpenUnitInterval = 0.7


@dataclass(frozen=True)
class StagedImplicitQ(ImplicitQ):
    """The critic of implicit Q-learning, trained in a phase of its own.

    Attributes:
        steps: Gradient steps of the critic's phase; `max_steps` includes them.
        batch_size: Transitions of each batch that the critic is trained on; the behavior model takes all.
    """

    steps: Steps = 500_000
    batch_size: Count = 256


@dataclass(frozen=True)
class SupportedCritic(StagedImplicitQ):
    """A critic that learns from the data's actions or from actions of the behavior model.

    Attributes:
        kind: `implicit` for IQL, `in_support` for QGPO's softmax backup over behavior actions, `conservative` for
            CQL's penalty upon that backup.
        backup_beta: Inverse temperature of the softmax backup; null for the policy's beta.
        conservatism: Weight of the penalty of `conservative`.
        layer_norm: Whether Q has LayerNorm. The published critics have none; with it, Q extrapolates less beyond the
            data, which short trainings need.
    """

    kind: Literal["implicit", "in_support", "conservative"] = "implicit"
    backup_beta: NonNegative | None = None
    conservatism: NonNegative = 5.0
    layer_norm: bool = False


@dataclass(frozen=True)
class DiffusionOptions:
    """A diffusion model on the VP-SDE and its solver, DPM-Solver++ of order 2, uniform in time.

    Attributes:
        hidden_dim: Width of the network's widest blocks.
        learning_rate: Step size of the behavior model.
        conditional: Whether the network sees the observation; 2-D bandits have none.
        solver_steps: Network evaluations per sample.
    """

    hidden_dim: Width = 256
    learning_rate: Positive = 3e-4
    conditional: bool = True
    solver_steps: Count = 15


@dataclass(frozen=True)
class EnergyOptions:
    """The network f whose gradient guides a diffusion model.

    Attributes:
        hidden_dim: Width of the hidden layers.
        learning_rate: Step size.
        batch_size: Transitions of each batch that f is trained on.
    """

    hidden_dim: Width = 256
    learning_rate: Positive = 3e-4
    batch_size: Count = 256
