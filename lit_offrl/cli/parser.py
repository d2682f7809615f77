"""The parser of the options that are not Lightning's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lit_offrl.errors import UserError

CONFIG = ("--config", "-c")


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints reach the user like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage and leaving."""
        raise UserError(f"{message} ({self.prog} --help)")


def split_options(words: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of some options, None where an option is absent, and the other words.

    Raises:
        UserError: An option has no value.
    """
    parser = CommandParser(prog="python -m lit_offrl fit", add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args(words)
