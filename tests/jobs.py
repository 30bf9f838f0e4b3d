"""Pieces of work for the tests of pools; a module, so that other processes find them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from mlseg.workers import HELD, Failed, Processes


def square(number: int) -> int:
    return number * number


def pid(_: int) -> int:
    return os.getpid()


def fail(_: int) -> None:
    raise ValueError("no such number\nin two lines")


def refuse(_: int) -> Failed:
    return Failed("it can't be done")


def die_once(marker: str) -> str:
    """Kill this process, the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def held_once(marker: str) -> Any:
    """Say that another process is at it, the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        return HELD
    return "done"


def sleep(place: str) -> None:
    """Say who sleeps, and do so."""
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)


def start_and_wait(arguments: list[str]) -> int:
    """A program that has a process at work, or an idle one, when it is killed."""
    place, kind = arguments
    with Processes(1, fresh=False) as pool:
        if kind == "idle":
            pool.start("pid", pid, [0], {})
            while not (ended := pool.wait(1.0)):
                pass
            Path(place).write_text(str(ended[0][1].value))  # type: ignore[union-attr]
        else:
            pool.start("sleep", sleep, [place], {})
        while True:
            pool.wait(1.0)
            time.sleep(0.1)
