"""`report`: statistics by hand, and a tree of run folders through the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

from lit_offrl.cli import main
from lit_offrl.report.rows import Report
from lit_offrl.report.runs import find_runs
from lit_offrl.report.statistics import (
    Summary,
    bootstrap_interval,
    expected_best,
    interquartile_mean,
    mean,
    performance_profile,
    probability_of_improvement,
    selection_curve,
)

LOCAL = {"name": "local", "min": 0.0, "max": 1.0}
D4RL = {"name": "d4rl", "min": -20.272305, "max": 3234.3}
NO_REFERENCE = {"name": None, "min": None, "max": None}


def write_run(
    root: Path,
    algorithm: str,
    dataset: str,
    seed: int,
    score: float,
    reference: dict[str, Any] = LOCAL,
    evaluations: dict[int, list[float]] | None = None,
    **entries: Any,
) -> Path:
    """Write a run folder as training does: the score in results.json, scores of episodes by step in eval.csv."""
    folder = root / algorithm / dataset / f"seed_{seed}"
    folder.mkdir(parents=True)
    known = reference["name"] is not None
    unit = (reference["max"] - reference["min"]) / 100 if known else 1.0
    low = reference["min"] if known else 0.0

    def scores(value: float) -> dict[str, Any]:
        normalized = value if known else None
        return {"normalized": normalized, "return_mean": low + unit * value, "return_std": 0.1, "episodes": 50}

    results = {
        "algorithm": algorithm,
        "dataset": dataset,
        "dataset_source": "offrl",
        "dataset_sha256": "ab" * 32,
        "dataset_return_mean": low + unit * 40,
        "seed": seed,
        "stage": "fit",
        "status": "finished",
        "gradient_steps": 3000,
        "protocol": {"rules": "d4rl-1"},
        "scored_step": 3000,
        "scores": scores(score),
        "score_reference": reference,
        "comparison": {"behavior": scores(score - 30)},
    }
    (folder / "results.json").write_text(json.dumps({**results, **entries}))
    with (folder / "eval.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "stage", "actor", "seed", "return", "length", "success", "normalized_score"])
        for step, values in (evaluations or {1000: [score - 20], 2000: [score + 10], 3000: [score]}).items():
            for i, value in enumerate(values):
                writer.writerow([step, "fit", "policy", i, low + unit * value, 100, "", value if known else ""])
        writer.writerow([3000, "fit", "behavior", 0, 0.0, 100, "", -1000.0])
        writer.writerow([3000, "test", "policy", 0, 0.0, 100, "", -1000.0])
        file.write("3000,fit,poli")  # a killed process leaves a partial row
    return folder


def flat(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(folder: Path, **wanted: str) -> dict[str, str]:
    (row,) = [row for row in flat(folder) if wanted.items() <= row.items()]
    return row


def line_of(out: str, name: str) -> list[str]:
    """Return the cells of the last line of a table that begins with this name."""
    (*_, line) = [line for line in out.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line)]
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------- statistics


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0  # floor(3/4) = 0 are cut off
    assert interquartile_mean(np.arange(10.0)) == pytest.approx(np.mean([2, 3, 4, 5, 6, 7]))
    np.testing.assert_array_equal(interquartile_mean(np.array([[4.0, 0, 1, 2], [8, 8, 8, 8]])), [1.5, 8.0])


def test_summary_by_hand():
    summary = Summary.of([1.0, 2.0, 6.0])
    assert (summary.mean, summary.iqm, summary.seeds) == (3.0, 3.0, 3)
    assert summary.std == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert summary.standard_error == pytest.approx((7 / 3) ** 0.5)
    assert Summary.of([5.0]) == Summary(5.0, None, None, 5.0, None, 1)


def test_bootstrap_interval_of_two_seeds_by_hand():
    # The mean of 2 draws from {0, 1} is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: the 95% interval is all of it.
    assert bootstrap_interval([np.array([0.0, 1.0])], mean) == (0.0, 1.0)
    # Stratified: the tasks differ much, but within each nothing varies, so nothing does.
    assert bootstrap_interval([np.array([0.0, 0.0]), np.array([90.0, 90.0])], mean) == (45.0, 45.0)
    assert bootstrap_interval([np.array([0.0, 1.0]), np.array([3.0])], mean) is None


def test_bootstrap_interval_agrees_with_the_normal_approximation_and_is_fixed():
    scores = np.random.default_rng(3).normal(50, 10, size=400)
    low, high = bootstrap_interval([scores], mean)
    half = 1.96 * scores.std() / 400**0.5
    # 10,000 resamples place a 2.5% quantile to about 3% of the half-width
    assert [low, high] == pytest.approx([scores.mean() - half, scores.mean() + half], abs=0.1 * half)
    assert bootstrap_interval([scores], mean) == (low, high)


def test_performance_profile_by_hand():
    tasks = [np.array([10.0, 20.0]), np.array([30.0, 40.0, 50.0, 60.0])]
    share, band = performance_profile(tasks, np.array([0.0, 10.0, 45.0, 60.0]))
    np.testing.assert_allclose(share, [1.0, (1 / 2 + 1) / 2, (0 + 1 / 2) / 2, 0.0])  # tasks count the same
    assert band.shape == (2, 4)
    np.testing.assert_array_equal(band[:, [0, 3]], [[1, 0], [1, 0]])
    assert (band[0] <= share).all()
    assert (share <= band[1]).all()
    assert performance_profile([np.array([1.0])], np.array([0.0]))[1] is None


def test_probability_of_improvement_by_hand():
    x, y = [np.array([1.0, 3.0]), np.array([5.0, 5.0])], [np.array([2.0, 2.0, 3.0]), np.array([4.0, 4.0])]
    # task 1: 1 wins none; 3 wins two and ties one, of 6 pairs: 2.5/6. Task 2: all.
    probability, interval = probability_of_improvement(x, y)
    assert probability == pytest.approx((2.5 / 6 + 1) / 2)
    assert interval[0] <= probability <= interval[1]
    assert probability_of_improvement(y, x)[0] == pytest.approx(1 - probability)
    assert probability_of_improvement(x, x)[0] == pytest.approx(0.5)
    assert probability_of_improvement([np.array([1.0])], [np.array([0.0])]) == (1.0, None)


def test_the_best_of_k_by_hand():
    scores = np.array([3.0, 0.0, 1.0])
    assert expected_best(scores, 1) == pytest.approx(4 / 3)
    assert expected_best(scores, 2) == pytest.approx((1 + 3 + 3) / 3)  # of {0, 1}, {0, 3}, {1, 3}
    assert expected_best(scores, 3) == 3


def test_a_choice_by_perfect_evaluations_is_the_best_of_k():
    policies = [np.full(length, float(score)) for length, score in ((5, 3), (1, 0), (3, 1), (4, 7))]
    means = np.array([3.0, 0.0, 1.0, 7.0])
    for k in (1, 2, 3, 4):
        curve, band = selection_curve(policies, k, budget=6)
        # 1,000 draws; after one episode a random policy is chosen, after k the best
        error = 4 * means.std() / 1000**0.5
        assert curve[0] == pytest.approx(means.mean(), abs=error)
        assert curve[k - 1 :] == pytest.approx(expected_best(means, k), abs=error)
        assert band.shape == (2, 6)
    assert (curve[3:] == 7).all()
    assert (band[:, 3:] == 7).all()


def test_a_choice_among_two_noisy_policies_by_hand():
    # Of success rates 1 and 1/2: after one episode of each, the worse one ties half of the time. It is then chosen
    # where it was played first, which is half of these.
    curve, _ = selection_curve([np.array([1.0]), np.array([0.0, 1.0])], 2, budget=400)
    assert curve[1] == pytest.approx(1 - 0.5 * 0.25, abs=0.02)
    assert curve[-1] > 0.99
    scaled, _ = selection_curve([np.array([100.0]), np.array([0.0, 100.0])], 2, budget=400)
    np.testing.assert_allclose(scaled, 100 * curve)


# ---------------------------------------------------------------- a tree of runs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two algorithms on two datasets with 3 seeds, one of them also on a third, and one run under way."""
    root = tmp_path / "runs"
    for seed in range(3):
        for dataset in ("offrl/antmaze/umaze-v0", "offrl/pointmaze/medium-v0"):
            write_run(root, "dtql", dataset, seed, 60.0 + seed)
            write_run(root, "bdpo", dataset, seed, 70.0 + 2 * seed)
        write_run(root, "dtql", "offrl/hopper/medium-v0", seed, 30.0)
    write_run(root, "bdpo", "offrl/antmaze/umaze-v0", 3, 10.0, status="running")
    return root


