"""Fitted Q evaluation: closed forms, intervals, divergence, and `evaluate` from a run folder to fqe.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import failure
from test_policy import save, trained
from tiny import words

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.batch import Batch
from lit_offrl.cli import main
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.evaluate.evaluation import discounted_returns, evaluate_policy
from lit_offrl.evaluate.fqe import FQE, FQEOptions
from lit_offrl.evaluate.intervals import interval_of_mean
from lit_offrl.evaluate.result import FQEResult
from lit_offrl.policy import Policy
from lit_offrl.run_folder import RunFolder

ONE = np.ones(1, np.float32)


def transitions(observations: Any, actions: Any, rewards: Any, next_observations: Any, terminals: Any) -> Transitions:
    """Return transitions of which each is an episode, that was cut where it is not terminal."""
    arrays = (np.asarray(each, np.float32) for each in (observations, actions, rewards, next_observations))
    terminals = np.asarray(terminals, bool)
    return Transitions(*arrays, terminals, ~terminals)


def every_tenth(n: int) -> np.ndarray:
    return np.arange(n) % 10 == 0


# ---------------------------------------------------------------- closed forms


def test_a_linear_system_with_quadratic_costs():
    """s' = 0.9 s + 0.5 a, r = -s^2 - 0.1 a^2 and a = -0.6 s have the value -p s^2, p = 1.036 / (1 - 0.95 * 0.36)."""
    rng, n = np.random.default_rng(0), 4000
    s = rng.uniform(-1.5, 1.5, (n, 1))
    a = -0.6 * s + rng.uniform(-0.6, 0.6, (n, 1))  # of which no step leads out of the data
    rewards = -(s**2) - 0.1 * a**2
    logged = transitions(s, a, rewards[:, 0], 0.9 * s + 0.5 * a, np.zeros(n))
    options = FQEOptions(1500, 0.95, batch_size=64, learning_rate=3e-3, hidden_dims=(64, 64), copy_every=20)
    result = evaluate_policy(lambda seen: -0.6 * seen, logged, every_tenth(n), (-1.5 * ONE, 1.5 * ONE), options)
    p = 1.036 / (1 - 0.95 * 0.36)
    true = -p * np.square(s[every_tenth(n)]).mean()
    # A small network after so few steps is within 6% on four seeds; cuts taken for terminal states would give 35% less.
    assert result.last.value == pytest.approx(true, rel=0.1)
    assert result.interval is not None
    low, high = result.interval
    assert low < -p * 1.5**2 / 3 < high, "the mean over all first states, of which some are held out"
    assert (result.held_out_episodes, result.fitted_transitions) == (400, 3600)
    assert not result.diverged
    assert result.action_distance == pytest.approx(np.sqrt(np.square((-0.6 * s - a)[every_tenth(n)] / 1.5).mean()))


# Of the chain of three states: (state, action) -> (next state, reward); action 1 of state 2 ends the episode.
CHAIN = {(0, 0): (1, 0), (0, 1): (2, 0), (1, 0): (0, 1), (1, 1): (2, 0), (2, 0): (1, 0), (2, 1): (0, 0.5)}


def chain_value(first_action: tuple[float, ...], ends: bool = True, steps: int = 1500) -> float:
    """Return the value at state 0 of a policy that takes action 0 in each state with some probability."""
    rows = [(*pair, *then) for pair, then in CHAIN.items()]
    # 100 of each pair; those of a further tenth, which is held out, begin in state 0.
    s, a, s_next, rewards = (np.repeat([*each, each[0]], 100) for each in zip(*rows, strict=True))
    one_hot, terminals = np.eye(3), (s == 2) & (a == 1) & ends
    logged = transitions(one_hot[s], 2.0 * a[:, None] - 1, rewards, one_hot[s_next], terminals)
    visits = np.zeros(3)

    def act(observations: np.ndarray) -> np.ndarray:
        """Take action 0 at every second visit where its probability is 1/2, and so on."""
        actions = np.ones((len(observations), 1), np.float32)
        for row, state in enumerate(observations.argmax(1)):
            if visits[state] * first_action[state] % 1 + first_action[state] >= 1:
                actions[row] = -1
            visits[state] += 1
        return actions

    options = FQEOptions(steps, 0.9, batch_size=64, learning_rate=3e-3, hidden_dims=(32,), copy_every=25)
    held_out = np.arange(len(s)) >= 100 * len(rows)
    return evaluate_policy(act, logged, held_out, (-ONE, ONE), options).last.value


def test_a_stochastic_policy_on_a_chain():
    assert chain_value((0.5, 1, 0.25)) == pytest.approx(1.42893, abs=0.1)


@pytest.mark.slow
def test_policies_on_a_chain_are_ranked_by_their_exact_values():
    assert chain_value((0.5, 1, 0.25), ends=False, steps=6000) == pytest.approx(3.59775, abs=0.03)
    for first_action, value in {(1, 1, 0): 4.736842, (0, 1, 0): 0.45, (1, 0, 0): 0.405, (0, 0, 1): 0.0}.items():
        assert chain_value(first_action, steps=6000) == pytest.approx(value, abs=0.02), first_action


