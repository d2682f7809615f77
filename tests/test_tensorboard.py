"""What TensorBoard is told beside losses and scores."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from conftest import run_folder, tiny_words
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import nested, tiny_options
from torch import Tensor, nn

from lit_offrl import algorithms
from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec
from lit_offrl.batch import Batch
from lit_offrl.callbacks.metrics_csv import MetricsCSV
from lit_offrl.callbacks.tensorboard import TensorBoardDetails
from lit_offrl.cli import main
from lit_offrl.data.transitions import BlockSampler

Words = Callable[..., list[str]]
OPTIMIZERS = ("critic", "behavior", "policy")


@pytest.fixture(scope="module")
def folder(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose learning rates fall by a cosine."""
    root = tmp_path_factory.mktemp("runs")
    assert main(tiny_words(root, "--model.init_args.cosine_decay=true")) == 0
    return run_folder(root)


@pytest.fixture(scope="module")
def events(folder: Path) -> EventAccumulator:
    return read(folder)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0, "scalars": 0})
    events.Reload()
    return events


def test_learning_rates_are_the_schedule(events: EventAccumulator):
    for name in OPTIMIZERS:
        curve = {e.step: e.value for e in events.Scalars(f"train/learning_rate_{name}")}
        assert max(curve) == 90
        for step, value in curve.items():  # 30 steps of pretraining, then half a cosine over 60
            expected = 3e-4 * 0.5 * (1 + math.cos(math.pi * max(step - 30, 0) / 60))
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_gradient_norms_are_of_optimizers_that_stepped(events: EventAccumulator):
    steps = {name: [e.step for e in events.Scalars(f"train/gradient_norm_{name}")] for name in OPTIMIZERS}
    losses = [e.step for e in events.Scalars("train/critic_q_loss")]
    assert steps["critic"] == steps["behavior"] == losses
    assert steps["policy"] == [step for step in losses if step > 30]
    for name in OPTIMIZERS:
        assert all(e.value > 0 for e in events.Scalars(f"train/gradient_norm_{name}"))


def test_histograms_of_actions_and_values_at_each_evaluation(events: EventAccumulator, minari_root: Path):
    steps = {tag: [e.step for e in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    assert steps == {
        **{f"histograms/action_{i}_data": [40] for i in range(2)},  # it does not change
        **{f"histograms/action_{i}_policy": [40, 80, 90] for i in range(2)},
        **{f"histograms/q_of_{whose}_actions": [40, 80, 90] for whose in ("data", "policy")},
    }
    for tag in steps:
        for event in events.Histograms(tag):
            assert event.histogram_value.num == 256
            if "action_" in tag:
                assert -1 <= event.histogram_value.min <= event.histogram_value.max <= 1


def test_the_table_of_hyper_parameters_names_the_scores(events: EventAccumulator):
    content = {tag: HParamsPluginData.FromString(data) for tag, data in events.PluginTagToContent("hparams").items()}
    start = content["_hparams_/session_start_info"].session_start_info
    values = dict(start.hparams.items())
    assert values["algorithm"].string_value == "DTQL"
    assert values["dataset"].string_value == "offrl/pointmaze/umaze-v0"
    assert values["hidden_dim"].number_value == 16
    assert values["cosine_decay"].string_value == "true"
    assert not [name for name in values if name.startswith("_")]
    metrics = {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos}
    scalars = events.Tags()["scalars"]
    assert metrics == {tag for tag in scalars if tag.startswith("eval/")}
    assert "hp_metric" not in scalars
    assert "_hparams_/session_end_info" in content


def test_metrics_csv_has_the_same_rows_with_more_columns(folder: Path):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train/critic_q_loss"]]
    assert all(row["train/learning_rate_critic"] and row["train/gradient_norm_critic"] for row in trained)
    assert len({row["step"] for row in trained}) == len(trained)  # no rows of their own


def test_looking_changes_nothing(folder: Path, events: EventAccumulator, tiny: Words, tmp_path: Path):
    assert main(tiny("--model.init_args.cosine_decay=true", "--tensorboard.histograms=false")) == 0
    without = run_folder(tmp_path / "runs")
    assert events.Tags()["histograms"]
    assert not read(without).Tags()["histograms"]
    weights = [
        torch.load(each / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for each in (folder, without)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# ---------------------------------------------------------------- against a computation by hand


class Bowls(OfflineAlgorithm):
    """Minimizes c |w|^2 / 2 for two vectors, whose gradients are c w; the second one until step 5 only."""

    def __init__(self) -> None:
        super().__init__(observation_dim=1, action_dim=1)
        self.one = nn.ParameterList([nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[12.0]]))])
        self.two = nn.ParameterList([nn.Parameter(torch.tensor([6.0, 8.0]))])
        self.norms: list[float] = []

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        return {
            "one": OptimizerSpec((self.one,), 0.1),
            "two": OptimizerSpec((self.two,), 0.1, clip_norm=0.5),
        }

    def update(self, batch: Batch) -> Info:
        loss = sum((p.square().sum() for p in self.one), torch.zeros(()))
        self.norms.append(2 * torch.cat([p.detach().flatten() for p in self.one]).norm().item())
        self.minimize("one", loss)
        if self.gradient_step < 5:
            self.minimize("two", self.two[0].square().sum())
        return {"loss": loss.detach()}

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        return observations


def test_gradient_norms_are_those_of_the_last_update_of_a_block(tmp_path: Path):
    algorithm = Bowls()
    table = BlockSampler(torch.zeros(10, 5), (1, 1, 1, 1, 1), 2, block_size=3, steps_per_epoch=12, max_steps=12)
    trainer = lightning.Trainer(
        max_steps=12,
        max_epochs=-1,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=[TensorBoardLogger(tmp_path, name="", version=""), MetricsCSV(tmp_path)],
        callbacks=[TensorBoardDetails(histograms=False)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.datamodule = None
    trainer.fit(algorithm, table)
    events = read(tmp_path)
    norms = {e.step: e.value for e in events.Scalars("train/gradient_norm_one")}
    assert norms == pytest.approx({step: algorithm.norms[step - 1] for step in (3, 6, 9, 12)}, rel=1e-6)
    # clipped to 0.5; absent where it did not step
    assert {e.step: e.value for e in events.Scalars("train/gradient_norm_two")} == pytest.approx(
        {3: 0.5, 6: 0.5}, rel=1e-5
    )


@pytest.mark.parametrize("name", [*algorithms.ALGORITHMS])
def test_every_critic_tells_the_value_of_single_actions(name: str):
    torch.manual_seed(0)
    algorithm = getattr(algorithms, name)(3, 2, **nested(tiny_options(name)))
    observations, actions = torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    values = algorithm.value_of(observations, actions)
    if values is None:
        # Chunks have a value, and not their single actions.
        assert not hasattr(algorithm, "critic") or algorithm.segment_length > 1
        return
    assert values.shape == (5,)
    assert np.ptp(values.detach().numpy()) > 0
    torch.testing.assert_close(algorithm.value_of(observations[2:3], actions[2:3]), values[2:3])
