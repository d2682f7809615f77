"""Behavior policies of the collected datasets.

A `Behavior` drives a body towards a point of a maze, an `Actor` performs a whole task. All are Markov: the action
depends on the observation, the target point and fresh noise only, so that a learned policy can fit them closely.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ARTIFACTS = Path(__file__).parent / "artifacts"
ANT_ARTIFACT = ARTIFACTS / "ant_student.npz"


class Behavior(Protocol):
    """Drives a body towards a point."""

    def act(
        self, observation: NDArray[np.floating], x: float, y: float, target: tuple[float, float]
    ) -> NDArray[np.float64]:
        """Return the action `[action_dim]` without noise at (x, y) on the way to `target` (meters).

        `observation` is the environment's, `[observation_dim]`.
        """


class Actor(Protocol):
    """Performs a task."""

    def act(self, observation: NDArray[np.floating], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """Return the action `[action_dim]` with the policy's own noise; without noise if `rng` is None."""


class PointController:
    """Proportional-derivative control of PointMaze's ball, `gain * (target - position) - damping * velocity`.

    Args:
        gain: Force per meter of distance.
        damping: Force per meter per second.
    """

    def __init__(self, gain: float = 10.0, damping: float = 1.0) -> None:
        self._gain = gain
        self._damping = damping

    def act(
        self, observation: NDArray[np.floating], x: float, y: float, target: tuple[float, float]
    ) -> NDArray[np.float64]:
        """Return the force `[2]`, clipped to [-1, 1]; `observation` is position and velocity, `[4]`."""
        force_x = self._gain * (target[0] - x) - self._damping * float(observation[2])
        force_y = self._gain * (target[1] - y) - self._damping * float(observation[3])
        force = np.array([force_x, force_y])
        return force.clip(-1.0, 1.0)


# The ant's legs are numbered front left, back left, back right, front right (legs 1 to 4 of the model). The ankles of
# legs 2 and 3 bend the other way, and the actuators begin with leg 4. If the leading side is k quarter turns from the
# body's front, the canonical leg j is the physical leg (j + k) mod 4.
_ANKLE_SIGN = np.array([1.0, -1.0, -1.0, 1.0])
_ACTUATOR_OF_LEG = np.array([2, 4, 6, 0])
_POSITION, _VELOCITY = 5, 19  # offsets of joint angles and joint velocities in the 27-d observation


def _leg_tables() -> tuple[list[NDArray[np.intp]], list[NDArray[np.float64]], list[NDArray[np.intp]]]:
    """Return, per number of quarter turns: joint indices `[16]` with their signs, and actuator indices `[8]`."""
    joints, signs, actuators = [], [], []
    for quarter_turns in range(4):
        legs = (np.arange(4) + quarter_turns) % 4
        hips, ankles = 2 * legs, 2 * legs + 1
        joints.append(
            np.concatenate([_POSITION + hips, _POSITION + ankles, _VELOCITY + hips, _VELOCITY + ankles]).astype(np.intp)
        )
        ones = np.ones(4)
        signs.append(np.concatenate([ones, _ANKLE_SIGN[legs], ones, _ANKLE_SIGN[legs]]))
        actuators.append(np.concatenate([_ACTUATOR_OF_LEG[legs], _ACTUATOR_OF_LEG[legs] + 1]).astype(np.intp))
    return joints, signs, actuators


_JOINTS, _JOINT_SIGNS, _ACTUATORS = _leg_tables()
ANT_FEATURES = 26


def ant_heading(observation: NDArray[np.floating], direction: float) -> tuple[int, float]:
    """Return the angle from the body's front to a direction: quarter turns (0 to 3) and the rest in [-pi/4, pi/4].

    The ant is the same from all four sides, so it need not turn: the side nearest to the direction leads.

    Args:
        observation: `[27]`, AntMaze's `observation`.
        direction: Direction of travel in the world, radians.
    """
    w, x, y, z = observation[1:5].tolist()
    yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    error = math.remainder(direction - yaw, 2 * math.pi)
    quarter_turns = round(error / (math.pi / 2))
    return quarter_turns % 4, error - quarter_turns * math.pi / 2


