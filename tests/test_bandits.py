"""2-D bandits: the papers' formulas, closed forms of their targets, and the measures against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_offrl.callbacks.bandit import BanditTarget, energy_distance
from lit_offrl.cli import main
from lit_offrl.data import bandits, sources
from lit_offrl.data.bandits import BANDITS
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.inspection import findings
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError

N = 40_000


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


# ---------------------------------------------------------------- the sets


@pytest.mark.parametrize("name", BANDITS)
def test_every_id_loads_as_terminal_one_step_episodes(name: str):
    bandit = BANDITS[name]
    transitions, info = sources.load(f"bandit/{name}")
    assert len(transitions) == len(transitions.episode_starts) == bandit.size
    assert (transitions.observation_dim, transitions.action_dim) == (1, 2)
    assert not transitions.observations.any()
    assert transitions.terminals.all()  # Q is the label: nothing to bootstrap from
    assert (info.id, info.source) == (f"bandit/{name}", "bandit")
    assert info.environment is None
    # the data module scales by the bounds and clips: no point may be lost, and there is some room around them
    assert 0.5 * bandit.bound < np.abs(transitions.actions).max() < 0.8 * bandit.bound
    data = bandit.draw()
    np.testing.assert_allclose(transitions.actions, data.points, rtol=1e-6)
    np.testing.assert_allclose(transitions.rewards, data.labels, rtol=1e-6)


@pytest.mark.parametrize("name", BANDITS)
@pytest.mark.parametrize("n", [1000, 1001])
def test_a_draw_is_a_function_of_size_and_seed(name: str, n: int):
    first, again, other = (BANDITS[name].draw(n, seed) for seed in (0, 0, 1))
    assert first.points.shape == (n, 2)
    assert first.labels.shape == first.modes.shape == (n,)
    np.testing.assert_array_equal(first.points, again.points)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert not np.array_equal(first.points, other.points)


@pytest.mark.parametrize("name", ["8gaussians", "dtql-swissroll-far"])
def test_what_makes_a_bandit_is_no_finding(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", f"bandit/{name}"]) == 0
    assert "no findings" in capsys.readouterr().out
    assert main(["data", "info", f"bandit/{name}"]) == 0
    assert "None" not in capsys.readouterr().out
    transitions, _ = sources.load(f"bandit/{name}")
    for change in ({"observations": 1.0}, {"terminals": False}):  # of one row: no bandit any more
        arrays = {key: array.copy() for key, array in transitions.arrays().items()}
        for key, value in change.items():
            arrays[key][7] = value
        assert any("episodes of one step" in line for line in findings(Transitions(**arrays), (-20, 20)))


def test_actions_are_scaled_alike_in_both_dimensions():
    module = D4RLDataModule("bandit/8gaussians", batch_size=4)
    center, scale = module.action_units
    assert center.tolist() == [0, 0]
    assert scale.tolist() == [6, 6]
    table, _ = module.table()
    assert table[:, 1:3].abs().max() < 1  # nothing was clipped


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("bandit/8gausians", "did you mean '8gaussians'?"),
        ("bandit/25gaussians", "did you mean '25gaussians-"),
        ("bandit/nothing", "there are 8gaussians, 2spirals"),
    ],
)
def test_an_unknown_name_is_told_which_there_are(dataset: str, words: str):
    with pytest.raises(UserError) as error:
        sources.load(dataset)
    assert words in str(error.value)


def test_eight_gaussians():
    data = BANDITS["8gaussians"].draw(N)
    centers = np.array([data.points[data.modes == k].mean(axis=0) for k in range(8)])
    # 5,000 points of deviation 0.35 per mode: a mean is known to 0.005
    np.testing.assert_allclose(np.hypot(*centers.T), 2.829, atol=0.02)
    np.testing.assert_allclose(centers[0], [0, 2.829], atol=0.02)  # up, then counterclockwise
    np.testing.assert_allclose(centers[2], [-2.829, 0], atol=0.02)
    deviation = (data.points - centers[data.modes]).std()
    assert deviation == pytest.approx(0.3536, rel=0.02)
    np.testing.assert_array_equal(data.labels, data.modes / 7)


def test_two_spirals():
    data = BANDITS["2spirals"].draw(N)
    half = N // 2
    np.testing.assert_array_equal(data.labels[:half], data.labels[half:])  # the arms mirror each other
    mirrored = data.points[:half] + data.points[half:]
    assert np.abs(mirrored).max() < 1  # but for noise of 0.1 on either
    assert data.labels.min() == pytest.approx(1 - 0.3 * np.pi, abs=1e-3)
    assert 0.95 < data.labels.max() <= 1
    # area-uniform along r = sqrt(u) 3 pi: E[r] = 2 pi
    assert data.labels.mean() == pytest.approx(1 - 0.2 * np.pi, abs=0.005)
    radius = 10 * (1 - data.labels) / 3
    # offsets up to 0.5 / 3 in both coordinates, and noise
    assert np.abs(np.hypot(*data.points.T) - radius).max() < 0.24 + 5 * 0.1


def test_checkerboard():
    data = BANDITS["checkerboard"].draw(N)
    x, y = data.points.T
    assert np.abs(data.points).max() <= 4
    np.testing.assert_array_equal(data.labels, ((x > 0) & (x <= 2)) | (x <= -2))
    assert ((np.floor(x / 2) + np.floor(y / 2)) % 2 == 0).all()
    assert data.labels.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(np.bincount(data.modes) / N, 1 / 8, atol=0.01)


def test_moons():
    data = BANDITS["moons"].draw(N)
    assert data.labels.mean() == 0.5
    x, y = ((data.points - [-1, -0.2]) / 2).T
    upper, lower = np.hypot(x, y), np.hypot(x - 1, y - 0.5)
    radii = np.where(data.labels == 1, lower, upper)
    # a radius of 1 with noise of 0.1 in the plane: mean 1 + 0.1^2 / 2
    assert radii.mean() == pytest.approx(1.005, abs=0.003)
    assert radii.std() == pytest.approx(0.1, rel=0.03)
    assert y[data.labels == 1].mean() == pytest.approx(0.5 - 2 / np.pi, abs=0.01)
    assert y[data.labels == 0].mean() == pytest.approx(2 / np.pi, abs=0.01)


def test_rings():
    data = BANDITS["rings"].draw(N)
    radius = np.hypot(*data.points.T)
    for expected, label in ((3, 0.667), (2.25, 0.333), (1.5, 1.0), (0.75, 0.0)):
        ring = radius[data.labels == label]
        assert len(ring) == N / 4
        assert ring.mean() == pytest.approx(expected, abs=0.01)
        assert ring.std() == pytest.approx(0.08, rel=0.05)
    outer = data.points[data.labels == 0.667]
    # equally spaced before the noise: the center of mass is off by noise alone, 0.08 / sqrt(10,000)
    np.testing.assert_allclose(outer.mean(axis=0), 0, atol=0.004)


def test_swiss_roll():
    data = BANDITS["swissroll"].draw(N)
    np.testing.assert_allclose(data.labels, (data.points**2).sum(axis=1) / 9)
    # E[t^2] / 25 over t ~ U(1.5 pi, 4.5 pi), and noise of 0.2 in two dimensions
    expected = (4.5**3 - 1.5**3) / (3 * 3) * np.pi**2 / 25 + 2 * 0.2**2
    assert 9 * data.labels.mean() == pytest.approx(expected, rel=0.02)
    assert data.labels.max() > 1


def test_grid_of_gaussians_and_its_rewards():
    data = BANDITS["25gaussians-same"].draw()
    assert np.bincount(data.modes).tolist() == [400] * 25
    assert (np.diff(data.modes) >= 0).all()
    centers = np.array([data.points[data.modes == k].mean(axis=0) for k in range(25)])
    np.testing.assert_allclose(centers, bandits.GRID_CENTERS, atol=0.06)  # 0.3 / sqrt(400), four times
    assert (data.points - centers[data.modes]).std() == pytest.approx(0.3, rel=0.03)
    distance = np.hypot(*data.points.T)
    corner = (data.points[:, 0] < -7.5) & (data.points[:, 1] > 7.5)
    assert corner.sum() == 400
    labels = {name: BANDITS[f"25gaussians-{name}"].draw().labels for name in ("far", "near", "hard", "same")}
    np.testing.assert_allclose(labels["far"], distance)
    np.testing.assert_allclose(labels["near"], distance.max() - distance)
    np.testing.assert_allclose(labels["hard"], distance * (1 + corner))
    assert not labels["same"].any()


def test_large_swiss_roll():
    data = BANDITS["dtql-swissroll-far"].draw(N)
    radius = np.hypot(*data.points.T)
    np.testing.assert_allclose(data.labels, radius)
    assert radius.min() > 1.5 * np.pi - 0.5
    assert radius.max() < 4.5 * np.pi + 0.5
    assert radius.mean() == pytest.approx(3 * np.pi, abs=0.1)
    assert data.points[:, 0].max() == pytest.approx(12.6, abs=0.5)


# ---------------------------------------------------------------- their targets


@pytest.mark.parametrize(
    ("name", "beta", "mode", "weight", "mean_label"),
    [
        ("8gaussians", 3, 7, 0.3602, 0.7713),
        ("8gaussians", 10, 7, 0.7604, 0.9550),
        ("8gaussians", 16.67, 7, 0.9076, 0.9855),
        ("rings", 3, 0, 0.2371, None),
        ("rings", 3, 1, 0.0870, None),
        ("rings", 3, 2, 0.6438, None),
        ("rings", 3, 3, 0.0321, None),
        ("moons", 3, 1, 0.9526, 0.9526),
        ("checkerboard", 3, 0, 0.9526 / 4, 0.9526),
    ],
)
def test_targets_have_their_closed_form(name: str, beta: float, mode: int, weight: float, mean_label: float | None):
    data = BANDITS[name].draw(N)
    weights = data.target_weights(beta)
    assert weights[data.modes == mode].sum() == pytest.approx(weight, abs=1e-4)
    if mean_label is not None:
        assert weights @ data.labels == pytest.approx(mean_label, abs=1e-4)


@pytest.mark.parametrize("name", ["8gaussians", "rings", "checkerboard", "moons"])
def test_mode_labels_are_the_labels_of_the_modes(name: str):
    bandit = BANDITS[name]
    data = bandit.draw(N)
    np.testing.assert_array_equal(data.labels, bandit.mode_labels[data.modes])
    masses = np.bincount(data.modes, weights=data.target_weights(3))
    np.testing.assert_allclose(masses, softmax(3 * bandit.mode_labels))


def test_without_modes_weights_are_a_softmax_of_labels():
    data = BANDITS["2spirals"].draw(1000)
    np.testing.assert_allclose(data.target_weights(3), softmax(3 * data.labels))


# ---------------------------------------------------------------- the measures


@pytest.mark.parametrize("name", ["8gaussians", "2spirals", "checkerboard", "moons", "rings", "swissroll"])
def test_samples_of_the_target_score_as_the_target(name: str):
    target = BanditTarget(f"bandit/{name}", beta=3, samples=2000)
    data = BANDITS[name].draw(N, seed=7)
    rows = np.random.default_rng(0).choice(N, 2000, p=data.target_weights(3))
    scores = target.measure(torch.from_numpy(data.points[rows]).float())
    # 2,000 samples: a share is known to 0.01, the energy distance to about 2 / 2,000; several times that
    assert scores.mean_label == pytest.approx(scores.target_mean_label, abs=0.03)
    assert abs(scores.energy_distance) < 0.006
    assert scores.off_mode_fraction < 0.03
    if scores.mode_mass_error is not None:
        assert scores.mode_mass_error < 0.06
    data_scores = target.measure(torch.from_numpy(data.points[:: N // 2000]).float())
    assert data_scores.energy_distance > 0.01  # the unguided distribution is another one
    assert data_scores.mean_label < scores.target_mean_label - 0.05


def test_modes_of_the_grid():
    target = BanditTarget("bandit/25gaussians-far", beta=3, samples=1000)
    corner = torch.tensor([[10.0, 10.0]])
    # half in one of the best modes, a quarter in a mode that is not, a quarter outside of any
    points = torch.cat([corner.repeat(500, 1), 0 * corner.repeat(250, 1), corner.repeat(250, 1) - 2.5])
    scores = target.measure(points)
    assert scores.best_mode_fraction == 0.5
    assert scores.off_mode_fraction == 0.25
    assert scores.target_mean_label == pytest.approx(np.hypot(10, 10), abs=0.5)
    assert scores.mode_mass_error is not None
    assert scores.mode_mass_error >= 0.5
    on_one_corner = target.measure(corner.repeat(100, 1))
    assert (on_one_corner.best_mode_fraction, on_one_corner.off_mode_fraction) == (1, 0)
    assert on_one_corner.mode_mass_error == pytest.approx(0.75, abs=0.03)  # four corners share the target's mass


def test_off_mode_begins_at_three_deviations():
    target = BanditTarget("bandit/25gaussians-same", beta=0, samples=10)
    inside, outside = (target.measure(torch.tensor([[5 + offset, 5.0]])) for offset in (0.89, 0.91))
    assert (inside.off_mode_fraction, outside.off_mode_fraction) == (0, 1)


def test_energy_distance_of_shifted_normals():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1500, 1, generator=generator) for _ in range(2))
    # in one dimension it is 2 * the integral of the squared difference of the distribution functions
    grid = torch.linspace(-10, 12, 20_001)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = 2 * float(torch.trapezoid((normal.cdf(grid) - normal.cdf(grid - 2)) ** 2, grid))
    assert energy_distance(x, y + 2) == pytest.approx(expected, rel=0.1)
    assert abs(energy_distance(x, y)) < 0.02
