"""A command in a process of its own that starts at once, within bounds, and may be broken.

It is forked from a process that has imported the commands and done nothing else: one that has
trained can't be forked where there is a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shlex
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_processes = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Start the process that the others are forked from."""
    _processes.set_forkserver_preload(["trials.child", "trials.preloaded"])
    former = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parents[1])  # else it wouldn't find these modules, and say nothing
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, former)))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if former is not None:
            os.environ["PYTHONPATH"] = former


LOGS = "logs"
CRASH = 70
"""The exit code of a command that raised."""
SECONDS = 10.0
"""Of processor time; a command that takes more hangs, or its trial says that it may."""
WALL = 60.0
"""Seconds that a command may take while others have the processor."""
MEMORY = 1024
"""MiB that a command may take beyond what its imports take."""


@dataclass(frozen=True)
class Task:
    """A command and how it is broken.

    Attributes:
        command: the module, ``run`` for ``python -m mlseg.run``; or ``module:function`` of these
            trials that takes the arguments and gives the exit code.
        arguments: of the command.
        place: the working directory; its output goes to ``logs`` beside it.
        name: of the output's files.
        stdout: where the output goes instead: a file's path, or ``pipe`` for one without a reader.
        die_at: the number of the file operation before which it kills itself; 0: never.
        file_size: bytes that no file may exceed, as on a full disk.
        seconds: of processor time.
        memory: MiB beyond its imports.
        environment: changed variables.
    """

    command: str
    arguments: tuple[str, ...]
    place: Path
    name: str = "command"
    stdout: str | None = None
    die_at: int = 0
    file_size: int | None = None
    seconds: float = SECONDS
    memory: int = MEMORY
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where it writes its standard error."""
        return self.place.parent / LOGS / f"{self.name}.err"

    def line(self) -> str:
        """The command for a shell, apart from what breaks it."""
        module = f"mlseg.{self.command}" if ":" not in self.command else self.command
        return f"cd {shlex.quote(str(self.place))}; python -m {module} {shlex.join(self.arguments)}"


class Child:
    """A started task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        task.place.mkdir(parents=True, exist_ok=True)
        task.log.parent.mkdir(parents=True, exist_ok=True)
        self._report = task.log.with_suffix(".json")
        self._report.unlink(missing_ok=True)
        self._reader: int | None = None
        if task.file_size is not None:
            # What it says isn't part of the disk that is full: it goes through a pipe.
            self._pipe = task.log.with_suffix(".pipe")
            os.mkfifo(self._pipe)
            self._reader = os.open(self._pipe, os.O_RDWR | os.O_NONBLOCK)
            fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, 2**20)
        with (task.log.parent / "commands.sh").open("a", encoding="utf-8") as file:
            file.write(f"{task.line()}  # {task.name}\n")
        _start_server()
        self._process = _processes.Process(target=_work, args=(task, self._report), daemon=True)
        self._process.start()
        self.started = time.monotonic()

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def running(self, seconds: float) -> bool:
        """Wait so long at most; whether it still runs."""
        self._process.join(max(0.0, seconds))
        return self._process.is_alive()

    def wait(self) -> Ended:
        """Its end; one that doesn't come is made."""
        hung = self.running(self.started + WALL - time.monotonic())
        if hung:
            self.send(signal.SIGKILL)
            self._process.join()
        code = self._process.exitcode
        assert code is not None
        if self._reader is not None:
            with contextlib.suppress(BlockingIOError):
                self.task.log.write_bytes(os.read(self._reader, 2**20))
            os.close(self._reader)
            self._pipe.unlink()
        report: dict[str, Any] = {}
        if self._report.is_file():
            report = json.loads(self._report.read_text(encoding="utf-8"))
        return Ended(
            task=self.task,
            code=code,
            hung=hung or code == -signal.SIGXCPU,
            seconds=time.monotonic() - self.started,
            memory=report.get("memory", 0.0),
            operations=report.get("operations", 0),
            error=_read(self.task.log),
            output=_read(self.task.log.with_suffix(".out")),
        )


@dataclass(frozen=True)
class Ended:
    """What became of a task.

    Attributes:
        code: its exit code, negative for the signal that ended it.
        hung: it ran beyond its time.
        seconds: that it took.
        memory: MiB at its peak beyond its imports; 0 if it was killed.
        operations: on files, if it came to its end.
        error, output: what it printed.
    """

    task: Task
    code: int
    hung: bool
    seconds: float
    memory: float
    operations: int
    error: str
    output: str


def call(task: Task) -> Ended:
    """Run a task to its end."""
    return Child(task).wait()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# ------------------------------------------------------------------------- in the child


def _work(task: Task, report: Path) -> None:
    code = CRASH
    operations = [0]
    base = _peak()
    try:
        _connect(task)
        os.chdir(task.place)
        os.environ.update(task.environment)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            former = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, former)
        _bound(task)
        import torch

        torch.set_num_threads(1)
        _count(operations, task.die_at)
        code = _command(task)
    except SystemExit as end:  # argparse's, as the interpreter takes it
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001, the exit code tells it from any of the command's own
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = 120  # as the interpreter's own
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        _count(operations, 0)
        found = {"memory": _peak() - base, "operations": operations[0]}
        report.write_text(json.dumps(found), encoding="utf-8")
        os._exit(code)


def _command(task: Task) -> int:
    import importlib

    module, _, function = task.command.partition(":")
    where = f"trials.{module}" if function else f"mlseg.{module}"
    code = getattr(importlib.import_module(where), function or "main")(list(task.arguments))
    assert isinstance(code, int)
    return code


def _connect(task: Task) -> None:
    out = os.open(task.log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if task.file_size is not None:
        out = os.open(task.log.with_suffix(".pipe"), os.O_WRONLY)
    if task.file_size is not None:
        err = os.open(task.log.with_suffix(".pipe"), os.O_WRONLY)
    else:
        err = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if task.stdout == "pipe":
        reader, out = os.pipe()
        os.close(reader)
    elif task.stdout is not None:
        out = os.open(task.stdout, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(err, 2)


def _bound(task: Task) -> None:
    seconds = int(_processor_time() + task.seconds + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    # Twice the bound, so that what exceeds it is measured where that is possible.
    space = (_virtual() + 2 * task.memory + 512) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if task.file_size is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task.file_size, hard))


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(key: str) -> float:
    """A figure of this process in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _peak() -> float:
    return _status("VmHWM")


def _virtual() -> int:
    return int(_status("VmSize"))


_OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_counting: list[tuple[list[int], int]] = []


def _count(operations: list[int], die_at: int) -> None:
    """Count what changes files from now on, and die before the operation of this number."""
    if not _counting:
        sys.addaudithook(_audit)
    _counting[:] = [(operations, die_at)]


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _counting or (event != "open" and event not in _OPERATIONS):
        return
    if event == "open" and not _writes(arguments):
        return
    operations, die_at = _counting[0]
    operations[0] += 1
    if operations[0] == die_at:
        os.kill(os.getpid(), signal.SIGKILL)


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether a file is opened for writing: a mode, or flags where there is none."""
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
