"""What evaluations in environments and on bandits share: the scores of each actor, and how they are logged."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.base import Actor, OfflineAlgorithm, select
from lit_offrl.callbacks.base import AlgorithmCallback


class Evaluation(AlgorithmCallback):
    """A callback that scores the algorithm's actors.

    Attributes:
        SCORES: The dataclass of an actor's scores; its method `logged(prefix)` returns their values by tag.
        scores: Scores of each actor in the latest evaluation.
        scored_step: Gradient step of the latest evaluation; None before the first.
    """

    SCORES: ClassVar[type[Any]]

    def __init__(self) -> None:
        self.scores: dict[str, Any] = {}
        self.scored_step: int | None = None

    def log_in_hook(self, algorithm: OfflineAlgorithm) -> None:
        """Log the scores in a hook in which Lightning allows `log`."""
        for values in self._logged():
            algorithm.log_dict(values)
        algorithm.log("step", float(algorithm.gradient_step))

    def log_directly(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log the scores in any other hook."""
        for logger in trainer.loggers:
            for values in self._logged():
                logger.log_metrics(values, step=algorithm.gradient_step)
            logger.save()

    def _logged(self) -> list[dict[str, float]]:
        prefixes = {name: "eval" if name == "policy" else f"eval_{name}" for name in self.scores}
        return [self.scores[name].logged(prefix) for name, prefix in prefixes.items()]

    def state_dict(self) -> dict[str, Any]:
        """Return the latest scores."""
        return {"scores": {name: asdict(each) for name, each in self.scores.items()}, "scored_step": self.scored_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of the checkpoint."""
        self.scores = {name: self.SCORES(**each) for name, each in state_dict["scores"].items()}
        self.scored_step = state_dict["scored_step"]


def best_of_behavior(algorithm: OfflineAlgorithm, count: int) -> dict[str, Actor]:
    """Return an actor that takes the best of some behavior actions by the policy's Q; none where there is none.

    It is the control that shows what a policy adds to a choice by its Q. Candidates are judged as the environment would
    see them, clamped.

    Args:
        algorithm: Has a behavior model and a critic, or gets no such actor.
        count: Actions of the behavior model to choose from; 0 for no such actor.
    """
    behavior = algorithm.actors().get("behavior")
    has_critic = type(algorithm).value_of is not OfflineAlgorithm.value_of
    if not count or behavior is None or not has_critic or algorithm.has_memory:
        return {}

    def act(observations: Tensor, generator: torch.Generator | None) -> Tensor:
        rows = observations.repeat_interleave(count, 0)
        candidates = algorithm.units.clamp(behavior(rows, generator))
        values = algorithm.value_of(rows, candidates)
        assert values is not None
        shape = (len(observations), count)
        return select(candidates.view(*shape, -1), values.view(shape), 0.0, None)

    return {f"behavior_best_of_{count}": act}