def test_the_report(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs), "--last", "2"]) == 0
    out = capsys.readouterr().out
    folder = runs / "report"
    assert {path.name for path in folder.iterdir()} == {
        "report.html", "report.md", "report.tex", "report.csv", "profiles_local.png", "improvement_local.png",
        "curve_offrl-antmaze-umaze-v0-local.png", "curve_offrl-pointmaze-medium-v0-local.png",
        "curve_offrl-hopper-medium-v0-local.png",
    }  # fmt: skip
    assert str(folder) in out
    assert "1 of 16 runs are not finished and left out; --all includes them" in out

    row = row_of(folder, dataset="offrl/antmaze/umaze-v0", algorithm="bdpo", actor="policy")
    assert (row["score"], row["seeds"], row["episodes_total"], row["unfinished"]) == ("local", "3", "150", "0")
    assert float(row["mean"]) == float(row["iqm"]) == pytest.approx(72)
    assert float(row["std"]) == pytest.approx(2)
    assert float(row["standard_error"]) == pytest.approx(2 / 3**0.5)
    assert 70 <= float(row["iqm_low"]) < 72 < float(row["iqm_high"]) <= 74
    assert float(row["last_2"]) == pytest.approx(72 + 5)  # of 82 and 72
    assert float(row["dataset_mean"]) == pytest.approx(40)
    assert "best_optimistic" not in row
    behavior = row_of(folder, dataset="offrl/antmaze/umaze-v0", algorithm="bdpo", actor="behavior")
    assert float(behavior["mean"]) == pytest.approx(42)
    assert behavior["last_2"] == ""

    # every bdpo run beats every dtql run on the datasets that they share
    assert "bdpo > dtql | 1.00 [1.00, 1.00]" in out
    assert "Left out, because not all of bdpo, dtql have runs there: offrl/hopper/medium-v0." in out
    assert "| bdpo | 72.0 [" in out


