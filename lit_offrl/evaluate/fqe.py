"""Fitted Q evaluation (Le, Voloshin and Yue, 2019, arXiv 1903.08738, Algorithm 3): Q^pi of a fixed policy from data.

Where this differs from the paper:

1. The paper solves a new regression in each of its iterations, with targets of the solution before. Here one network
   goes on learning, and its targets are of a copy that is renewed every `copy_every` steps (as in d3rlpy).
2. Rewards are divided by the root mean square of the data's discounted returns, so that Q is of order 1 for the
   optimizer. Values are multiplied by it again: they are in units of the data's own rewards.
3. The policy's next actions are drawn once for the whole data, because it is fixed and often much slower than Q. A
   stochastic policy's noise is then averaged by the regression over the data, as that of s' is.

There is no pessimism and no policy improvement: the critic is one network and not the minimum of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.optimizers import Optimizers, OptimizerSpec
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ

ROWS_AT_A_TIME = 65_536


@dataclass(frozen=True)
class FQEOptions:
    """Options of fitted Q evaluation.

    Attributes:
        steps: Gradient steps. Values travel back one step of the data with each copy of the target, so it takes
            log(0.01) / log(discount) copies until 99% of a value has arrived, 458 for a discount of 0.99.
        discount: Discount factor.
        samples: Actions of the policy at each next observation, over which the target is a mean.
        batch_size: Transitions per gradient step.
        learning_rate: Adam's step size.
        hidden_dims: Widths of the hidden layers.
        copy_every: Gradient steps between two copies of the target network.
        seed: Seed of the weights, the minibatches and the policy's noise.
    """

    steps: int = 20_000
    discount: float = 0.99
    samples: int = 1
    batch_size: int = 256
    learning_rate: float = 3e-4
    hidden_dims: tuple[int, ...] = (256, 256)
    copy_every: int = 25
    seed: int = 0


class FQE:
    """Learns Q of a fixed policy pi.

        L_Q = E [ ( Q(s, a) - r - discount (1 - d) mean_k Q'(s', a'_k) )^2 ],   a'_k ~ pi(. | s')

    d is 1 in terminal states and 0 in all others, also where an episode was cut. Q' is the latest copy of Q.

    Args:
        data: Transitions `[n, ...]`, with observations, actions and rewards of order 1.
        next_actions: The policy's actions at `data.next_observations`, `[n, samples, action_dim]`.
        options: The options.
    """

    def __init__(self, data: Batch, next_actions: Tensor, options: FQEOptions) -> None:
        self.data, self.next_actions, self.options = data, next_actions, options
        widths = data.observations.shape[1], data.actions.shape[1], options.hidden_dims
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.q, self.target_q = (
                EnsembleQ(*widths, members=1, layer_norm=False, activation=nn.ReLU) for _ in range(2)
            )
        self.target_q.requires_grad_(False)
        self.optimizers = Optimizers({"q": OptimizerSpec((self.q,), options.learning_rate)})
        self.generator = torch.Generator().manual_seed(options.seed)

    def next_values(self, q: nn.Module, next_observations: Tensor, next_actions: Tensor) -> Tensor:
        """Return mean_k Q(s', a'_k), `[batch]`."""
        values: Tensor = q(next_observations[:, None], next_actions)[0]
        return values.mean(1)

    def q_loss(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """Return the squared error of Q to the bootstrapped target."""
        with torch.no_grad():
            next_values = self.next_values(self.target_q, batch.next_observations, next_actions)
            goal = bootstrapped(batch, next_values, self.options.discount)
        return ensemble_loss(self.q(batch.observations, batch.actions), goal)

    def update(self) -> Tensor:
        """Perform one gradient step on a random minibatch; return the loss."""
        rows = torch.randint(len(self.next_actions), (self.options.batch_size,), generator=self.generator)
        batch = Batch(*(field[rows] for field in self.data[:5]))
        loss = self.q_loss(batch, self.next_actions[rows])
        self.optimizers.minimize("q", loss)
        return loss.detach()

    def fit(self, reports: int) -> Iterator[tuple[int, float]]:
        """Perform all gradient steps; yield the step and the mean loss at `reports` equal distances and at the end."""
        steps, losses = self.options.steps, []
        every = max(steps // reports, 1)
        for step in range(steps):
            if step % self.options.copy_every == 0:
                self.target_q.load_state_dict(self.q.state_dict())
            losses.append(self.update())
            if (step + 1) % every == 0 or step + 1 == steps:
                yield step + 1, float(torch.stack(losses).mean())
                losses.clear()

    @torch.no_grad()
    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return E_{a ~ pi} Q(s, a), `[n]`, of observations and the policy's actions there, `[n, samples, ...]`."""
        pieces = zip(*(torch.split(each, ROWS_AT_A_TIME) for each in (observations, actions)), strict=True)
        return torch.cat([self.next_values(self.q, *each) for each in pieces])

    @torch.no_grad()
    def td_errors(self, data: Batch, next_actions: Tensor) -> Tensor:
        """Return Q(s, a) - r - discount (1 - d) mean_k Q(s', a'_k), `[n]`: of Q with itself, without the copy."""
        goal = bootstrapped(data, self.values(data.next_observations, next_actions), self.options.discount)
        return self.values(data.observations, data.actions[:, None]) - goal
