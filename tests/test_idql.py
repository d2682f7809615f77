"""IDQL: its losses and its sampler against plain reimplementations, and what selection does to the behavior's law."""

from __future__ import annotations

import pytest
import torch
from mixtures import GaussianMixture
from tiny import ACTION_DIM, OBSERVATION_DIM, batch, nested, shake
from torch import Tensor, nn

from lit_offrl.algorithms import IDQL
from lit_offrl.algorithms.critic_losses import expectile_loss

MEAN, STD = 0.2, 0.25


def make(**options: object) -> IDQL:
    torch.manual_seed(5)
    algorithm = IDQL(OBSERVATION_DIM, ACTION_DIM, **nested({"hidden_dim": 16, "critic__hidden_dim": 16, **options}))
    algorithm.configure_optimizers()
    algorithm.main_steps = 1000
    for target in algorithm.targets():
        shake(target.target)
    return algorithm


class ExactNoise(nn.Module):
    """The noise in diffused actions of N(0.2, 0.25^2) in each dimension."""

    def __init__(self, algorithm: IDQL) -> None:
        super().__init__()
        self.schedule = algorithm.schedule
        self.mixture = GaussianMixture.isotropic(torch.full((1, ACTION_DIM), MEAN, dtype=torch.float64), STD)

    def forward(self, x: Tensor, step: Tensor, observations: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(step).double(), self.schedule.sigma(step).double()
        score = self.mixture.diffused(alpha, sigma).score(x.double().flatten(0, -2))
        return (-sigma * score).to(x).view(x.shape)


class LinearQ(nn.Module):
    """Twin Q = slope a_1, and a second one that is 0.1 larger."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        q = self.slope * actions[..., 0]
        return torch.stack([q, q + 0.1])


def exact(slope: float, **options: object) -> IDQL:
    algorithm = make(**options)
    algorithm.target_actor, algorithm.target_q = ExactNoise(algorithm), LinearQ(slope)
    return algorithm


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_actor_loss_is_the_summed_error_of_the_noise_with_dropout_before_each_normalization(dropout: float):
    algorithm, rows = make(dropout=dropout), batch()
    before = algorithm.noise.get_state()
    loss, _ = algorithm.actor_loss(rows)
    algorithm.noise.set_state(before)
    step = 1 + (5 * algorithm.noise.stratified(12)).long()
    assert step.min() == 1
    assert step.max() == 5
    epsilon = algorithm.noise.normal(12, ACTION_DIM)
    masks = algorithm.noise.dropout_masks(dropout, 12, 3, 16) if dropout else torch.ones(3, 12, 16)
    alpha_bar = torch.cumprod(1 - algorithm.schedule.betas, 0)[step][:, None]
    x = alpha_bar.sqrt() * rows.actions + (1 - alpha_bar).sqrt() * epsilon
    actor = algorithm.actor
    hidden = actor.mix(torch.cat([x, rows.observations, actor.time(step)], -1))
    for block, mask in zip(actor.blocks, masks, strict=True):
        hidden = hidden + block.contract(nn.functional.silu(block.expand(block.norm(hidden * mask))))
    error = actor.head[1](nn.functional.silu(hidden)) - epsilon
    torch.testing.assert_close(loss, (error**2).sum() / 12)


def test_critic_losses_are_those_of_implicit_q_learning_with_a_normalized_input_of_v():
    algorithm, rows = make(), batch()
    v, q = algorithm.critic["v"], algorithm.critic["q"]
    x = rows.observations
    normalized = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(v(x), v[1].layers(normalized)[:, 0])
    best = torch.minimum(*algorithm.target_q(x, rows.actions))
    torch.testing.assert_close(algorithm.v_loss(rows)[0], expectile_loss(best - v(x), 0.7))
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * v(rows.next_observations)
    first, second = q(x, rows.actions)
    expected = ((goal - first).square().mean() + (goal - second).square().mean()) / 2
    torch.testing.assert_close(algorithm.q_loss(rows)[0], expected)


def test_the_actor_alone_has_weight_decay_and_a_decaying_rate():
    specs = make().optimizer_specs()
    assert {name: (spec.weight_decay, spec.cosine) for name, spec in specs.items()} == {
        "actor": (1e-4, True),
        "v": (0, False),
        "q": (0, False),
    }


# ---------------------------------------------------------------- acting


def test_sampler_equals_the_loop_of_the_authors():
    algorithm = make()
    observations = torch.randn(4, OBSERVATION_DIM)
    ours = algorithm.sample(observations, 3, torch.Generator().manual_seed(1))
    noise = torch.randn(5, 4, 3, ACTION_DIM, generator=torch.Generator().manual_seed(1))
    betas = algorithm.schedule.betas
    alpha_bar = torch.cumprod(1 - betas, 0)
    x = noise[0]
    for i, n in enumerate(range(5, 0, -1)):
        epsilon = algorithm.target_actor(x, torch.tensor([n]), observations[:, None])
        x = (x - betas[n] / (1 - alpha_bar[n]).sqrt() * epsilon) / (1 - betas[n]).sqrt()
        if n > 1:
            x = x + betas[n].sqrt() * noise[i + 1]
        x = x.clamp(-1, 1)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)  # float32, in another order


def test_with_constant_q_it_acts_by_the_behavior_law():
    algorithm = exact(0.0, diffusion_steps=5, acting__candidates=8)
    observations = torch.zeros(4000, OBSERVATION_DIM)
    policy, behavior = (
        algorithm.actors()[name](observations, torch.Generator().manual_seed(0)) for name in ("policy", "behavior")
    )
    # Standard errors of mean and deviation are 0.004 and 0.003; five of them.
    assert (policy.mean(0) - behavior.mean(0)).abs().max() < 5 * 0.004 * 2**0.5
    assert (policy.std(0) - behavior.std(0)).abs().max() < 5 * 0.003 * 2**0.5
    assert behavior.mean(0) == pytest.approx(torch.full((2,), MEAN), abs=0.05)  # five steps leave some bias


def test_many_candidates_and_a_linear_q_go_to_the_edge_of_the_support_along_q_alone():
    observations = torch.zeros(2000, OBSERVATION_DIM)
    behavior = exact(3.0, clip=None).sample_behavior(observations, torch.Generator().manual_seed(1))
    for candidates, largest in ((16, 1.766), (256, 2.827)):  # expected maxima of so many standard normal numbers
        algorithm = exact(3.0, clip=None, acting__candidates=candidates)
        actions = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
        # Exact noise and no clipping: each step is linear, so samples are normal. Four standard errors are 0.09.
        distance = (actions - behavior).mean(0) / behavior.std(0)
        assert distance.tolist() == pytest.approx([largest, 0], abs=0.12)
    algorithm = exact(3.0, acting__candidates=256)
    assert algorithm.sample_actions(observations, torch.Generator().manual_seed(0)).abs().max() <= 1


def test_the_smaller_target_q_selects():
    algorithm = make(acting__candidates=6)
    observations = torch.randn(5, OBSERVATION_DIM)
    actions = algorithm.sample(observations, 6, torch.Generator().manual_seed(2))
    q = torch.stack([algorithm.target_q(observations, actions[:, k]).amin(0) for k in range(6)], 1)
    chosen = algorithm.sample_actions(observations, torch.Generator().manual_seed(2))
    assert torch.equal(chosen, actions[torch.arange(5), q.argmax(1)])
