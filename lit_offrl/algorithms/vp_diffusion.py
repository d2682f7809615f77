"""What algorithms whose diffusion models follow the VP-SDE share: levels, noisy actions, Q, work on whole datasets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.diffusion.denoisers import diffuse
from lit_offrl.diffusion.schedules import VPSDE
from lit_offrl.networks.critics import EnsembleQ

SAMPLED_AT_ONCE = 4096  # rows of a sampler's batch: more need more memory and save no time
FIGURE_TIMES = (1e-3, 0.1, 0.25, 0.5)
FIGURE_SAMPLES, FIGURE_NEIGHBORS = 3000, 15


class VPDiffusion(OfflineAlgorithm):
    """An algorithm whose diffusion models see x_t = alpha_t x_0 + sigma_t epsilon for t in [1e-3, 1].

    Attributes:
        schedule: The VP-SDE of QGPO, EDA and AEPO.
        levels: What DPM-Solver++ visits in 15 evaluations, uniform in time.
        target_q: The Q networks whose values are final, which the algorithm makes.
    """

    schedule = VPSDE()
    levels = schedule.levels(15)
    target_q: EnsembleQ

    def noised(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return times `[batch]`, sorted, a_t at them of `actions` `[batch, ..., action_dim]`, and the noise in a_t."""
        start, end = self.levels[-1].time, self.levels[0].time
        time = (start + (end - start) * self.stratified(len(actions))).to(actions)
        noise = self.normal(*actions.shape)
        alpha, sigma = self.scales(time, actions)
        return time, diffuse(actions, noise, alpha, sigma), noise

    def scales(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at `time` `[batch]`, with the dimensions of `like` `[batch, ...]`."""
        time = time.view(-1, *[1] * (like.ndim - 1))
        return self.schedule.alpha(time), self.schedule.sigma(time)

    def best_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the smaller target Q, `[...]`, of leading dimensions that broadcast."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        return self.best_q(observations, actions)

    def in_pieces(
        self, function: Callable[[Tensor], Tensor], rows: Tensor, rows_at_once: int, description: str
    ) -> Tensor:
        """Return `function` of all `rows` `[n, ...]`, some at a time and in their order, behind a progress bar."""
        results = []
        with self.progress(description, len(rows), unit="state") as bar:
            for some in torch.split(rows, max(rows_at_once, 1)):
                results.append(function(some))
                bar.update(len(some))
        return torch.cat(results)

    def among(self, actions: Tensor, samples: Tensor, noise: Tensor, time: float) -> Tensor:
        """Return at which points of a grid several noisy samples fall: nothing has trained a network elsewhere.

        Args:
            actions: The grid, `[points, action_dim]`; the first two are neighbors.
            samples: Actions, `[samples, action_dim]`.
            noise: The noise that they get, of their shape.
            time: t.

        Returns:
            `[points]`, bool.
        """
        near = 2 * (actions[1] - actions[0]).norm()
        alpha, sigma = self.scales(actions.new_full((1,), time), samples)
        distance = torch.cdist(actions, diffuse(samples, noise, alpha, sigma))
        seen: Tensor = distance.topk(FIGURE_NEIGHBORS, largest=False).values[:, -1] < near
        return seen
