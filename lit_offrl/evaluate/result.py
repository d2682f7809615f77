"""What a fitted Q evaluation reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lit_offrl.evaluate.fqe import FQEOptions


@dataclass(frozen=True)
class FQEPoint:
    """One point of the curve of a fit.

    Attributes:
        step: Gradient steps.
        loss: Mean squared error of Q to its targets over the minibatches since the last point, in squared rewards.
        value: Mean of E_{a ~ pi} Q(s_0, a) over the first states of the held-out episodes.
        td_error: Mean square of Q(s, a) - r - discount (1 - d) Q(s', pi(s')) over the held-out transitions.
        largest_q: Largest |Q| there.
    """

    step: int
    loss: float
    value: float
    td_error: float
    largest_q: float


@dataclass(frozen=True)
class FQEResult:
    """The value of a policy by fitted Q evaluation; values and errors are in units of the data's own rewards.

    Attributes:
        curve: Points during the fit; the last one is the result.
        interval: 95% bootstrap interval of the value over held-out episodes; it holds no error of Q. None for one.
        data_value: Mean discounted return of the held-out episodes, as they were recorded; cut ones end with the cut.
        action_distance: Root mean square distance between the policy's actions and those of the held-out data at the
            same observations, per dimension, in units of half of the range of actions.
        largest_possible: Largest |Q| that rewards like those of the data allow, max |r| / (1 - discount).
        fitted_episodes: Number of episodes that Q was fitted on.
        fitted_transitions: Number of their transitions.
        held_out_episodes: Number of held-out episodes.
        held_out_transitions: Number of their transitions.
        options: Options of the fit.
        act_s: Seconds for the policy's actions.
        fit_s: Seconds for the fit.
    """

    curve: tuple[FQEPoint, ...]
    interval: tuple[float, float] | None
    data_value: float
    action_distance: float
    largest_possible: float
    fitted_episodes: int
    fitted_transitions: int
    held_out_episodes: int
    held_out_transitions: int
    options: FQEOptions
    act_s: float
    fit_s: float

    # Q of a linear problem may end at its bound exactly, up to an error of approximation.
    TOLERANCE = 1.1

    @property
    def last(self) -> FQEPoint:
        """The result."""
        return self.curve[-1]

    @property
    def diverged(self) -> bool:
        """Whether Q went beyond what rewards allow, or is no number."""
        return not self.last.largest_q <= self.TOLERANCE * self.largest_possible

    def lines(self) -> Iterator[str]:
        """Yield a summary for people, with what the value does not say."""
        last, options = self.last, self.options
        bounds = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        yield f"value {last.value:.4g}{bounds}; the held-out episodes' own: {self.data_value:.4g}"
        yield (
            f"held-out TD error {last.td_error:.3g} (mean square); largest |Q| {last.largest_q:.4g}, "
            f"possible {self.largest_possible:.4g}"
        )
        yield (
            f"the value is the mean over first states of the sum of rewards of the data, each weighed by "
            f"{options.discount:g}^t: it ranks policies, and is no return (a reward at step 100 weighs "
            f"{options.discount**100:.2g})"
        )
        yield "its interval is over the first states of episodes only: the error of Q itself is not in it"
        yield (
            f"the policy's actions lie {self.action_distance:.2f} of the half range from the logged ones (RMS): the "
            "farther, the more Q extrapolates, most in narrow data, and the less the value means"
        )