def test_the_page_needs_nothing_else(runs: Path):
    main(["report", str(runs)])
    page = (runs / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    links, places = re.findall(r'href="#([^"]+)"', page), re.findall(r'id="([^"]+)"', page)
    assert len(links) > 3  # a page this long has a list of contents
    assert len(set(places)) == len(places)
    assert set(links) < set(places)
    assert page.count("<table>") == page.count("</table></div><figcaption>")

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    tex = (runs / "report" / "report.tex").read_text()
    assert r"72.0 $\pm$ 2.0" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 3


def test_unfinished_runs_are_marked(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs), "--all", "--best"]) == 0
    out = capsys.readouterr().out
    assert "4 (1 unfinished)" in out
    assert "56.5 ± 31.0*" in out
    assert "*: with unfinished runs" in out
    assert "best (optimistic)" in out
    assert float(row_of(runs / "report", dataset="offrl/hopper/medium-v0", actor="policy")["best_optimistic"]) == 40


def test_one_seed_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "eda", "offrl/antmaze/umaze-v0", 0, 61.2345, comparison={})
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert line_of(capsys.readouterr().out, "eda") == ["eda", "61.2 (1 seed)", "", "", "", "1", "50", "3,000"]
    row = row_of(tmp_path / "out", algorithm="eda")
    assert [row[name] for name in ("std", "standard_error", "iqm", "iqm_low", "last_5")] == [""] * 5
    assert not (tmp_path / "report").exists()


def test_scores_of_different_references_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in range(2):
        write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", seed, 50.0)
        write_run(tmp_path, "dtql", "mujoco/hopper/medium-v0", seed, 70.0, {"name": "minari", "min": 0.0, "max": 9.0})
        write_run(tmp_path, "bdpo", "offrl/hopper/medium-v0", seed, 52.0)
        write_run(tmp_path, "bdpo", "mine", seed, 1234.5, NO_REFERENCE, dataset_sha256=None)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert {(row["dataset"], row["score"]) for row in flat(tmp_path / "report")} == {
        ("offrl/hopper/medium-v0", "local"), ("mujoco/hopper/medium-v0", "minari"), ("mine", "return"),
    }  # fmt: skip
    assert "## Over datasets (local)" in out
    assert "Over offrl/hopper/medium-v0 (reference local)." in out
    assert "## Over datasets (return)" not in out
    assert "1,234 ± 0" in out
    assert "no reference is known" in out


