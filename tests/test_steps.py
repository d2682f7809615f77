"""`max_steps` N means N updates of every network, whatever N, the block size and the number of optimizers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_folder

from lit_offrl.cli import main


def adam_steps(checkpoint: Path) -> list[int]:
    state = torch.load(checkpoint, weights_only=True)
    return [int(s["step"]) for optimizer in state["optimizer_states"] for s in optimizer["state"].values()]


@pytest.mark.parametrize(("steps", "block", "epoch"), [(1, 50, 1000), (37, 10, 1000), (40, 7, 20), (45, 64, 20)])
def test_exact_number_of_updates(tiny: Callable[..., list[str]], tmp_path: Path, steps: int, block: int, epoch: int):
    extra = [
        f"--trainer.max_steps={steps}",
        f"--data.block_size={block}",
        f"--data.steps_per_epoch={epoch}",
        "--model.init_args.pretrain_steps=0",
        "--evaluation.enabled=false",
    ]
    assert main(tiny(*extra)) == 0
    checkpoint = run_folder(tmp_path / "runs") / "checkpoints" / f"step_{steps:07d}.ckpt"
    counts = adam_steps(checkpoint)
    assert set(counts) == {steps}
    # weights and biases: 2 Q of 7 layers (LayerNorms included), V of 4; 2 + 1 + 4 in the diffusion model; policy of 4
    assert len(counts) == 2 * (2 * 7 + 4 + 7 + 4)
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == state["offrl"]["gradient_step"] == steps


def test_phases_have_their_own_counts(tiny: Callable[..., list[str]], tmp_path: Path):
    assert main(tiny("--evaluation.enabled=false")) == 0
    state = torch.load(run_folder(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    critic, behavior, policy = (
        {int(s["step"]) for s in optimizer["state"].values()} for optimizer in state["optimizer_states"]
    )
    assert (critic, behavior, policy) == ({90}, {90}, {60})
