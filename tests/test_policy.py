"""Acting with a checkpoint alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import nested, tiny_options

import lit_offrl
from lit_offrl.algorithms import ALGORITHMS, OfflineAlgorithm
from lit_offrl.errors import UserError
from lit_offrl.policy import Policy

OBSERVATIONS = np.random.default_rng(0).normal(size=(5, 3))


def trained(name: str) -> OfflineAlgorithm:
    """Return a small algorithm at the end of its training, whose data have units of their own."""
    torch.manual_seed(0)
    algorithm = ALGORITHMS[name](3, 2, seed=4, **nested(tiny_options(name)))
    algorithm.units.observation_mean.fill_(2.0)
    algorithm.units.action_center.copy_(torch.tensor([1.0, -2.0]))
    algorithm.units.action_scale.fill_(3.0)
    algorithm.gradient_step = 10**6
    algorithm.trained_on = {"id": "log", "sha256": "ab" * 32}
    return algorithm


def save(algorithm: OfflineAlgorithm, path: Path) -> Path:
    checkpoint = {"state_dict": algorithm.state_dict(), "hyper_parameters": dict(algorithm.hparams)}
    algorithm.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_checkpoint_acts_in_the_environments_units(name: str, tmp_path: Path):
    algorithm = trained(name).eval()
    policy = lit_offrl.load_policy(save(algorithm, tmp_path / "last.ckpt"), seed=3)
    actions = policy.act(OBSERVATIONS)
    assert actions.dtype == np.float32
    assert actions.shape == (5, 2)
    expected = algorithm.act(torch.from_numpy(OBSERVATIONS).float(), torch.Generator().manual_seed(3))
    assert np.array_equal(actions, expected.numpy())
    assert (policy.spec.action_low <= actions).all()
    assert (actions <= policy.spec.action_high).all()
    policy.reset(seed=3)
    as_tensor = policy.act(torch.from_numpy(OBSERVATIONS))
    assert isinstance(as_tensor, torch.Tensor)
    assert np.array_equal(actions, as_tensor.numpy())
    policy.reset(seed=3)
    assert policy.act(OBSERVATIONS[0]).shape == (2,)


def test_the_specification_says_what_a_policy_takes_and_gives(tmp_path: Path):
    spec = lit_offrl.load_policy(save(trained("DTQL"), tmp_path / "last.ckpt"), "behavior").spec
    assert (spec.algorithm, spec.actor, spec.observation_dim, spec.action_dim) == ("DTQL", "behavior", 3, 2)
    assert spec.action_low.tolist() == [-2, -5]
    assert spec.action_high.tolist() == [4, 1]
    assert (spec.dataset, spec.dataset_sha256, spec.gradient_steps) == ("log", "ab" * 32, 10**6)


def test_noise_is_the_policys_own(tmp_path: Path):
    path = save(trained("DTQL"), tmp_path / "last.ckpt")
    state = torch.get_rng_state()
    first, second, other = (lit_offrl.load_policy(path, seed=seed).act(OBSERVATIONS) for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    policy = lit_offrl.load_policy(path)
    assert not np.array_equal(policy.act(OBSERVATIONS), policy.act(OBSERVATIONS))
    assert torch.equal(state, torch.get_rng_state())


def test_a_memory_lasts_for_an_episode():
    policy = Policy(trained("QC"))
    chunk = [policy.act(OBSERVATIONS[0]) for _ in range(3)]  # the chunk goes on, whatever noise comes
    policy.reset(seed=0)
    assert np.array_equal(policy.act(OBSERVATIONS[0]), chunk[0])
    assert np.array_equal(policy.act(OBSERVATIONS[1]), chunk[1])
    with pytest.raises(UserError, match="observations: must be 1 rows, as many as episodes"):
        policy.act(OBSERVATIONS)


def test_the_decision_transformer_takes_rewards():
    acted = []
    for reward in (0.0, 1000.0):
        policy = Policy(trained("DecisionTransformer"))
        policy.act(OBSERVATIONS)
        acted.append(policy.act(OBSERVATIONS, reward))
    assert not np.array_equal(*acted)


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path):
    path = save(trained("DTQL"), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"actor: DTQL has no behaviour \(did you mean 'behavior'"):
        lit_offrl.load_policy(path, "behaviour")
    policy = lit_offrl.load_policy(path)
    for wrong in (OBSERVATIONS[:, :2], OBSERVATIONS[None], np.float32(1)):
        with pytest.raises(UserError, match=r"observations: must be of shape \[3\] or \[n, 3\], not"):
            policy.act(wrong)
    with pytest.raises(UserError, match="observations: must be finite"):
        policy.act(np.full(3, np.nan))


def test_neither_environments_nor_data_are_imported(tmp_path: Path):
    path = save(trained("IQL"), tmp_path / "last.ckpt")
    code = (
        f"import sys, numpy, lit_offrl; lit_offrl.load_policy({str(path)!r}).act(numpy.zeros(3)); "
        "print([name for name in ('gymnasium', 'minari', 'mujoco') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
