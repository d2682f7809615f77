"""CQL, conservative Q-learning (Kumar, Zhou, Tucker and Levine, 2020, arXiv 2006.04779): its CQL(H).

The settings are those of CORL (Tarasov et al., 2022, arXiv 2210.07105), which decides, and we with it:

1. The log-sum-exp is an importance-weighted sum over sampled actions, without the data's action and without a division
   by their number, which adds a constant. The actions of the policy at s' are evaluated at s, with their density at s'.
2. The target has no entropy term. The entropy's weight is learned, toward an entropy of minus the action's dimensions,
   at the policy's learning rate.
3. With a Lagrange multiplier, the multiplier times alpha weighs the gap less its threshold. The multiplier begins at e.
4. All losses of an update are those of the networks before it.
5. The last layers begin small: the policy's by Xavier's rule, the critic's orthogonal, both with gain 0.01. The
   deviation of the policy is exp(m x + b) of the network's output x, with m and b learned, from 1 and -1.

Ours: `critic_layers` is the depth of both Q networks; in the code the second one always has three hidden layers. The
authors' own code trains the policy by behavior cloning in the first 40,000 steps; CORL's settings do not, nor do we.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import CriticOptions
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.mlp import mlp, orthogonal_
from lit_offrl.networks.policies import TanhGaussian
from lit_offrl.ranges import Count, Finite, NonNegative, Positive, Width

LAST_GAIN = 0.01
LARGEST_MULTIPLIER = 1e6


class ScaledTanhGaussianPolicy(nn.Module):
    """a = tanh(mean(s) + std(s) z), ln std(s) = m x(s) + b, with learned scalars m and b.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden_dim: Width of the three hidden layers.
    """

    LOG_STD_RANGE = (-20.0, 2.0)

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *(hidden_dim,) * 3, 2 * action_dim), nn.ReLU)
        *_, last = self.layers
        assert isinstance(last, nn.Linear)
        nn.init.xavier_uniform_(last.weight, LAST_GAIN)
        nn.init.zeros_(last.bias)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> TanhGaussian:
        """Return the action distribution at `[..., observation_dim]`."""
        mean, output = self.layers(observations).chunk(2, dim=-1)
        return TanhGaussian(mean, (self.scale * output + self.offset).clamp(*self.LOG_STD_RANGE).exp())


class CQL(OfflineAlgorithm):
    """Soft actor-critic with a critic whose Q is pushed down at all actions and up at those of the data.

        y        = r + discount min_i Q'_i(s', a'),  a' ~ pi(. | s')
        gap_i    = log sum_j exp(Q_i(s, a_j)) / p(a_j) - Q_i(s, a),  a_j ~ p in {uniform, pi(. | s), pi(. | s')}
        L_Q      = sum_i E [ (y - Q_i(s, a))^2 + alpha gap_i ]                                      (Eq. 4, CQL(H))
        L_pi     = E [ eta log pi(a~ | s) - min_i Q_i(s, a~) ],  a~ ~ pi(. | s)
        L_eta    = - E [ log eta (log pi(a~ | s) - dim(a)) ]

    With a threshold, L_Q has a multiplier times alpha (gap_i - threshold) instead, which the multiplier maximizes: it
    grows while the gap is above the threshold.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Weight of the gap; 0 is soft actor-critic without the entropy in the target.
        samples: Actions sampled from each of the three distributions.
        threshold: Threshold of the gap for a Lagrange multiplier; null for no multiplier.
        smallest_gap: The gap of each transition is cut at this lower end; null for none.
        max_target_backup: Let a' be the best of `samples` actions of the policy.
        critic: The critic.
        critic_layers: Hidden layers of each Q network.
        learning_rate: Step size of the policy and of the entropy's weight.
        hidden_dim: Width of the policy's three hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: NonNegative = 10.0,
        samples: Count = 10,
        threshold: Finite | None = None,
        smallest_gap: Finite | None = None,
        max_target_backup: bool = False,
        critic: CriticOptions = CriticOptions(),
        critic_layers: Count = 3,
        learning_rate: Positive = 3e-5,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.alpha = alpha
        self.samples = samples
        self.threshold = threshold
        self.smallest_gap = smallest_gap
        self.max_target_backup = max_target_backup
        self.critic_options = critic
        self.learning_rate = learning_rate
        hidden = (critic.hidden_dim,) * critic_layers
        self.critic = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=False, activation=nn.ReLU)
        orthogonal_(self.critic, gain=math.sqrt(2))
        for member in self.critic.members:
            orthogonal_(member[-1], gain=LAST_GAIN)  # type: ignore[index]
        self.target_critic = frozen_copy(self.critic)
        self.policy = ScaledTanhGaussianPolicy(observation_dim, action_dim, hidden_dim)
        self.log_entropy_weight = nn.ParameterList([nn.Parameter(torch.tensor(0.0))])
        if threshold is not None:
            self.log_multiplier = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network and each multiplier."""
        specs = {
            "entropy": OptimizerSpec((self.log_entropy_weight,), self.learning_rate),
            "policy": OptimizerSpec((self.policy,), self.learning_rate),
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
        }
        if self.threshold is not None:
            specs["multiplier"] = OptimizerSpec((self.log_multiplier,), self.critic_options.learning_rate)
        return specs

    def targets(self) -> tuple[Target, ...]:
        """The critic."""
        return (Target(self.critic, self.target_critic, self.critic_options.target_rate),)

    def sample_policy(self, observations: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return actions at each observation, `[batch, count, action_dim]`, and log densities, `[batch, count]`."""
        distribution: TanhGaussian = self.policy(observations[:, None])
        return distribution.sample_with_log_density(self.noise.normal(len(observations), count, self.action_dim))

    # ---------------------------------------------------------------- losses

    def log_sum_exp(self, batch: Batch) -> Tensor:
        """Return the log of the importance-weighted sum of exp Q_i over sampled actions, `[members, batch]`.

        Of n actions from each of k distributions it estimates log(n k integral of exp Q_i(s, a) da).
        """
        with torch.no_grad():
            limit = self.units.limit
            uniform = limit * (2 * self.noise.uniform(len(batch.rewards), self.samples, self.action_dim) - 1)
            uniform_density = (-self.action_dim * (2 * limit).log()).expand(uniform.shape[:2])
            present, present_density = self.sample_policy(batch.observations, self.samples)
            following, following_density = self.sample_policy(batch.next_observations, self.samples)
            actions = torch.cat([uniform, present, following], dim=1)
            log_density = torch.cat([uniform_density, present_density, following_density], dim=1)
        q: Tensor = self.critic(batch.observations[:, None], actions)
        return (q - log_density).logsumexp(-1)

    def temporal_difference_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the critic's loss of soft actor-critic without the entropy, and Q of the data, `[members, batch]`."""
        with torch.no_grad():
            actions, _ = self.sample_policy(batch.next_observations, self.samples if self.max_target_backup else 1)
            next_q = self.target_critic(batch.next_observations[:, None], actions).amin(0).amax(-1)
            goal = bootstrapped(batch, next_q, self.critic_options.discount)
        q: Tensor = self.critic(batch.observations, batch.actions)
        return ensemble_loss(q, goal), q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping, and the gap (Eq. 4); `gap` in what is returned is the mean over both Q networks."""
        td_loss, q = self.temporal_difference_loss(batch)
        gap = self.log_sum_exp(batch) - q
        if self.smallest_gap is not None:
            gap = gap.clamp_min(self.smallest_gap)
        gaps = gap.mean(1)  # of each network
        weight = self.alpha * (1.0 if self.threshold is None else self.multiplier().detach())
        loss = td_loss + weight * gaps.sum()  # the threshold has no gradient here
        info = {"critic_loss": loss, "td_loss": td_loss, "gap": gaps.mean(), "q_mean": q.mean()}
        return loss, {name: value.detach() for name, value in info.items()}

    def multiplier(self) -> Tensor:
        """Return the Lagrange multiplier."""
        multiplier: Tensor = self.log_multiplier[0].exp().clamp_max(LARGEST_MULTIPLIER)
        return multiplier

    def multiplier_loss(self, gap: Tensor) -> Tensor:
        """Return the loss of the multiplier at the mean gap of an update."""
        assert self.threshold is not None
        return -self.multiplier() * self.alpha * (gap - self.threshold)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Q and the entropy; `log_density` in what is returned is the mean of log pi."""
        actions, log_density = self.sample_policy(batch.observations, 1)
        q = self.critic(batch.observations[:, None], actions).amin(0)
        loss = (self.log_entropy_weight[0].exp().detach() * log_density - q).mean()
        info = {"policy_loss": loss, "policy_q": q.mean(), "log_density": log_density.mean()}
        return loss, {name: value.detach() for name, value in info.items()}

    def entropy_loss(self, log_density: Tensor) -> Tensor:
        """Return the loss of the entropy's weight at the mean of log pi."""
        loss: Tensor = -self.log_entropy_weight[0] * (log_density - self.action_dim)
        return loss

    # ---------------------------------------------------------------- the algorithm

    def validation_losses(self, batch: Batch) -> Info:
        """The losses of both networks."""
        return {**self.critic_loss(batch)[1], **self.policy_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """Compute all losses, then step all that is trained; `EMATargets` moves the target."""
        policy_loss, policy_info = self.policy_loss(batch)
        critic_loss, critic_info = self.critic_loss(batch)
        info = {**critic_info, **policy_info, "entropy_weight": self.log_entropy_weight[0].detach().exp()}
        self.minimize("entropy", self.entropy_loss(policy_info["log_density"]))
        self.minimize("policy", policy_loss)
        if self.threshold is not None:
            info["multiplier"] = self.multiplier().detach()
            self.minimize("multiplier", self.multiplier_loss(critic_info["gap"]))
        self.minimize("critic", critic_loss)
        return info

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the tanh of the mean."""
        mean: Tensor = self.policy(observations).mean
        return mean.tanh()

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic(observations, actions).amin(0)
        return q
