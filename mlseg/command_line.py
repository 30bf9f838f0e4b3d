"""Reads a command's arguments: options and KEY=VALUE in any order."""

import argparse
import re
import sys
from collections.abc import Sequence

_OVERRIDE = re.compile(r"[^-/=][^/=]*=")
"""How a KEY=VALUE begins; a path in which a folder bears a ``=`` is none."""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was given, with every KEY=VALUE in ``overrides``, wherever it stood.

    argparse alone lets an option of several values (``--seeds 0 1 KEY=VALUE``) swallow the
    overrides behind it, and an argument that may be left out take the first. Here a KEY=VALUE is
    the value of an option of exactly one, if it stands behind that, and else always an override.

    Args:
        parser: if it has a positional ``overrides``, that is where they go.
        argv: arguments without the program's name; None takes the process's.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    taking = [action for action in parser._actions if action.dest == "overrides"]
    if not taking:
        return parser.parse_args(given)
    taking[0].required = False  # else argparse misses it too, where another is missing
    overrides: list[str] = []
    rest: list[str] = []
    before = ""
    for word in given:
        is_override = _OVERRIDE.match(word) and not _takes_the_next(parser, before)
        (overrides if is_override else rest).append(word)
        before = word
    arguments = parser.parse_intermixed_args(rest)
    arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _takes_the_next(parser: argparse.ArgumentParser, word: str) -> bool:
    """Whether it is an option, or the beginning of one, that has exactly one value."""
    return (
        len(word) > 2
        and word.startswith("--")
        and any(
            action.nargs is None and any(name.startswith(word) for name in action.option_strings)
            for action in parser._actions
        )
    )
