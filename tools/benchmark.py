"""What training, acting, loading, collecting and evaluating cost, beside loops as research code has them.

    python tools/benchmark.py [--algorithms all] [--shape hopper] [--batch-size 256,paper] [--rounds 3]
                              [--options '{"members": 4}'] [--json FILE] [--compare OLD.json] [--device cuda]
                              [--scaling] [--against CHECKOUT]

Every line of the tables is one `Row`: something to time, in one or more variants. All rows take turns, round by round,
so that whatever else a machine does meets all of them alike; medians are shown, and the median of each round's ratio.
Ratios are to the loops of `reference_loops.py` and `reference_loops_baselines.py`, which test_benchmark.py holds to
compute the same losses; an algorithm without a loop has no ratio. Times are CPU seconds of this process; on a GPU they
are wall seconds, synchronised. The 50th and 99th percentile of the choice of an action are over the calls of all
rounds, 10 calls a round.

The allocator keeps freed memory, as in training (`lit_offrl/system/memory.py`), for the reference loops too.

A gradient step includes drawing its minibatch, its target networks, and reading its losses back: ours once per block,
as in training. Lightning's loop, loggers and callbacks are left out; they act once per block (`profile_block.py`).
Data are random numbers of the shape of a task.

FLOPs are those of matrix products, by PyTorch's counter. "GEMM" is their rate as a share of that of a product of two
matrices of 1024 x 1024, measured in the same run: at 100% nothing but matrix products would be left. Memory is by how
much the peak of resident memory grows while a process that has imported everything and holds the dataset builds
networks and optimizers and runs the row once, each in a fork of its own (on a GPU, the peak of allocated memory).

`--scaling` measures the last phase of the algorithms against the batch size, BDPO's against the ensemble, and loading
against the size of the dataset, instead.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from inspect import signature
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from reference_loops import LOOPS as PAPER_LOOPS
from reference_loops import EDALoop, ReferenceLoop
from reference_loops_baselines import BASELINE_LOOPS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_offrl.algorithms import AEPO, ALGORITHMS, EDA, QGPO, OfflineAlgorithm, SfBC
from lit_offrl.algorithms.base import Memory
from lit_offrl.algorithms.eda import Labels
from lit_offrl.algorithms.loop import run_eagerly, train_block
from lit_offrl.algorithms.options import Acting
from lit_offrl.algorithms.qgpo import Support
from lit_offrl.batch import Batch
from lit_offrl.callbacks.acceleration import CapturedUpdates, CompiledUpdates
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.system.memory import keep_freed_memory
from lit_offrl.system.onednn import products_by_onednn

LINUX = sys.platform.startswith("linux")
TABLES = Path(__file__).parent / "results" / "speed.json"  # figures of the machine of the tables, by --json
SHAPES = {"hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}  # widths of observations and actions
TRANSITIONS = 100_000
FAR = 1_000_000  # a phase's length: no measurement comes to its end
CONFIGS = Path(__file__).parents[1] / "conf"
LOOPS = {**PAPER_LOOPS, **BASELINE_LOOPS}
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"warmup_steps": 0} for name in ("BDPO", "BDPOGaussian", "BDPODeterministic")
}
# What the authors set for AntMaze and nowhere else.
OPTIONS_ANTMAZE: dict[str, dict[str, Any]] = {
    "BDPO": {"hidden_dim": 512, "critic": {"layer_norm": True}, "max_backup": True},
    "DTQL": {"nll_weight": 1.0},
    "QGPO": {"support_actions": 32},
}
# An actor that waits makes the cost of a step depend on the step: a run holds whole periods of BDPO's 5 and TD3BC's 2.
STEPS, BATCHES = 10, 50
STATES = (1, 100)
WARM_UP = 3  # runs until all kinds of updates are compiled
SCALING_BATCHES = (64, 256, 1024, 4096, 8192)
# Choices of an action follow one another, as in an episode: the first after a row of training would measure how caches
# are filled, and fill them for the reference that comes next.
ACTIONS = 10
REST = 0.05  # seconds: threads of the row before wait at full load for a while, and would be counted to the next
UNITS = {"step": "steps", "call": "calls", "batch": "batches", "environment step": "environment steps"}


def compiled(algorithm: OfflineAlgorithm) -> None:
    """Compile the updates."""
    algorithm.run_update = CompiledUpdates(print)


def captured(algorithm: OfflineAlgorithm) -> None:
    """Replay the updates as CUDA graphs."""
    algorithm.run_update = CapturedUpdates(print)


AUTHORS = "the authors' code"
# Ways to run an algorithm, each of which prepares it before its first update; the first is what others are compared to.
VARIANTS: dict[str, Callable[[OfflineAlgorithm], None]] = {
    "eager": lambda algorithm: None,
    "compiled": compiled,
    "captured": captured,
}
WHOLE = ("compiled", "captured")  # variants in which an update is one function


class Lap(NamedTuple):
    """What one run of a row has done: how many units, the seconds of its parts, and those of each call."""

    units: float
    parts: Mapping[str, float] = {}
    calls: Sequence[float] = ()


Work = Callable[[], Lap]


@dataclass(frozen=True)
class Row:
    """Something to time.

    Attributes:
        subject: The algorithm, or what else.
        what: The phase, or what is done.
        variant: The way it is done: one of `VARIANTS`, or a reference.
        make: Builds everything and returns what is to be run, again and again.
        unit: What is counted.
        shape: Of which task.
        batch_size: Transitions of a minibatch; None where there is none.
        scale: The number that varies in `--scaling`.
    """

    subject: str
    what: str
    variant: str
    make: Callable[[], Work]
    unit: str = "step"
    shape: str = ""
    batch_size: int | None = None
    scale: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What it has in common with its other variants."""
        return self.subject, self.what, self.shape, self.batch_size, self.scale


