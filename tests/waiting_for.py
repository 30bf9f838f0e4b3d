"""Waiting for what other processes do."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(what: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What ``what`` returns as soon as that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing has come of it"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()  # it has ended since; or there is no /proc
