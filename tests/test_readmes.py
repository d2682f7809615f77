"""Every README: commands parse, links and anchors resolve, files and configuration keys exist. Nothing is trained."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from tiny import load_tool

from lit_offrl.cli import main

ROOMS = ("conf", "lit_offrl", "notebooks", "tests", "tools")
READMES = sorted([*REPOSITORY.glob("*.md"), *(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.md"))])
ALGORITHMS_README = REPOSITORY / "lit_offrl/algorithms/README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE_COMMANDS = ("python ", "lit-offrl ", "pytest ", "pip install ")
TRAINING = ("fit", "validate", "test", "predict")
NOT_OURS = ("apt", "optuna-dashboard", "sbatch", "tensorboard")
# Options that are read before the parser of `fit`, each followed by one value.
SEEDS = ("--seeds", "--parallel")
ENGINE = ("--engine", "slurm")


def test_the_page_of_faults_names_tests_that_exist():
    """The expressions after -k select a test by words of its name."""
    page = (REPOSITORY / "tests/FAULTS.md").read_text()
    named = re.findall(r'`(test_\w+\.py)(?: -k (?:"([^"]+)"|(\w+)))?`', page)
    assert len(named) > 30
    for file, several, single in named:
        functions = re.findall(r"def (test_\w+)", (REPOSITORY / "tests" / file).read_text())
        for word in re.split(" or ", several or single):
            assert any(word in name for name in functions), (file, word)


class Parsed(BaseException):
    """The command has been parsed; what follows would run it. No handler of the commands catches it."""


@dataclass(frozen=True)
class Command:
    """A command line of a README, without variables of the environment before it."""

    readme: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.readme.relative_to(REPOSITORY)}: {shlex.join(self.words)}"

    @property
    def program(self) -> str:
        """The program that is started in the end, `lit_offrl` also by torchrun or srun."""
        by_name = "lit_offrl" if self._is_module else self.words[0]
        return self.words[1] if by_name == "python" else by_name.replace("lit-offrl", "lit_offrl")

    @property
    def arguments(self) -> list[str]:
        """The arguments of the program."""
        if self._is_module:
            return [*self.words[self.words.index("lit_offrl") + 1 :]]
        return [*self.words[1 + (self.words[0] == "python") :]]

    @property
    def _is_module(self) -> bool:
        return ("-m", "lit_offrl") in pairwise(self.words)


def text_of(readme: Path) -> str:
    """Return the README without its blocks of code."""
    return BLOCK.sub("", readme.read_text())


def commands_of(readme: Path) -> Iterator[Command]:
    """Yield the command lines of the README's shell blocks and of its text."""
    blocks = [content for language, content in BLOCK.findall(readme.read_text()) if language == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(code for code in CODE.findall(text_of(readme)) if code.startswith(INLINE_COMMANDS))]:
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&" and command:
                yield Command(readme, tuple(command))
                command = []
            elif word != "&&" and (command or not re.match(r"[A-Z_]+=", word)):
                command.append(word)


