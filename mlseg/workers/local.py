"""Processes of this machine, forked from one that has imported everything and done nothing else.

So a piece of work starts at once and finds nothing that an earlier one has left behind. Where
processes can't be forked they start anew.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from mlseg.errors import one_line
from mlseg.workers.pool import Died, Ended, Raised, Resources, Returned

_KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_LATER = ("torch._dynamo", "scipy.ndimage", "scipy.spatial")
"""What a run loads only when it comes to it, and so each anew: two seconds of the CPU."""
_ASKING = 1.0
"""Seconds between two requests to end: a piece of work hears them while it trains."""
_PATIENCE = 600.0
"""Seconds that it has for saving, once its parent is gone."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    slot: int
    key: Hashable | None = None


class Processes:
    """A :class:`mlseg.workers.Pool` of ``jobs`` processes.

    They end with this one, however that ends. With several GPUs each sees one of them, in turn.

    Args:
        jobs: at a time.
        fresh: whether each piece of work has a process of its own, and saves when it is asked to
            end.
    """

    def __init__(self, jobs: int, *, fresh: bool) -> None:
        self.jobs, self.fresh = jobs, fresh
        self._context: Any = multiprocessing.get_context(_KIND)
        if _KIND == "forkserver":
            loaded = (name for name in sys.modules if name.split(".")[0] == "mlseg")
            modules = sorted(set(loaded) - {"mlseg.__main__"})
            self._context.set_forkserver_preload([*modules, *(_LATER if fresh else ())])
        self._workers: list[_Worker] = []
        self._asked = 0.0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            if worker.key is None:
                worker.connection.close()  # it waits for work, and ends
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def room(self) -> int:
        """Processes that have nothing to do, or could be started."""
        return self.jobs - sum(worker.key is not None for worker in self._workers)

    def start(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        needs: Resources,
    ) -> None:
        """Hand it to a process; what it needs isn't looked at."""
        idle = next((worker for worker in self._workers if worker.key is None), None)
        worker = self._begin() if idle is None else idle
        worker.key = key
        with contextlib.suppress(OSError):  # it died while it waited: `wait` finds that out
            worker.connection.send((function, tuple(arguments)))

    def wait(self, seconds: float) -> list[tuple[Hashable, Ended]]:
        """What has ended."""
        busy = {worker.connection: worker for worker in self._workers if worker.key is not None}
        found: list[tuple[Hashable, Ended]] = []
        if not busy:
            time.sleep(seconds)
            return found
        for ready in wait(list(busy), seconds):
            assert isinstance(ready, Connection)
            worker = busy[ready]
            key, worker.key = worker.key, None
            try:
                ended: Ended = ready.recv()
            except (EOFError, OSError):
                worker.process.join()
                ended = Died(_how(worker.process.exitcode))
            if self.fresh or isinstance(ended, Died):
                self._workers.remove(worker)
                worker.connection.close()
                worker.process.join()
            found.append((key, ended))
        return found

    def interrupt(self) -> None:
        """Send SIGTERM to what is at work, at most once a second."""
        if time.monotonic() - self._asked < _ASKING:
            return
        self._asked = time.monotonic()
        for worker in self._workers:
            if worker.key is not None and worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGTERM)

    def _begin(self) -> _Worker:
        used = {worker.slot for worker in self._workers}
        slot = next(number for number in range(self.jobs) if number not in used)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self.fresh, _gpu_of(slot)), daemon=True
        )
        process.start()
        theirs.close()
        worker = _Worker(process, ours, slot)
        self._workers.append(worker)
        return worker


def _gpu_of(slot: int) -> str | None:
    """What ``CUDA_VISIBLE_DEVICES`` is to be for a process; None leaves it as it is."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        import torch  # counts them without touching one

        names = [str(number) for number in range(torch.cuda.device_count())]
    return names[slot % len(names)] if len(names) > 1 else None


def _serve(connection: Connection, fresh: bool, gpu: str | None) -> None:
    """What a process does: pieces of work, until there is none, or nobody to give it one.

    Signals reach it through its work alone. One that comes while that saves must not cut it short,
    and there may be many: from this pool, from a terminal, from a scheduler that sends them to all.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    state = {"saving": False}
    threading.Thread(target=_end_with_parent, args=(state,), daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        state["saving"] = fresh
        ended: Ended
        try:
            ended = Returned(function(*arguments))
        except BaseException as error:  # noqa: BLE001, whatever it was, the parent hears of it
            ended = Raised(f"{type(error).__name__}: {one_line(error)}", traceback.format_exc())
        state["saving"] = False
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            connection.send(ended)
        except OSError:
            return
        if fresh:
            return


def _end_with_parent(state: dict[str, bool]) -> None:
    """Wait for the parent's end, give work that saves the time to do so, and end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    until = time.monotonic() + _PATIENCE
    while state["saving"] and time.monotonic() < until:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ASKING)
    os._exit(128 + signal.SIGTERM)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        number = signal.Signals(-code).name
        memory = " (out of memory?)" if number == "SIGKILL" else ""
        return f"its process was ended by {number}{memory}"
    return f"its process ended with code {code}"
