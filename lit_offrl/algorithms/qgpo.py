"""Q-Guided Policy Optimization by contrastive energy prediction (Lu, Chen et al., 2023, arXiv 2304.12824).

Where the authors' code differs from the paper or adds to it, and which we follow:

1. The backup has an inverse temperature of its own, `backup_beta`, which the published command sets to 1 at beta = 3
   (code).
2. Q in labels and backup is the smaller of two target Q; the critic's loss is the mean over both (code).
3. f is trained from the first update of the critic on, for twice as long as the critic (code).
4. Support actions at s and s' are sampled once, when the behavior model is final, and kept (code).
5. One t per state, shared by its support actions, each with noise of its own (both; without the first, the constant
   of s and t that f is free to have would not cancel).
6. The solver is DPM-Solver++ of order 2, 15 evaluations uniform in time from 1 to 1e-3; one sample acts (code).
7. On 2-D sets the code contrasts the actions of a whole batch at one t. Ours takes `support_actions` of them, and a
   time for each row.

Ours differs from both in what changes no expectation: times of a batch are stratified, and the random frequencies of
the time features are quantiles of their distribution.

`guidance` names what the paper compares with: regression on beta Q of the clean action (`mse`), which learns its mean
instead of the logarithm of its exponential mean, and the gradient of Q through the denoised action (`dps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_offrl.algorithms.base import Info, Phase, Target
from lit_offrl.algorithms.energy_guided import Critic, EnergyGuided, Rescale
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import x0_from_epsilon
from lit_offrl.networks.gradients import action_gradient


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return - E [ sum_k softmax_k(labels) log softmax_k(logits) ], of `[batch, K]` (CEP)."""
    return F.cross_entropy(logits, labels.softmax(-1))