@dataclass
class Result:
    """What was measured of a row; per unit where not told otherwise.

    Attributes:
        seconds: Of every round.
        parts: Seconds of every round, by part.
        calls: Seconds of every single call of all rounds, where calls are timed one by one.
        flops: Of matrix products; None where they are not counted.
        memory: Bytes by which the peak grows; None where it is not measured.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: list[float] = field(default_factory=list)
    flops: float | None = None
    memory: float | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the seconds of a call."""
        return float(np.percentile(self.calls, percent))


# ---------------------------------------------------------------- the clock


def now(device: str) -> float:
    """Return the CPU seconds of this process, or the wall seconds at which the GPU is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def repeat(call: Callable[[], object], calls: int, device: str) -> Lap:
    """Call something several times, and time each call."""
    marks = [now(device)]
    for _ in range(calls):
        call()
        marks.append(now(device))
    return Lap(calls, calls=[after - before for before, after in pairwise(marks)])


class Parts:
    """Seconds on the way to each `minimize` of an algorithm: loss, gradients and step.

    Of an update that runs as one function there are none: only the time in all.
    """

    def __init__(self, algorithm: OfflineAlgorithm) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._mark = str(algorithm.device), 0.0
        if algorithm.run_update is not run_eagerly:
            return
        minimize = algorithm.minimize

        def timed(name: str, loss: Tensor) -> None:
            minimize(name, loss)
            self.lap(name)

        algorithm.minimize = timed  # type: ignore[method-assign]

    def start(self) -> None:
        """Forget what was."""
        self.seconds.clear()
        self._mark = now(self._device)

    def lap(self, name: str) -> None:
        """Add what has passed since the last lap."""
        self.seconds[name] += (passed := now(self._device)) - self._mark
        self._mark = passed


# ---------------------------------------------------------------- data


@cache
def dataset(shape: str, transitions: int, device: str) -> tuple[Tensor, Batch]:
    """Return transitions of random numbers, as the table that our sampler takes and field by field."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(transitions, sum(widths(shape)), generator=generator)
    _, actions, rewards, _, terminals = table.split(widths(shape), dim=1)
    actions.tanh_()
    terminals.copy_(terminals > 2.3)  # one in a hundred
    rewards.abs_()
    fields = [each.to(device, copy=True).contiguous() for each in table.split(widths(shape), dim=1)]
    fields[2], fields[4] = fields[2].squeeze(1), fields[4].squeeze(1)
    return table.to(device), Batch(*fields, torch.arange(transitions, device=device))


def widths(shape: str) -> tuple[int, ...]:
    """Return the widths of the fields of a batch."""
    observation_dim, action_dim = SHAPES[shape]
    return observation_dim, action_dim, 1, observation_dim, 1


def episode_ends(fields: Batch) -> Tensor:
    """Return whether each transition is the last of its episode, `[n]`."""
    ends = fields.terminals > 0
    ends[-1] = True
    return ends


def sampler(
    shape: str, batch_size: int, block: int, transitions: int, device: str, segment_length: int = 1
) -> Iterator[Batch]:
    """Return blocks of minibatches without end, of segments where an algorithm needs them."""
    table, fields = dataset(shape, transitions, device)
    ends = episode_ends(fields)
    blocks = BlockSampler(table, widths(shape), batch_size, block, steps_per_epoch=FAR, episode_ends=ends)
    blocks.segment_length = segment_length
    return iter(blocks)


# ---------------------------------------------------------------- algorithms and their reference loops


