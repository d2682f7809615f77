"""The reference loops of the benchmark compute what our algorithms compute: else their ratios would mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, STATES, load_tool, nested, shake
from torch import Tensor

from lit_offrl import algorithms
from lit_offrl.batch import Batch
from lit_offrl.callbacks.ema import EMATargets

VP = {"diffusion.hidden_dim": 16, "critic.hidden_dim": 16}
ENERGY = {**VP, "energy.hidden_dim": 16}
ACTOR_CRITIC = {"hidden_dim": 16, "critic.hidden_dim": 16}
FAST_TARGET = {"ema_rate": 0.2, "ema_every": 2, "ema_after": 0}  # moves far enough to be seen within five steps
SIZES: dict[str, dict[str, Any]] = {
    "AEPO": {**ENERGY, "table_size": 9, "table_samples": 64},
    "BDPO": {"hidden_dim": 16, "critic.hidden_dim": 16, "critic.members": 3, "samples": 4, "warmup_steps": 0},
    "DTQL": {"hidden_dim": 16, "critic.hidden_dim": 16, "nll_weight": 0.7},
    "EDA": {**VP, "critic.steps": 0, "candidates_per_state": 3},
    "QGPO": {**ENERGY, "support_actions": 3},
    "DQL": {**ACTOR_CRITIC, "max_q_backup": True, "clip": 3.0, **FAST_TARGET, "acting.candidates": 5},
    "FQL": {**ACTOR_CRITIC, "normalize_q": True},
    "IDQL": {**ACTOR_CRITIC, "acting.candidates": 5},
    "IQL": {**ACTOR_CRITIC, "dropout": 0.2},
    "TD3BC": ACTOR_CRITIC,
}
# Both run in float32: sums in another order, a Mish written otherwise, and five steps of Adam upon them.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def loops() -> dict[str, Any]:
    return {**load_tool("reference_loops").LOOPS, **load_tool("reference_loops_baselines").BASELINE_LOOPS}


def dataset() -> Batch:
    generator = torch.Generator().manual_seed(0)
    observations, next_observations = torch.randn(2, STATES, OBSERVATION_DIM, generator=generator)
    return Batch(
        observations,
        torch.rand(STATES, ACTION_DIM, generator=generator) * 2 - 1,
        torch.randn(STATES, generator=generator),
        next_observations,
        (torch.rand(STATES, generator=generator) < 0.4).float(),
        torch.arange(STATES),
    )


def make(name: str) -> Any:
    """Return an algorithm whose targets, policies and energies differ from what they started as."""
    torch.manual_seed(2)
    algorithm = getattr(algorithms, name)(OBSERVATION_DIM, ACTION_DIM, **nested(SIZES[name]))
    algorithm.pretrain_steps = 0
    for phase in algorithm.phases():
        phase.begin()
    for i, module in enumerate(algorithm.children()):
        shake(module, seed=i, scale=0.05)
    if name in ("AEPO", "EDA"):
        algorithm.critic_options = replace(algorithm.critic_options, steps=10**6)
    algorithm.configure_optimizers()
    algorithm.main_steps = 10**9  # the learning rate of a cosine stays
    EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
    algorithm.dataset_observations = dataset().observations
    algorithm.dataset_next_observations = dataset().next_observations
    return algorithm


def record(algorithm: Any) -> list[tuple[str, Tensor]]:
    """Note all noise that an algorithm draws."""
    drawn: list[tuple[str, Tensor]] = []

    def noting(kind: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*shape: int, **options: bool) -> Tensor:
            drawn.append((kind, draw(*shape, **options)))
            return drawn[-1][1]

        return noted

    noise = algorithm.noise
    stratified, uniform = noise.stratified, noise.uniform
    noise.normal = noting("normal", noise.normal)
    noise.uniform = noting("uniform", uniform)

    def spread(count: int) -> Tensor:
        noise.uniform = uniform
        values = stratified(count)
        noise.uniform = noting("uniform", uniform)
        drawn.append(("stratified", values))
        return values

    noise.stratified = spread
    return drawn


def script(algorithm: Any, drawn: list[tuple[str, Tensor]], rows: int) -> list[Tensor]:
    """Return the noise in the order and the shapes in which the reference loop draws it."""
    draws: list[Tensor] = []
    counts_steps = isinstance(algorithm, algorithms.BDPO | algorithms.DQL | algorithms.IDQL)
    for kind, values in drawn:
        if kind == "uniform" and values.ndim == 3:
            if algorithm.dropout and not isinstance(algorithm, algorithms.EDA):  # EDA's has a test of its own
                draws += ((values >= algorithm.dropout) / (1 - algorithm.dropout)).unbind(1)
        elif counts_steps and kind != "normal" and len(values) == rows:
            draws.append((1 + algorithm.schedule.steps * values).long())
        elif counts_steps and values.ndim == 4:  # the paths: rows, steps, samples, dimensions
            draws += [each.flatten(0, 1) for each in values.unbind(1)]
        elif isinstance(algorithm, algorithms.BDPO) and values.ndim == 3:  # the rows of the smallest step get no noise
            draws.append(torch.cat([values.new_zeros(rows - len(values), *values.shape[1:]), values]))
        else:
            draws.append(values)
    return draws


def play(loop: Any, draws: list[Tensor]) -> None:
    """Let a reference loop draw these."""

    def draw(*shape: int) -> Tensor:
        values = draws.pop(0)
        assert values.shape == shape
        return values

    loop.normal = loop.uniform = draw
    loop.steps = lambda count, _: draw(count)
    loop.coin = lambda: draw(1).item()
    if getattr(loop.options, "dropout", 0.0):
        loop.dropped = lambda x, _: x * draw(*x.shape)


def prepare(loops: dict[str, Any], name: str) -> tuple[Any, Any]:
    algorithm = make(name)
    loop = loops[name](algorithm, dataset(), len(dataset().rewards))
    if name == "EDA":
        algorithm.dropout = 0.0
        loop.dropped = lambda x, _: x
        q = algorithm.best_q(dataset().observations[:, None], loop.candidates)
        rows = torch.arange(STATES)
        algorithm.labels = algorithms.eda.Labels(rows, loop.candidates, (algorithm.alpha * q).softmax(-1))
    if name == "QGPO":
        algorithm.support = algorithms.qgpo.Support(loop.support, loop.next_support)
    if name == "AEPO":
        algorithm.variances.copy_(algorithm.variance_table(dataset()))
    return algorithm, loop


PHASES = {
    "AEPO": ("behavior", "critic", "energy"),
    "BDPO": ("pretraining", "training"),
    "DTQL": ("pretraining", "training"),
    "EDA": ("behavior", "critic", "alignment"),
    "QGPO": ("behavior", "critic and energy", "energy"),
    **dict.fromkeys(("DQL", "FQL", "IDQL", "IQL", "TD3BC"), ("training",)),
}


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name, phases in PHASES.items() for phase in phases])
def test_reference_loop_computes_our_losses(loops: dict[str, Any], name: str, phase: str):
    """Over several updates, so that optimizers and targets are compared too; with the actor's of BDPO among them."""
    algorithm, loop = prepare(loops, name)
    (ours,) = (each for each in algorithm.phases() if each.name == phase)
    theirs = loop.phases()[phase]
    drawn = record(algorithm)
    rows = len(dataset().rewards)
    compared: set[str] = set()
    reported: set[str] = set()
    for step in range(1, 6):
        drawn.clear()
        info = ours.update(dataset())
        algorithm.target_updates.update(step if phase in ("training", "energy", "alignment") else step - 100)
        algorithm.gradient_step = step
        draws = script(algorithm, drawn, rows)
        play(loop, draws)
        losses = theirs(dataset())
        assert not draws
        reported |= losses.keys()
        for key in losses.keys() & info.keys():
            compared.add(key)
            torch.testing.assert_close(losses[key], info[key].item(), **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")
    assert compared == reported


ACTING_TOLERANCE = {"rtol": 0, "atol": 1e-3}  # float32: 1 / alpha = 150 at t = 1 enlarges what sums in another order do


@pytest.mark.parametrize("name", PHASES)
def test_reference_loop_acts_as_ours(loops: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(name), dataset()
    loop = loops[name](algorithm, rows, len(rows.rewards))
    algorithm.gradient_step = algorithm.main_start + 10
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(-1, keepdim=True))
    drawn: list[Tensor] = []
    randn = torch.randn

    def noted(*shape: Any, **options: Any) -> Tensor:
        drawn.append(randn(*shape, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", noted)
    ours = algorithm.act(rows.observations, torch.Generator().manual_seed(0))
    if name == "DQL":  # whose noise has the rows first
        drawn = [noise.movedim(1, 0) for noise in drawn]
    draws = [each.reshape(-1, ACTION_DIM) for noise in drawn for each in (noise if noise.ndim == 4 else [noise])]
    play(loop, draws)
    limit = algorithm.units.limit
    torch.testing.assert_close(loop.act(rows.observations).clamp(-limit, limit), ours, **ACTING_TOLERANCE)
    assert not draws


@pytest.fixture(scope="module")
def benchmark(loops: dict[str, Any]) -> ModuleType:
    return load_tool("benchmark")  # which imports the loops


SMALL: dict[str, dict[str, Any]] = {
    "DTQL": {"hidden_dim": 8, "acting": {"candidates": 4}},
    "EDA": {
        "diffusion": {"hidden_dim": 16},
        "critic": {"hidden_dim": 8},
        "candidates_per_state": 2,
        "alignment_batch_size": 16,
    },
    # no reference loop: segments of two transitions, segments and a memory, returns of the whole dataset
    "ReBRAC": ACTOR_CRITIC,
    "QC": {**ACTOR_CRITIC, "candidates": 4},
    "SfBC": {"diffusion.hidden_dim": 16},
}
REFERENCE_LESS = {"ReBRAC": {"training"}, "QC": {"training"}, "SfBC": {"behavior", "round 1", "round 2"}}


@pytest.mark.parametrize("name", ["DTQL", pytest.param("EDA", marks=pytest.mark.slow), *REFERENCE_LESS])
def test_benchmark_measures_and_compares(
    benchmark: ModuleType,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(benchmark, "TRANSITIONS", 500)
    words = ["--algorithms", name, "--only-algorithms", "--batch-size", "16", "--rounds", "2"]
    words += ["--options", json.dumps(nested(SMALL[name]))]
    benchmark.main([*words, "--json", str(tmp_path / "old.json")])
    rows = json.loads((tmp_path / "old.json").read_text())["rows"]
    phases = {row["what"] for row in rows if row["unit"] == "step"}
    assert phases == set(REFERENCE_LESS.get(name) or PHASES[name])
    assert any(row["variant"] == "reference" for row in rows) == (name not in REFERENCE_LESS)
    for row in rows:
        assert row["ms"] > 0
        assert row["flops"] > 0
        assert row["memory"] is None or row["memory"] >= 0
        if row["what"] == "act, 1 state":
            assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert bool(row["parts_ms"]) == (row["variant"] == "eager" and row["unit"] == "step")
    capsys.readouterr()
    benchmark.main([*words, "--compare", str(tmp_path / "old.json")])
    assert "times as fast" in capsys.readouterr().out


def test_paper_batch_sizes_are_those_of_the_configs(benchmark: ModuleType):
    sizes = {name: benchmark.batch_size_of("paper", name, "hopper") for name in algorithms.ALGORITHMS}
    assert (sizes["BCQ"], sizes["DTQL"], sizes["ReBRAC"], sizes["QGPO"]) == (100, 256, 1024, 4096)
    assert benchmark.batch_size_of("paper", "DTQL", "antmaze") == 2048
    assert benchmark.batch_size_of("paper", "DTQLKL", "antmaze") == 256  # of locomotion: it has no config of antmaze
    assert benchmark.batch_size_of("64", "DTQL", "antmaze") == 64


def test_flops_are_those_of_the_matrix_products(benchmark: ModuleType):
    """A critic of one hidden layer less would count less: 2 Q and V of 3 layers, by hand."""
    setting = benchmark.Setting("DTQL", "hopper", 10, {"hidden_dim": 4}, "cpu", ("eager",))
    options = {"hidden_dim": 4, "critic": {"hidden_dim": 4}, "acting": {"candidates": 5}}
    work = benchmark.our_actions(benchmark.Setting("DTQL", "hopper", 0, options, "cpu", ()), 2, "eager")
    policy = 11 * 4 + 4 * 4 + 4 * 4 + 4 * 6
    q = 14 * 4 + 4 * 4 + 4 * 4 + 4
    assert benchmark.count_flops(work) == 2 * (2 * policy + 2 * 5 * 2 * q)
    assert benchmark.count_flops(benchmark.our_steps(setting, "training", "eager", 5)) > 0