COMMANDS = [command for readme in READMES for command in commands_of(readme)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with `conf/` and the module of the algorithms' README."""
    folder = tmp_path_factory.mktemp("readmes")
    (folder / "conf").symlink_to(REPOSITORY / "conf")
    examples = [content for language, content in BLOCK.findall(ALGORITHMS_README.read_text()) if language == "python"]
    (folder / "my_module.py").write_text(examples[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the outermost call of a parser raise `Parsed` instead of returning."""
    depth = 0

    def stopping(parse: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = parse(*arguments, **options)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed
            return result

        return wrapper

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command of lit_offrl; return its exit code, and what it printed."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Parsed:
        code = 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def configuration(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the configuration of a training command."""
    code, out, err = outcome([*words, "--print_config"], capsys)
    assert code == 0, err
    config: dict[str, Any] = yaml.safe_load(out)
    return config


def without_seeds(words: list[str]) -> list[str]:
    kept: list[str] = []
    for word, before in zip(words, [None, *words], strict=False):
        if before in SEEDS:
            assert re.fullmatch(r"\d+(,\d+)*", word), word
        elif word not in SEEDS:
            kept.append(word)
    return kept


def make_run(workplace: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Make the run folder whose checkpoint the words name: configuration files are read when commands are parsed."""
    for option, value in pairwise(words):
        if option == "--ckpt_path" and value not in ("last", "auto"):
            path = re.fullmatch(r"runs/(\w+)/(\S+)/seed_\d+/checkpoints/last\.ckpt", value)
            assert path is not None, f"{value} is no checkpoint of a run folder"
            config = configuration(["fit", "--config=conf/dtql_antmaze.yaml", f"--data.dataset={path[2]}"], capsys)
            folder = workplace / Path(value).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "last.ckpt").touch()
            (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program == "lit_offrl"], ids=str)
def test_command_of_lit_offrl_parses(
    command: Command, workplace: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    words = command.arguments
    if "--help" in words or "--help-all" in words:
        pass
    elif words[0] in TRAINING:
        make_run(workplace, words, capsys)
        words = [*without_seeds([word for word in words if word not in ENGINE]), "--print_config"]
    elif words[0] == "grid" and words[1:2] in (["status"], ["cancel"]):
        assert len(words) == 3
        return
    elif words[0] == "grid":
        words = [*words, *["--list"] * ("--list" not in words)]  # prints the commands, runs nothing
    elif words[0] != "algorithms":
        request.getfixturevalue("stop_after_parsing")
    code, out, err = outcome(words, capsys)
    assert code == 0, err
    assert out or words[0] not in (*TRAINING, "grid", "algorithms")


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program.startswith("tools/")], ids=str)
def test_command_of_a_tool_parses(command: Command, stop_after_parsing: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [command.program, *command.arguments])
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    with pytest.raises(Parsed):
        load_tool(Path(command.program).stem).main()


def test_other_commands_are_known(pytestconfig: pytest.Config):
    extras = {*(metadata("lit_offrl").get_all("Provides-Extra") or ())}
    markers = {each.partition(":")[0] for each in pytestconfig.getini("markers")}
    for command in COMMANDS:
        program, words = command.program, command.arguments
        if program == "pip":
            assert words[0] == "install", command
            named = re.findall(r"\[([\w,]+)\]", str(command))
            assert {each for names in named for each in names.split(",")} <= extras, command
        elif program == "pytest":
            names = "".join((REPOSITORY / word).read_text() for word in words if word.endswith(".py"))
            for option, value in pairwise(words):
                assert option != "-k" or value in names, command
                assert option != "-m" or {*re.findall(r"\w+", value)} - {"or", "not", "and"} <= markers, command
        else:
            ours = program == "lit_offrl" or program.startswith("tools/")
            assert ours or program in NOT_OURS, f"{command}: unknown program {program}"


# ---------------------------------------------------------------- links, files, keys


def anchors(readme: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", text_of(readme), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_resolve(readme: Path):
    for target in LINK.findall(text_of(readme)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = readme.parent / name if name else readme
        assert path.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


def mentioned_files(readme: Path) -> Iterator[str]:
    """Yield the names of files of the repository in the README's text and commands, with `*` for placeholders."""
    for word in [*CODE.findall(text_of(readme)), *(word for each in commands_of(readme) for word in each.words)]:
        name = re.sub(r"<\w+>", "*", word.removeprefix("--config=").rstrip(":"))
        if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./*{{}},-]*", name) or re.fullmatch(r"[\w./*-]+\.(py|ipynb)", name):
            yield name


def expanded(name: str) -> list[str]:
    """Expand braces: a{b,c} is ab and ac."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        return [name]
    return [each for part in found[1].split(",") for each in expanded(name.replace(found[0], part, 1))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_mentioned_files_exist(readme: Path):
    for name in mentioned_files(readme):
        for each in expanded(name):
            assert any(any(folder.glob(each)) for folder in (REPOSITORY, readme.parent)), f"{name}: no such file"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_mentioned_keys_exist(readme: Path, workplace: Path, capsys: pytest.CaptureFixture[str]):
    config = configuration(["fit", "--config=conf/dtql_antmaze.yaml"], capsys)
    groups = "|".join(name for name, value in config.items() if isinstance(value, dict) and name != "model")
    for code in CODE.findall(text_of(readme)):
        if key := re.match(rf"(?:--)?(({groups})\.\w+)(?:[ =][^.]*)?$", code):
            group, name = key[1].split(".")
            assert name in config[group], f"{code}: no such key"


def test_front_page_fits_on_a_page():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200
