"""Noisy actions on the VP-SDE, with its solver, and at the steps of a chain; and sampling for whole datasets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_offrl.algorithms.noise import NoiseStream
from lit_offrl.diffusion.denoisers import Denoise, diffuse
from lit_offrl.diffusion.samplers import sample_dpm_singlestep
from lit_offrl.diffusion.schedules import VPSDE, DiscreteVP
from lit_offrl.system.progress import progress_bar

SAMPLED_AT_ONCE = 4096  # rows of a sampler's batch: larger batches need more memory and save no time
FIGURE_TIMES = (1e-3, 0.1, 0.25, 0.5)
FIGURE_SAMPLES, FIGURE_NEIGHBORS = 3000, 15


class VPDiffusion:
    """Noisy actions a_t = alpha_t a_0 + sigma_t epsilon for t in [1e-3, 1], and the solver that goes back.

    Args:
        solver_steps: Network evaluations per sample.

    Attributes:
        levels: Noise levels that the solver visits, uniform in time.
    """

    schedule = VPSDE()

    def __init__(self, solver_steps: int = 15) -> None:
        self.levels = self.schedule.levels(solver_steps)
        self.start, self.end = self.levels[-1].time, self.levels[0].time  # 1e-3 and 1

    def noised(self, actions: Tensor, stream: NoiseStream) -> tuple[Tensor, Tensor, Tensor]:
        """Return times `[batch]`, a_t at these times of `actions` `[batch, ..., action_dim]`, and the noise in a_t.

        The times are stratified: one in each of `batch` equal parts of [1e-3, 1], in increasing order.
        """
        time = (self.start + (self.end - self.start) * stream.stratified(len(actions))).to(actions)
        noise = stream.normal(*actions.shape)
        alpha, sigma = self.scales(time, actions)
        return time, diffuse(actions, noise, alpha, sigma), noise

    def scales(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at `time` `[batch]`, with the dimensions of `like` `[batch, ...]`."""
        time = time.view(-1, *[1] * (like.ndim - 1))
        return self.schedule.alpha(time), self.schedule.sigma(time)

    def solve(self, denoise: Denoise, noise: Tensor) -> Tensor:
        """Return a_0 of `noise`, which is a_t at t = 1, by DPM-Solver++ of order 2 with a model of the clean action."""
        return sample_dpm_singlestep(denoise, noise, self.levels)

    def near_samples(self, grid: Tensor, samples: Tensor, noise: Tensor, time: float) -> Tensor:
        """Return at which points of a grid several noisy samples lie; elsewhere no network has been trained.

        Args:
            grid: Actions, `[points, action_dim]`; the first two are neighbors.
            samples: Clean actions, `[samples, action_dim]`.
            noise: Their noise, of the same shape.
            time: t.

        Returns:
            `[points]`, bool.
        """
        near = 2 * (grid[1] - grid[0]).norm()
        alpha, sigma = self.scales(grid.new_full((1,), time), samples)
        distance = torch.cdist(grid, diffuse(samples, noise, alpha, sigma))
        is_near: Tensor = distance.topk(FIGURE_NEIGHBORS, largest=False).values[:, -1] < near
        return is_near


def noised_at_steps(
    schedule: DiscreteVP, actions: Tensor, stream: NoiseStream, *, stratified: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps n of a chain, uniform on 1 .. N, `[batch]`, the `actions` at them, and the noise in these.

    Stratified steps are in increasing order, one in each of `batch` equal parts.
    """
    share = stream.stratified(len(actions)) if stratified else stream.uniform(len(actions))
    step = 1 + (schedule.steps * share).long()
    epsilon = stream.normal(*actions.shape)
    return step, diffuse(actions, epsilon, schedule.alpha(step)[:, None], schedule.sigma(step)[:, None]), epsilon


def for_all_rows(
    function: Callable[[Tensor], Tensor], rows: Tensor, rows_at_once: int, description: str, *, show_progress: bool
) -> Tensor:
    """Return `function` of all `rows` `[n, ...]`, computed piece by piece, with a progress bar if wanted."""
    results = []
    with progress_bar(description, len(rows), unit="state", disable=not show_progress) as bar:
        for piece in torch.split(rows, max(rows_at_once, 1)):
            results.append(function(piece))
            bar.update(len(piece))
    return torch.cat(results)
