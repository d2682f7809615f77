"""Distill the scripted ant gait into the small memoryless network that collects the AntMaze data.

    python tools/distill_ant_student.py [--rounds 3] [--samples 200000]

The gait (tools/ant_gait.npz, 43 parameters found by CMA-ES) is an oscillator with a hidden phase. Round 0 clones the
gait from its own walks; the ant moves with action noise, and the labels are the actions without noise. Later rounds are
DAgger (Ross et al. 2011): the student walks, and the gait labels the student's states. The label has the phase at which
the gait's action is closest to the student's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from mujoco import rollout
from numpy.typing import NDArray

from lit_offrl.collect.behaviors import (
    ANT_ARTIFACT,
    AntWalker,
    ant_features,
    ant_heading,
    ant_to_canonical,
)

Floats = NDArray[np.float64]
GAIT = Path(__file__).parent / "ant_gait.npz"
CONTROL_PERIOD = 0.05  # seconds per environment step: frame skip 5 at 0.01 s
HYSTERESIS = np.radians(58.0)  # heading error at which the gait changes its leading side
COMMAND_SCALE = 0.8  # keeps all torques inside the action box, with room for noise

LEFT = np.array([1.0, 1.0, -1.0, -1.0])
FRONT = np.array([1.0, 0.0, 0.0, 1.0])
PARAMETER_ROW = np.array([0, 1, 1, 0])  # the front legs share parameters, and so do the rear legs
ANKLE_SIGN = np.array([1.0, -1.0, -1.0, 1.0])
ACTUATOR_OF_LEG = np.array([2, 4, 6, 0])


def wrap(angle: Floats) -> Floats:
    """Map angles to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


class Gait:
    """A central pattern generator for n ants.

    Each joint has a target angle of two harmonics with feedback of heading and tilt, and a PD controller.
    """

    def __init__(self, parameters: Floats, n: int) -> None:
        self.coefficients = parameters[:20].reshape(2, 2, 5)[PARAMETER_ROW]  # leg, joint (hip, ankle), harmonic
        self.frequency = float(np.clip(parameters[20], 0.5, 6.0))
        self.hip_p, self.hip_d, self.ankle_p, self.ankle_d = parameters[21:25]
        self.steering = parameters[25:37].reshape(4, 3)
        self.balance = parameters[37:43]
        self.phase = np.zeros(n)
        self.quarter_turns = np.full(n, -1)

    def lead(self, observations: Floats, directions: Floats) -> tuple[NDArray[np.intp], Floats]:
        """Choose the leading side with hysteresis; return its quarter turns (0 to 3) and the heading error, `[n]`."""
        w, x, y, z = observations[:, 1:5].T
        yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        total = wrap(directions - yaw)
        error = wrap(total - self.quarter_turns * np.pi / 2)
        fresh = np.round(total / (np.pi / 2)).astype(int) % 4
        self.quarter_turns = np.where(
            (self.quarter_turns < 0) | (np.abs(error) >= HYSTERESIS), fresh, self.quarter_turns
        )
        return self.quarter_turns, wrap(total - self.quarter_turns * np.pi / 2)

    def torques(
        self, observations: Floats, directions: Floats, k: NDArray[np.intp], error: Floats, phase: Floats
    ) -> Floats:
        """Return torques `[n, 8]` at the given phases."""
        n = len(observations)
        rows = np.arange(n)[:, None]
        w, x, y, z = observations[:, 1:5].T
        up_x, up_y = 2 * (x * z - w * y), 2 * (y * z + w * x)
        cos, sin = np.cos(k * np.pi / 2), np.sin(k * np.pi / 2)
        tilt_x, tilt_y = cos * up_x + sin * up_y, cos * up_y - sin * up_x
        spin = observations[:, 16:19]
        spin_x, spin_y = cos * spin[:, 0] + sin * spin[:, 1], cos * spin[:, 1] - sin * spin[:, 0]
        aside = np.cos(directions) * observations[:, 14] - np.sin(directions) * observations[:, 13]
        legs = (np.arange(4) + k[:, None]) % 4
        angles, speeds = observations[:, 5:13], observations[:, 19:27]
        hip, hip_speed = angles[:, 0::2][rows, legs], speeds[:, 0::2][rows, legs]
        sign = ANKLE_SIGN[legs]
        ankle, ankle_speed = angles[:, 1::2][rows, legs] * sign, speeds[:, 1::2][rows, legs] * sign

        p = phase[:, None] + np.where(LEFT > 0, 0.0, np.pi)
        basis = np.stack([np.sin(p), np.cos(p), np.sin(2 * p), np.cos(2 * p)], -1)
        swing = np.einsum("nlb,ljb->nlj", basis, self.coefficients[..., 1:])
        offset = self.coefficients[..., 0]
        steer = np.tanh(np.stack([error, spin[:, 2] * 0.3, aside * 0.5], -1) @ self.steering.T)
        b = self.balance
        pitch = (b[0] * tilt_x + b[1] * spin_y * 0.3)[:, None]
        roll = (b[2] * tilt_y + b[3] * spin_x * 0.3)[:, None]
        hip_target = LEFT * (offset[:, 0] + swing[..., 0] * (1 - LEFT * steer[:, 2:3]))
        hip_target += FRONT * steer[:, 0:1] + (1 - FRONT) * steer[:, 1:2]
        ankle_target = offset[:, 1] + swing[..., 1] * (1 - LEFT * steer[:, 3:4]) + (2 * FRONT - 1) * pitch + LEFT * roll
        torques = np.empty((n, 8))
        columns = ACTUATOR_OF_LEG[legs]
        torques[rows, columns] = np.clip(self.hip_p * (hip_target - hip) - self.hip_d * hip_speed, -1, 1)
        torques[rows, columns + 1] = sign * np.clip(
            self.ankle_p * (ankle_target - ankle) - self.ankle_d * ankle_speed, -1, 1
        )
        return COMMAND_SCALE * torques

    def advance(self) -> None:
        """Advance the phases by one control period."""
        self.phase = (self.phase + 2 * np.pi * self.frequency * CONTROL_PERIOD) % (2 * np.pi)


