"""Q-chunking: windows by hand, FQL as the case of one action, the optimum of a small process, chunks while acting."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_segments import arrays, fit  # which also registers Corridor-v0
from tiny import batch, nested, segments, words
from torch import Tensor, nn

from lit_offrl.algorithms import FQL, QC
from lit_offrl.algorithms.qc import as_long_transitions
from lit_offrl.batch import Batch
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.cli import main
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import BlockSampler

SIZES = {"hidden_dim": 16, "critic__hidden_dim": 16, "chunk_length": 3, "candidates": 4}


def make(observation_dim: int = 3, action_dim: int = 2, **options: object) -> QC:
    torch.manual_seed(5)
    algorithm = QC(observation_dim, action_dim, **nested({**SIZES, **options}))
    algorithm.configure_optimizers()
    return algorithm


class Linear(nn.Module):
    """Q networks of given offsets and one slope in the first action of a chunk."""

    def __init__(self, *offsets: float, slope: float = 0.0) -> None:
        super().__init__()
        self.offsets, self.slope = torch.tensor(offsets), slope

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return (self.offsets + self.slope * actions[..., :1]).movedim(-1, 0)


# ---------------------------------------------------------------- windows


def windows() -> Batch:
    """Return the windows of three steps at all rows of an episode of 3 steps and one of 4, which a time limit cuts."""
    data = D4RLDataModule.from_arrays(
        {
            "observations": np.arange(7, dtype=np.float32)[:, None],
            "next_observations": np.arange(7, dtype=np.float32)[:, None] + 1,
            "actions": np.arange(14, dtype=np.float32).reshape(7, 2) / 14,
            "rewards": np.ones(7, np.float32),
            "terminals": np.arange(7) == 2,
            "timeouts": np.arange(7) == 6,
        }
    )
    table, widths = data.table()
    sampler = BlockSampler(table, widths, 64, 1, 1, 1, episode_ends=data.episode_ends())
    sampler.segment_length = 3
    (block,) = sampler
    (drawn,) = block.updates()
    assert drawn.rows is not None
    rows = [drawn.rows.tolist().index(row) for row in range(7)]
    return Batch._make(None if each is None else each[rows] for each in drawn)


def test_windows_by_hand():
    seen = windows()
    long = as_long_transitions(seen, 0.5)
    assert long.mask is not None
    assert long.mask[:, 2].tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert long.mask[:, 1].tolist() == [1, 1, 0, 1, 1, 1, 0]
    whole = long.mask[:, 2] == 1
    assert long.rewards[whole].tolist() == [1.75] * 3
    assert long.observations[whole, 0].tolist() == [0, 3, 4]
    assert long.next_observations[whole, 0].tolist() == [3, 6, 7]
    assert long.terminals[whole].tolist() == [1, 0, 0]  # an end at the last step of the window is kept
    # the action that is played first comes first
    assert torch.equal(long.actions[3], seen.actions[3].reshape(6))
    assert torch.equal(long.actions[3, :2], seen.actions[3, 0])


def test_critic_loss_by_hand():
    algorithm = make(1, critic__discount=0.5)
    algorithm.critic, algorithm.target_critic = Linear(0.0, 1.0), Linear(2.0, 4.0)
    goals = [1.75, 1.75 + 0.125 * 3, 1.75 + 0.125 * 3]  # of the windows that are whole
    expected = sum(goal**2 + (goal - 1) ** 2 for goal in goals) / (2 * 7)  # cut windows still count as rows
    assert algorithm.critic_loss(windows())[0].item() == pytest.approx(expected)
    algorithm.aggregation = "min"
    goals = [1.75, 2.0, 2.0]
    expected = sum(goal**2 + (goal - 1) ** 2 for goal in goals) / (2 * 7)
    assert algorithm.critic_loss(windows())[0].item() == pytest.approx(expected)


def test_a_terminal_state_within_a_window_stops_bootstrapping():
    seen = windows()
    seen = Batch._make(None if each is None else each[3:4] for each in seen)
    algorithm = make(1, critic__discount=0.5)
    algorithm.critic, algorithm.target_critic = Linear(0.0), Linear(100.0)
    stopped = seen._replace(terminals=torch.tensor([[0.0, 1.0, 0.0]]))
    assert algorithm.critic_loss(stopped)[0].item() == pytest.approx(1.75**2)
    assert algorithm.critic_loss(seen)[0].item() == pytest.approx((1.75 + 12.5) ** 2)


class Zero(nn.Module):
    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_flow_loss_leaves_out_the_steps_beyond_the_end():
    algorithm = make(1)
    algorithm.behavior = Zero()
    seen, noise = windows(), torch.randn(7, 6)
    with algorithm.noise.replaying([noise, torch.rand(7)]):
        loss = algorithm.flow_loss(seen)[0]
    errors = (seen.actions - noise.view(7, 3, 2)).square()
    kept = [(0, 3), (1, 2), (2, 1), (3, 3), (4, 3), (5, 2), (6, 1)]  # rows and the steps left in their episodes
    assert loss.item() == pytest.approx(sum(errors[row, :steps].sum().item() for row, steps in kept) / (7 * 6))


def test_the_best_chunk_by_the_online_critic_is_valued_by_the_target_critic():
    algorithm = make(1, critic__discount=1.0)
    algorithm.critic, algorithm.target_critic = Linear(0.0, 2.0, slope=1.0), Linear(0.0, slope=-5.0)
    seen, noise = windows(), torch.randn(7, 4, 6)
    with algorithm.noise.replaying([noise]):
        loss = algorithm.critic_loss(seen)[0]
    long = as_long_transitions(seen, 1.0)
    chunks = algorithm.flow_chunks(long.next_observations[:, None], noise)
    goal = 3 + (1 - long.terminals) * -5 * chunks[..., 0].amax(1)
    q = long.actions[:, 0] + torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(loss, (seen.mask[:, 2] * (q - goal).square()).mean())


@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_chunks_of_one_action_are_fql(aggregation: str):
    """The same seeds, the same numbers: rows without a mask, and rows as segments of one step."""
    torch.manual_seed(0)
    options = {**SIZES, "aggregation": aggregation, "alpha": 7.0}
    plain = FQL(3, 2, **nested({k: v for k, v in options.items() if k not in ("chunk_length", "candidates")}))
    chunked = QC(3, 2, **nested({**options, "policy": "distilled", "chunk_length": 1}))
    chunked.load_state_dict(plain.state_dict())
    for algorithm in (plain, chunked):
        algorithm.configure_optimizers()
    for step in range(3):
        rows = batch(seed=step)
        assert plain.update(rows) == chunked.update(rows)
    for (name, one), two in zip(plain.state_dict().items(), chunked.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    observations = torch.randn(4, 3)
    one, two = (each.act(observations, torch.Generator().manual_seed(0)) for each in (plain, chunked))
    assert torch.equal(one, two)


def test_the_policy_learns_at_cut_windows_too():
    algorithm = make(policy="distilled")
    rows = segments(batch(), 3)
    cut = rows._replace(mask=torch.zeros(12, 3))
    for loss in (algorithm.critic_loss, algorithm.flow_loss):
        assert loss(cut)[0].item() == 0
    noise = torch.randn(12, 6)
    with algorithm.noise.replaying([noise, noise]):
        assert algorithm.policy_loss(cut)[0].item() == algorithm.policy_loss(rows)[0].item() != 0


# ---------------------------------------------------------------- the fixed point


class Chain:
    """Five states in a row; an action of -1 or 1 moves to a neighbor, and the state it reaches has the reward."""

    REWARDS = torch.tensor([0.3, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)

    @classmethod
    def step(cls, state: int, action: int) -> int:
        return min(max(state + action, 0), 4)


class TableQ(nn.Module):
    """One value for each state and chunk of two signs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))

    def forward(self, observations: Tensor, chunks: Tensor) -> Tensor:
        signs = (chunks > 0).long()
        return self.table[observations[..., 0].round().long(), 2 * signs[..., 0] + signs[..., 1]][None]


