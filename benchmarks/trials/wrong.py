"""Commands that do what none should, by which a test sees that it would be noticed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence


def raises(arguments: Sequence[str]) -> int:
    """A traceback."""
    raise KeyError("x")


def hangs(arguments: Sequence[str]) -> int:
    """No end."""
    while True:
        pass


def grows(arguments: Sequence[str]) -> int:
    """More memory than is allowed."""
    return 0 if len(b"x" * 2**27) else 1


def silent(arguments: Sequence[str]) -> int:
    """A failure without a line."""
    return 1


def dies(arguments: Sequence[str]) -> int:
    """A crash."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