def test_the_same_seed_in_several_folders_makes_several_rows(tmp_path: Path):
    write_run(tmp_path / "a", "dtql", "offrl/hopper/medium-v0", 0, 50.0)
    write_run(tmp_path / "b", "dtql", "offrl/hopper/medium-v0", 0, 60.0)
    write_run(tmp_path / "b", "eda", "offrl/hopper/medium-v0", 0, 60.0)
    runs = find_runs([tmp_path, tmp_path / "a"], warn=pytest.fail)
    assert len(runs) == 3, "overlapping folders count once"
    assert Report(runs).algorithms == ["dtql (a)", "dtql (b)", "eda"]


def test_different_files_of_one_id_have_different_names(tmp_path: Path):
    write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", 0, 50.0)
    write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", 1, 60.0, dataset_sha256="cd" * 32)
    tasks = Report(find_runs([tmp_path], warn=pytest.fail)).tasks
    assert [task.dataset.partition(" ")[2] for task in tasks] == ["[sha256 abababab]", "[sha256 cdcdcdcd]"]


def test_notes_tell_what_does_not_fit(tmp_path: Path):
    for seed, alpha in enumerate((1.0, 5.0)):
        folder = write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", seed, 50.0)
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel:\n  alpha: {alpha}\n")
        write_run(tmp_path, "eda", "offrl/hopper/medium-v0", seed, 50.0, scored_step=3000 - 1000 * seed)
    write_run(tmp_path, "bdpo", "offrl/hopper/medium-v0", 0, 50.0, scores={"normalized": float("nan")})
    notes = "\n".join(Report(find_runs([tmp_path], warn=pytest.fail)).notes)
    assert "dtql on offrl/hopper/medium-v0: the seeds differ in their config.yaml: alpha." in notes
    assert "the scored checkpoint is not the last one (seed 1 at 2,000 of 3,000 gradient steps)" in notes
    assert "Without a score: " in notes
    assert "last 5 is empty in 2 of 2 rows, where a run has fewer evaluations; --last 3" in notes


def test_bandits_have_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measures = {"target_mean_label": 0.9987, "energy_distance": 0.004632, "off_mode_fraction": 0.0065}
    for seed, label in enumerate((0.98, 0.99)):
        entries = {
            "scores": {"normalized": None, "return_mean": None},
            "comparison": {},
            "bandit": {"beta": 16.6667, "mean_label": label, **measures},
            "bandit_comparison": {"behavior": {"mean_label": 0.5, **measures}},
        }
        write_run(tmp_path, "bdpo", "bandit/rings", seed, 0.0, NO_REFERENCE, **entries)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "bandit/rings") == [
        "bandit/rings", "behavior of bdpo", "16.67", "0.500 ± 0.000", "0.999", "0.005 ± 0.000", "0.7% ± 0.0%", "2",
        "3,000",
    ]  # fmt: skip
    assert "0.985 ± 0.007" in out
    assert "Over datasets" not in out
    assert row_of(tmp_path / "report", actor="policy", seed="1")["mean_label"] == "0.99"


# ---------------------------------------------------------------- published figures