def ant_features(
    observation: NDArray[np.floating], direction: float, quarter_turns: int, error: float
) -> NDArray[np.float64]:
    """Return the inputs of the walking network, `[26]`, which do not depend on which side leads.

    Height, tilt (2), linear velocity (3), angular velocity (3), joint angles (8), joint velocities (8) and the heading
    error, all seen from the leading side.

    Args:
        observation: `[27]`, AntMaze's `observation`.
        direction: Direction of travel in the world, radians.
        quarter_turns: From `ant_heading`.
        error: From `ant_heading`, radians.
    """
    height, w, x, y, z = observation[:5].tolist()
    vx, vy, vz, wx, wy, wz = observation[13:19].tolist()
    tilt_x, tilt_y = 2 * (x * z - w * y), 2 * (y * z + w * x)  # the world's up axis in the body's frame
    cos_k, sin_k = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns]
    facing = direction - error
    cos_f, sin_f = math.cos(facing), math.sin(facing)
    features = np.empty(ANT_FEATURES)
    features[:10] = (
        height,
        cos_k * tilt_x + sin_k * tilt_y,
        cos_k * tilt_y - sin_k * tilt_x,
        cos_f * vx + sin_f * vy,
        cos_f * vy - sin_f * vx,
        vz,
        cos_k * wx + sin_k * wy,
        cos_k * wy - sin_k * wx,
        wz,
        error,
    )
    features[10:] = observation[_JOINTS[quarter_turns]] * _JOINT_SIGNS[quarter_turns]
    return features


def ant_to_canonical(action: NDArray[np.float64], quarter_turns: int) -> NDArray[np.float64]:
    """Return an action `[8]` of the environment as hip (4) and ankle (4) torques seen from the leading side."""
    return action[_ACTUATORS[quarter_turns]] * _JOINT_SIGNS[quarter_turns][:8]


class AntWalker:
    """A small network that walks the ant in any direction; it imitates a scripted gait.

    See tools/distill_ant_student.py.

    Arrays of the file: `mean` and `scale` of the features, `w0, b0, w1, b1, w2, b2` of a ReLU network, all
    float16. Weights are `[in, out]`.

    Args:
        artifact: The file.
    """

    def __init__(self, artifact: Path = ANT_ARTIFACT) -> None:
        with np.load(artifact, allow_pickle=False) as arrays:
            weights = {name: arrays[name].astype(np.float64) for name in arrays.files}
        # The first layer includes the normalization.
        self._w0 = np.ascontiguousarray((weights["w0"] / weights["scale"][:, None]).T)
        self._b0 = weights["b0"] - self._w0 @ weights["mean"]
        self._w1, self._b1 = np.ascontiguousarray(weights["w1"].T), weights["b1"]
        self._w2, self._b2 = np.ascontiguousarray(weights["w2"].T), weights["b2"]

    def act(
        self, observation: NDArray[np.floating], x: float, y: float, target: tuple[float, float]
    ) -> NDArray[np.float64]:
        """Return the torques `[8]`, clipped to [-1, 1]; `observation` is AntMaze's, `[27]`."""
        direction = math.atan2(target[1] - y, target[0] - x)
        quarter_turns, error = ant_heading(observation, direction)
        return self.torques(ant_features(observation, direction, quarter_turns, error), quarter_turns)

    def torques(self, features: NDArray[np.float64], quarter_turns: int) -> NDArray[np.float64]:
        """Return the torques `[8]` in the order of the environment's actuators for `ant_features`."""
        hidden = np.maximum(self._w0 @ features + self._b0, 0.0)
        hidden = np.maximum(self._w1 @ hidden + self._b1, 0.0)
        action = np.empty(8)
        action[_ACTUATORS[quarter_turns]] = (self._w2 @ hidden + self._b2) * _JOINT_SIGNS[quarter_turns][:8]
        return np.clip(action, -1.0, 1.0)


