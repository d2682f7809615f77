"""The training contract, checked on every algorithm that the package exports."""

from __future__ import annotations

import inspect

import lightning
import pytest
import torch
from tiny import nested, segments, tiny_options

from lit_offrl import algorithms
from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.algorithms.base import Phase
from lit_offrl.batch import Batch
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.evaluation import best_of_behavior
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import UserError

ALGORITHMS = [*algorithms.ALGORITHMS.values()]
OBSERVATION_DIM, ACTION_DIM, BATCH_SIZE = 5, 3, 16
# With these options a single update of the main phase moves every network.
EVERY_STEP = {"policy_every": 1}
TARGET_ACTOR = {"ema_after": 0}
NO_STAGES = {"critic.steps": 0, "critic.batch_size": 256}
OPTIONS: dict[str, dict[str, int]] = {
    **{name: {"warmup_steps": 0, "actor_every": 1} for name in ("BDPO", "BDPOGaussian", "BDPODeterministic")},
    **dict.fromkeys(("DQL", "EDP"), TARGET_ACTOR),
    **dict.fromkeys(("EDA", "AEPO", "QGPO", "SRPO"), NO_STAGES),
    "SfBC": {"critic.steps": 0},
    "TD3BC": EVERY_STEP,
    "ReBRAC": EVERY_STEP,
}
TRAIN_WITHOUT_NOISE = {"BC", "BDPODeterministic", "IQL"}
# All actors of an algorithm, or one of them.
ACT_WITHOUT_NOISE = {
    *("AWAC", "BC", "BDPODeterministic", "CQL", "DecisionTransformer", "IQL", "ReBRAC", "SRPO.policy", "TD3BC"),
}


def make(cls: type[OfflineAlgorithm], seed: int = 0, width: int = 16) -> OfflineAlgorithm:
    torch.manual_seed(0)
    options = {**tiny_options(cls.__name__), **OPTIONS.get(cls.__name__, {})}
    if "pretrain_steps" in options:
        options["pretrain_steps"] = 0
    options |= {name: width for name in options if name.endswith(("hidden_dim", "embedding_dim"))}
    algorithm = cls(OBSERVATION_DIM, ACTION_DIM, seed=seed, **nested(options))
    algorithm.configure_optimizers()
    algorithm.dataset_observations = torch.randn(BATCH_SIZE, OBSERVATION_DIM)
    algorithm.dataset_next_observations = torch.randn(BATCH_SIZE, OBSERVATION_DIM)
    algorithm.dataset_rewards = torch.randn(BATCH_SIZE)
    algorithm.dataset_episode_ends = torch.arange(BATCH_SIZE) % 4 == 3
    enter_phase(algorithm, algorithm.phases()[-1])
    return algorithm


