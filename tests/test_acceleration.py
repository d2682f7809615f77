"""Compiled and captured updates: the same training as eager ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import run_folder
from tiny import ACTION_DIM, OBSERVATION_DIM, STATES, batch, nested, segments, tiny_options

from lit_offrl import algorithms
from lit_offrl.algorithms import OfflineAlgorithm, aepo, energy_guided, optimizers
from lit_offrl.algorithms.base import OptimizerSpec
from lit_offrl.algorithms.eda import Labels
from lit_offrl.algorithms.loop import advance, run_eagerly
from lit_offrl.algorithms.qgpo import Support
from lit_offrl.batch import Batch
from lit_offrl.callbacks.acceleration import Acceleration, CapturedUpdates, CompiledUpdates, rehearse
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.cli import main
from lit_offrl.errors import UserError
from lit_offrl.networks import bottleneck, energy_guidance, gradients

EVERY = [*algorithms.ALGORITHMS]
# Small, and every kind of update within a few steps.
BDPO = {"warmup_steps": 3, "actor_every": 2, "pretrain_steps": 3}
STAGES = {"pretrain_steps": 3, "critic.steps": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "DTQL": {"pretrain_steps": 3, "nll_weight": 1.0},
    "DTQLKL": {"pretrain_steps": 3},
    "BDPO": {**BDPO, "diffusion_steps": 2},
    "BDPOGaussian": BDPO,
    "BDPODeterministic": BDPO,
    "DQL": {"max_q_backup": True, "ema_after": 3},
    "EDP": {"loss": "crr", "ema_after": 3},
    "EDA": STAGES,
    "AEPO": {**STAGES, "critic.kind": "conservative"},
    "QGPO": STAGES,
    "AWAC": {},
    "DecisionTransformer": {"warmup": 5},
    "BCQ": {},
    "CQL": {"threshold": 1.0, "smallest_gap": -200.0, "max_target_backup": True},
    "SfBC": STAGES,
    "SRPO": STAGES,
}
UPDATE_WITHOUT_NOISE = {"BC", "IQL", "SfBC"}
STEPS = 13


def make(cls: type[OfflineAlgorithm], device: str = "cpu", **options: Any) -> OfflineAlgorithm:
    torch.manual_seed(0)
    algorithm = cls(
        OBSERVATION_DIM,
        ACTION_DIM,
        seed=3,
        **nested({**(tiny_options(cls.__name__) if cls.__name__ in algorithms.ALGORITHMS else {}), **options}),
    ).to(device)
    algorithm.configure_optimizers()
    algorithm.main_steps = 10
    EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(2, STATES, OBSERVATION_DIM, generator=generator).to(device)
    algorithm.dataset_observations, algorithm.dataset_next_observations = every
    algorithm.dataset_rewards = torch.randn(STATES, generator=generator).to(device)
    algorithm.dataset_episode_ends = (torch.arange(STATES) % 5 == 4).to(device)
    return algorithm


def on(device: str, rows: Batch) -> Batch:
    return Batch._make(None if each is None else each.to(device) for each in rows)


def train(algorithm: OfflineAlgorithm, steps: range = range(STEPS)) -> list[dict[str, float]]:
    told = []
    for step in steps:
        rows = segments(batch(seed=step), algorithm.segment_length)
        names, values = advance(algorithm, on(str(algorithm.device), rows))
        told.append(dict(zip(names, values.tolist(), strict=True)))
    return told


def failed(note: str) -> None:
    assert note.startswith("note: compiled an update of the phase "), note


def is_variant(name: str) -> bool:
    """Return whether an algorithm derives from another one that is exported."""
    exported = [getattr(algorithms, each) for each in EVERY]
    return any(base in exported for base in getattr(algorithms, name).__mro__[1:])


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * is_variant(each)) for each in EVERY])
def test_every_update_can_be_traced_whole_and_is_the_same(name: str):
    """`fullgraph`: no scalar is read, no shape and no branch depends on data. Eager kernels: the bits are the same."""
    torch._dynamo.reset()
    cls, options = getattr(algorithms, name), OPTIONS.get(name, {})
    eager, traced = make(cls, **options), make(cls, **options)
    traced.run_update = CompiledUpdates(failed, backend="eager")
    assert train(eager) == train(traced)
    for (key, a), b in zip(eager.state_dict().items(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(eager.noise.normal(5), traced.noise.normal(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", EVERY)
def test_replayed_updates_are_the_same(name: str):
    cls, options = getattr(algorithms, name), OPTIONS.get(name, {})
    eager, captured = make(cls, "cuda", **options), make(cls, "cuda", **options)
    captured.run_update = CapturedUpdates(failed)
    captured.run_update.WARM_UP = 1
    assert train(eager) == train(captured)
    for (key, a), b in zip(eager.state_dict().items(), captured.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(eager.noise.normal(5), captured.noise.normal(5))


@pytest.mark.parametrize("name", EVERY)
def test_updates_stay_on_their_device(name: str, monkeypatch: pytest.MonkeyPatch):
    """On a device without data: what mixes devices, or wants to see a value, fails there as it would on a GPU."""
    monkeypatch.setattr(optimizers, "adam_kernel", torch.ops.lit_offrl.adam)  # the kernel itself knows no such device
    for module in (bottleneck, energy_guidance, gradients, energy_guided, aepo):
        monkeypatch.setattr(module, "full_precision", lambda like: nullcontext())  # nor does autocast
    algorithm = make(getattr(algorithms, name), "meta", **OPTIONS.get(name, {}))
    rows = on("meta", segments(batch(), algorithm.segment_length))
    candidates = torch.rand(STATES, 3, ACTION_DIM, device="meta")
    for phase in algorithm.phases():
        if isinstance(algorithm, algorithms.EDA):
            algorithm.labels = Labels(candidates[:, 0, 0].long(), candidates, candidates[..., 0])
        if isinstance(algorithm, (algorithms.AEPO, algorithms.QGPO)):
            algorithm.support = Support(candidates, candidates)
        if isinstance(algorithm, algorithms.SfBC):
            algorithm.returns = candidates[:, 0, 0]
        on_meta = algorithm.noise.replaced_by(lambda draw: draw.distribution(*draw.shape, device="meta"))
        with on_meta, algorithm.tracing(("actor", "penalty", "policy")):
            info = phase.update(rows)
        assert {value.device.type for value in info.values()} == {"meta"}
    with pytest.raises(RuntimeError, match="device"):  # this is how it is noticed
        torch.zeros(3) + torch.zeros(3, device="meta")


class Regression(OfflineAlgorithm):
    """One small network; its update can be told to do what cannot be traced."""

    def __init__(self, *sizes: int, hidden_dim: int = 8, reads: bool = False, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.network = torch.nn.Linear(self.observation_dim, self.action_dim)
        self.reads = reads

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        return {"network": OptimizerSpec((self.network,), 1e-2, clip_norm=1.0)}

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        noisy = batch.observations + 0.1 * self.noise.normal(*batch.observations.shape)
        loss = (self.network(noisy) - batch.actions).square().mean()
        if self.reads and loss.item() < 0:
            loss = loss * 2
        self.minimize("network", loss)
        return {"loss": loss.detach()}

    def sample_actions(self, observations: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        actions: torch.Tensor = self.network(observations)
        return actions


def test_compiled_by_the_real_compiler():
    eager, compiled = make(Regression), make(Regression)
    compiled.run_update = CompiledUpdates(failed)
    first, second = train(eager), train(compiled)
    # Rounding: fused operations may round once where eager ones round twice.
    assert [each["loss"] for each in first] == pytest.approx([each["loss"] for each in second], rel=1e-5)
    torch.testing.assert_close(eager.network.weight, compiled.network.weight, rtol=1e-5, atol=1e-6)


def test_a_resumed_compiled_run_equals_an_uninterrupted_one_bit_for_bit():
    """The first update of a process is compiled, too: an eager one would round in another way."""
    whole, first, second = make(Regression), make(Regression), make(Regression)
    for each in (whole, first, second):
        each.run_update = CompiledUpdates(failed)
    train(whole)
    train(first, range(6))
    second.load_state_dict(first.state_dict())
    second.optimizer_set.adams["network"].load_state_dict(first.optimizer_set.adams["network"].state_dict())
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    train(second, range(6, STEPS))
    assert torch.equal(whole.network.weight, second.network.weight)
    assert torch.equal(whole.noise.normal(5), second.noise.normal(5))


@pytest.mark.parametrize("name", EVERY)
def test_a_rehearsed_update_leaves_nothing_behind(name: str):
    algorithm = make(getattr(algorithms, name), **OPTIONS.get(name, {}))
    phase = algorithm.phases()[-1]
    phase.prepare(segments(batch(), algorithm.segment_length))
    adams = algorithm.optimizer_set.adams.values()
    before = [*algorithm.state_dict().values(), algorithm.noise.get_state()]
    before = [each.clone() for each in before]
    with algorithm.tracing(("actor", "penalty", "policy")):
        names, draws = rehearse(algorithm, phase, segments(batch(), algorithm.segment_length))
    after = [*algorithm.state_dict().values(), algorithm.noise.get_state()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(float(state["step"]) == 0 for adam in adams for state in adam.state.values())
    assert not any(state["exp_avg"].any() for adam in adams for state in adam.state.values())
    assert names
    assert draws or name in UPDATE_WITHOUT_NOISE


@pytest.mark.parametrize(
    ("options", "max_steps", "compiles"),
    [
        ({}, 9_999, False),
        ({}, 10_000, True),
        ({"compile": False}, 10**6, False),
        ({"compile": True}, 10, True),
        ({"cuda_graph": True}, 10**6, False),
    ],
)
def test_long_runs_compile_by_default(options: dict[str, bool], max_steps: int, compiles: bool):
    algorithm, acceleration = make(Regression), Acceleration(**options)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    acceleration.on_fit_start(trainer, algorithm)
    assert isinstance(algorithm.run_update, CompiledUpdates) == compiles
    acceleration.on_fit_end(trainer, algorithm)
    assert algorithm.run_update is run_eagerly


def test_what_cannot_be_traced_runs_eagerly_with_one_note():
    notes: list[str] = []
    eager, compiled = make(Regression), make(Regression, reads=True)
    compiled.run_update = CompiledUpdates(notes.append, backend="eager")
    assert train(eager) == train(compiled)
    (note,) = notes
    assert note.startswith("note: updates run eagerly: they could not be compiled")
    assert "\n" not in note


def test_without_a_compiler_updates_run_eagerly():
    def broken(*_: Any) -> None:
        raise FileNotFoundError("no C++ compiler")

    notes: list[str] = []
    eager, compiled = make(Regression), make(Regression)
    compiled.run_update = CompiledUpdates(notes.append, backend=broken)  # type: ignore[arg-type]
    assert train(eager) == train(compiled)
    assert len(notes) == 1
    assert "no C++ compiler" in notes[0]


def test_a_run_on_the_command_line(tiny: Callable[..., list[str]], tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr(CompiledUpdates.__init__, "__defaults__", ("eager",))  # the compiler itself has its own test
    states = []
    for name in ("eager", "compile", "cuda_graph"):
        root = tmp_path / name
        flag = [] if name == "eager" else [f"--{name}=true"]
        assert main(tiny(f"--trainer.default_root_dir={root}", "--evaluation.enabled=false", *flag)) == 0
        note = "note: cuda_graph has no effect on the device cpu"
        assert (note in capfd.readouterr().err) == (name == "cuda_graph")
        states.append(torch.load(run_folder(root) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert torch.equal(value, states[2][key]), key


def test_bad_choices(tiny: Callable[..., list[str]], capsys):
    assert main(tiny("--compile=true", "--cuda_graph=true")) == 2
    assert capsys.readouterr().err == "error: compile and cuda_graph: choose one of them\n"
    with pytest.raises(UserError, match="choose one"):
        Acceleration(compile=True, cuda_graph=True)
