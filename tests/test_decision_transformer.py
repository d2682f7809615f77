"""Decision Transformer: what a prediction depends on, the returns that it sees, and whether it follows a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
from tiny import moved, rate, shake
from torch import Tensor, nn

from lit_offrl.algorithms import DecisionTransformer
from lit_offrl.algorithms.base import Memory
from lit_offrl.batch import Batch
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.envs.rollout import Rollouts
from lit_offrl.errors import UserError
from lit_offrl.networks.transformer import CausalSelfAttention, DropoutMasks, TransformerBlock

STEPS, OBSERVATION_DIM, ACTION_DIM = 5, 3, 2


def make(**options: Any) -> DecisionTransformer:
    torch.manual_seed(0)
    sizes = {"context": STEPS, "embedding_dim": 16, "layers": 2, "heads": 2, "max_episode_steps": 20}
    algorithm = DecisionTransformer(OBSERVATION_DIM, ACTION_DIM, **{**sizes, "reward_scale": 1.0, **options})
    shake(algorithm.policy, scale=0.2)  # so that everything that may matter does
    algorithm.configure_optimizers()
    return algorithm.eval()


def segments(rows: int = 6, seed: int = 0, length: int = STEPS) -> Batch:
    """Return segments of 2 to 5 steps, padded."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, length, OBSERVATION_DIM, generator=generator)
    actions = torch.rand(rows, length, ACTION_DIM, generator=generator) * 2 - 1
    rewards, returns_to_go = torch.randn(2, rows, length, generator=generator)
    mask = (torch.arange(length) < 2 + torch.arange(rows)[:, None] % 4).float()
    timesteps = 3 + torch.arange(length).expand(rows, -1)
    return Batch(
        observations, actions, rewards, observations, torch.zeros(rows, length), None, mask, returns_to_go, timesteps
    )


def predict(algorithm: DecisionTransformer, batch: Batch) -> Tensor:
    return algorithm.predict(batch.returns_to_go, batch.observations, batch.actions, batch.timesteps)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_that_of_torch(heads: int):
    torch.manual_seed(0)
    ours, theirs = CausalSelfAttention(8, heads), nn.MultiheadAttention(8, heads, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.project.weight.data, ours.project.bias.data
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    tokens = torch.randn(3, 7, 8)
    expected, _ = theirs(tokens, tokens, tokens, attn_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))
    torch.testing.assert_close(ours(tokens), expected)


def test_a_block_is_that_of_torch():
    torch.manual_seed(0)
    ours = TransformerBlock(8, 2)
    theirs = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    shake(ours)
    theirs.self_attn.in_proj_weight.data = ours.attention.project.weight.data
    theirs.self_attn.in_proj_bias.data = ours.attention.project.bias.data
    pairs = [
        (theirs.self_attn.out_proj, ours.attention.output),
        (theirs.norm1, ours.attention_norm),
        (theirs.norm2, ours.mlp_norm),
        (theirs.linear1, ours.mlp[0]),
        (theirs.linear2, ours.mlp[2]),
    ]
    for one, other in pairs:
        one.load_state_dict(other.state_dict())
    tokens = torch.randn(3, 7, 8)
    expected = theirs(tokens, src_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))
    torch.testing.assert_close(ours(tokens), expected)


def test_initial_weights():
    torch.manual_seed(0)
    policy = DecisionTransformer(OBSERVATION_DIM, ACTION_DIM, embedding_dim=64, layers=2).policy
    assert policy.embed_timestep.weight.std().item() == pytest.approx(0.02, rel=0.05)  # of 64,000 values
    assert policy.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Uniform within sqrt(6 / (64 + 192)): the deviation is the bound over sqrt(3).
    projection = policy.blocks[1].attention.project
    assert projection.weight.abs().max().item() <= (6 / 256) ** 0.5
    assert projection.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not projection.bias.any()


def test_a_prediction_depends_on_the_past_and_on_the_present_return_and_observation_alone():
    """The order of the tokens, too: with another one, a prediction would see its own action or not its observation."""
    algorithm, batch = make(), segments(rows=1)
    inputs = [each.clone().requires_grad_() for each in (batch.returns_to_go, batch.observations, batch.actions)]
    prediction = algorithm.predict(*inputs, batch.timesteps)
    for t in range(STEPS):
        gradients = torch.autograd.grad(prediction[0, t].sum(), inputs, retain_graph=True, materialize_grads=True)
        sees_return, sees_observation, sees_action = (
            each[0].reshape(STEPS, -1).ne(0).any(1).tolist() for each in gradients
        )
        assert sees_return == sees_observation == [step <= t for step in range(STEPS)]
        assert sees_action == [step < t for step in range(STEPS)]


