"""rollout.gif: it has the frames of real episodes, and a machine that cannot render only says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_offrl.callbacks import video
from lit_offrl.cli import main
from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.envs.film import HEIGHT, MOST_FRAMES, NoVideo, film

Words = Callable[..., list[str]]
HOPPER = EnvironmentInfo("Hopper-v5", {}, max_episode_steps=None)


def film_or_skip(path: Path, steps: tuple[int, ...]) -> Path:
    actions = [np.random.default_rng(i).uniform(-1, 1, (n, 3)).astype(np.float32) for i, n in enumerate(steps)]
    try:
        film(HOPPER, range(len(steps)), actions, path)
    except NoVideo as reason:
        pytest.skip(f"this machine cannot render: {reason}")
    return path


def test_episodes_stand_side_by_side_and_move(tmp_path: Path):
    with Image.open(film_or_skip(tmp_path / "hopper.gif", (15, 5))) as gif:
        assert gif.n_frames == 1 + 3  # 125 steps a second, a frame every 5
        assert gif.size == (2 * HEIGHT + 4, HEIGHT)
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB"), dtype=float))
    assert not np.array_equal(frames[1][:, :HEIGHT], frames[3][:, :HEIGHT])
    assert np.array_equal(frames[1][:, HEIGHT + 4 :], frames[3][:, HEIGHT + 4 :])  # it has ended: it stands still


@pytest.mark.slow  # a minute of rendering
def test_long_episodes_are_thinned(tmp_path: Path):
    # Actions beyond the end of an episode do not matter for how many frames there are.
    with Image.open(film_or_skip(tmp_path / "hopper.gif", (1500,))) as gif:
        assert MOST_FRAMES // 2 < gif.n_frames <= MOST_FRAMES + 1


def test_a_maze_is_a_map(tmp_path: Path):
    """The walls of UMaze around the middle row are of one color, and the ground is not, as seen from above."""
    umaze = EnvironmentInfo("PointMaze_UMaze-v3", {}, max_episode_steps=300)
    try:
        film(umaze, [0], [np.zeros((3, 2), np.float32)], tmp_path / "maze.gif")
    except NoVideo as reason:
        pytest.skip(f"this machine cannot render: {reason}")
    with Image.open(tmp_path / "maze.gif") as gif:
        frame = np.asarray(gif.convert("RGB"), dtype=int)
    red, _, blue = np.moveaxis(frame, -1, 0)
    cells = (red < blue)[20:-20, 20:-20]  # the ground is blue, walls are brown
    rows = np.array_split(cells, 5)
    upper, middle, lower = (rows[i].mean() for i in (1, 2, 3))
    assert middle < 0.6 * min(upper, lower)  # a wall reaches into it from the left
    left, right = np.array_split(rows[2], 2, axis=1)
    assert left.mean() < 0.1 < right.mean()
    np.testing.assert_allclose(cells.mean(1)[5:-5], cells.mean(1)[::-1][5:-5], atol=0.2)  # no perspective


def test_a_run_leaves_its_video_and_tensorboard_shows_it(tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    film_or_skip(tmp_path / "hopper.gif", (1,))

    def film_20_steps(environment: EnvironmentInfo, seeds: Any, actions: Any, path: Path) -> None:
        film(environment, seeds, [each[:20] for each in actions], path)  # a frame takes a tenth of a second

    monkeypatch.setattr(video, "film", film_20_steps)
    assert main(tiny("--video.episodes=2")) == 0
    folder = run_folder(tmp_path / "runs")
    events = EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Images("video/rollout")
    assert event.step == 90
    assert event.encoded_image_string == (folder / "rollout.gif").read_bytes()
    assert (event.width, event.height) == (2 * HEIGHT + 4, HEIGHT)

    (folder / "rollout.gif").unlink()
    words = ["validate", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--video.episodes=1"]
    assert main(words) == 0
    with Image.open(folder / "rollout.gif") as gif:
        assert gif.size == (HEIGHT, HEIGHT)
        assert gif.n_frames > 1


def test_where_nothing_renders_the_run_goes_on(
    tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MUJOCO_GL", "no-such-backend")
    assert main(tiny("--video.episodes=1")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "video" in line]
    assert len(lines) == 1
    assert lines[0].startswith("no video: rendering failed with MUJOCO_GL=no-such-backend")
    assert not (run_folder(tmp_path / "runs") / "rollout.gif").exists()


def test_without_an_environment_there_is_a_line_and_no_video(tiny: Words, capsys: pytest.CaptureFixture[str]):
    assert main(tiny("--video.episodes=1", "--evaluation.enabled=false")) == 0
    assert "no video: policies are not evaluated" in capsys.readouterr().err