def build(name: str, shape: str, options: Mapping[str, Any], device: str) -> OfflineAlgorithm:
    """Return an algorithm for the dataset of a shape, whose phases last as long as one likes."""
    torch.manual_seed(0)
    given = {**OPTIONS.get(name, {}), **(OPTIONS_ANTMAZE.get(name, {}) if shape == "antmaze" else {}), **options}
    algorithm = ALGORITHMS[name](*SHAPES[shape], **given)
    algorithm.pretrain_steps = FAR if algorithm.pretrain_steps else 0
    critic: Any = getattr(algorithm, "critic_options", None)
    if hasattr(critic, "steps"):
        algorithm.critic_options = replace(critic, steps=FAR)
    algorithm.to(device).configure_optimizers()
    algorithm.main_steps = FAR
    _, fields = dataset(shape, TRANSITIONS, device)
    algorithm.dataset_observations, algorithm.dataset_next_observations = fields.observations, fields.next_observations
    algorithm.dataset_rewards, algorithm.dataset_episode_ends = fields.rewards, episode_ends(fields)
    EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
    return algorithm


def enter(algorithm: OfflineAlgorithm, phase: str) -> None:
    """Go to a phase, just after its first step, with made-up samples in the place of what its beginning would take."""
    algorithm.gradient_step = 1
    for each in algorithm.phases():
        each.begin()
        if each.name == phase:
            break
        algorithm.gradient_step += each.steps
    assert algorithm.dataset_observations is not None
    n, device = len(algorithm.dataset_observations), algorithm.device
    if isinstance(algorithm, EDA) and phase == "alignment":
        k = algorithm.candidates_per_state
        candidates = torch.rand(n, k, algorithm.action_dim, device=device) * 2 - 1
        algorithm.labels = Labels(
            torch.arange(n, device=device), candidates, torch.rand(n, k, device=device).softmax(-1)
        )
    if isinstance(algorithm, QGPO):
        shape = (2, n, algorithm.support_actions, algorithm.action_dim)
        algorithm.support = Support(*(torch.rand(shape, device=device) * 2 - 1))
    if isinstance(algorithm, AEPO):
        algorithm.variances.fill_(0.1)
    if isinstance(algorithm, SfBC):
        algorithm.returns = torch.randn(n, device=device)


@dataclass(frozen=True)
class Setting:
    """What the rows of one algorithm share."""

    name: str
    shape: str
    batch_size: int
    options: Mapping[str, Any]
    device: str
    variants: Sequence[str]

    def build(self) -> OfflineAlgorithm:
        """Return the algorithm."""
        return build(self.name, self.shape, self.options, self.device)

    def reference(self, loop: Callable[..., ReferenceLoop]) -> ReferenceLoop:
        """Return a reference loop on networks like the algorithm's."""
        return loop(self.build(), dataset(self.shape, TRANSITIONS, self.device)[1], self.batch_size)

    def row(self, what: str, variant: str, make: Callable[[], Work], unit: str = "step", **more: Any) -> Row:
        """Return a row of it."""
        return Row(
            self.name, what, variant, make, unit, self.shape, self.batch_size if unit == "step" else None, **more
        )


def our_steps(setting: Setting, phase: str, variant: str, steps: int) -> Work:
    """Return a block of gradient steps of a phase."""
    algorithm = setting.build()
    enter(algorithm, phase)
    VARIANTS[variant](algorithm)
    parts = Parts(algorithm)
    length = algorithm.segment_length
    blocks = sampler(setting.shape, setting.batch_size, steps, TRANSITIONS, setting.device, length)

    def work() -> Lap:
        parts.start()
        block = next(blocks)
        parts.lap("rest")
        train_block(algorithm, block)
        parts.lap("rest")
        return Lap(steps, dict(parts.seconds))

    return work


def reference_steps(setting: Setting, phase: str, steps: int, kind: Callable[..., ReferenceLoop]) -> Work:
    """Return as many gradient steps of a reference loop."""
    loop = setting.reference(kind)
    update = loop.phases()[phase]

    def work() -> Lap:
        for _ in range(steps):
            update(loop.batch())
        return Lap(steps)

    return work