def test_time_is_the_place_in_the_episode():
    algorithm, batch = make(), segments()
    shifted = batch._replace(timesteps=batch.timesteps + 1)
    assert not torch.allclose(predict(algorithm, batch), predict(algorithm, shifted))
    late, later = (predict(algorithm, batch._replace(timesteps=batch.timesteps + more)) for more in (100, 200))
    assert torch.equal(late, later)  # beyond max_episode_steps
    assert algorithm.policy.embed_timestep.num_embeddings == 20


def test_actions_reach_the_limit_of_the_data():
    algorithm, batch = make(), segments()
    before = predict(algorithm, batch)
    algorithm.units.limit.fill_(6.0)
    torch.testing.assert_close(predict(algorithm, batch), 6 * before)


# ---------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    """A mean over all entries of the batch, where padding counts as 0."""
    algorithm, batch = make(), segments()
    prediction, total = predict(algorithm, batch).detach(), 0.0
    for i, row in enumerate(batch.mask):
        for step in range(int(row.sum())):
            total += float((prediction[i, step] - batch.actions[i, step]).square().sum())
    expected = total / (len(batch.mask) * STEPS * ACTION_DIM)
    assert algorithm.policy_loss(batch).item() == pytest.approx(expected, rel=1e-5)
    assert algorithm.validation_losses(batch)["policy_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_padding_plays_no_part():
    algorithm, batch = make(), segments()
    real = batch.mask[..., None]
    filled = batch._replace(
        observations=torch.where(real == 1, batch.observations, torch.tensor(9.0)),
        actions=torch.where(real == 1, batch.actions, torch.tensor(-0.7)),
        returns_to_go=torch.where(batch.mask == 1, batch.returns_to_go, torch.tensor(99.0)),
        timesteps=torch.where(batch.mask == 1, batch.timesteps, torch.tensor(0)),
    )
    one, two = predict(algorithm, batch), predict(algorithm, filled)
    torch.testing.assert_close(one * real, two * real)
    assert not torch.allclose(one, two)
    torch.testing.assert_close(algorithm.policy_loss(batch), algorithm.policy_loss(filled))
    for i, row in enumerate(batch.mask):  # and without padding
        length = int(row.sum())
        short = Batch._make(None if each is None else each[i : i + 1, :length] for each in batch)
        torch.testing.assert_close(predict(algorithm, short)[0], one[i, :length])


def test_returns_are_scaled():
    batch = segments()
    plain, scaled = make(), make(reward_scale=0.1)
    ten_times = batch._replace(returns_to_go=10 * batch.returns_to_go)
    torch.testing.assert_close(predict(scaled, ten_times), predict(plain, batch))


def test_dropout_masks_act_where_they_should():
    algorithm, batch = make(), segments()
    inputs = batch.returns_to_go, batch.observations, batch.actions, batch.timesteps
    rows, tokens = len(batch.mask), 3 * STEPS
    ones = DropoutMasks(torch.ones(5, rows, tokens, 16), torch.ones(2, rows, 2, tokens, tokens))
    torch.testing.assert_close(algorithm.predict(*inputs, ones), predict(algorithm, batch))
    # Blocks whose outputs are dropped do nothing. If the tokens are dropped too, all predictions are equal.
    silent = torch.ones(5, rows, tokens, 16)
    silent[1:] = 0
    policy = algorithm.policy
    blocks, policy.blocks = policy.blocks, nn.ModuleList()
    expected = predict(algorithm, batch)
    policy.blocks = blocks
    torch.testing.assert_close(algorithm.predict(*inputs, ones._replace(values=silent)), expected)
    silent[0] = 0
    constant = algorithm.predict(*inputs, ones._replace(values=silent))
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant))
    # If the attention weights are dropped, a prediction does not depend on other steps.
    alone = algorithm.predict(*inputs, ones._replace(attention=torch.zeros(2, rows, 2, tokens, tokens)))
    other = algorithm.predict(
        *(torch.cat([each[:, :1].flip(0), each[:, 1:]], 1) for each in inputs),
        ones._replace(attention=torch.zeros(2, rows, 2, tokens, tokens)),
    )
    assert torch.equal(alone[:, 1:], other[:, 1:])


