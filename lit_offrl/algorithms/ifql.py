"""IFQL: implicit Q-learning with a flow in the place of IDQL's diffusion model (Park, Li and Levine, 2025).

A baseline of the FQL paper, arXiv 2502.02538. What its code decides, and we with it: V is regressed on the target
networks, Q on the present V, all losses come from the same weights, and the online Q chooses among the candidates. The
code acts at one state at a time; ours at any number. Q's loss is a mean over both networks; in the code it is their
sum, which Adam does not notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    OfflineAlgorithm,
    OptimizerSpec,
    Target,
    draw_noise,
    frozen_copy,
    select,
)
from lit_offrl.algorithms.critic_losses import implicit_q_loss
from lit_offrl.algorithms.flow_policy import LAYERS, flow_loss, make_q, make_v, sample_flow
from lit_offrl.algorithms.options import Acting, ImplicitQ
from lit_offrl.batch import Batch
from lit_offrl.networks.policies import VelocityField
from lit_offrl.ranges import Count, Positive, Width


class IFQL(OfflineAlgorithm):
    """The best of several actions of a flow model of the behavior, by the critic of IQL.

        L_V    = E [ L_tau( min_i Q'_i(s, a) - V(s) ) ],  L_tau(u) = |tau - 1(u < 0)| u^2
        L_Q    = mean_i E [ (r + discount V(s') - Q_i(s, a))^2 ]
        L_flow = E [ (v(x_t, t, s) - (a - x_0))^2 ],  x_t = (1 - t) x_0 + t a
        pi(s)  = argmax min_i Q_i(s, a_k) over candidates a_k of the flow

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        flow_steps: Euler steps of the flow.
        critic: The critic, Q and V, with four hidden layers.
        acting: How an action is chosen.
        learning_rate: Step size of the flow.
        hidden_dim: Width of its four hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        flow_steps: Count = 10,
        critic: ImplicitQ = ImplicitQ(expectile=0.9, hidden_dim=512),
        acting: Acting = Acting(candidates=32),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 512,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.flow_steps = flow_steps
        self.critic_options = critic
        self.acting = acting
        self.learning_rate = learning_rate
        q = make_q(observation_dim, action_dim, critic.hidden_dim)
        self.critic = nn.ModuleDict({"q": q, "v": make_v(observation_dim, critic.hidden_dim)})
        self.target_q = frozen_copy(q)
        self.behavior = VelocityField(observation_dim, action_dim, (hidden_dim,) * LAYERS)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for Q and V, one for the flow."""
        return {
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
            "behavior": OptimizerSpec((self.behavior,), self.learning_rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that V is regressed on."""
        return (Target(self.critic["q"], self.target_q, self.critic_options.target_rate),)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Implicit Q-learning, V and Q from the same weights."""
        options = self.critic_options
        q, v = self.critic["q"], self.critic["v"]
        return implicit_q_loss(q, v, self.target_q, batch, options.expectile, options.discount)

    def flow_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow matching."""
        return flow_loss(self.behavior, batch.observations, batch.actions, self.noise)

    def validation_losses(self, batch: Batch) -> Info:
        """All losses."""
        return {**self.critic_loss(batch)[1], **self.flow_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """Step critic and flow, which do not depend on each other; `EMATargets` moves the target."""
        return self.minimize_in_turn({"critic": self.critic_loss, "behavior": self.flow_loss}, batch)

    def sample(self, observations: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Return `count` actions of the flow at each observation, `[batch, count, action_dim]`."""
        noise = draw_noise(observations, count, self.action_dim, generator=generator)
        return sample_flow(self.behavior, observations[:, None], noise, self.flow_steps, self.units)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the candidate of the highest Q."""
        candidates = self.sample(observations, self.acting.candidates, generator)
        q = self.value_of(observations[:, None], candidates)
        return select(candidates, q, self.acting.selection_temperature, generator)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a sample of the flow."""
        return self.sample(observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The best candidate, and the flow."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic["q"](observations, actions).amin(0)
        return q