def test_policies_stand_beside_their_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in (0, 1):
        best = {"behavior": {"normalized": 20.0}, "behavior_best_of_16": {"normalized": 30.0 + seed}}
        write_run(tmp_path, "dtql", "hopper", seed, 70.0 + seed, comparison=best)
        twin = write_run(tmp_path / "other", "dtql", "hopper", seed, 50.0 + seed, ablation="no_q")
        twin.parent.parent.rename(twin.parent.parent.with_name(f"dtql-no_q_{seed}"))
        write_run(tmp_path, "bc", "hopper", seed, 10.0, comparison={})
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (header,) = [line for line in out.splitlines() if "behavior, best of 16" in line]
    columns = ["dataset", "", "policy", "without its Q", "behavior model", "behavior, best of 16", "dataset's mean"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == columns
    (line,) = [line for line in out.splitlines() if "70.5" in line and "30.5" in line]
    cells = ["hopper", "dtql", "70.5 ± 0.7", "50.5 ± 0.7", "20.0 ± 0.0", "30.5 ± 0.7", "40.0"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == cells
    assert line_of(out, "dtql without its Q")[1] == "50.5 ± 0.7"
    report = tmp_path / "report"
    assert {row["actor"] for row in flat(report)} == {"policy", "no_q", "behavior", "behavior_best_of_16"}
    assert "without" not in out[out.index("Over datasets") : out.index("## hopper")]  # a control is no rival


def test_configurations_have_a_curve_of_policy_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for label, score in (("a", 20.0), ("b", 40.0), ("c", 90.0)):
        write_run(tmp_path / label, "dtql", "offrl/antmaze/umaze-v0", 0, score, evaluations={3000: [score] * 5})
        write_run(tmp_path / label, "iql", "offrl/pointmaze/medium-v0", 0, score, evaluations={3000: [score] * 5})
    write_run(tmp_path, "bdpo", "offrl/antmaze/umaze-v0", 0, 10.0)
    assert main(["report", str(tmp_path)]) == 0
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if re.match(r"\| (dtql|iql|bdpo) \| \d of ", line)]
    assert [row.split(" | ")[1] for row in rows] == ["1 of 3", "2 of 3", "3 of 3"] * 2
    assert rows[2] == "| dtql | 3 of 3 | 90.0 | 90.0 | 90.0 | 90.0 |"
    assert rows[1].endswith(f"| {(40 + 90 + 90) / 3:.1f} |")
    page = (tmp_path / "report" / "report.html").read_text()
    for name in ("selection_offrl-antmaze-umaze-v0-local.png", "selection_offrl-pointmaze-medium-v0-local.png"):
        assert (tmp_path / "report" / name).is_file()
    assert "What tuning costs" in page


def test_the_figures_of_the_readme_are_those_of_the_kept_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(REPOSITORY / "tools/results/kept_runs"), "--output", str(tmp_path)]) == 0
    report = {(row["dataset"], row["algorithm"], row["actor"]): row for row in flat(tmp_path)}
    shown = 0
    for line in (REPOSITORY / "README.md").read_text().splitlines():
        if match := re.match(r"\| `(offrl/\S+)`, (\w+) \|", line):
            data, *cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
            for actor, cell in zip(("behavior", "no_q", "behavior_best_of_16", "policy"), cells, strict=True):
                row = report[match[1], match[2].lower(), actor]
                assert cell == f"{float(row['mean']):.1f} +- {float(row['std']):.1f}"
                assert data == f"{float(row['dataset_mean']):.1f}"
                assert row["seeds"] == "3"
                shown += 1
    assert shown == 8


