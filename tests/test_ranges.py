"""Ranges of options: what is refused, by which name, and that nothing is built before."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny import TINY, nested, tiny_options

import lit_offrl.algorithms.base
from lit_offrl import algorithms
from lit_offrl.algorithms import BDPO, DTQL, EDA, QGPO, OfflineAlgorithm
from lit_offrl.algorithms.checkpoints import load_algorithm
from lit_offrl.algorithms.options import Acting, ImplicitQ
from lit_offrl.callbacks.checkpoint import RunCheckpoint
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.errors import UserError
from lit_offrl.ranges import Range, flat, plain

ALGORITHMS = [*algorithms.ALGORITHMS.values()]


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.01, float("nan"), float("inf"))),
        (Range(0, 1, without_low=True, without_high=True), (0.5, 1e-300), (0, 1)),
        (Range(1), (1, 10**12), (0, 0.999, float("inf"))),
        (Range(), (-1e300, 0), (float("-inf"), float("nan"))),
    ],
)
def test_ends_of_ranges(interval: Range, inside: tuple[float, ...], outside: tuple[float, ...]):
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DTQL, {"alpha": -1.0}, "model.init_args.alpha: must be at least 0, not -1.0"),
        (DTQL, {"alpha": float("nan")}, "model.init_args.alpha: must be at least 0, not nan"),
        (DTQL, {"hidden_dim": 0}, "model.init_args.hidden_dim: must be at least 1 and at most 65536, not 0"),
        (DTQL, {"hidden_dim": 10**12}, "model.init_args.hidden_dim"),
        (DTQL, {"critic.expectile": 1.0}, "model.init_args.critic.expectile: must be above 0 and below 1, not 1.0"),
        (DTQL, {"critic.target_rate": 5.0}, "model.init_args.critic.target_rate: must be above 0 and at most 1"),
        (DTQL, {"learning_rate": 0.0}, "model.init_args.learning_rate: must be above 0"),
        (DTQL, {"acting.candidates": 0}, "model.init_args.acting.candidates: must be at least 1"),
        (DTQL, {"critic.expectil": 0.7}, "no option 'model.init_args.critic.expectil' .did you mean 'expectile'"),
        (DTQL, {"seed": -1}, "model.init_args.seed: must be at least 0 and at most 4294967295"),
        (BDPO, {"eta": -0.1}, "model.init_args.eta"),
        (BDPO, {"clip": -1.0}, "model.init_args.clip: must be above 0"),
        (BDPO, {"critic.members": 1}, "model.init_args.critic.members: must be at least 2"),
        (EDA, {"loss": "values"}, "model.init_args.loss: must be one of value, preference, dpo, not values"),
        (EDA, {"loss": "dpo"}, "model.init_args.candidates_per_state: must be 2 where loss is dpo"),
        (QGPO, {"sweep": [1.0, -1.0]}, "model.init_args.sweep: must be at least 0, not -1.0"),
        (QGPO, {"diffusion.hidden_dim": 18}, "model.init_args.diffusion.hidden_dim: must be a multiple of 4"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(cls: type[OfflineAlgorithm], options: Any, message: str):
    with pytest.raises(UserError, match=message):
        cls(3, 2, **nested(options))


def test_callbacks_and_null():
    with pytest.raises(UserError, match=r"evaluation\.num_envs: must be at least 1"):
        RolloutEvaluation(num_envs=0)
    with pytest.raises(UserError, match=r"checkpoint\.keep_every_n_epochs: must be at least 0"):
        RunCheckpoint(keep_every_n_epochs=-1)
    assert BDPO(3, 2, **nested({**TINY["BDPO"], "clip": None})).clip is None


def numbers(hints: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the annotations of all options that are numbers, those of groups included."""
    found: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            found |= numbers(get_type_hints(hint, include_extras=True), f"{prefix}{name}.")
        elif "float" in str(hint) or "int" in str(hint):
            found[prefix + name] = hint
    return found


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_every_number_has_a_range(cls: type[OfflineAlgorithm]):
    """The widths are the dataset's; a flag and a literal have no range."""
    hints = {name: hint for base in cls.__mro__[:-1] for name, hint in constructor_hints(base).items()}
    for name, hint in numbers(hints).items():
        if name not in ("observation_dim", "action_dim"):
            assert "Range(" in str(hint) or "Literal" in str(hint), name


def constructor_hints(cls: type) -> dict[str, Any]:
    own = vars(cls).get("__init__")
    if own is None or not cls.__module__.startswith("lit_offrl.algorithms") or cls.__name__ == "TrainingModule":
        return {}
    hints = get_type_hints(inspect.unwrap(own), include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and hint is not Any}


def test_groups_are_dataclasses_or_dictionaries_and_are_stored_as_plain_values():
    one = DTQL(3, 2, critic=ImplicitQ(expectile=0.9, hidden_dim=8), acting=Acting(2), hidden_dim=8)
    two = DTQL(3, 2, critic={"expectile": 0.9, "hidden_dim": 8}, acting={"candidates": 2}, hidden_dim=8)  # type: ignore[arg-type]
    assert one.critic_options == two.critic_options
    assert one.hparams == two.hparams
    assert one.hparams["critic"]["expectile"] == 0.9
    assert flat(plain(one.hparams))["acting.candidates"] == 2


@pytest.mark.parametrize("name", ["DTQLKL", "BDPOGaussian"])
def test_a_subclass_stores_its_own_arguments_and_those_that_it_passes_on(name: str):
    algorithm = getattr(algorithms, name)(3, 2, seed=7, **nested(tiny_options(name)))
    assert algorithm.hparams["seed"] == 7
    assert algorithm.hparams["hidden_dim"] == 16
    assert not {"nll_weight", "diffusion_steps", "clip", "options", "common"} & set(algorithm.hparams)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_a_policy_is_loaded_from_its_checkpoint_alone(cls: type[OfflineAlgorithm], tmp_path: Path):
    torch.manual_seed(0)
    algorithm = cls(3, 2, seed=4, **nested(tiny_options(cls.__name__)))
    algorithm.units.observation_mean.fill_(2.0)
    algorithm.units.action_scale.fill_(3.0)
    algorithm.gradient_step = 10**6
    checkpoint = {"state_dict": algorithm.state_dict(), "hyper_parameters": dict(algorithm.hparams)}
    algorithm.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    policy = load_algorithm(tmp_path / "last.ckpt")
    assert type(policy) is cls
    observations = torch.randn(5, 3)
    one, two = (each.act(observations, torch.Generator().manual_seed(1)) for each in (algorithm, policy))
    assert torch.equal(one, two)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="load_policy: no checkpoint at"):
        load_algorithm(tmp_path / "nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match="is broken"):
        load_algorithm(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="is not a checkpoint of this package"):
        load_algorithm(tmp_path / "other.ckpt")


def test_the_contract_is_short():
    """What an author of an algorithm reads."""
    assert len(Path(lit_offrl.algorithms.base.__file__).read_text().splitlines()) <= 250


def test_annotated_types_are_what_a_parser_sees():
    hint = get_type_hints(ImplicitQ, include_extras=True)["expectile"]
    assert get_args(hint)[0] is float
