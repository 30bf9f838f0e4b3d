"""Signals that ask a command to end: what it writes is put away first, and nothing is traced back.

A run has its own answer while it trains (``mlseg.engines.interruption``): it saves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_PLAIN = (signal.SIG_DFL, signal.default_int_handler)
"""What answers to a signal where nobody has said anything."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; SIGINT is Python's own KeyboardInterrupt.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 plus the signal's number, as shells have it: 130, 143 or 129."""
    return 128 + (interrupt.number if isinstance(interrupt, Stopped) else int(signal.SIGINT))


def end_at_once() -> None:
    """Let Ctrl-C end a process that has only begun to load, without Python's traceback.

    For a program alone, before it imports torch; :func:`raised` puts Python's answer back.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class _Waiting:
    """What has come while :func:`held_back` was in force."""

    number: int | None = None


_waiting: list[_Waiting] = []


@contextmanager
def held_back() -> Iterator[None]:
    """Within this block the signals of :func:`raised` wait; the last one is raised at its end.

    For what is short and has to be done as a whole.
    """
    mine = _Waiting()
    _waiting.append(mine)
    try:
        yield
    finally:
        _waiting.remove(mine)
    if mine.number is not None:
        _raise(mine.number)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


@contextmanager
def raised() -> Iterator[None]:
    """Within this block SIGINT, SIGTERM and SIGHUP are exceptions, so that blocks clean up.

    What answers to a signal already, or ignores it, goes on to do so. Only a main thread hears
    signals; in any other this does nothing.
    """
    former: dict[int, Any] = {}
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # forked from it: a process of its own, which may just end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _waiting:
            _waiting[-1].number = number
            return
        _raise(number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not everywhere
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in _PLAIN:
                former[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