def test_costs_are_means_over_runs_with_the_device_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed, seconds in enumerate((10.0, 30.0)):
        time = {"train_s": 1800.0, "eval_s": 1800.0, "train_s_per_1k_steps": seconds, "act_ms": 2.5, "act_ms_p99": 4.0}
        write_run(tmp_path, "dtql", "hopper", seed, 50.0, time=time, device="NVIDIA X")
    write_run(tmp_path, "eda", "hopper", 0, 50.0)  # of before these were measured
    assert main(["report", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "NVIDIA X" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["dtql", "20", "1", "2.5", "4", "NVIDIA X"]


@pytest.mark.parametrize(
    ("dataset", "source", "reference", "protocol", "shown"),
    [
        ("hopper-medium-v2", "d4rl", D4RL, {"rules": "d4rl-1"}, True),
        ("hopper-medium-v2", "d4rl", D4RL, {"rules": "own"}, False),
        ("hopper-medium-v2", "d4rl", D4RL, None, False),
        ("hopper-medium-v0", "d4rl", D4RL, {"rules": "d4rl-1"}, False),
        ("hopper-medium-v2", "file", D4RL, {"rules": "d4rl-1"}, False),
        ("hopper-medium-v2", "d4rl", NO_REFERENCE, {"rules": "d4rl-1"}, False),
        ("offrl/hopper/medium-v2", "offrl", LOCAL, {"rules": "local"}, False),
        ("D4RL/hopper/medium-v2", "minari", {**D4RL, "name": "minari"}, {"rules": "minari-d4rl"}, False),
    ],
)
def test_published_figures_only_where_source_version_and_rules_agree(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    source: str,
    reference: dict[str, Any],
    protocol: dict[str, Any] | None,
    shown: bool,
):
    for algorithm in ("dtql", "eda"):
        write_run(tmp_path, algorithm, dataset, 0, 95.0, reference, dataset_source=source, protocol=protocol)
    write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 0, 95.0)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("Published in arXiv 2405.19690, Table 1 (± standard error)" in out) == shown
    assert ("dtql, published" in out) == shown
    assert any(row.get("source") for row in flat(tmp_path / "report")) == shown
    if shown:
        assert "DTQL 99.6 ± 0.9" in out
        assert "BDPO 99.3 ± 2.9" in out
        assert "eda, published" not in out
        row = row_of(tmp_path / "report", algorithm="DTQL", source="arXiv 2405.19690, Table 1")
        assert (row["mean"], row["std"], row["standard_error"]) == ("99.6", "", "0.87")


def test_rivals_have_the_cells_that_the_papers_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Under the names of this package, and with the papers that print them."""
    more = {"dataset_source": "d4rl", "protocol": {"rules": "d4rl-1"}}
    for algorithm in ("td3bc", "dql", "iql"):
        write_run(tmp_path, algorithm, "hopper-medium-v2", 0, 95.0, D4RL, **more)
    write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 0, 95.0)  # an overview is of several datasets
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if re.match(r"\| \w+, published", line)
    ]
    assert {row[0].removesuffix(", published"): row[1] for row in rows} == {
        "dql": "90.5",
        "dtql": "99.6 ± 0.9",
        "iql": "66.3",
        "td3bc": "59.3",
    }
    assert "td3bc, published: as printed in arXiv 2405.19690." in out


def test_figures_of_ogbench_stand_beside_success_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A default task has two names; other rules, e.g. of a dataset that was collected here, have no figures."""
    success = {"name": "ogbench", "min": 0.0, "max": 1.0, "measure": "success"}
    ogbench = {"dataset_source": "ogbench", "protocol": {"rules": "ogbench-1.2"}}
    write_run(tmp_path, "fql", "ogbench/cube-single-play-singletask-task2-v0", 0, 90.0, success, **ogbench)
    write_run(tmp_path, "fql", "ogbench/scene-play-singletask-v0", 0, 70.0, success, **ogbench)
    write_run(tmp_path, "qc", "ogbench/scene-play-singletask-v0", 0, 98.0, success, **ogbench)
    write_run(tmp_path, "fql", "ogbench/cube-double-play-singletask-v0", 0, 30.0, success, dataset_source="ogbench")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "97.0 ± 2.0" in out
    assert "76.0 ± 9.0" in out
    assert "99.5" in out  # QC on task 2 of the scene
    assert "36.0 ± 6.0" not in out
    assert "a success rate of 0 scores 0, of 1 scores 100" in out
    assert not re.search(r"^\| dataset +\| +\d", out, re.MULTILINE), "the data's returns say nothing of its successes"


def test_published_json_is_consistent_with_the_printed_averages():
    content = json.loads((REPOSITORY / "lit_offrl" / "report" / "published.json").read_text())
    figures = content["figures"]
    assert {figure["paper"] for figure in figures} == set(content["papers"])
    assert all(re.search(r"-v\d$", figure["dataset"]) for figure in figures)
    assert all((figure["spread"] is None) == (figure["spread_kind"] is None) for figure in figures)
    keys = [tuple(figure[name] for name in ("paper", "table", "algorithm", "dataset")) for figure in figures]
    assert len(set(keys)) == len(keys)

    def scores(paper: str, algorithm: str, start: str, end: str) -> list[float]:
        return [
            figure["mean"]
            for figure in figures
            if (figure["paper"], figure["table"], figure["algorithm"]) == (paper, "Table 1", algorithm)
            and figure["dataset"].startswith(start)
            and figure["dataset"].endswith(end)
        ]

    assert np.mean(scores("DTQL", "DTQL", "", "v2")) == pytest.approx(88.7, abs=0.06)  # Gym Average
    assert np.mean(scores("DTQL", "DTQL", "antmaze", "v0")) == pytest.approx(73.6, abs=0.06)  # Antmaze Average
    assert np.mean(scores("DTQL", "IQL", "antmaze", "v0")) == pytest.approx(63.0, abs=0.06)
    # misprinted columns are left out
    assert scores("DTQL", "TD3+BC", "antmaze", "v0") == scores("BDPO", "QGPO", "antmaze", "v0") == []
    assert scores("BDPO", "DTQL", "antmaze-umaze-v0", "") == []


# ---------------------------------------------------------------- bad input


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 2
    (*_, line) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_input_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "no folder" in failure(capsys, str(tmp_path / "nowhere"))
    assert "no results.json below" in failure(capsys, str(tmp_path))
    assert "FOLDER" in failure(capsys)
    folder = write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", 0, 50.0, status="interrupted")
    assert "none of 1 runs is finished: --all" in failure(capsys, str(tmp_path))
    assert "--last: must be at least 1" in failure(capsys, str(tmp_path), "--all", "--last", "0")
    in_the_way = str(folder / "results.json")
    assert "cannot be written" in failure(capsys, str(tmp_path), "--all", "--output", in_the_way)
    (folder / "results.json").write_text("{")
    assert "no readable results.json" in failure(capsys, str(tmp_path))


def test_broken_files_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", 9, 50.0)
    broken = []
    for seed, content in enumerate(
        (b'{"algorithm": "dtql", "sta', b"[]", b'{"algorithm": "dtql", "seed": 1}', b"\xff\xfe")
    ):
        broken.append(write_run(tmp_path, "dtql", "offrl/hopper/medium-v0", seed, 50.0) / "results.json")
        broken[-1].write_bytes(content)
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(broken)
    for line, path in zip(lines, broken, strict=True):
        assert line.startswith(f"warning: {path} cannot be read and is skipped: ")
    assert row_of(tmp_path / "report", algorithm="dtql", actor="policy")["seeds"] == "1"


def test_no_torch_is_needed(runs: Path):
    code = (
        "import sys; from lit_offrl.cli import main; code = main(sys.argv[1:]); "
        "print('LOADED', code, *sorted(name for name in sys.modules if '.' not in name))"
    )
    command = [sys.executable, "-c", code, "report", str(runs)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded = output.rpartition("LOADED")[2].split()
    assert loaded[0] == "0"
    assert not set(loaded) & {"torch", "lightning", "gymnasium", "minari", "h5py", "scipy", "tensorboard"}


# ---------------------------------------------------------------- folders that hold anything


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"algorithm": "dtql"}',
        "[" * 100_000,
        '{"algorithm": "dtql", "dataset": "x", "seed": "many"}',
        '{"algorithm": "dtql", "dataset": "x", "seed": 1e999}',
        '{"algorithm": "dtql\\ud800", "dataset": "x", "seed": 0, "scores": {"return_mean": 1}}',
        '{"algorithm": "dtql", "dataset": "x", "seed": 0, "scores": [1, 2]}',
        '{"algorithm": "dtql", "dataset": "x", "seed": 0, "score_reference": {"name": "d4rl", "min": 1, "max": 1}}',
        '{"algorithm": "dtql", "dataset": "x", "seed": 0, "protocol": "d4rl-1"}',
        "\xff\xfe",
    ],
)
def test_a_bad_run_is_left_out_with_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 0, 95.0)
    bad = tmp_path / "bad" / "results.json"
    bad.parent.mkdir()
    bad.write_bytes(content.encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{bad} cannot be read and is skipped" in captured.err
    assert "95.0" in captured.out


def test_a_csv_file_with_a_huge_field_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 0, 95.0)
    bad = write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 1, 95.0)
    (bad / "eval.csv").write_text("step,actor,stage,return\n" + "9" * 200_000 + ",policy,fit,1\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "is skipped" in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_the_report(tmp_path: Path):
    write_run(tmp_path, "dtql", "offrl/antmaze/umaze-v0", 0, 95.0)
    done = subprocess.run(
        [sys.executable, "-m", "lit_offrl", "report", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "95.0" in done.stdout


def test_names_can_be_neither_formulas_nor_markup(tmp_path: Path):
    for seed, name in enumerate(("=cmd()", "+1+1", "@x", "<script>", "[x](javascript:1)", "a^b")):
        folder = write_run(tmp_path / str(seed), "dtql", "offrl/antmaze/umaze-v0", seed, 95.0)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "dataset": name}))
    assert main(["report", str(tmp_path)]) == 0
    folder = tmp_path / "report"
    names = [row["dataset"] for row in flat(folder)]
    assert {"'=cmd()", "'+1+1", "'@x", "a^b"} <= set(names)
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown
    assert "](javascript" not in markdown
    assert "^" not in (folder / "report.tex").read_text().replace("\\textasciicircum", "")