def test_dropout_is_for_training_and_of_the_stream():
    algorithm, batch = make(dropout=0.5), segments()
    assert algorithm.dropout_masks(6, STEPS) is None
    algorithm.train()
    masks = algorithm.dropout_masks(400, STEPS)
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert mask.mean().item() == pytest.approx(1.0, abs=0.01)  # of at least 360,000 draws: 6 standard errors
    one, two = algorithm.policy_loss(batch), algorithm.policy_loss(batch)
    assert not torch.equal(one, two)
    assert make(dropout=0.0).train().dropout_masks(6, STEPS) is None


def test_an_update_decays_the_weights_and_warms_up():
    algorithm = make()
    (spec,) = algorithm.optimizer_specs().values()
    assert (spec.weight_decay, spec.clip_norm, spec.warmup) == (1e-4, 0.25, 10_000)
    algorithm.main_steps = 100_000
    assert rate(algorithm, spec) == pytest.approx(1e-4 / 10_000)
    algorithm.gradient_step = 4_999
    assert rate(algorithm, spec) == pytest.approx(0.5e-4)
    algorithm.gradient_step = 50_000
    assert rate(algorithm, spec) == 1e-4
    assert moved(algorithm, lambda: algorithm.update(segments())) == {"policy"}


def test_heads_divide_the_width():
    with pytest.raises(UserError, match="heads: must be a divisor of embedding_dim, 16, not 3"):
        make(heads=3)


# ---------------------------------------------------------------- data and acting


