"""Fuzzing of options: any number in any option, any damage to a config file. See FAULTS.md."""

from __future__ import annotations

import inspect
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from faults import BANDIT, survives, trial
from hypothesis import given
from hypothesis import strategies as st
from test_ranges import numbers
from tiny import TINY, nested, tiny_options

from lit_offrl import algorithms
from lit_offrl.cli.configs import CONF
from lit_offrl.cli.options import OPTION_GROUPS
from lit_offrl.ranges import Range, flat, plain

ALGORITHMS = sorted(algorithms.ALGORITHMS)
NOT_NUMBERS = ("", "abc", "null", "[1, 2]", "{a: 1}", "1e400", "--", "0x", "nan", ".inf", "-.inf", "true")
TRAINER = (
    *("max_steps", "max_epochs", "min_steps", "min_epochs", "devices", "num_nodes", "limit_train_batches"),
    *("limit_val_batches", "limit_test_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
    *("num_sanity_val_steps", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "max_time"),
    *("reload_dataloaders_every_n_epochs", "precision", "fast_dev_run", "accelerator", "strategy"),
)


def options_of(algorithm: str) -> dict[str, Range]:
    """Return the ranges of all numbers of an algorithm, by their name on the command line."""
    hints: dict[str, Any] = {}
    for base in reversed(algorithms.ALGORITHMS[algorithm].__mro__[:-1]):
        if "__init__" in vars(base) and base.__module__.startswith("lit_offrl.algorithms"):
            hints |= get_type_hints(inspect.unwrap(vars(base)["__init__"]), include_extras=True)
    found = {name: range_in(hint) for name, hint in numbers(hints).items()}
    cls = algorithms.ALGORITHMS[algorithm]
    accepted = flat(plain(cls(3, 2, **nested(tiny_options(algorithm))).hparams))
    return {
        f"model.init_args.{name}": each
        for name, each in found.items()
        if each is not None and name in accepted and name != "seed"
    }


def options_of_groups() -> dict[str, Range]:
    """Return the ranges of all numbers of data, evaluation, checkpoint and the other groups but the trainer."""
    found: dict[str, Range] = {}
    for group, cls in OPTION_GROUPS.items():
        if group != "trainer":
            hints = get_type_hints(inspect.unwrap(vars(cls)["__init__"]), include_extras=True)
            found |= {f"{group}.{name}": each for name, hint in hints.items() if (each := range_in(hint)) is not None}
    return {name: each for name, each in found.items() if name != "data.seed"}


def range_in(hint: Any) -> Range | None:
    """Return the first range in an annotation."""
    for each in getattr(hint, "__metadata__", ()):
        if isinstance(each, Range):
            return each
    inner = [range_in(each) for each in get_args(hint) if get_origin(hint) is not None]
    return next((each for each in inner if each is not None), None)


def outside(interval: Range) -> st.SearchStrategy[float]:
    """Return numbers that an option of this range must refuse."""
    numbers = st.one_of(
        st.sampled_from([math.nan, math.inf, -math.inf, 0, -0.0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 1e308]),
        st.integers(),
        st.floats(),
    )
    return numbers.filter(lambda value: value not in interval)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def refused(option: str, value: object, words: list[str], root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, line = survives([*words, f"--trainer.default_root_dir={root}", f"--{option}={value}"], root, capfd)
    assert code == 2, (option, value)
    assert option.rpartition(".")[2] in line, (option, value, line)


@pytest.mark.faults
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numbers_outside_their_range_in_every_option_of_an_algorithm(
    algorithm: str, root: Path, capfd: pytest.CaptureFixture[str]
):
    options = options_of(algorithm)
    assert any(name.endswith(("hidden_dim", "embedding_dim")) for name in options)
    words = [*BANDIT[:1], *model_words(algorithm)]

    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        option = data.draw(st.sampled_from(sorted(options)))
        value = data.draw(st.one_of(outside(options[option]), st.sampled_from(NOT_NUMBERS[:8])))
        with trial(f"options of {algorithm}"):
            if value == "null" or (value == "true" and "bool" in option):
                survives([*words, f"--trainer.default_root_dir={root}", f"--{option}={value}"], root, capfd)
            else:
                refused(option, value, words, root, capfd)

    attempt()


def model_words(algorithm: str) -> list[str]:
    """Return the options of a tiny run of an algorithm on a 2-D set, after `fit`."""
    model = {f"model.init_args.{name}": value for name, value in TINY[algorithm].items()}
    own = {
        "data.dataset": "bandit/8gaussians",
        "data.steps_per_epoch": 2,
        "data.block_size": 1,
        "data.batch_size": 16,
        "bandit.figures": False,
        "bandit.samples": 20,
        "trainer.max_steps": 2,
        "trainer.enable_progress_bar": False,
        "tensorboard.histograms": False,
        "compile": False,
    }
    return [f"--model={algorithm}", *(f"--{name}={value}" for name, value in {**own, **model}.items())]


def test_numbers_outside_their_range_in_every_group(root: Path, capfd: pytest.CaptureFixture[str]):
    options = options_of_groups()
    assert {"data.batch_size", "evaluation.episodes", "checkpoint.keep_every_n_epochs"} <= set(options)
    words = ["fit", *model_words("DTQL")]

    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        option = data.draw(st.sampled_from(sorted(options)))
        value = data.draw(st.one_of(outside(options[option]), st.sampled_from(NOT_NUMBERS[:8])))
        with trial("options of data, evaluation, checkpoint ..."):
            if value == "null":
                survives([*words, f"--trainer.default_root_dir={root}", f"--{option}={value}"], root, capfd)
            else:
                refused(option, value, words, root, capfd)

    attempt()


def test_anything_in_every_option_of_the_trainer(root: Path, capfd: pytest.CaptureFixture[str]):
    words = ["fit", *model_words("DTQL")]
    values = st.one_of(
        st.sampled_from([0, -1, 1, 2, 3, 0.5, 1.0, -0.5, 10**30, math.nan, math.inf, *NOT_NUMBERS]),
        st.integers(-5, 5),
        st.floats(-2, 2),
        st.text("abc019:;,.{}[]-_ ", max_size=8),
    )

    @given(st.sampled_from(TRAINER), values)
    def attempt(option: str, value: object) -> None:
        endless = option in ("max_steps", "max_epochs") and isinstance(value, (int, float)) and value > 10
        folder = Path(tempfile.mkdtemp(dir=root))
        with trial("options of the trainer"):
            limit = [] if option == "max_steps" or endless else ["--trainer.max_steps=2"]
            own = [f"--trainer.default_root_dir={folder}", f"--trainer.{option}={3 if endless else value}"]
            survives([*words, *limit, *own], folder, capfd)
        shutil.rmtree(folder)

    attempt()


@pytest.mark.faults
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numbers_inside_their_range_train_or_end_in_one_line(
    algorithm: str, root: Path, capfd: pytest.CaptureFixture[str]
):
    """Extreme values may make the training diverge, which is a line, too."""
    options = options_of(algorithm)
    words = ["fit", *model_words(algorithm)]

    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        option = data.draw(st.sampled_from(sorted(options)))
        interval = options[option]
        small = st.integers(max(math.ceil(interval.low), 0) if interval.low > -math.inf else 0, 9)
        # Large numbers of a count are slow, not wrong.
        value = data.draw(st.one_of(small, st.sampled_from([1e-30, 1e-3, 0.5, 1e30]), st.floats(0, 1)))
        folder = Path(tempfile.mkdtemp(dir=root))
        with trial(f"extreme values of {algorithm}"):
            survives([*words, f"--trainer.default_root_dir={folder}", f"--{option}={value}"], folder, capfd)
        shutil.rmtree(folder)

    attempt()


SAMPLE = (CONF / "dtql_bandit.yaml").read_text()
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-10, 10), st.floats(), st.text(max_size=6))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
)
SPOILED = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    TREES.map(lambda tree: yaml.safe_dump(tree).encode()),
    st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 20), st.binary(max_size=5)).map(
        lambda cut: SAMPLE[: cut[0]].encode() + cut[2] + SAMPLE[cut[0] + cut[1] :].encode()
    ),
)


@st.composite
def replaced_entry(draw: st.DrawFn) -> bytes:
    """A config in which one entry, at any depth, holds any tree of values."""
    config = yaml.safe_load(SAMPLE)
    node, keys = config, []
    while isinstance(node, dict) and node:
        key = draw(st.sampled_from(sorted(node)))
        keys.append((node, key))
        node = node[key]
        if draw(st.booleans()):
            break
    parent, key = keys[-1]
    parent[key] = draw(TREES)
    return yaml.safe_dump(config).encode()


def test_spoiled_config_files(root: Path, capfd: pytest.CaptureFixture[str]):
    file = root.parent / "spoiled.yaml"
    limits = ["--trainer.max_steps=2", "--data.dataset=bandit/8gaussians", "--data.batch_size=16"]
    limits += ["--data.block_size=1"]

    @given(st.one_of(SPOILED, replaced_entry()))
    def attempt(text: bytes) -> None:
        file.write_bytes(text)
        folder = Path(tempfile.mkdtemp(dir=root))
        words = [*BANDIT, f"--config={file}", *limits, f"--trainer.default_root_dir={folder}"]
        with trial("config files"):
            survives(words, folder, capfd)
        shutil.rmtree(folder)

    attempt()