class Ants:
    """n ants on an open plane with the physics of AntMaze, simulated by mujoco.rollout on several threads."""

    def __init__(self, n: int, threads: int) -> None:
        path = Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"
        self.model = mujoco.MjModel.from_xml_path(str(path))
        self.workers = [mujoco.MjData(self.model) for _ in range(threads)]
        kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.rest = np.zeros(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.workers[0], self.rest, kind)
        self.pool = rollout.Rollout(nthread=threads)
        self.state = np.tile(self.rest, (n, 1))

    def reset(self, mask: NDArray[np.bool_], rng: np.random.Generator) -> None:
        """Reset the ants of the mask to rest; half of them get a random heading, pose and velocity."""
        count = int(mask.sum())
        state = np.tile(self.rest, (count, 1))
        perturbed = rng.random(count) < 0.5
        yaw = rng.uniform(-np.pi, np.pi, count) * perturbed
        state[:, 4], state[:, 7] = np.cos(yaw / 2), np.sin(yaw / 2)
        state[:, 8:16] += rng.uniform(-0.15, 0.15, (count, 8)) * perturbed[:, None]
        state[:, 16:30] += 0.1 * rng.standard_normal((count, 14)) * perturbed[:, None]
        self.state[mask] = state

    @property
    def observations(self) -> Floats:
        """AntMaze's `observation`, `[n, 27]`."""
        return self.state[:, 3:30].copy()

    def step(self, actions: Floats) -> None:
        """Advance all ants by one control period."""
        control = np.repeat(actions[:, None], 5, axis=1)
        states, _ = self.pool.rollout([self.model] * len(self.state), self.workers, self.state, control)
        self.state = states[:, -1].copy()

    @property
    def down(self) -> NDArray[np.bool_]:
        """Mask of the ants that lie on their backs or sides."""
        upright: Floats = 1 - 2 * (self.state[:, 5] ** 2 + self.state[:, 6] ** 2)
        return upright < 0.2