def ant_is_down(observation: NDArray[np.floating]) -> bool:
    """Return whether the ant lies on its back or side, where it cannot get up; `observation` is AntMaze's, `[27]`."""
    _, x, y, _ = observation[1:5].tolist()
    return bool(1 - 2 * (x * x + y * y) < 0.0)


class UniformActor:
    """Actions drawn uniformly from [-1, 1].

    Args:
        action_dim: Size of an action.
    """

    def __init__(self, action_dim: int) -> None:
        self._action_dim = action_dim

    def act(self, observation: NDArray[np.floating], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """Return a random action `[action_dim]`, or zeros if `rng` is None."""
        return np.zeros(self._action_dim) if rng is None else rng.uniform(-1.0, 1.0, self._action_dim)


class LinearActor:
    """A linear policy with Gaussian noise, clipped to [-1, 1].

    See tools/search_hopper.py.

    Arrays of the file, all float16: `weight` `[action_dim, observation_dim]`, `mean` and `scale` of the
    observations, and the noise's standard deviation `noise`.

    Args:
        artifact: The file.
    """

    def __init__(self, artifact: Path) -> None:
        with np.load(artifact, allow_pickle=False) as arrays:
            weights = {name: arrays[name].astype(np.float64) for name in arrays.files}
        self._weight = weights["weight"] / weights["scale"]
        self._bias = -self._weight @ weights["mean"]
        self._noise = float(weights["noise"])

    def act(self, observation: NDArray[np.floating], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """Return the action `[action_dim]`, without noise if `rng` is None."""
        action = self._weight @ observation + self._bias
        if rng is not None:
            action = action + self._noise * rng.standard_normal(len(action))
        clipped: NDArray[np.float64] = np.clip(action, -1.0, 1.0)
        return clipped


_LOG_STD_RANGE = -20.0, 2.0  # of stable-baselines3


class SACActor:
    """A policy trained by soft actor-critic: the tanh of a Gaussian, for actions in [-1, 1].

    See tools/train_locomotion.py.

    The arrays of the file, all float16, have the names of stable-baselines3's actor: `latent_pi.0` and
    `latent_pi.2`, two ReLU layers, then `mu` and `log_std`; each has `.weight` `[out, in]` and `.bias`.

    Args:
        artifact: The file.
    """

    def __init__(self, artifact: Path) -> None:
        with np.load(artifact, allow_pickle=False) as arrays:
            weights = {name: arrays[name].astype(np.float64) for name in arrays.files}
        self._w0, self._b0 = weights["latent_pi.0.weight"], weights["latent_pi.0.bias"]
        self._w1, self._b1 = weights["latent_pi.2.weight"], weights["latent_pi.2.bias"]
        # One matrix for both heads.
        self._w2 = np.concatenate([weights["mu.weight"], weights["log_std.weight"]])
        self._b2 = np.concatenate([weights["mu.bias"], weights["log_std.bias"]])

    def act(self, observation: NDArray[np.floating], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """Return a sampled action `[action_dim]`, or the mode if `rng` is None."""
        hidden = np.maximum(self._w0 @ observation + self._b0, 0.0)
        hidden = np.maximum(self._w1 @ hidden + self._b1, 0.0)
        mean, log_std = np.split(self._w2 @ hidden + self._b2, 2)
        if rng is not None:
            mean = mean + np.exp(np.clip(log_std, *_LOG_STD_RANGE)) * rng.standard_normal(len(mean))
        action: NDArray[np.float64] = np.tanh(mean)
        return action


def load_actor(artifact: Path) -> Actor:
    """Return the locomotion policy of a file."""
    with np.load(artifact, allow_pickle=False) as arrays:
        is_linear = "weight" in arrays
    return LinearActor(artifact) if is_linear else SACActor(artifact)
