"""The command in a process of its own, which starts at once and may be killed.

It is forked from a process that has imported the command and done nothing else: one that has
trained can't be forked where there is a GPU, since neither autograd's threads nor CUDA survive it.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlseg import checkpoint, run
from mlseg.engines.engine import Engine

if sys.platform != "win32":
    _processes = multiprocessing.get_context("forkserver")
    _processes.set_forkserver_preload(["mlseg.run"])


class Child:
    """``mlseg run`` with ``arguments``; its standard error goes to ``stderr``.

    Args:
        command: another one, which may have processes of its own.
        before: called in the child before the command, to break something there; a function of this
            module.
    """

    def __init__(
        self,
        arguments: list[str],
        stderr: Path,
        before: Callable[[], None] | None = None,
        command: Callable[[list[str]], int] = run.main,
    ) -> None:
        self.stderr = stderr
        self._process = _processes.Process(
            target=_run, args=(arguments, stderr, before, command), daemon=command is run.main
        )
        self._process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, unless it has ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Its exit code, negative for the signal that ended it."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.exitcode

    def lines(self) -> list[str]:
        """What it wrote."""
        return self.stderr.read_text(encoding="utf-8").splitlines()


def _run(
    arguments: list[str],
    stderr: Path,
    before: Callable[[], None] | None,
    command: Callable[[list[str]], int],
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    code = 70
    try:
        descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        if before is not None:
            before()
        code = command(arguments)
    except BaseException:  # noqa: BLE001, the exit code is to tell it from any of the command's own
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --------------------------------------------------------------------- what breaks in a child


def slow_steps() -> None:
    """Each iteration takes half a minute."""
    Engine.train_step = lambda self: time.sleep(30)  # type: ignore[method-assign]


def limit_files(size: int) -> None:
    """Writes beyond ``size`` bytes of a file fail."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def signal_at(number: int, write: int) -> None:
    """The signal comes once so many files are written and not yet in their place."""
    writes = iter(range(1, write + 1))

    def sync(fd: Any) -> None:
        original(fd)
        if next(writes, 0) == write:
            os.kill(os.getpid(), number)

    original, os.fsync = os.fsync, sync
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process that nobody has prepared


def fill_up_later() -> None:
    """From the second checkpoint on, writes beyond 20 000 bytes of a file fail."""
    saves = iter([checkpoint.save])

    def save(path: Path, state: dict[str, Any]) -> None:
        limit_files(1 << 30 if next(saves, None) else 20_000)
        original(path, state)

    original, checkpoint.save = checkpoint.save, save