def walk(
    gait: Gait, ants: Ants, student: AntWalker | None, samples: int, rng: np.random.Generator
) -> tuple[Floats, Floats, dict[str, float]]:
    """Walk for about `samples` steps; return features `[m, 26]`, canonical labels `[m, 8]`, and statistics.

    The gait walks where there is no student yet.
    """
    n = len(ants.state)
    everyone = np.ones(n, bool)
    ants.reset(everyone, rng)
    gait.phase[:] = 0.0
    gait.quarter_turns[:] = -1
    directions = rng.choice([0.0, np.pi / 2, np.pi, -np.pi / 2], n) + rng.uniform(-0.6, 0.6, n)
    noise = rng.choice([0.0, 0.05, 0.1, 0.2, 0.3] if student is None else [0.0, 0.0, 0.05, 0.1, 0.15], n)
    age, life = np.zeros(n, int), rng.integers(100, 400, n)
    drift = np.zeros(n)
    features, labels = [], []
    falls = progress = 0.0
    grid = np.linspace(-0.6, 0.6, 9)
    for _ in range(samples // n):
        observations = ants.observations
        aim = directions + drift
        k, error = gait.lead(observations, aim)
        if student is not None:
            heading = [ant_heading(o, d) for o, d in zip(observations, aim, strict=True)]
            k = np.array([h[0] for h in heading])
            error = np.array([h[1] for h in heading])
        x = np.stack([ant_features(*item) for item in zip(observations, aim, k.tolist(), error.tolist(), strict=True)])
        label = gait.torques(observations, aim, k, error, gait.phase)
        acted = label
        if student is not None:
            acted = np.stack([student.torques(f, int(turn)) for f, turn in zip(x, k, strict=True)])
            tries = np.stack([gait.torques(observations, aim, k, error, gait.phase + delta) for delta in grid])
            # The second term keeps the phase near the running one; without it the phase of a standing ant would stop.
            cost = ((tries - acted) ** 2).sum(-1) + 0.05 * grid[:, None] ** 2
            best = cost.argmin(0)
            label = tries[best, np.arange(n)]
            gait.phase = gait.phase + grid[best] * (age > 2)
        features.append(x)
        labels.append(np.stack([ant_to_canonical(a, int(turn)) for a, turn in zip(label, k, strict=True)]))
        before = ants.state[:, 1:3].copy()
        ants.step(np.clip(acted + noise[:, None] * rng.standard_normal((n, 8)), -1, 1))
        moved = ants.state[:, 1:3] - before
        progress += float((np.cos(aim) * moved[:, 0] + np.sin(aim) * moved[:, 1]).sum())
        gait.advance()
        age += 1
        drift = 0.98 * drift + 0.05 * rng.standard_normal(n)
        turning = rng.random(n) < 1 / 60
        turn = np.radians(rng.choice([90, -90, 180, 45, -45, 20, -20], n, p=[0.25, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1]))
        directions = np.where(turning, directions + turn, directions)
        falls += float(ants.down.sum())
        over = ants.down | (age >= life)
        if over.any():
            ants.reset(over, rng)
            gait.phase[over] = 0.0
            gait.quarter_turns[over] = -1
            age[over] = 0
            drift[over] = 0.0
            directions[over] = rng.choice([0.0, np.pi / 2, np.pi, -np.pi / 2], int(over.sum()))
    steps = samples // n * n
    facts = {"falls_per_1000_steps": 1000 * falls / steps, "speed_m_per_s": progress / steps / CONTROL_PERIOD}
    return np.concatenate(features), np.concatenate(labels), facts


def fit(
    features: Floats, labels: Floats, epochs: int, seed: int, start: dict[str, Floats] | None = None
) -> tuple[dict[str, Floats], float]:
    """Train the network by mean squared error; return its arrays and R2 on held-out data."""
    torch.manual_seed(seed)
    mean, scale = features.mean(0), features.std(0) + 1e-3
    if start is not None:
        mean, scale = start["mean"], start["scale"]
    # The last tenth is held out. It is contiguous in time: neighboring steps are too similar to split at random.
    x = torch.tensor((features - mean) / scale, dtype=torch.float32)
    y = torch.tensor(labels, dtype=torch.float32)
    cut = int(0.9 * len(x))
    layers = [torch.nn.Linear(*sizes) for sizes in ((x.shape[1], 128), (128, 128), (128, 8))]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    if start is not None:
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.weight.copy_(torch.tensor(start[f"w{i}"].T))
                layer.bias.copy_(torch.tensor(start[f"b{i}"]))
    batch = 1024
    steps = epochs * cut // batch
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        rows = torch.randint(cut, (batch,))
        loss = torch.nn.functional.mse_loss(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        r2 = 1 - float(((net(x[cut:]) - y[cut:]) ** 2).sum() / ((y[cut:] - y[cut:].mean(0)) ** 2).sum())
    arrays: dict[str, Floats] = {"mean": mean, "scale": scale}
    for i, layer in enumerate(layers):
        arrays[f"w{i}"] = layer.weight.detach().numpy().T.astype(np.float64)
        arrays[f"b{i}"] = layer.bias.detach().numpy().astype(np.float64)
    return arrays, r2


def save(arrays: dict[str, Floats], path: Path) -> None:
    """Write the arrays as float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: array.astype(np.float16) for name, array in arrays.items()})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="number of walking steps per round")
    parser.add_argument("--rounds", type=int, default=3, help="1: clone the gait; each further round is a DAgger round")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--ants", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ANT_ARTIFACT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    with np.load(GAIT, allow_pickle=False) as file:
        gait = Gait(file["parameters"], arguments.ants)
    ants = Ants(arguments.ants, arguments.threads)
    features, labels = np.empty((0, 26)), np.empty((0, 8))
    student: AntWalker | None = None
    arrays: dict[str, Floats] | None = None
    for number in range(arguments.rounds):
        begin = time.monotonic()
        new_features, new_labels, facts = walk(gait, ants, student, arguments.samples, rng)
        walked = time.monotonic() - begin
        # New data comes first, so that every round holds out walks of round 0.
        features, labels = np.concatenate([new_features, features]), np.concatenate([new_labels, labels])
        arrays, r2 = fit(features, labels, arguments.epochs, arguments.seed, arrays)
        save(arrays, arguments.output)
        student = AntWalker(arguments.output)
        print(
            f"round {number}: {len(features)} samples, R2 {r2:.3f}, walking {facts}, "
            f"{walked:.0f} s walk, {time.monotonic() - begin - walked:.0f} s fit",
            flush=True,
        )
    _, _, facts = walk(gait, ants, student, 20_000, rng)
    print(f"student on its own: {facts}; {arguments.output.stat().st_size / 1024:.1f} KB")


if __name__ == "__main__":
    main()
