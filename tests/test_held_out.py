"""Held-out episodes: training does not see them, and looking at them changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_contract import ALGORITHMS, batch, make
from tiny import state, words

from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.cli import main
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import Episodes
from lit_offrl.errors import UserError

EPISODES, LENGTH = 10, 6


def arrays() -> dict[str, np.ndarray]:
    some, n = np.random.default_rng(0), EPISODES * LENGTH
    observations = some.normal(size=(EPISODES, LENGTH + 1, 3)) + np.arange(EPISODES)[:, None, None]
    return {
        "observations": observations[:, :-1].reshape(n, 3),
        "next_observations": observations[:, 1:].reshape(n, 3),
        "actions": some.uniform(-1, 1, (n, 2)),
        "rewards": some.normal(size=n),
        "terminals": np.arange(n) % LENGTH == LENGTH - 1,
        "timeouts": np.zeros(n, bool),
    }


def test_whole_episodes_are_held_out():
    module = D4RLDataModule.from_arrays(arrays(), validation_fraction=0.3, normalize_observations=True)
    held_out = module.held_out
    assert held_out is not None
    by_episode = held_out.reshape(EPISODES, LENGTH)
    assert by_episode.any(1).sum() == by_episode.all(1).sum() == 3
    training, held = module.table()[0], module.table(held_out=True)[0]
    assert (len(training), len(held)) == (42, 18)
    torch.testing.assert_close(training[:, :3].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(training[:, :3].std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(held[:, 6 - 1], torch.from_numpy(arrays()["rewards"][held_out]).float())
    (only,) = module.val_dataloader()
    assert only.rows is None
    assert torch.equal(torch.cat([each.reshape(18, -1) for each in only[:5]], dim=1), held)


def test_the_split_does_not_depend_on_the_seed():
    masks = [D4RLDataModule.from_arrays(arrays(), validation_fraction=0.3, seed=seed).held_out for seed in (0, 1)]
    np.testing.assert_array_equal(*masks)


def test_something_must_be_left():
    with pytest.raises(UserError, match="validation_fraction"):
        D4RLDataModule.from_arrays(arrays(), validation_fraction=0.99).table()
    with pytest.raises(UserError, match="at least 0 and below 1"):
        D4RLDataModule.from_arrays(arrays(), validation_fraction=1.0)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_every_algorithm_has_losses_on_held_out_transitions(cls: type[OfflineAlgorithm]):
    algorithm = make(cls).eval()
    before = [p.clone() for p in algorithm.parameters()]
    with torch.inference_mode():
        losses = algorithm.validation_losses(batch(algorithm)._replace(rows=None))
    assert any(name.endswith("loss") for name in losses)
    for value in losses.values():
        assert value.shape == ()
        assert torch.isfinite(value)
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.parameters(), strict=True))


def test_looking_changes_nothing(tmp_path: Path):
    logged = []
    for every in (1, 3):
        root = tmp_path / f"every_{every}"
        extra = ("--data.validation_fraction=0.2", f"--trainer.check_val_every_n_epoch={every}")
        assert main(words(root, "EDA", *extra)) == 0
        (metrics,) = root.rglob("metrics.csv")
        with metrics.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val/behavior_loss"]]
        logged.append({row["step"]: row["val/behavior_loss"] for row in rows})
    one, other = (state(tmp_path / f"every_{every}") for every in (1, 3))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [*logged[0]] == ["10", "20", "30", "40", "50", "60"]
    assert logged[1] == {step: logged[0][step] for step in ("30", "60")}
    assert len({logged[0][step] for step in ("20", "30", "60")}) == 1, "the behavior model is done at step 20"


def test_the_best_episodes_alone_are_kept():
    returns = arrays()["rewards"].reshape(EPISODES, LENGTH).sum(1)
    module = D4RLDataModule.from_arrays(arrays(), best_episodes=0.35)  # three of ten
    rewards = module.table()[0][:, 5].reshape(-1, LENGTH)
    assert sorted(rewards.sum(1).tolist()) == pytest.approx(sorted(returns)[-3:], rel=1e-5)
    table = module.table()[0]
    episodes = Episodes.of(table[:, 5], module.episode_ends(), table[:, -1])
    assert episodes.last_rows.tolist() == [5] * 6 + [11] * 6 + [17] * 6
    one = D4RLDataModule.from_arrays(arrays(), best_episodes=0.01).table()[0]
    assert one[:, 5].sum().item() == pytest.approx(returns.max(), rel=1e-5)


def test_the_best_episodes_that_are_held_out_are_not_trained_on():
    both = D4RLDataModule.from_arrays(arrays(), best_episodes=0.5, validation_fraction=0.3)
    training, held = both.table()[0], both.table(held_out=True)[0]
    assert len(training) + len(held) == 5 * LENGTH
    assert not set(training[:, 5].tolist()) & set(held[:, 5].tolist())
    splits = [D4RLDataModule.from_arrays(arrays(), best_episodes=0.1, validation_fraction=f) for f in (0.1, 0.9)]
    with pytest.raises(UserError, match=r"data\.best_episodes: .* leaves none"):
        [split.table(held_out) for split in splits for held_out in (True, False)]