class Clicker(gym.Env[Any, Any]):
    """Four steps; the reward is 1 where the action is positive."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 4
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return np.zeros(1, np.float32), float(action[0] > 0), False, self.left == 0, {}


def clicks(rewards: list[list[float]]) -> dict[str, Any]:
    """Return episodes of one-dimensional zeros whose action is the sign of the return-to-go less 1/2."""
    ends = np.concatenate([np.arange(len(each)) == len(each) - 1 for each in rewards])
    returns_to_go = np.concatenate([np.cumsum(each[::-1])[::-1] for each in rewards])
    n = len(ends)
    return {
        "observations": np.zeros((n, 1), np.float32),
        "next_observations": np.zeros((n, 1), np.float32),
        "actions": np.sign(returns_to_go - 0.5)[:, None].astype(np.float32),
        "rewards": np.concatenate(rewards).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": ends,
    }


def fit(algorithm: DecisionTransformer, data: D4RLDataModule, steps: int, folder: Path) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(algorithm, datamodule=data)
    return trainer


def test_returns_and_times_of_segments_of_training_and_of_held_out_ones(tmp_path: Path):
    class Watching(DecisionTransformer):
        def policy_loss(self, batch: Batch) -> Tensor:
            (seen if self.training else held_out).append(batch)
            return super().policy_loss(batch)

    seen: list[Batch] = []
    held_out: list[Batch] = []
    arrays = clicks([[1, 2, 3], [4], [1, 2, 3], [4]])
    data = D4RLDataModule.from_arrays(arrays, batch_size=40, steps_per_epoch=2, validation_fraction=0.5)
    algorithm = Watching(1, 1, context=2, embedding_dim=4, layers=1)
    fit(algorithm, data, 2, tmp_path)
    assert held_out
    expected = {  # by the first return-to-go: rewards, returns-to-go, timesteps, mask
        6.0: ([1, 2], [6, 5], [0, 1], [1, 1]),
        5.0: ([2, 3], [5, 3], [1, 2], [1, 1]),
        3.0: ([3, 3], [3, 3], [2, 2], [1, 0]),
        4.0: ([4, 4], [4, 4], [0, 0], [1, 0]),
    }
    firsts = set()
    for batch in [*seen, *held_out]:
        for row in zip(batch.rewards, batch.returns_to_go, batch.timesteps, batch.mask, strict=True):
            first = float(row[1][0])
            assert tuple(each.tolist() for each in row) == expected[first]
            firsts.add(first)
    assert firsts == set(expected)
    assert algorithm.best_return.item() == max(float(each.returns_to_go.max()) for each in seen)


def test_rewards_must_be_those_of_the_environment(tmp_path: Path):
    data = D4RLDataModule.from_arrays(clicks([[1, 2, 3]]), steps_per_epoch=2, reward="minus_one")
    with pytest.raises(UserError, match="must be raw, not minus_one"):
        fit(DecisionTransformer(1, 1, context=2, embedding_dim=4, layers=1), data, 2, tmp_path)


def play(algorithm: DecisionTransformer, observations: Tensor, rewards: Tensor) -> tuple[Tensor, list[list[float]]]:
    """Return the actions `[steps, action_dim]` of one episode, and the returns-to-go that each step was given."""
    memory: Memory = {}
    actions, fed = [], []
    for observation, reward in zip(observations, rewards.tolist(), strict=True):
        actions.append(algorithm.act(observation[None], memories=[memory])[0])
        fed.append(memory["returns_to_go"].tolist())
        memory["reward"] = reward
    return torch.stack(actions), fed


def test_received_rewards_leave_the_return_to_go():
    algorithm = make(target_return=6.0)
    _, fed = play(algorithm, torch.randn(3, OBSERVATION_DIM), torch.tensor([1.0, 2.0, 3.0]))
    assert fed == [[6], [6, 5], [6, 5, 3]]


def test_an_action_is_the_prediction_on_the_same_segment():
    """Of an episode of 8 steps with a context of 5: the last 5 steps, at their true times."""
    algorithm, steps = make(target_return=2.5), 8
    torch.manual_seed(1)
    observations, rewards = torch.randn(steps, OBSERVATION_DIM), torch.rand(steps)
    actions, _ = play(algorithm, observations, rewards)
    returns_to_go = 2.5 - torch.cat([torch.zeros(1), rewards.cumsum(0)[:-1]])
    for t in range(steps):
        window = slice(max(t - STEPS + 1, 0), t + 1)
        inputs = returns_to_go[window], observations[window], actions[window], torch.arange(steps)[window]
        expected = algorithm.predict(*(each[None] for each in inputs))[0, -1]
        torch.testing.assert_close(actions[t], expected)


def test_rows_of_a_call_are_at_any_step_of_their_episodes():
    algorithm = make(target_return=2.5)
    torch.manual_seed(1)
    observations, rewards = torch.randn(3, 8, OBSERVATION_DIM), torch.rand(3, 8)
    expected = [play(algorithm, *each)[0] for each in zip(observations, rewards, strict=True)]
    memories: list[Memory] = [{}, {}, {}]
    for step in range(-6, 8):  # episode i begins 3 i steps after the first
        rows = [i for i in range(3) if 0 <= step + 6 - 3 * i < 8]
        places = [step + 6 - 3 * i for i in rows]
        actions = algorithm.act(observations[rows, places], memories=[memories[i] for i in rows])
        for i, place, action in zip(rows, places, actions, strict=True):
            torch.testing.assert_close(action, expected[i][place])
            memories[i]["reward"] = float(rewards[i, place])
    assert torch.equal(algorithm.act(observations[:, 0]), algorithm.act(observations[:, 0], memories=[{}, {}, {}]))


def test_the_return_reached_is_the_one_asked_for(tmp_path: Path):
    """Four episodes with the returns 0 to 3, whose action depends on the return-to-go alone."""
    data = D4RLDataModule.from_arrays(
        clicks([[1.0] * k + [0.0] * (4 - k) for k in range(4)]), batch_size=32, steps_per_epoch=150
    )
    torch.manual_seed(0)
    algorithm = DecisionTransformer(
        *(1, 1),
        **{"context": 4, "embedding_dim": 16, "layers": 1, "dropout": 0.0, "reward_scale": 1.0},
        **{"learning_rate": 1e-2, "warmup": 10, "max_episode_steps": 4},
    )
    trainer = fit(algorithm, data, 150, tmp_path)
    loader = data.train_dataloader()
    loader.segment_length = 4
    assert algorithm.policy_loss(next(next(iter(loader)).updates())).item() < 0.01
    evaluation = RolloutEvaluation()
    with Rollouts(Clicker, 3) as rollouts:
        evaluation._rollouts = rollouts
        for target in (0, 1, 2, 3, None):
            algorithm.target_return = target
            episodes = evaluation.play(algorithm, ["policy"], 4, trainer)["policy"]
            assert [each.episode_return for each in episodes] == [3 if target is None else target] * 4


def test_a_forgotten_reward_is_asked_for():
    memories: list[Memory] = [{}]
    algorithm = make()
    algorithm.act(torch.randn(1, OBSERVATION_DIM), memories=memories)
    with pytest.raises(UserError, match=r"set memory\['reward'\]"):
        algorithm.act(torch.randn(1, OBSERVATION_DIM), memories=memories)