class QGPO(EnergyGuided):
    """A diffusion policy guided by an energy that tells which of K noisy behavior actions have the better Q.

        f_t(s, a_t) = log E_{mu(a_0 | a_t, s)} exp(beta Q(s, a_0))                                    (Theorem 3.1)
        grad log pi_t = grad log mu_t + omega grad f_t
        L_mu = E || epsilon(s, a_t, t) - epsilon ||^2
        L_f  = - E [ sum_k softmax_k(beta Q(s, a^k)) log softmax_k f(s, a_t^k, t) ],  a^k ~ mu(. | s)          (CEP)
        L_Q  = E [ ( r + discount sum_k softmax_k(beta' Q(s', a'^k)) Q(s', a'^k) - Q(s, a) )^2 ]

    The policy becomes mu exp(beta Q) in the limit of many support actions; f is known up to a constant of s and t.
    Three phases: the behavior model; the critic and f together; f alone. With the guidance `dps` there is no f, and the
    critic has all that follows the behavior model.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta: Inverse temperature of Q in the policy.
        omega: Scale of the guidance when acting; 0 is the behavior model.
        sweep: Further values of omega that are evaluated beside the policy, as actors `omega_...`.
        rescale: What gets the norm of the behavior model's score (AEPO): each `sample`, the `batch`, or `none`.
        guidance: How f is learned: `contrastive`, by regression (`mse`), or not at all, by Q's gradient (`dps`).
        support_actions: Behavior actions K sampled at each state and each next state.
        critic: `in_support` for the softmax backup, `implicit` for IQL, `conservative` for CQL upon the first.
        backup_beta: Inverse temperature of the softmax in the backup.
        expectile: Expectile tau of the value regression of the critic `implicit`.
        conservatism: Weight of the penalty of the critic `conservative`.
        discount: Discount factor.
        target_rate: Rate at which the target critics follow.
        conditional: Whether the diffusion model and f see the observation; 2-D bandits have none, and there the actions
            of a batch are each other's support actions.
        behavior_learning_rate: Step size of the behavior model.
        critic_learning_rate: Step size of the critic.
        energy_learning_rate: Step size of f.
        critic_batch_size: Transitions of each batch that the critic is trained on; the behavior model takes all.
        energy_batch_size: States of each batch that f is trained on.
        hidden_dim: Width of the widest blocks of the behavior model.
        critic_hidden_dim: Width of the three hidden layers of Q.
        energy_hidden_dim: Width of the four hidden layers of f.
        pretrain_steps: Gradient steps that train the behavior model.
        critic_steps: Gradient steps, after these, that train critic and f; f has the rest of `max_steps` to itself.
        pretrained: Checkpoint of another run whose networks start this one.
        seed: Seed of the training noise (set from `seed_everything`).
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: float = 3.0,
        omega: float = 1.0,
        sweep: Sequence[float] = (),
        rescale: Rescale = "none",
        guidance: Literal["contrastive", "mse", "dps"] = "contrastive",
        support_actions: int = 16,
        critic: Critic = "in_support",
        backup_beta: float = 1.0,
        expectile: float = 0.7,
        conservatism: float = 5.0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        conditional: bool = True,
        behavior_learning_rate: float = 1e-4,
        critic_learning_rate: float = 3e-4,
        energy_learning_rate: float = 3e-4,
        critic_batch_size: int = 256,
        energy_batch_size: int = 256,
        hidden_dim: int = 512,
        critic_hidden_dim: int = 256,
        energy_hidden_dim: int = 256,
        pretrain_steps: int = 600_000,
        critic_steps: int = 500_000,
        pretrained: str | None = None,
        seed: int = 0,
    ) -> None:
        rates = {"behavior": behavior_learning_rate, "critic": critic_learning_rate, "energy": energy_learning_rate}
        if guidance == "dps":
            del rates["energy"]
        super().__init__(
            observation_dim,
            action_dim,
            beta=beta,
            backup_beta=backup_beta,
            omega=omega,
            sweep=sweep,
            rescale=rescale,
            critic=critic,
            support_actions=support_actions,
            expectile=expectile,
            conservatism=conservatism,
            discount=discount,
            target_rate=target_rate,
            conditional=conditional,
            learning_rates=rates,
            critic_batch_size=critic_batch_size,
            energy_batch_size=energy_batch_size,
            hidden_dim=hidden_dim,
            critic_hidden_dim=critic_hidden_dim,
            energy_hidden_dim=energy_hidden_dim,
            energy_layers=4,
            pretrain_steps=pretrain_steps,
            critic_steps=critic_steps,
            pretrained=pretrained,
            seed=seed,
        )
        self.save_hyperparameters()
        self.contrastive = guidance == "contrastive"

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic and f, f alone."""
        behavior = Phase("behavior", self.pretrain_update, self.pretrain_steps)
        if not self.learns_energy:
            return behavior, Phase("critic", self.critic_update, begin=self.forget_support)
        return (
            behavior,
            Phase("critic and energy", self.concurrent_update, self.critic_steps, self.forget_support),
            Phase("energy", self.update),
        )

    def targets(self) -> tuple[Target, ...]:
        """The Q networks whose values are final."""
        q, early = self.critic["q"], self.learns_energy
        return (Target(q, self.target_q, self.target_rate, early=early, early_steps=self.critic_steps),)

    @property
    def guided_from(self) -> int:
        """The gradient step at which the behavior model is final."""
        return self.pretrain_steps

    @property
    def supports(self) -> tuple[bool, bool]:
        """Whether training needs behavior actions at the observation and at the next observation."""
        here, next_ = super().supports
        return here or self.learns_energy, next_

    def forget_support(self) -> None:
        """Support actions are to be sampled from the behavior model as it is now."""
        self.support = None

    # ---------------------------------------------------------------- guidance

    def guidance(self, noisy_actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return the gradient of f; or of beta min Q(s, E[a_0 | a_t, s]) (`dps`, Chung et al. 2023)."""
        if self.learns_energy:
            return super().guidance(noisy_actions, time, observations)

        def value(noisy_actions: Tensor) -> Tensor:
            alpha, sigma = self.scales(time, noisy_actions)
            clean = x0_from_epsilon(noisy_actions, self.behavior(noisy_actions, time, observations), alpha, sigma)
            return self.beta * self.best_q(observations, clean)

        return action_gradient(value, noisy_actions)

    def energy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Cross-entropy of the better of noisy support actions (CEP); or the regression that it is compared with."""
        actions = self.support_of(batch).actions
        assert actions is not None
        observations = batch.observations[:, None]
        with torch.no_grad():
            labels = self.beta * self.best_q(observations, actions)
        time, noisy_actions, _ = self.noised(actions)
        f = self.energy(noisy_actions, time[:, None], observations)
        loss = contrastive_loss(f, labels) if self.contrastive else (f - labels).square().mean()
        return loss, {"energy_std": f.detach().std(-1).mean(), "label_std": labels.std(-1).mean()}

    # ---------------------------------------------------------------- the algorithm

    def concurrent_update(self, batch: Batch) -> Info:
        """Train the critic, then f."""
        return {**self.critic_update(batch), **self.energy_update(batch)}

    def update(self, batch: Batch) -> Info:
        """Train f."""
        return self.energy_update(batch)