def our_actions(setting: Setting, states: int, variant: str) -> Work:
    """Return the choice of an action in each of some states, by the policy.

    A policy that plays chunks of actions makes a chunk when the one before is over: a run holds whole chunks.
    """
    algorithm = setting.build()
    enter(algorithm, algorithm.phases()[-1].name)
    VARIANTS[variant](algorithm)
    observations = dataset(setting.shape, TRANSITIONS, setting.device)[1].observations[:states]
    memories: list[Memory] = [{} for _ in observations]
    calls = max(ACTIONS // states, algorithm.segment_length if algorithm.has_memory else 1)
    return partial(repeat, partial(algorithm.act, observations, memories=memories), calls, setting.device)


def reference_actions(
    setting: Setting, states: int, loop: Callable[..., ReferenceLoop], one_by_one: bool = False
) -> Work:
    """Return the same by a reference loop; one by one, each candidate with a call of its own."""
    reference = setting.reference(loop)
    observations = reference.table.observations[:states]
    calls, each = max(ACTIONS // states, 1), reference.options.acting.candidates if one_by_one else 1
    if one_by_one:
        reference.options.acting = Acting()

    def call() -> None:
        for _ in range(each):
            reference.act(observations)

    return partial(repeat, call, calls, setting.device)


def training_rows(setting: Setting) -> Iterator[Row]:
    """Yield the phases of an algorithm."""
    for phase in setting.build().phases():
        steps = 1 if phase.name == "alignment" else STEPS  # 4,096 rows
        for variant in setting.variants:
            yield setting.row(phase.name, variant, partial(our_steps, setting, phase.name, variant, steps))
        if setting.name in LOOPS:
            loop = LOOPS[setting.name]
            yield setting.row(phase.name, "reference", partial(reference_steps, setting, phase.name, steps, loop))
        if (setting.name, phase.name) == ("EDA", "critic"):
            make = partial(reference_steps, setting, phase.name, steps, partial(EDALoop, monitored=True))
            yield setting.row(phase.name, "reference with the authors' monitoring policy", make)


def acting_rows(setting: Setting) -> Iterator[Row]:
    """Yield the choice of actions in one state and in many; for EDA also without a choice among candidates."""
    settings = {f"act, {n} state{'s' if n > 1 else ''}": (n, setting) for n in STATES}
    if setting.name == "EDA":
        single = Setting(
            "EDA", setting.shape, 0, {**setting.options, "acting": {"candidates": 1}}, setting.device, setting.variants
        )
        settings["one sample, 1 state"] = (1, single)
    for what, (states, each) in settings.items():
        for variant in each.variants:
            if variant not in WHOLE:  # updates are, acting is not
                yield each.row(what, variant, partial(our_actions, each, states, variant), "call")
        if each.name not in LOOPS:
            continue
        yield each.row(what, "reference", partial(reference_actions, each, states, LOOPS[each.name]), "call")
        if each.name == "EDA":
            lean = partial(EDALoop, create_graph=False)
            make = partial(reference_actions, each, states, lean)
            yield each.row(what, "reference without a second derivative's graph", make, "call")
        if what == "act, 1 state" and each.name == "EDA":
            make = partial(reference_actions, each, states, EDALoop, one_by_one=True)
            yield each.row(what, "reference, candidates one by one", make, "call")


def authors_rows(setting: Setting, checkout: Path) -> Iterator[Row]:
    """Yield the phases and the acting of DTQL by its authors' code, from a checkout of theirs.

    Args:
        setting: Shape, batch size and device.
        checkout: Folder of https://github.com/TianyuCodings/Diffusion_Trusted_Q_Learning.
    """
    for phase in ("pretraining", "training"):
        yield setting.row(phase, AUTHORS, partial(authors_steps, setting, phase, checkout))
    yield setting.row("act, 1 state", AUTHORS, partial(authors_actions, setting, checkout), "call")


def authors_agent(setting: Setting, checkout: Path) -> tuple[Any, Any]:
    """Return the authors' agent, with the paper's settings for locomotion, and their sampler of minibatches."""
    if not (checkout / "agents" / "dtql.py").is_file():
        raise SystemExit(f"--against: {checkout} holds no agents/dtql.py: give a checkout of the authors' DTQL")
    sys.path.insert(0, str(checkout))
    make_agent = import_module("agents.dtql").DTQL
    make_buffer = import_module("utils.data_sampler").Data_Sampler
    fields = dataset(setting.shape, TRANSITIONS, setting.device)[1]
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    arrays = {name: getattr(fields, name).cpu().numpy() for name in names}
    box = SimpleNamespace(high=np.ones(SHAPES[setting.shape][1]))
    agent = make_agent(setting.device, *SHAPES[setting.shape], action_space=box, gamma=0.0)
    return agent, make_buffer(arrays, setting.device)


def authors_steps(setting: Setting, phase: str, checkout: Path) -> Work:
    """Return gradient steps of a phase by the authors' code."""
    agent, buffer = authors_agent(setting, checkout)

    def work() -> Lap:
        if phase == "pretraining":
            agent.pretrain(buffer, setting.batch_size, STEPS)
        else:
            for _ in range(STEPS):
                agent.train(buffer, setting.batch_size)
        return Lap(STEPS)

    return work


def authors_actions(setting: Setting, checkout: Path) -> Work:
    """Return the choice of an action in single states by the authors' code."""
    agent, buffer = authors_agent(setting, checkout)
    states = buffer.state[:ACTIONS].cpu().numpy()

    def work() -> Lap:
        for state in states:
            agent.sample_action(state)
        return Lap(len(states))

    return work


# ---------------------------------------------------------------- loading, collecting, evaluating


def our_loading(shape: str, batch_size: int, transitions: int, device: str) -> Work:
    """Return the drawing of a block of minibatches."""
    blocks = sampler(shape, batch_size, BATCHES, transitions, device)

    def work() -> Lap:
        return Lap(sum(1 for _ in next(blocks).updates()))

    return work


def reference_loading(shape: str, batch_size: int, transitions: int, device: str) -> Work:
    """Return the gathering of as many minibatches, each field by itself."""
    fields = dataset(shape, transitions, device)[1]

    def work() -> Lap:
        for _ in range(BATCHES):
            rows = torch.randint(transitions, (batch_size,), device=device)
            _ = [each[rows] for each in fields[:5]]
        return Lap(BATCHES)

    return work


COLLECTED = "offrl/pointmaze/umaze-v0"
EVALUATED = "Hopper-v5"


def collection() -> Work:
    """Return the recording of an episode, in environment steps."""
    from lit_offrl.collect.catalog import CATALOG
    from lit_offrl.collect.workers import make_recorder

    recorder, indices = make_recorder(CATALOG[COLLECTED], 0), count()

    def work() -> Lap:
        return Lap(len(recorder.record(next(indices))))

    return work


def our_evaluation(episodes: int = 10) -> Work:
    """Return episodes of random actions in as many copies of an environment, in environment steps."""
    from lit_offrl.data.info import EnvironmentInfo
    from lit_offrl.envs.make import make_env
    from lit_offrl.envs.rollout import Rollouts

    rollouts = Rollouts(partial(make_env, EnvironmentInfo(EVALUATED, {}, None)), episodes)
    rng = np.random.default_rng(0)

    def work() -> Lap:
        played = rollouts.run(lambda rows, _: rng.uniform(-1, 1, (len(rows), 3)).astype(np.float32), range(episodes))
        return Lap(sum(each.length for each in played))

    return work


def reference_evaluation(episodes: int = 10) -> Work:
    """Return the same in one environment, episode after episode."""
    import gymnasium

    env, rng = gymnasium.make(EVALUATED), np.random.default_rng(0)

    def work() -> Lap:
        steps = 0
        for seed in range(episodes):
            env.reset(seed=seed)
            done = False
            while not done:
                _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 3).astype(np.float32))
                done = terminated or truncated
                steps += 1
        return Lap(steps)

    return work