class Signs(nn.Module):
    """A field whose Euler steps end at the signs of the noise."""

    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        return (x.sign() - x) / (1 - time)[..., None]


def test_chunks_reach_the_optimum_of_a_deterministic_process():
    discount, rows = 0.9, []
    for state, chunk in product(range(5), product((-1, 1), repeat=2)):
        middle = Chain.step(state, chunk[0])
        end = Chain.step(middle, chunk[1])
        rows.append((state, chunk, middle, end))
    states, chunks, middles, ends = (torch.tensor(each, dtype=torch.float64) for each in zip(*rows, strict=True))
    steps = torch.stack([states, middles], 1)[..., None], torch.stack([middles, ends], 1)
    every = Batch(
        steps[0],
        chunks[..., None],
        Chain.REWARDS[steps[1].long()],
        steps[1][..., None],
        torch.zeros(20, 2, dtype=torch.float64),
        mask=torch.ones(20, 2, dtype=torch.float64),
    )
    algorithm = make(1, 1, chunk_length=2, candidates=64, critic__discount=discount)
    algorithm.critic = algorithm.target_critic = TableQ()
    algorithm.behavior = Signs()
    for _ in range(150):
        loss = algorithm.critic_loss(every)[0]
        (gradient,) = torch.autograd.grad(loss, [algorithm.critic.table])
        with torch.no_grad():
            algorithm.critic.table -= gradient * 20 / 2  # a step of regression to the goals, exactly
    values = torch.zeros(5, dtype=torch.float64)
    for _ in range(500):  # value iteration with single actions
        moves = torch.tensor([[Chain.step(state, action) for action in (-1, 1)] for state in range(5)])
        values = (Chain.REWARDS[moves] + discount * values[moves]).amax(1)
    torch.testing.assert_close(algorithm.critic.table.detach().amax(1), values, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- acting


class Clock(nn.Module):
    """A chunk of three actions that tell the time at its beginning, which is the observation, and their own number."""

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        return observations / 10 + torch.tensor([0.0, 0.01, 0.02])


def test_each_episode_plays_its_own_chunks():
    algorithm = make(1, 1, policy="distilled")
    algorithm.policy = Clock()
    lengths = {"first": [5, 4], "second": [2, 1, 3, 3]}
    memories = {name: {} for name in lengths}
    ages = dict.fromkeys(lengths, 0)
    for time in range(9):
        observations = torch.full((2, 1), float(time))
        actions = algorithm.act(observations, memories=[*memories.values()])[:, 0].tolist()
        for name, action in zip(lengths, actions, strict=True):
            number = ages[name] % 3
            assert action == pytest.approx((time - number) / 10 + number / 100, abs=1e-6), (name, time)
            ages[name] += 1
            if ages[name] == lengths[name][0]:  # the episode ends, and with it its memory
                lengths[name].pop(0)
                memories[name], ages[name] = {}, 0
    without = [algorithm.act(torch.full((1, 1), float(time))).item() for time in range(3)]
    assert without == pytest.approx([0.0, 0.1, 0.2])  # without memories every action begins a chunk


class Turns(nn.Module):
    """The chunk -1, 0, 1; its parameter has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0]).expand_as(noise) + 0 * self.parameter


def test_training_and_rollouts_of_several_episodes_at_once(tmp_path: Path):
    """Episodes of 1 to 9 steps in two environments: the return tells that each began with a chunk of its own."""
    algorithm = make(1, 1, policy="distilled")
    algorithm.policy = Turns()
    evaluation = RolloutEvaluation(final_episodes=9, num_envs=2, seed=0, max_episode_steps=20)
    data = D4RLDataModule.from_arrays(arrays(), environment="Corridor-v0", batch_size=8, steps_per_epoch=4)
    before = [each.clone() for each in algorithm.critic.parameters()]
    fit(algorithm, data, tmp_path, EMATargets(), evaluation)
    assert any(not torch.equal(a, b) for a, b in zip(before, algorithm.critic.parameters(), strict=True))
    lines = [line.split(",") for line in (tmp_path / "eval.csv").read_text().splitlines()]
    returns = {int(line[5]): float(line[4]) for line in lines if line[2] == "policy"}  # by length
    assert returns == {length: -1.0 if length % 3 else 0.0 for length in range(1, 10)}


def test_episodes_shorter_than_a_chunk_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(words(tmp_path / "runs", "QC", chunk_length=7)) == 2  # the episodes of the tiny data have 6 steps
    assert "model.init_args.chunk_length: 7 actions are more than the longest episode of the data has, 6" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
