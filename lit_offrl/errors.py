"""The exceptions whose message is meant for the user's eyes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that names the culprit and the remedy; the command line prints it and exits with code 2."""


class RunFailure(RuntimeError):  # noqa: N818 (it is not an error of the program)
    """A run that cannot go on, e.g. a loss that is not finite: one line, exit code 1, the last checkpoint intact."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest allowed word, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def require(condition: bool, option: str, rule: str, value: object) -> None:
    """Raise `UserError` naming the option, the rule and the value unless the condition holds."""
    if not condition:
        raise UserError(f"{option}: must be {rule}, not {value}")


def one_line(error: BaseException) -> str:
    """Return the error's message without line breaks."""
    return " ".join(str(error).split())