def other_rows(shape: str, batch_size: int, device: str) -> Iterator[Row]:
    """Yield what no algorithm has a part in."""
    for variant, make in (("eager", our_loading), ("reference", reference_loading)):
        what = f"minibatch of {TRANSITIONS:,} transitions"
        load = partial(make, shape, batch_size, TRANSITIONS, device)
        yield Row("loading", what, variant, load, "batch", shape, batch_size)
    if device == "cpu":
        yield Row("collection", COLLECTED, "eager", collection, "environment step")
        for variant, play in (("eager", our_evaluation), ("reference", reference_evaluation)):
            yield Row("evaluation", f"{EVALUATED}, random actions", variant, play, "environment step")


# ---------------------------------------------------------------- scaling


def scaling_rows(
    names: Sequence[str], shape: str, sizes: Sequence[int], device: str, variants: Sequence[str]
) -> Iterator[Row]:
    """Yield rows of a number that grows: the batch, the ensemble, the dataset."""
    for name in names:
        for batch_size in sizes:
            options = batch_size_options(name, shape, batch_size, device)
            setting = Setting(name, shape, batch_size, options, device, variants)
            yield from scaled(setting, "batch size", batch_size)
    if "BDPO" in names:
        for members in (1, 2, 5, 10, 20):
            setting = Setting("BDPO", shape, 64, {"critic": {"members": members}, "rho": 0.0}, device, variants)
            yield from scaled(setting, "ensemble members", members)
    for name in names:
        for hidden_dim in (64, 128, 256, 512, 1024):
            key = "diffusion" if "diffusion" in signature(ALGORITHMS[name]).parameters else None
            options = {key: {"hidden_dim": hidden_dim}} if key else {"hidden_dim": hidden_dim}
            yield from scaled(Setting(name, shape, 256, options, device, variants), "width", hidden_dim)
        chooses = isinstance(getattr(build(name, shape, {}, device), "acting", None), Acting)
        for candidates in (1, 4, 16, 64, 256) if chooses else ():
            setting = Setting(name, shape, 256, {"acting": {"candidates": candidates}}, device, ("eager",))
            make = partial(our_actions, setting, 1, "eager")
            yield setting.row("candidates", "eager", make, "call", scale=candidates)
        for states in (1, 10, 100, 1000):
            setting = Setting(name, shape, 256, {}, device, ("eager",))
            make = partial(our_actions, setting, states, "eager")
            yield setting.row("environments", "eager", make, "call", scale=states)
    for transitions in (10_000, 100_000, 1_000_000, 10_000_000):
        make = partial(our_loading, shape, 256, transitions, device)
        yield Row("loading", "transitions", "eager", make, "batch", shape, 256, transitions)


