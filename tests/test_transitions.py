import numpy as np
import pytest
import torch

from lit_offrl.batch import Batch
from lit_offrl.data.rewards import reward_rule
from lit_offrl.data.transitions import BlockSampler, Transitions
from lit_offrl.errors import UserError


def table(n: int = 6, **replaced: np.ndarray) -> Transitions:
    fields = {
        "observations": np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        "actions": np.zeros((n, 1), np.float32),
        "rewards": np.array([1, 2, 3, 4, 5, 6][:n], np.float32),
        "next_observations": np.arange(2 * n, dtype=np.float32).reshape(n, 2) + 2,
        "terminals": np.array([0, 0, 1, 0, 0, 0][:n], bool),
        "timeouts": np.array([0, 0, 0, 0, 1, 0][:n], bool),
    }
    return Transitions(**(fields | replaced))


def test_episodes_and_returns_by_hand():
    transitions = table()  # episodes: 3 steps to a terminal, 2 steps to a timeout, 1 step cut by the end of the data
    assert transitions.episode_starts.tolist() == [0, 3, 5]
    assert transitions.episode_returns().tolist() == [6, 9, 6]
    assert not transitions.timeouts[-1], "looking at the episodes must not change the table"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("observations", np.full((6, 2), np.nan, np.float32), "'observations' holds NaN"),
        (
            "rewards",
            np.array([1, 2, np.inf, 4, 5, 6], np.float32),
            "'rewards' holds NaN or infinity, first in transition 2",
        ),
        ("actions", np.zeros((5, 1), np.float32), r"'actions' has shape \(5, 1\)"),
        ("terminals", np.zeros((6, 1), bool), "'terminals' has shape"),
    ],
)
def test_broken_tables_are_refused(field: str, value: np.ndarray, words: str):
    with pytest.raises(UserError, match=words):
        table(**{field: value})


def test_empty_table_is_refused():
    with pytest.raises(UserError, match="no transitions"):
        table(0)


def rewards_by(rule: str) -> list[float]:
    return reward_rule(rule)(table()).tolist()


def test_reward_rules():
    """On rewards 1 to 6: episodes of returns 1 + 2 + 3, 4 + 5 and 6."""
    assert rewards_by("raw") == [1, 2, 3, 4, 5, 6]
    assert rewards_by("minus_one") == [0, 1, 2, 3, 4, 5]
    assert rewards_by("cql_antmaze") == [2, 6, 10, 14, 18, 22]
    assert rewards_by("times_100") == [100, 200, 300, 400, 500, 600]
    assert rewards_by("affine:5:-1") == [4, 9, 14, 19, 24, 29]
    mixed = table(rewards=np.array([-3, 0, -1, 0, 0, 2], np.float32))
    assert reward_rule("sparse")(mixed).tolist() == [-1, 0, -1, 0, 0, -1]
    returns = table().episode_returns()
    assert np.ptp(returns) == 3
    assert rewards_by("return_range") == pytest.approx([r * 1000 / 3 for r in range(1, 7)])
    assert rewards_by("standardize") == pytest.approx([(r - 3.5) / (35 / 12) ** 0.5 for r in range(1, 7)])


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("minus-one", "did you mean 'minus_one'"),
        ("affine:5", "not affine:SCALE:BIAS"),
        ("affine:a:b", "not affine:SCALE:BIAS"),
        ("raw:1", "no rule 'raw:1'"),
    ],
)
def test_reward_rules_that_do_not_exist(rule: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        reward_rule(rule)


@pytest.mark.parametrize("rule", ["return_range", "standardize"])
def test_reward_rules_that_divide_by_nothing(rule: str):
    with pytest.raises(UserError, match="but all are 0"):
        reward_rule(rule)(table(rewards=np.zeros(6, np.float32)))


def sampler(block_size: int = 4, max_steps: int = -1, seed: int = 0, epoch: int = 10) -> BlockSampler:
    rows = torch.arange(50.0)[:, None]
    fields = torch.cat([rows, rows + 100, rows + 200, rows + 300, rows + 400], dim=1)
    return BlockSampler(fields, (1, 1, 1, 1, 1), 3, block_size, epoch, max_steps, seed)


def rewards_of(blocks: list[Batch]) -> torch.Tensor:
    return torch.cat([block.rewards for block in blocks])


def test_blocks_hold_whole_transitions():
    block = next(iter(sampler()))
    assert block.observations.shape == (4, 3, 1)
    assert block.rewards.shape == block.terminals.shape == (4, 3)
    rows = block.observations[..., 0]
    for offset, field in ((100, block.actions[..., 0]), (200, block.rewards), (300, block.next_observations[..., 0])):
        assert torch.equal(field, rows + offset)
    assert torch.equal(block.terminals, rows + 400)
    assert torch.equal(block.rows, rows.long())
    first = next(block.updates())
    assert torch.equal(first.rows, block.rows[0])
    assert [len(field) for field in first.head(2)[:6]] == [2] * 6
    assert first.head(2).mask is None


def test_an_epoch_has_exactly_its_steps_whatever_the_block_size():
    for block_size in (1, 3, 4, 10, 64):
        source = sampler(block_size)
        for _ in range(3):
            expected_blocks = len(source)
            blocks = list(source)
            assert len(blocks) == expected_blocks
            assert len(rewards_of(blocks)) == 10


def test_the_stream_of_minibatches_does_not_depend_on_the_block_size():
    first, second = sampler(3), sampler(7)
    assert torch.equal(rewards_of([*first, *first]), rewards_of([*second, *second]))


def test_max_steps_ends_the_last_epoch():
    source = sampler(4, max_steps=13)
    assert len(rewards_of(list(source))) == 10
    assert len(source) == 1
    assert len(rewards_of(list(source))) == 3
    assert list(source) == []


def test_saved_state_continues_in_the_middle_of_an_epoch():
    whole = sampler()
    expected = rewards_of([*whole, *whole])
    stopped = sampler()
    blocks = iter(stopped)
    head = [next(blocks), next(blocks)]
    resumed = sampler(seed=99)
    resumed.load_state_dict(stopped.state_dict())
    assert len(resumed) == 3
    tail = [*resumed]
    assert torch.equal(rewards_of([*head, *tail, *resumed]), expected)


def test_sampling_is_uniform():
    source = sampler(100, epoch=20_000)
    counts = torch.bincount(torch.cat([b.observations.flatten() for b in source]).long(), minlength=50)
    # 60,000 draws over 50 rows: mean 1200, standard deviation 34; five of these for the worst of 50 rows
    assert (counts - 1200).abs().max() < 5 * 34
