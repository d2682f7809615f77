"""`--ablation no_q`: the same policy, trained and chosen without its Q."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import STATES, batch, nested, segments, tiny_options, words
from torch import Tensor

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.cli import main
from lit_offrl.cli.configs import CONF

TWINS = yaml.safe_load((CONF / "ablations/no_q.yaml").read_text())
WITH_TWIN = sorted(name for name, values in TWINS.items() if isinstance(values, dict))
# Large weights stand for infinite ones; Q's share is below this, and thousands of times as large without the ablation.
TOLERANCES = dict.fromkeys(("DAC", "FQL", "ReBRAC"), 1e-6)


def actions_of(name: str, sign: float) -> Tensor:
    """Return the actions of a twin after a few updates of each phase, with rewards of this sign."""
    torch.manual_seed(0)
    stages = {option: 0 for option in ("pretrain_steps", "critic.steps") if option in tiny_options(name)}
    algorithm = ALGORITHMS[name](3, 2, seed=0, **nested({**tiny_options(name), **stages, **TWINS[name]}))
    algorithm.configure_optimizers()
    algorithm.dataset_observations = algorithm.dataset_next_observations = torch.randn(STATES, 3)
    algorithm.dataset_rewards = sign * torch.randn(STATES)
    algorithm.dataset_episode_ends = torch.arange(STATES) % 4 == 3
    for phase in algorithm.phases():
        phase.begin()
        for i in range(5):
            rows = segments(batch(seed=i), algorithm.segment_length)
            rows = rows._replace(rewards=sign * rows.rewards)
            phase.prepare(rows)
            phase.update(rows)
            algorithm.gradient_step += phase.name == algorithm.phases()[-1].name
            for target in algorithm.targets():
                target.target.load_state_dict(target.online.state_dict())
    observations = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    memories = ([{} for _ in observations],) if algorithm.has_memory else ()
    with torch.no_grad():
        return algorithm.eval().actors()["policy"](observations, torch.Generator().manual_seed(2), *memories)


@pytest.mark.parametrize("name", WITH_TWIN)
def test_rewards_play_no_part(name: str):
    rewarded, punished = (actions_of(name, sign) for sign in (1.0, -1.0))
    torch.testing.assert_close(rewarded, punished, rtol=0, atol=TOLERANCES.get(name, 0.0))


def test_every_algorithm_has_a_twin_or_a_reason():
    assert sorted(TWINS) == sorted(ALGORITHMS)


def test_a_twin_has_a_folder_and_an_entry_of_its_own(tmp_path: Path):
    arguments = words(tmp_path / "runs", "IQL", "--model.init_args.beta=5")
    assert main(arguments) == 0
    assert main([*arguments, "--ablation", "no_q"]) == 0
    entries = {}
    for file in tmp_path.rglob("results.json"):
        entries[file.parts[-4]] = json.loads(file.read_text())["ablation"]
        config = yaml.safe_load(file.with_name("config.yaml").read_text())
        assert config["ablation"] == entries[file.parts[-4]]
        assert config["model"]["init_args"]["beta"] == (0.0 if config["ablation"] else 5.0)
    assert entries == {"iql": None, "iql-no_q": "no_q"}


def test_the_config_of_a_twin_repeats_and_resumes_it(tmp_path: Path):
    root = tmp_path / "runs"
    assert main([*words(root, "IQL", "--ablation=no_q"), "--trainer.max_steps=30"]) == 0
    (checkpoint,) = root.rglob("last.ckpt")
    assert main(["fit", f"--ckpt_path={checkpoint}", "--trainer.max_steps=60"]) == 0
    results = json.loads((checkpoint.parent.parent / "results.json").read_text())
    assert (results["ablation"], results["gradient_steps"]) == ("no_q", 60)
    config = checkpoint.parent.parent / "config.yaml"
    again = tmp_path / "again"
    assert main(["fit", f"--config={config}", f"--trainer.default_root_dir={again}"]) == 0
    assert [path.name for path in again.iterdir()] == ["iql-no_q"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "BC", "--ablation", "no_q"], "error: --ablation no_q: BC has none: it has no Q"),
        (["--ablation", "no_q"], "error: --ablation needs an algorithm: add --model DTQL"),
        (["--model", "IQL", "--ablation", "noq"], "error: --ablation: no file noq, and no config of this name"),
        (["--model", "mine.Own", "--ablation", "no_q"], "error: --ablation no_q: no values for Own; there are some of"),
    ],
)
def test_wrong_ablations_give_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["fit", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_ablation_of_ones_own_is_a_file(tmp_path: Path):
    (tmp_path / "sarsa.yaml").write_text("IQL: {critic.expectile: 0.5}\n")
    assert main(words(tmp_path / "runs", "IQL", f"--ablation={tmp_path / 'sarsa.yaml'}")) == 0
    (config,) = tmp_path.rglob("iql-sarsa/data/seed_0/config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["init_args"]["critic"]["expectile"] == 0.5