def batch(algorithm: OfflineAlgorithm, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = Batch(
        torch.randn(BATCH_SIZE, OBSERVATION_DIM, generator=generator),
        torch.rand(BATCH_SIZE, ACTION_DIM, generator=generator) * 2 - 1,
        torch.randn(BATCH_SIZE, generator=generator),
        torch.randn(BATCH_SIZE, OBSERVATION_DIM, generator=generator),
        (torch.rand(BATCH_SIZE, generator=generator) < 0.3).float(),
        torch.randint(BATCH_SIZE, (BATCH_SIZE,), generator=generator),
    )
    return segments(rows, algorithm.segment_length)


def enter_phase(algorithm: OfflineAlgorithm, phase: Phase) -> None:
    phase.begin()
    phase.prepare(batch(algorithm))


def update(algorithm: OfflineAlgorithm, phase: Phase) -> dict[str, torch.Tensor]:
    phase.prepare(batch(algorithm))
    return phase.update(batch(algorithm))


pytestmark = pytest.mark.parametrize("cls", ALGORITHMS)


def test_updates_move_every_optimizer_and_return_detached_scalars(cls: type[OfflineAlgorithm]):
    algorithm = make(cls)
    before = {
        name: [p.clone() for m in s.modules for p in m.parameters()] for name, s in algorithm.optimizer_specs().items()
    }
    info = {name: value for phase in algorithm.phases() for name, value in update(algorithm, phase).items()}
    for name, spec in algorithm.optimizer_specs().items():
        after = [p for m in spec.modules for p in m.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(after, before[name], strict=True)), name
    for name, value in info.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert torch.isfinite(value), name


def test_every_trainable_parameter_has_one_optimizer(cls: type[OfflineAlgorithm]):
    algorithm = make(cls)
    owned = [p for spec in algorithm.optimizer_specs().values() for m in spec.modules for p in m.parameters()]
    assert len(owned) == len({id(p) for p in owned})
    assert {id(p) for p in owned} == {id(p) for p in algorithm.parameters() if p.requires_grad}


def test_updates_are_a_function_of_state_and_seed(cls: type[OfflineAlgorithm]):
    results = []
    for seed in (0, 0, 1):
        algorithm = make(cls, seed)
        torch.manual_seed(seed + 123)  # the global stream plays no part
        for i in range(3):
            algorithm.update(batch(algorithm, i))
        results.append(torch.cat([p.detach().flatten() for p in algorithm.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (cls.__name__ in TRAIN_WITHOUT_NOISE)


def test_targets_follow_by_the_callback_alone(cls: type[OfflineAlgorithm]):
    algorithm = make(cls)
    callback = EMATargets()
    callback.on_fit_start(None, algorithm)  # type: ignore[arg-type]
    for target in (each for each in algorithm.targets() if not each.early):
        assert not any(p.requires_grad for p in target.target.parameters())
        before = [p.clone() for p in target.target.parameters()]
        algorithm.update(batch(algorithm))
        assert all(torch.equal(a, b) for a, b in zip(before, target.target.parameters(), strict=True))
        algorithm.target_updates.update(target.every)
        for old, online, new in zip(before, target.online.parameters(), target.target.parameters(), strict=True):
            torch.testing.assert_close(new, old + target.rate * (online - old))


def test_an_algorithm_with_targets_refuses_to_train_without_the_callback(cls: type[OfflineAlgorithm], tmp_path):
    algorithm = make(cls)
    table = torch.randn(40, 2 * OBSERVATION_DIM + ACTION_DIM + 2)
    ends = torch.arange(40) % 10 == 9
    loader = BlockSampler(table, (OBSERVATION_DIM, ACTION_DIM, 1, OBSERVATION_DIM, 1), 4, 2, 10, 10, episode_ends=ends)
    trainer = lightning.Trainer(
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    if algorithm.targets():
        with pytest.raises(UserError, match="EMATargets"):
            trainer.fit(algorithm, loader)


def test_every_actor_acts_in_the_box(cls: type[OfflineAlgorithm]):
    algorithm = make(cls)
    assert next(iter(algorithm.actors())) == "policy"
    observations = torch.randn(7, OBSERVATION_DIM)
    for actor in algorithm.actors():
        first, second, third = (
            algorithm.act(observations, torch.Generator().manual_seed(seed), actor) for seed in (0, 0, 1)
        )
        assert first.shape == (7, ACTION_DIM)
        assert first.abs().max() <= 1
        assert torch.equal(first, second)
        assert torch.equal(first, third) == bool(ACT_WITHOUT_NOISE & {cls.__name__, f"{cls.__name__}.{actor}"})


def test_the_best_of_several_behavior_actions_is_a_control(cls: type[OfflineAlgorithm]):
    algorithm = make(cls)
    assert best_of_behavior(algorithm, 0) == {}
    algorithm.control_actors = best_of_behavior(algorithm, 8)
    if not (names := [*algorithm.control_actors]):
        assert "behavior" not in algorithm.actors() or algorithm.has_memory
        return
    observations = torch.randn(64, OBSERVATION_DIM, generator=torch.Generator().manual_seed(1))
    values = {}
    for name in ("behavior", *names):
        actions = algorithm.act(observations, torch.Generator().manual_seed(2), name)
        values[name] = algorithm.value_of(
            algorithm.units.normalize(observations), algorithm.units.normalize_actions(actions)
        )
        assert values[name] is not None
    gain = (values["behavior_best_of_8"] - values["behavior"]).mean()
    assert gain > 0 or cls.__name__ in ACT_WITHOUT_NOISE
    generators = {name: torch.Generator().manual_seed(2) for name in ("policy", *names)}
    together = algorithm.act_each(observations, ["policy"] * 32 + names * 32, generators)
    alone = algorithm.act(observations[32:], torch.Generator().manual_seed(2), names[0])
    torch.testing.assert_close(together[32:], alone)
    without_critic = type("WithoutCritic", (cls,), {"value_of": OfflineAlgorithm.value_of})
    algorithm.__class__ = without_critic
    assert best_of_behavior(algorithm, 8) == {}


def test_state_survives_a_checkpoint_without_pickle(cls: type[OfflineAlgorithm], tmp_path):
    algorithm = make(cls)
    algorithm.update(batch(algorithm))
    checkpoint = {"state_dict": algorithm.state_dict(), "hyper_parameters": dict(algorithm.hparams)}
    algorithm.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    restored = torch.load(tmp_path / "model.ckpt", weights_only=True)
    other = cls(**restored["hyper_parameters"])
    other.load_state_dict(restored["state_dict"])
    other.on_load_checkpoint(restored)
    assert torch.equal(other.noise.normal(3), algorithm.noise.normal(3))
    observations = torch.randn(4, OBSERVATION_DIM)
    one, two = (a.act(observations, torch.Generator().manual_seed(0)) for a in (algorithm, other))
    assert torch.equal(one, two)


def test_hyper_parameters_are_described_for_help(cls: type[OfflineAlgorithm]):
    documentation = inspect.getdoc(cls) or ""
    for name in list(inspect.signature(cls.__init__).parameters)[1:]:
        assert f"{name}: " in documentation, name
