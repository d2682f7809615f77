"""The option groups of the training commands."""

from __future__ import annotations

import lightning

from lit_offrl.callbacks.bandit import BanditEvaluation
from lit_offrl.callbacks.checkpoint import RunCheckpoint
from lit_offrl.callbacks.distributed import DistributedTraining
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.callbacks.tensorboard import TensorBoardDetails
from lit_offrl.callbacks.video import RolloutVideo
from lit_offrl.data.datamodule import D4RLDataModule

OPTION_GROUPS: dict[str, type] = {
    "data": D4RLDataModule,
    "evaluation": RolloutEvaluation,
    "bandit": BanditEvaluation,
    "checkpoint": RunCheckpoint,
    "distributed": DistributedTraining,
    "tensorboard": TensorBoardDetails,
    "video": RolloutVideo,
    "trainer": lightning.Trainer,
}
ACCELERATION = {
    "compile": "Compile the updates with torch.compile; auto: in long runs on a GPU or one CPU thread.",
    "cuda_graph": "On a GPU, replay each kind of update as one CUDA graph.",
    "tf32": "Let a GPU multiply matrices in TensorFloat-32.",
}
TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": -1,  # max_steps ends a run
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,  # a block of updates logs its means as one event
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "default_root_dir": "runs",
}
