"""A bandit run: results without an environment, and figures of data, samples and trust regions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_offrl.algorithms import DTQL
from lit_offrl.callbacks import figures
from lit_offrl.cli import main

DATASET = "bandit/25gaussians-far"
MEASURES = {
    "mean_label", "target_mean_label", "mode_mass_error", "energy_distance", "off_mode_fraction", "best_mode_fraction",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; nothing was said about evaluation."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "GRID", 20)  # coarse maps
        assert main(words(root)) == 0
    return root / "dtql" / DATASET / "seed_0"


def words(root: Path, *extra: str, dataset: str = DATASET, command: str = "fit") -> list[str]:
    bandit = (
        f"--data.dataset={dataset}",
        "--data.reward=raw",
        "--bandit.samples=50",
        "--trainer.check_val_every_n_epoch=2",
    )
    return tiny_words(root, *bandit, *extra, command=command)


def tags(folder: Path, kind: str) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    read = events.Images if kind == "images" else events.Scalars
    return {tag: [event.step for event in read(tag)] for tag in events.Tags()[kind]}


def test_a_bandit_is_scored_against_its_target(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    assert (results["dataset_source"], results["status"], results["gradient_steps"]) == ("bandit", "finished", 90)
    assert results["scored_step"] == 90
    bandit = results["bandit"]
    assert bandit.keys() == {"beta", *MEASURES}
    assert bandit["beta"] == 3
    # corners at 14.14, a tilt of beta std^2 = 0.27 outwards, and some curvature
    assert bandit["target_mean_label"] == pytest.approx(14.14 + 0.27, abs=0.1)
    assert 0 <= bandit["mean_label"] <= 15.2
    for share in ("mode_mass_error", "off_mode_fraction", "best_mode_fraction"):
        assert 0 <= bandit[share] <= 1
    assert bandit["best_mode_fraction"] + bandit["off_mode_fraction"] <= 1
    assert results["bandit_comparison"]["behavior"].keys() == MEASURES
    assert set(results["scores"].values()) == {None}  # there are no episodes, and none are invented
    assert results["time"]["eval_s"] > 0
    assert not (folder / "eval.csv").exists()


def test_curves_and_pictures_in_tensorboard(folder: Path):
    scalars = tags(folder, "scalars")
    for measure in MEASURES:
        assert scalars[f"eval/{measure}"] == [80, 90]
        assert scalars[f"eval_behavior/{measure}"] == [80, 90]
    assert tags(folder, "images") == {"figures/samples": [80, 90], "figures/maps": [80, 90]}


def test_pictures_in_the_run_folder(folder: Path):
    files = sorted((folder / "figures").iterdir())
    names = [f"step_{step:07d}_{name}.png" for step in (80, 90) for name in ("maps", "samples")]
    assert [file.name for file in files] == names
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_validate_measures_the_same(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = json.loads((folder / "results.json").read_text())
    assert main(["validate", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--bandit.figures=false"]) == 0
    after = json.loads((folder / "results.json").read_text())
    assert after["stage"] == "validate"
    assert after["bandit"] == before["bandit"]
    assert "gradient step 90: mean label" in capsys.readouterr().out


def test_resuming_a_finished_run_keeps_its_scores(folder: Path):
    before = json.loads((folder / "results.json").read_text())["bandit"]
    assert main([*words(folder.parents[3]), "--ckpt_path=last", "--bandit.figures=false"]) == 0
    assert json.loads((folder / "results.json").read_text())["bandit"] == before


def test_sets_without_modes_and_runs_without_figures(tmp_path: Path):
    assert main(words(tmp_path, "--bandit.figures=false", "--bandit.beta=1", dataset="bandit/2spirals")) == 0
    folder = tmp_path / "dtql" / "bandit/2spirals" / "seed_0"
    bandit = json.loads((folder / "results.json").read_text())["bandit"]
    assert bandit["beta"] == 1
    assert bandit["mode_mass_error"] is bandit["best_mode_fraction"] is None
    assert not (folder / "figures").exists()


def test_maps_are_the_losses_of_single_actions():
    torch.manual_seed(0)
    algorithm = DTQL(1, 2, hidden_dim=16, sigma_data=0.1)
    observations, actions = torch.zeros(5, 1), torch.rand(5, 2) * 2 - 1
    maps = algorithm.figure_maps(observations, actions)
    assert next(iter(maps)) == "min Q"
    torch.testing.assert_close(maps["min Q"], algorithm.critic["q"](observations, actions).amin(0))
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for scale, values in zip((0.5, 1, 2, 4), list(maps.values())[1:], strict=True):
        sigma = torch.full((8,), scale * 0.1)
        for action, value in zip(actions, values, strict=True):
            expected = algorithm.behavior.loss(action.expand(8, 2), sigma, noise, torch.zeros(8, 1))
            torch.testing.assert_close(value, expected)


def test_a_map_is_drawn_where_it_belongs():
    class Ramp(DTQL):
        def figure_maps(self, observations: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"first": actions[:, 0], "second": actions[:, 1]}

    algorithm = Ramp(1, 2, hidden_dim=16)
    algorithm.units.action_scale.fill_(4.0)
    maps = figures.action_maps(algorithm, extent=4.0)
    ramp = np.linspace(-1, 1, figures.GRID)
    np.testing.assert_allclose(maps["first"], np.tile(ramp, (figures.GRID, 1)), atol=1e-6)
    np.testing.assert_allclose(maps["second"], np.tile(ramp[:, None], (1, figures.GRID)), atol=1e-6)
    figure = figures.maps_figure(np.zeros((3, 2)), np.arange(3.0), maps, extent=4.0)
    image = figure.axes[1].images[0]
    assert image.origin == "lower"
    assert list(image.get_extent()) == [-4, 4, -4, 4]


def test_panels_show_every_sample_on_equal_axes():
    points, labels = np.random.default_rng(0).normal(size=(20_000, 2)), np.zeros(20_000)
    samples = {"target": torch.zeros(7, 2), "policy": torch.ones(9, 2)}
    figure = figures.samples_figure(points, labels, samples, extent=3.0)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [panel.get_title() for panel in panels] == ["data, by reward", "target", "policy"]
    assert [len(panel.collections[-1].get_offsets()) for panel in panels] == [figures.POINTS_DRAWN, 7, 9]
    for panel in panels:
        assert panel.get_aspect() == 1
        assert panel.get_xlim() == panel.get_ylim() == (-3, 3)


def test_paths_are_drawn_on_their_map_from_green_to_red_in_the_units_of_the_data():
    class Walk(DTQL):
        def figure_paths(self, observations: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
            way = torch.linspace(0, 1, 4)[:, None, None]
            return {"second": way.expand(4, len(observations), 2)}

    algorithm = Walk(1, 2, hidden_dim=16)
    algorithm.units.action_scale.fill_(3.0)
    paths = figures.action_paths(algorithm, torch.Generator())
    assert paths["second"].shape == (4, figures.PATHS_DRAWN, 2)
    maps = dict.fromkeys(("first", "second"), np.zeros((figures.GRID, figures.GRID)))
    figure = figures.maps_figure(np.zeros((3, 2)), np.arange(3.0), maps, extent=4.0, paths=paths)
    first, second = (axes for axes in figure.axes if axes.get_title() in maps)
    assert not first.collections
    start, end = second.collections
    assert start.get_offsets()[0].tolist() == [0, 0]
    assert end.get_offsets()[0].tolist() == [3, 3]
    assert start.get_facecolor()[0, 1] > start.get_facecolor()[0, 0]
    assert end.get_facecolor()[0, 0] > end.get_facecolor()[0, 1]
    assert len(second.lines) == figures.PATHS_DRAWN
