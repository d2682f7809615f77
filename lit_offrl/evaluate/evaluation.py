"""From a policy and logged episodes to its value: the policy's actions, the fit, and what held-out episodes say."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.algorithms.sfbc import planned_returns
from lit_offrl.batch import Batch
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.evaluate.fqe import FQE, FQEOptions
from lit_offrl.evaluate.intervals import interval_of_mean
from lit_offrl.evaluate.result import FQEPoint, FQEResult

Array = NDArray[np.float32]

HELD_OUT_FRACTION = 0.1  # of the episodes, where the run held out none
CURVE_POINTS = 10
FIRST_ACTIONS = 32  # of the policy at each first state
STATES_AT_A_TIME = 256  # each may have a thousand candidate actions


def evaluate_policy(
    act: Callable[[Array], Array],
    transitions: Transitions,
    held_out: NDArray[np.bool_],
    action_bounds: tuple[Array, Array],
    options: FQEOptions,
    report: Callable[[FQEPoint], object] = lambda point: None,
) -> FQEResult:
    """Return the value of a policy by fitted Q evaluation.

    Q is fitted on the episodes that are not held out. The value, its interval and the errors are of the held-out ones.

    Args:
        act: The policy, from observations `[n, observation_dim]` to actions `[n, action_dim]` in the data's units; it
            draws its own noise.
        transitions: Logged episodes.
        held_out: Which transitions are held out, whole episodes, bool `[n]`.
        action_bounds: Smallest and largest action of each dimension. Logged actions beyond are clipped, as
            environments do.
        options: Options of the fit.
        report: Called with each point of the curve.

    Raises:
        UserError: No episode is held out, or none is left.
        RunFailure: Q became infinite.
    """
    if held_out.all() or not held_out.any():
        raise UserError(
            f"data.dataset: has {len(transitions.episode_starts)} episodes: fitted Q evaluation needs at least 2, one "
            "to fit on and one to hold out"
        )
    began = time.perf_counter()
    starts = np.zeros(len(transitions), bool)
    starts[transitions.episode_starts] = True
    first_observations = transitions.observations[starts & held_out]
    next_actions = _sample(act, transitions.next_observations, options.samples)
    first_actions = _sample(act, first_observations, FIRST_ACTIONS)
    own_actions = _sample(act, transitions.observations[held_out], 1)[:, 0]
    acted = time.perf_counter()

    returns = discounted_returns(transitions, options.discount)
    scale = float(np.sqrt(np.square(returns[~held_out]).mean())) or 1.0
    mean = transitions.observations[~held_out].mean(0)
    std = np.maximum(transitions.observations[~held_out].std(0), D4RLDataModule.SMALLEST_STD)
    low, high = action_bounds

    def observations_of(values: Array) -> Tensor:
        return torch.from_numpy((values - mean) / std)

    def actions_of(values: Array) -> Tensor:
        return torch.from_numpy((2 * (values - low) / (high - low) - 1).clip(-1, 1).astype(np.float32))

    def rows_of(mask: NDArray[np.bool_]) -> tuple[Batch, Tensor]:
        data = Batch(
            observations_of(transitions.observations[mask]),
            actions_of(transitions.actions[mask]),
            torch.from_numpy(transitions.rewards[mask]) / scale,
            observations_of(transitions.next_observations[mask]),
            torch.from_numpy(transitions.terminals[mask]).float(),
        )
        return data, actions_of(next_actions[mask])

    fqe = FQE(*rows_of(~held_out), options)
    judged, judged_next_actions = rows_of(held_out)
    first = observations_of(first_observations), actions_of(first_actions)
    curve = []
    for step, loss in fqe.fit(CURVE_POINTS):
        td_error = float(fqe.td_errors(judged, judged_next_actions).square().mean())
        largest = float(fqe.values(judged.observations, judged.actions[:, None]).abs().max())
        value = float(fqe.values(*first).mean())
        curve.append(FQEPoint(step, loss * scale**2, value * scale, td_error * scale**2, largest * scale))
        if not np.isfinite([loss, value, td_error]).all():
            raise RunFailure(f"fitted Q evaluation diverged before step {step:,}: Q is not finite; lower the discount")
        report(curve[-1])

    differences = actions_of(own_actions) - judged.actions
    return FQEResult(
        curve=tuple(curve),
        interval=interval_of_mean(scale * fqe.values(*first).numpy(), options.seed),
        data_value=float(returns[starts & held_out].mean()),
        action_distance=float(differences.square().mean().sqrt()),
        largest_possible=float(np.abs(transitions.rewards).max() / (1 - options.discount)),
        fitted_episodes=int((starts & ~held_out).sum()),
        fitted_transitions=int((~held_out).sum()),
        held_out_episodes=int((starts & held_out).sum()),
        held_out_transitions=int(held_out.sum()),
        options=options,
        act_s=acted - began,
        fit_s=time.perf_counter() - acted,
    )


def discounted_returns(transitions: Transitions, discount: float) -> NDArray[np.float64]:
    """Return the discounted sum of the rewards from each transition to the end of its episode, `[n]`.

    Nothing counts after a terminal step, also where the recorded episode goes on.
    """
    rewards = torch.from_numpy(transitions.rewards).double()
    ends = torch.from_numpy(transitions.episode_ends | transitions.terminals)
    returns: NDArray[np.float64] = planned_returns(rewards, ends, None, discount).numpy()
    return returns


def _sample(act: Callable[[Array], Array], observations: Array, samples: int) -> Array:
    """Return `samples` actions at each observation, `[n, samples, action_dim]`."""
    repeated = np.repeat(observations, samples, axis=0)
    pieces = np.array_split(repeated, -(-len(repeated) // STATES_AT_A_TIME))
    return np.concatenate([act(each) for each in pieces]).reshape(len(observations), samples, -1)
