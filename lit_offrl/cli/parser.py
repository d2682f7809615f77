"""The parser of the subcommands that are not Lightning's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_offrl.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints reach the user like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage and leaving."""
        raise UserError(f"{message} ({self.prog} --help)")