def test_a_linear_q_ends_at_the_fixed_point_of_least_squares():
    """theta = A^-1 b with A = sum phi (phi - discount (1 - d) phi')^T and b = sum phi r (LSTD-Q)."""
    generator = torch.Generator().manual_seed(0)
    n, discount = 500, 0.8
    s, a, s_next, noise = (torch.randn(n, width, generator=generator) for width in (2, 1, 2, 1))
    s_next = 0.7 * s + 0.3 * s_next
    rewards, terminals = s[:, 0] - 2 * a[:, 0] + 0.1 * noise[:, 0], (torch.rand(n, generator=generator) < 0.2).float()
    next_actions = torch.stack([0.5 * s_next[:, :1], -0.1 * s_next[:, 1:]], dim=1)
    options = FQEOptions(1200, discount, batch_size=250, learning_rate=1e-2, hidden_dims=(), copy_every=25)
    fqe = FQE(Batch(s, a, rewards, s_next, terminals), next_actions, options)
    *_, (last, _) = fqe.fit(reports=7)
    assert last == 1200
    ones = torch.ones(n, 1)
    phi, phi_next = torch.cat([s, a, ones], 1), torch.cat([s_next, next_actions.mean(1), ones], 1)
    theta = torch.linalg.solve(phi.T @ (phi - discount * (1 - terminals)[:, None] * phi_next), phi.T @ rewards)
    linear = fqe.q.members[0][0]
    found = torch.cat([linear.weight[0], linear.bias])
    torch.testing.assert_close(found, theta, atol=0.05, rtol=0)  # Adam on minibatches of half of the data
    residual = phi @ theta - rewards - discount * (1 - terminals) * (phi_next @ theta)
    errors = fqe.td_errors(fqe.data, next_actions)
    torch.testing.assert_close(errors.square().mean(), residual.square().mean(), atol=0.02, rtol=0)


CONSTANT = FQEOptions(600, 0.9, batch_size=8, learning_rate=1e-2, hidden_dims=(4,), copy_every=10)


@pytest.mark.parametrize(("terminal", "value"), [(True, -3.0), (False, -30.0)])
def test_a_constant_reward_reaches_the_largest_possible_value(terminal: bool, value: float):
    n = 20
    same = np.zeros((n, 1))
    logged = transitions(same, same, np.full(n, -3.0), same, np.full(n, terminal))
    result = evaluate_policy(lambda seen: 0 * seen, logged, every_tenth(n), (-ONE, ONE), CONSTANT)
    assert result.last.value == pytest.approx(value, rel=0.01)
    assert result.largest_possible == pytest.approx(30)
    assert not result.diverged
    assert result.data_value == pytest.approx(-3)
    assert result.interval == pytest.approx((result.last.value,) * 2)


def test_divergence_is_noticed():
    """Where all steps lead out of the data, each target is larger than the last (Tsitsiklis and Van Roy, 1997)."""
    s = np.tile([[1.0], [2.0]], (20, 1))
    logged = transitions(s, 0 * s, s[:, 0], 3 * s, np.zeros(40))

    def fit(learning_rate: float) -> FQEResult:
        options = FQEOptions(300, 0.9, batch_size=8, learning_rate=learning_rate, hidden_dims=(), copy_every=10)
        return evaluate_policy(lambda seen: 0 * seen, logged, every_tenth(40), (-ONE, ONE), options)

    result = fit(0.1)
    assert result.diverged
    assert result.last.largest_q > 1.1 * result.largest_possible == pytest.approx(22)
    with pytest.raises(RunFailure, match="diverged before step 30"):
        fit(1e38)


# ---------------------------------------------------------------- intervals and returns