def batch_size_options(name: str, shape: str, batch_size: int, device: str) -> dict[str, Any]:
    """Return the options of an algorithm that say how many transitions of a batch its phases use."""
    algorithm = build(name, shape, {}, device)
    groups = [
        each for each in ("critic", "energy") if hasattr(getattr(algorithm, f"{each}_options", None), "batch_size")
    ]
    names = [each for each in ("alignment_batch_size", "policy_batch_size") if hasattr(algorithm, each)]
    return {each: {"batch_size": batch_size} for each in groups} | dict.fromkeys(names, batch_size)


def scaled(setting: Setting, what: str, scale: int) -> Iterator[Row]:
    """Yield the last phase of an algorithm in its variants."""
    phase = setting.build().phases()[-1].name
    steps = STEPS if setting.name.startswith("BDPO") else 1
    for variant in setting.variants:
        yield setting.row(what, variant, partial(our_steps, setting, phase, variant, steps), scale=scale)


# ---------------------------------------------------------------- measuring


def gemm_rate(device: str, size: int = 1024) -> float:
    """Return the FLOPs per second of a product of two matrices of `size` x `size`, the best of several."""
    a, b = torch.randn(2, size, size, device=device)
    taken = []
    for _ in range(12):
        started = now(device)
        a @ b
        taken.append(now(device) - started)
    return 2 * size**3 / min(taken)


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(row: Row, device: str) -> float | None:
    """Return by how much the peak of memory grows while a row is built and run once."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row.make()()
        return torch.cuda.max_memory_allocated()
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        torch.set_num_threads(1)  # the others have not come along through the fork, and would be waited for
        before = peak_memory()
        row.make()()
        theirs.send(peak_memory() - before)

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        process.join()


class Untracked:
    """Stands for the counter's record of which module is active: its hooks bar `autograd.grad` on leaves."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def count_flops(work: Work) -> float | None:
    """Return the FLOPs of matrix products per unit of one run."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()  # type: ignore[assignment]
    with counter:
        units = work().units
    return counter.get_total_flops() / units or None


def measure(rows: Sequence[Row], rounds: int, device: str) -> list[Result]:
    """Return what each row costs. Memory comes first, from processes that share no past."""
    for row in rows:
        if row.shape:
            dataset(row.shape, row.scale if row.what == "transitions" and row.scale else TRANSITIONS, device)
    # Neither is taken of what is compiled: most memory is the compiler's, and its functions hide their products.
    looked_into = [row.unit in ("step", "call") and row.variant not in WHOLE for row in rows]
    memory = [measure_memory(row, device) if look else None for row, look in zip(rows, looked_into, strict=True)]
    results = [Result(memory=each) for each in memory]
    works = [row.make() for row in rows]
    for work, look, result in zip(works, looked_into, results, strict=True):  # this warms up, too
        if look:
            result.flops = count_flops(work)
        else:
            for _ in range(WARM_UP):
                work()
    for _ in range(rounds):
        for row, work, result in zip(rows, works, results, strict=True):
            time.sleep(REST)
            started = now(device)
            with products_by_onednn() if row.variant in VARIANTS else nullcontext():  # ours, as in training
                lap = work()
            result.seconds.append((now(device) - started) / lap.units)
            result.calls += lap.calls
            for name, seconds in lap.parts.items():
                result.parts[name].append(seconds / lap.units)
    return results


# ---------------------------------------------------------------- tables


def ratio(ours: Result, theirs: Result) -> float:
    """Return the median over the rounds of how many times as long the other takes."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


Cell = str | float | None


