"""Films of episodes, as animated GIFs.

Episodes are replayed and rendered in another process: a broken graphics driver can end a process, and MuJoCo chooses
its rendering backend when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.envs.make import build_env
from lit_offrl.system.files import write_atomically

BACKENDS = ("egl", "osmesa")  # MuJoCo's backends without a display: on the graphics card, in software
SECONDS = 300  # time limit of rendering
HEIGHT = 240  # pixels
GAP = 4  # pixels between episodes
MOST_FRAMES = 200
FRAMES_PER_S = 25  # at most; browsers slow faster GIFs down
LAST_FRAME_MS = 1000

Frame = NDArray[np.uint8]


class NoVideo(Exception):  # noqa: N818 (nothing is wrong with the run)
    """This machine cannot render."""


def film(
    environment: EnvironmentInfo, seeds: Sequence[int], actions: Sequence[NDArray[np.float32]], path: Path
) -> None:
    """Replay episodes and write them side by side as a GIF; a finished episode shows its last frame.

    Args:
        environment: The environment.
        seeds: Seeds of the resets.
        actions: Actions of each episode, `[steps, action_dim]`.
        path: The file.

    Raises:
        NoVideo: No backend works on this machine.
    """
    request = {
        "environment": asdict(environment),
        "seeds": list(seeds),
        "actions": [each.tolist() for each in actions],
        "path": str(path.absolute()),
    }
    problem = ""
    for backend in _backends():
        variables = {**os.environ, "MUJOCO_GL": backend} if backend else dict(os.environ)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lit_offrl.envs.film"],
                input=json.dumps(request), env=variables, capture_output=True, text=True, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            problem = f"not ready after {SECONDS} seconds"
            continue
        if done.returncode == 0:
            return
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    tried = " and ".join(f"MUJOCO_GL={backend}" for backend in _backends() if backend)
    raise NoVideo(f"rendering failed{f' with {tried}' if tried else ''} ({problem[:200]})")


def _backends() -> tuple[str, ...]:
    if os.environ.get("MUJOCO_GL"):
        return (os.environ["MUJOCO_GL"],)
    return BACKENDS if sys.platform == "linux" else ("",)  # on other systems MuJoCo's default works


# ---------------------------------------------------------------- in the process that renders


def main() -> None:
    """Render the episodes that standard input describes."""
    request = json.load(sys.stdin)
    information: Mapping[str, Any] = request["environment"]
    environment = EnvironmentInfo(**information)
    longest = max(len(actions) for actions in request["actions"])
    films, every, frame_ms = [], 1, 0.0
    for seed, actions in zip(request["seeds"], request["actions"], strict=True):
        env = build_env(replace(environment, kwargs={**environment.kwargs, "render_mode": "rgb_array"}))
        per_s = float(env.metadata.get("render_fps") or FRAMES_PER_S)
        every = max(round(per_s / FRAMES_PER_S), -(-longest // MOST_FRAMES), 1)
        frame_ms = min(1000 * every / per_s, 1000 / FRAMES_PER_S)  # long episodes are shown faster
        films.append(_render(env, seed, np.array(actions, np.float32), every))
        env.close()
    write_atomically(Path(request["path"]), lambda path: _write_gif(path, _side_by_side(films), frame_ms))


def _render(env: Any, seed: int, actions: NDArray[np.float32], every: int) -> list[Frame]:
    _look_down_at_mazes(env.unwrapped)
    env.reset(seed=seed)
    frames = [_scaled(env.render())]
    low, high = env.action_space.low, env.action_space.high
    for step, action in enumerate(actions, start=1):
        env.step(np.clip(action, low, high))
        if step % every == 0 or step == len(actions):
            frames.append(_scaled(env.render()))
    return frames


def _look_down_at_mazes(env: Any) -> None:
    """Show a maze of gymnasium-robotics from above: its own cameras look into walls."""
    maze = getattr(env, "maze", None)
    body = getattr(env, "ant_env", None) or getattr(env, "point_env", None)
    if maze is not None and body is not None:
        size = maze.maze_size_scaling * max(maze.map_length, maze.map_width)
        camera = {"lookat": np.zeros(3), "distance": 1.25 * size, "azimuth": 90.0, "elevation": -90.0}
        body.mujoco_renderer.default_cam_config = camera


def _scaled(frame: Frame) -> Frame:
    from PIL import Image

    height, width = frame.shape[:2]
    return np.asarray(Image.fromarray(frame).resize((round(width * HEIGHT / height), HEIGHT), Image.Resampling.BOX))


def _side_by_side(films: Sequence[Sequence[Frame]]) -> list[Frame]:
    gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
    frames = []
    for index in range(max(map(len, films))):
        row = [part for each in films for part in (gap, each[min(index, len(each) - 1)])]
        frames.append(np.concatenate(row[1:], axis=1))
    return frames


def _write_gif(path: Path, frames: Sequence[Frame], frame_ms: float) -> None:
    from PIL import Image

    # One palette for all frames: colors would flicker otherwise.
    palette = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])).quantize(128)
    first, *others = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(frame_ms)] * len(others) + [LAST_FRAME_MS]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


if __name__ == "__main__":
    main()