def test_intervals_of_a_mean():
    assert interval_of_mean(np.array([0.0, 1.0])) == (0.0, 1.0)  # 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert interval_of_mean(np.array([5.0])) is None
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    # 10,000 resamples place a 2.5% quantile to about 3% of the half-width
    assert interval_of_mean(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_discounted_returns_end_with_their_episode():
    terminals, timeouts = np.array([0, 0, 1, 0, 0], bool), np.array([0, 0, 0, 1, 0], bool)
    column = np.zeros((5, 1), np.float32)
    logged = Transitions(column, column, np.array([1, 2, 4, 8, 16], np.float32), column, terminals, timeouts)
    assert discounted_returns(logged, 0.5).tolist() == [1 + 1 + 1, 2 + 2, 4, 8, 16]


# ---------------------------------------------------------------- policies and the command


@pytest.mark.parametrize("name", sorted(name for name, cls in ALGORITHMS.items() if not cls.has_memory))
def test_every_policy_has_a_value_that_its_seed_repeats(name: str):
    logged, held_out = D4RLDataModule.from_arrays(arrays()).transitions, np.arange(60) < 12
    algorithm = trained(name)

    def value(seed: int) -> FQEResult:
        policy = Policy(algorithm, seed=seed)
        options = FQEOptions(4, 0.9, samples=2, seed=seed, hidden_dims=(8,))
        return evaluate_policy(policy.act, logged, held_out, (policy.spec.action_low, policy.spec.action_high), options)

    first, again, other = value(0), value(0), value(1)
    assert first.curve == again.curve
    assert first.interval == again.interval
    assert first.last.value != other.last.value
    assert (first.fitted_episodes, first.held_out_episodes) == (8, 2)


def arrays(episodes: int = 10, length: int = 6) -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(0), episodes * length
    states = rng.normal(size=(episodes, length + 1, 3))
    return {
        "observations": states[:, :-1].reshape(n, 3),
        "next_observations": states[:, 1:].reshape(n, 3),
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.normal(size=n),
        "terminals": np.arange(n) % length == length - 1,
        "timeouts": np.zeros(n, bool),
    }


def test_the_command_evaluates_on_the_episodes_that_the_run_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(words(tmp_path / "runs", "DTQL", "--data.validation_fraction=0.3")) == 0
    (last,) = (tmp_path / "runs").rglob("last.ckpt")
    folder = last.parent.parent
    command = ["evaluate", "--ckpt_path", str(last), "--steps", "40"]
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"DTQL (policy) at gradient step 60 on {tmp_path / 'data.npz'}" in out
    assert "fits Q on 42 of 60 transitions; held-out episodes: 0.3 of all, those that the policy's training held" in out
    assert f"wrote {folder / 'fqe.json'}" in out
    result = json.loads((folder / "fqe.json").read_text())
    assert (result["held_out_episodes"], result["held_out_transitions"], result["fitted_episodes"]) == (3, 18, 7)
    module = D4RLDataModule(str(tmp_path / "data.npz"), validation_fraction=0.3)
    held_out = module.held_out
    assert held_out is not None
    returns = discounted_returns(module.transitions, 0.99)[module.transitions.episode_starts]
    assert result["data_value"] == pytest.approx(returns[held_out.reshape(10, 6)[:, 0]].mean())
    assert result["value"] == result["curve"][-1]["value"]
    assert result["curve"][-1]["step"] == 40
    assert f"value {result['value']:.4g} [{result['interval'][0]:.4g}, {result['interval'][1]:.4g}]" in out
    (_,) = (folder / "fqe").glob("events.out.tfevents.*")

    def value(*options: str) -> float:
        assert main([*command, *options, "--output", str(tmp_path / "other.json")]) == 0
        return float(json.loads((tmp_path / "other.json").read_text())["value"])

    assert value() == result["value"]
    assert value("--actor", "behavior") != result["value"]
    assert json.loads((folder / "fqe.json").read_text()) == result, "it went elsewhere"
    (_,) = (folder / "fqe").glob("events.out.tfevents.*")

    np.savez(tmp_path / "more.npz", **arrays(episodes=20))
    capsys.readouterr()
    value("--data.dataset", str(tmp_path / "more.npz"))
    assert "108 of 120 transitions; held-out episodes: 0.1 of all, of other data" in capsys.readouterr().out

    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("validation_fraction: 0.3", "validation_fraction: 0.0"))
    value()
    assert "0.1 of all; the policy was trained on them, so the value may be optimistic" in capsys.readouterr().out
    RunFolder(folder).clear()
    assert not [*folder.rglob("fqe.json"), *folder.rglob("events*")], "a new run begins without an old value"


def test_bad_input_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "checkpoints").mkdir()
    last = save(trained("BC"), tmp_path / "checkpoints" / "last.ckpt")
    np.savez(tmp_path / "one.npz", **arrays(episodes=1))
    np.savez(tmp_path / "narrow.npz", **{**arrays(), "actions": np.zeros((60, 1))})

    def complaint(*options: str) -> str:
        return failure(capsys, ["evaluate", f"--ckpt_path={last}", *options])

    assert "no config.yaml beside" in complaint()
    assert "--steps: must be at least 1, not 0" in complaint("--steps=0")
    assert "--discount: must be at least 0 and below 1, not 1.0" in complaint("--discount=1")
    assert "--samples: must be at least 1" in complaint("--samples=0")
    assert "invalid choice: 'wis'" in complaint("--method=wis")
    assert "BC has no behavior" in complaint("--actor=behavior")
    assert "has 1 episode" in complaint(f"--data.dataset={tmp_path / 'one.npz'}")
    assert "has 3 observations and 1 actions, the policy" in complaint(f"--data.dataset={tmp_path / 'narrow.npz'}")
    data = f"--data.dataset={tmp_path / 'narrow.npz'}"
    assert "no folder" in complaint(data, f"--output={tmp_path / 'nowhere' / 'fqe.json'}")
    assert "does not lie in a run folder" in failure(capsys, ["evaluate", f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    for name in ("QC", "DecisionTransformer"):
        save(trained(name), last)
        assert f"{name} acts by what happened earlier in the episode" in complaint()
    assert not [*tmp_path.rglob("fqe*")]


def test_whole_episodes_must_remain_on_both_sides():
    logged = D4RLDataModule.from_arrays(arrays()).transitions
    for held_out in (np.zeros(60, bool), np.ones(60, bool)):
        with pytest.raises(UserError, match="needs at least 2, one to fit on"):
            evaluate_policy(lambda seen: seen[:, :2], logged, held_out, (-ONE, ONE), CONSTANT)
