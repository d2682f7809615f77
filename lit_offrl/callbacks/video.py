"""rollout.gif: episodes of the policy to look at."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray

from lit_offrl.algorithms.base import Memory, OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback, find_callback, find_datamodule, tensorboard_writers
from lit_offrl.callbacks.checkpoint import stop_requested
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.callbacks.throughput import evaluation_mode
from lit_offrl.envs.film import NoVideo, film
from lit_offrl.envs.make import make_env
from lit_offrl.envs.rollout import Rollouts, StoppedEarly
from lit_offrl.errors import UserError
from lit_offrl.ranges import Range, checked


class RolloutVideo(AlgorithmCallback):
    """Films the policy after the final evaluation of `fit`, and in `validate` and `test`.

    The episodes start as the first of the evaluation do and stand side by side in `rollout.gif` of the run folder, and
    in TensorBoard as `video/rollout`. A machine that cannot render gets one line instead.

    Args:
        episodes: Number of episodes to film; 0 for no video.
    """

    NAME = "rollout.gif"

    @checked("video")
    def __init__(self, episodes: Annotated[int, Range(0, 100)] = 0) -> None:
        self.episodes = episodes

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Film the final policy."""
        if algorithm.gradient_step >= trainer.max_steps:
            self._film(trainer, algorithm)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Film the policy of the checkpoint."""
        if trainer.state.fn != "fit":
            self._film(trainer, algorithm)

    on_test_epoch_end = on_validation_epoch_end

    def _film(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        if not self.episodes or not trainer.is_global_zero or stop_requested(trainer):
            return
        path = Path(trainer.default_root_dir) / self.NAME
        try:
            with evaluation_mode(trainer, algorithm):
                self._play(trainer, algorithm, path)
        except StoppedEarly:
            return
        except (NoVideo, UserError) as error:
            print(f"no video: {error}", file=sys.stderr, flush=True)
            return
        # An animated GIF as a picture: TensorBoard shows it as it is. `SummaryWriter.add_video` would need moviepy.
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        for writer in tensorboard_writers(trainer):
            file: Any = writer.file_writer
            file.add_summary(
                Summary(value=[Summary.Value(tag="video/rollout", image=picture)]), algorithm.gradient_step
            )
            writer.flush()

    def _play(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, path: Path) -> None:
        datamodule, evaluation = find_datamodule(trainer), find_callback(trainer, RolloutEvaluation)
        if evaluation is None or evaluation.environment is None or datamodule is None:
            raise NoVideo("policies are not evaluated in an environment here")
        environment, keys = evaluation.environment, datamodule.info.observation_keys
        seeds = range(evaluation.seed, evaluation.seed + self.episodes)
        played: list[list[NDArray[np.float32]]] = [[] for _ in seeds]
        generator = torch.Generator(device=algorithm.device).manual_seed(evaluation.seed + algorithm.gradient_step)
        memories: dict[int, Memory] = defaultdict(dict)

        def policy(observations: NDArray[np.float32], places: Sequence[int]) -> NDArray[np.float32]:
            kept = [memories[place] for place in places]
            observed = torch.from_numpy(observations).to(algorithm.device)
            actions = np.asarray(algorithm.act(observed, generator, memories=kept).float().cpu())
            for place, action in zip(places, actions, strict=True):
                played[place].append(action)
            return actions

        with Rollouts(partial(make_env, environment, keys), self.episodes) as rollouts:
            rollouts.run(policy, seeds, lambda: stop_requested(trainer), memories=memories)
        film(environment, seeds, [np.stack(actions) for actions in played], path)
