"""The training loop: phases, updates, and the means of a block of updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_offrl.batch import Batch
from lit_offrl.errors import RunFailure

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm

Info = dict[str, Tensor]  # detached scalars by name
Named = tuple[tuple[str, ...], Tensor]  # the same as names and one tensor `[names]`


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        name: What the progress bar shows.
        update: Performs one gradient step. It may be compiled or captured, so it reads no scalars and does not know
            the gradient step.
        steps: Length in gradient steps; the last phase, the main one, has what remains of `max_steps`.
        begin: Called once before the first update, when all earlier phases are complete.
        prepare: Called before each update with its batch, for work that is done once or now and then, or that takes
            minutes; it may read scalars and the gradient step.
    """

    name: str
    update: Callable[[Batch], Info]
    steps: int = 0
    begin: Callable[[], None] = lambda: None
    prepare: Callable[[Batch], None] = lambda batch: None


def main_start(phases: Sequence[Phase]) -> int:
    """Return the gradient step at which the main phase begins."""
    return sum(phase.steps for phase in phases[:-1])


def phase_at(phases: Sequence[Phase], gradient_step: int) -> tuple[Phase, int]:
    """Return the phase of the update that follows `gradient_step` updates, and the step at which the phase begins."""
    begins = 0
    for phase in phases[:-1]:
        if gradient_step < begins + phase.steps:
            return phase, begins
        begins += phase.steps
    return phases[-1], begins


RunUpdate = Callable[["OfflineAlgorithm", Phase, Batch], Named]


def run_eagerly(algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> Named:
    """Perform one update of a phase and move the target networks; return what the update reports."""
    info = phase.update(batch)
    algorithm.update_targets()
    return tuple(info), torch.stack(list(info.values()))


def advance(algorithm: OfflineAlgorithm, batch: Batch) -> Named:
    """Perform the next gradient step, whatever phase it belongs to; return what the update reports."""
    phase, begins = phase_at(algorithm.phases(), algorithm.gradient_step)
    if algorithm.gradient_step == begins:
        phase.begin()
    phase.prepare(batch)
    algorithm.optimizer_set.set_rates(algorithm.gradient_step - algorithm.main_start, algorithm.main_steps)
    named = algorithm.run_update(algorithm, phase, batch)
    algorithm.gradient_step += 1
    return named


def train_block(algorithm: OfflineAlgorithm, block: Batch) -> dict[str, float]:
    """Perform the updates of a block; return the mean of each scalar over the updates that report it.

    The scalars stay on the device until the block is complete: one host synchronization per block.

    Raises:
        RunFailure: A mean is not finite.
    """
    sums: dict[tuple[str, ...], Tensor] = {}  # by the names that are summed: updates may differ in what they report
    counts: dict[tuple[str, ...], int] = {}
    for batch in block.updates():
        names, values = advance(algorithm, batch)
        sums[names] = sums.get(names, 0) + values
        counts[names] = counts.get(names, 0) + 1
    total = torch.cat(list(sums.values()))
    if algorithm.optimizer_set.average is not None:
        (total,) = algorithm.optimizer_set.average([total])
    means: dict[str, float] = {}
    updates: dict[str, int] = {}
    values_of = iter(total.tolist())
    for names, count in counts.items():
        for name in names:
            means[name] = means.get(name, 0.0) + next(values_of)
            updates[name] = updates.get(name, 0) + count
    means = {name: value / updates[name] for name, value in means.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise RunFailure(
                f"train/{name} became {mean} by gradient step {algorithm.gradient_step}; "
                "lower the learning rates, or check the data with `data check`"
            )
    return means