def table(head: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """Return a Markdown table."""

    def words(cell: Cell) -> str:
        return (
            "" if cell is None else cell if isinstance(cell, str) else f"{cell:.3g}" if cell < 100 else f"{cell:,.0f}"
        )

    rows = [head, ["---"] * len(head), *([words(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def megabytes(result: Result | None) -> float | None:
    """Return the memory in MB."""
    return None if result is None or result.memory is None else result.memory / 1e6


def costs(rows: Sequence[Row], results: Sequence[Result], gemm: float) -> str:
    """Return the main table: a line for everything that was timed, beside its reference."""
    by_key = {(*row.key, row.variant): result for row, result in zip(rows, results, strict=True)}
    lines: list[list[Cell]] = []
    for row, result in zip(rows, results, strict=True):
        if row.variant not in VARIANTS:
            continue
        reference = by_key.get((*row.key, "reference"))
        rate = None if result.flops is None else result.flops / result.median
        times = None if reference is None else ratio(result, reference)
        lines.append([
            f"{row.subject}: {row.what}" + ("" if row.variant == "eager" else f" ({row.variant})"),
            row.shape, str(row.batch_size or ""), f"{1 / result.median:,.3g} {UNITS[row.unit]}/s", 1000 * result.median,
            None if reference is None else 1000 * reference.median,
            None if times is None else f"{times:.2f}",
            None if result.flops is None else result.flops / 1e9, None if rate is None else rate / 1e9,
            None if rate is None else f"{rate / gemm:.0%}", megabytes(result), megabytes(reference),
        ])  # fmt: skip
    head = (
        "",
        "shape",
        "batch",
        "rate",
        "ms",
        "reference ms",
        "ratio",
        "GFLOP",
        "GFLOP/s",
        "GEMM",
        "MB",
        "reference MB",
    )
    return table(head, lines)


def other_references(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return the ratios to further references."""
    by_key = {(*row.key, row.variant): result for row, result in zip(rows, results, strict=True)}
    lines: list[list[Cell]] = []
    for row, result in zip(rows, results, strict=True):
        if row.variant not in VARIANTS and row.variant != "reference":
            ours = by_key[(*row.key, "eager")]
            lines.append(
                [f"{row.subject}: {row.what}", row.variant, 1000 * result.median, f"{ratio(ours, result):.2f}"]
            )
    return table(("", "against", "ms", "ratio"), lines) if lines else ""


def split(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return where the time of gradient steps goes."""
    lines: list[list[Cell]] = []
    for row, result in zip(rows, results, strict=True):
        if result.parts:
            shares = {name: statistics.median(each) for name, each in result.parts.items()}
            total = sum(shares.values())
            words = ", ".join(f"{name} {1000 * each:.1f} ({each / total:.0%})" for name, each in shares.items())
            lines.append([f"{row.subject}: {row.what}", row.shape, str(row.batch_size), words])
    return table(("", "shape", "batch", "ms on the way to each optimizer's step"), lines) if lines else ""


def latencies(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return how long the choice of an action in a single state takes, as percentiles over all calls."""
    lines: list[list[Cell]] = []
    for row, result in zip(rows, results, strict=True):
        if row.what == "act, 1 state" and (row.variant in VARIANTS or row.variant == "reference"):
            percentiles = [1000 * result.percentile(each) for each in (50, 99)]
            lines.append([row.subject, row.shape, row.variant, str(len(result.calls)), *percentiles])
    return table(("act, 1 state", "shape", "by", "calls", "p50 ms", "p99 ms"), lines) if lines else ""


# How the time of large sizes should grow: by this power of the size. Small sizes cost calls, not arithmetic.
EXPECTED = {
    "batch size": 1,
    "ensemble members": 1,
    "width": 2,
    "candidates": 1,
    "environments": 1,
    "transitions": 0,
}


def scaling(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return the table of `--scaling`: the times, and by which power of the size they grow from one to the next."""
    lines: list[list[Cell]] = []
    smaller: dict[tuple[str, ...], tuple[int, float]] = {}  # size and seconds of the row before in each series
    for row, result in zip(rows, results, strict=True):
        assert row.scale is not None
        series, power = (row.subject, row.what, row.variant), None
        if series in smaller:
            size, seconds = smaller[series]
            power = f"{math.log(result.median / seconds) / math.log(row.scale / size):.2f}"
        smaller[series] = row.scale, result.median
        lines.append(
            [
                f"{row.subject}: {row.what}",
                f"{row.scale:,}",
                1000 * result.median,
                power,
                str(EXPECTED[row.what]),
                megabytes(result),
            ]
        )
    return table(("", "", "ms", "grows by the power", "at most, for large sizes", "MB"), lines)


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what has changed since an earlier run, also as a multiple of the references of each run."""

    def keyed(run: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        names = ("subject", "what", "shape", "batch_size", "scale", "variant")
        return {tuple(each[name] for name in names): each for each in run["rows"]}

    before, after = keyed(old), keyed(new)
    lines: list[list[Cell]] = []
    for key, row in after.items():
        if key in before and key[-1] in VARIANTS:
            one, other = before[key]["ms"], row["ms"]
            reference = (*key[:-1], "reference")
            both = reference in before and reference in after
            ratios = f"{before[reference]['ms'] / one:.2f} -> {after[reference]['ms'] / other:.2f}" if both else None
            lines.append([f"{key[0]}: {key[1]}", key[2], str(key[3] or ""), one, other, f"{one / other:.2f}", ratios])
    return table(("", "shape", "batch", "ms before", "ms now", "times as fast", "ratio to the reference"), lines)


def machine(device: str) -> str:
    """Return what decides about times: the processor, its vector width, the library of matrix products, the load."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if LINUX else []
    library = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    parts = (
        f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}",
        torch.backends.cpu.get_cpu_capability(),
        f"products by {library[1] if library else 'an unknown library'}",
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        load,
    )
    return ", ".join(parts)


def distance(gemm: float, device: str) -> str:
    """Return how fast this machine is beside the one of the tables."""
    if not TABLES.is_file() or device != "cpu":
        return ""
    theirs = json.loads(TABLES.read_text())
    return (
        f"Matrix products run at {gemm / 1e9:.0f} GFLOP/s here, {gemm / 1e9 / theirs['gemm_gflops']:.2f} times as fast "
        f"as on the machine of {TABLES.with_suffix('.md').name} ({theirs['machine']}): expect times to differ by about "
        "this factor, and ratios as in the tables only where the vector width is the same."
    )


def as_json(rows: Sequence[Row], results: Sequence[Result], gemm: float, device: str) -> dict[str, Any]:
    """Return all that was measured."""
    return {
        "device": device,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gemm_gflops": gemm / 1e9,
        "rows": [
            {name: value for name, value in vars(row).items() if name != "make"}
            | {"ms": 1000 * result.median, "ms_of_rounds": [1000 * each for each in result.seconds]}
            | {"flops": result.flops, "memory": result.memory}
            | {f"p{each}_ms": 1000 * result.percentile(each) for each in (50, 99) if result.calls}
            | {"parts_ms": {name: 1000 * statistics.median(each) for name, each in result.parts.items()}}
            for row, result in zip(rows, results, strict=True)
        ],
    }


# ---------------------------------------------------------------- the command line


def batch_size_of(word: str, name: str, shape: str) -> int:
    """Return a batch size from the command line, where "paper" stands for the one of the algorithm's config."""
    if word != "paper":
        return int(word)
    configs = [CONFIGS / f"{name.lower()}_{domain}.yaml" for domain in ("antmaze", "mujoco")]
    config = configs[0] if shape == "antmaze" and configs[0].is_file() else configs[1]
    size: int = yaml.safe_load(config.read_text())["data"]["batch_size"]
    return size


def all_rows(given: argparse.Namespace) -> list[Row]:
    """Return what is asked for."""
    names = list(ALGORITHMS) if given.algorithms == "all" else given.algorithms.split(",")
    variants = given.variants.split(",")
    if given.scaling:
        sizes = [int(word) for word in given.batch_size.split(",")] if given.batch_size else SCALING_BATCHES
        return list(scaling_rows(names, given.shape.split(",")[0], sizes, given.device, variants))
    rows: dict[tuple[Any, ...], Row] = {}
    for shape in given.shape.split(","):
        for name in names:
            for word in (given.batch_size or "256").split(","):
                size = batch_size_of(word, name, shape)
                setting = Setting(name, shape, size, given.options, given.device, variants)
                against = name == "DTQL" and given.against is not None
                authors = authors_rows(setting, given.against.absolute()) if against else ()
                for row in (*training_rows(setting), *acting_rows(setting), *authors):
                    rows.setdefault((*row.key, row.variant), row)
    if not given.only_algorithms:
        for row in other_rows(given.shape.split(",")[0], 256, given.device):
            rows.setdefault((*row.key, row.variant), row)
    return list(rows.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="all", help=f"all, or some of {','.join(ALGORITHMS)}")
    parser.add_argument("--shape", default="hopper", help=f"of {','.join(SHAPES)}")
    parser.add_argument(
        "--batch-size", help="numbers, and paper for the authors'; by default 256, or some for --scaling"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default="eager", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--options", type=json.loads, default={}, help="hyper-parameters of all of them, as JSON")
    parser.add_argument("--only-algorithms", action="store_true", help="leave out loading, collection and evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--default-allocator", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--against", type=Path, help="a checkout of the authors' DTQL, whose code is timed beside ours")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--compare", type=Path, help="figures of an earlier run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if not given.default_allocator:
        keep_freed_memory()
    rows = all_rows(given)
    results = measure(rows, given.rounds, given.device)
    gemm = gemm_rate(given.device)
    kind = "CPU" if given.device == "cpu" else "wall"
    print(f"{machine(given.device)}\n{kind} ms per unit, GEMM {gemm / 1e9:.0f} GFLOP/s\n")
    print(f"{distance(gemm, given.device)}\n")
    texts = [scaling(rows, results)] if given.scaling else [
        costs(rows, results, gemm), other_references(rows, results), latencies(rows, results), split(rows, results)
    ]  # fmt: skip
    figures = as_json(rows, results, gemm, given.device)
    if given.compare:
        texts.append(compared(json.loads(given.compare.read_text()), figures))
    print("\n\n".join(text for text in texts if text))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
