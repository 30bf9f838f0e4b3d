"""The command in a process of its own, forked, so that it starts at once and may be killed."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from mlseg import run


class Child:
    """``mlseg run`` with ``arguments``; its standard error goes to ``stderr``.

    Args:
        before: called in the child before the command, to break something there.
    """

    def __init__(
        self,
        arguments: list[str],
        stderr: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.stderr = stderr
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, before)

    def _run(self, arguments: list[str], before: Callable[[], None] | None) -> None:
        code = 70
        try:
            descriptor = os.open(self.stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            # Not pytest's, which would print into its own capture.
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads doesn't survive a fork
            os.environ.pop("MKL_NUM_THREADS", None)
            torch.set_num_threads(1)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            if before is not None:
                before()
            code = run.main(arguments)
        except BaseException:  # noqa: BLE001, nothing may get back into the tests' own process
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, negative for the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def lines(self) -> list[str]:
        """What it wrote."""
        return self.stderr.read_text(encoding="utf-8").splitlines()
