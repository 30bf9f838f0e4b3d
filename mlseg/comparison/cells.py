"""The cells of a comparison, run one after another or in several processes, each kept on disk."""

from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mlseg import config
from mlseg.comparison import measuring
from mlseg.comparison.settings import DTYPES, Comparison, parse
from mlseg.comparison.tasks.base import Conditions
from mlseg.engines.interruption import Interrupted, Interruption
from mlseg.errors import RunError, one_line
from mlseg.files import write_json

Figures = dict[str, Any]
FAILED = "failed"


@dataclass(frozen=True)
class Cell:
    """What is measured once.

    Attributes:
        phase: ``accuracy``; ``tuning`` or ``training`` from end to end.
        task, method: labels.
        dtype: by name.
        seed: of every draw.
        rate: the upper level's, from end to end.
    """

    phase: Literal["accuracy", "tuning", "training"]
    task: str
    method: str
    dtype: str
    seed: int
    rate: float | None = None

    @property
    def file(self) -> str:
        """A name that tells what it is, and is its own."""
        values = [str(value) for value in vars(self).values() if value is not None]
        slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", value) for value in values)
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
        return f"{slug[:120]}-{digest}.json"


class Stopped(Interrupted):
    """SIGINT, SIGTERM or SIGHUP came; finished cells are kept."""

    def __init__(self, number: int, finished: int, total: int) -> None:
        super().__init__(number, finished)
        self.args = (f"{signal.Signals(number).name}: stopped, {finished} of {total} cells kept",)


def compute(comparison: Comparison, cell: Cell) -> Figures:
    """Measure one cell; what goes wrong in it becomes its ``status``, with the traceback.

    Returns:
        its figures, and ``cell_seconds``, which all of it took.
    """
    start = time.perf_counter()
    try:
        figures = _measure(comparison, cell)
    except Exception as error:  # noqa: BLE001, whatever a method or a user's task raises is a row
        figures = {
            "status": FAILED,
            "reason": one_line(error),
            "traceback": traceback.format_exc(),
        }
    return {**figures, "cell_seconds": time.perf_counter() - start}


def _measure(comparison: Comparison, cell: Cell) -> Figures:
    task, settings = comparison.tasks[cell.task]
    training = comparison.settings.training
    conditions = Conditions(
        method=comparison.methods[cell.method],
        dtype=DTYPES[cell.dtype],
        device=comparison.device,
        seed=cell.seed,
    )
    if cell.phase == "accuracy":
        assert comparison.settings.accuracy is not None
        return measuring.accuracy(task, settings, conditions, comparison.settings.accuracy.repeats)
    assert training is not None
    assert cell.rate is not None
    conditions = dataclasses.replace(
        conditions, upper_rate=cell.rate, upper_optimizer=training.optimizer
    )
    return measuring.training(
        task, settings, conditions, training.iterations, training.evaluate_every
    )


class Runner:
    """Computes cells that aren't on disk yet; a context, in which its processes live.

    Args:
        comparison: the checked config.
        directory: each cell is a file in its ``cells``.
        jobs: processes; 1 computes in this one.
        machine: description of this machine, stored with each cell.
        on_done: called with each cell as it is finished or found.
    """

    def __init__(
        self,
        comparison: Comparison,
        directory: Path,
        jobs: int,
        machine: Mapping[str, str],
        on_done: Callable[[Cell], None],
    ) -> None:
        self.comparison, self.directory, self.jobs = comparison, directory / "cells", jobs
        self.machine, self.on_done = dict(machine), on_done
        self._pool: futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            for process in processes if kind is not None else ():
                process.terminate()

    def __call__(self, cells: Sequence[Cell]) -> dict[Cell, Figures]:
        """Figures of all ``cells``, in their order.

        A cell that failed with an exception is tried again; its cause may be gone.

        Raises:
            Stopped: SIGINT, SIGTERM or SIGHUP came.
            RunError: a process died, or a cell can't be written.
        """
        found: dict[Cell, Figures] = {}
        for cell in cells:
            kept = self._read(cell)
            if kept is not None and kept["status"] != FAILED:
                found[cell] = kept
                self.on_done(cell)
        missing = [cell for cell in cells if cell not in found]
        with Interruption() as interruption:
            for cell, figures in self._compute(missing, interruption):
                entry = {**vars(cell), **figures, "machine": self.machine}
                write_json(self.directory / cell.file, _plain(entry))
                found[cell] = self._read(cell) or {}
                self.on_done(cell)
                if interruption.number is not None:
                    raise Stopped(interruption.number, len(found), len(cells))
            if interruption.number is not None:
                raise Stopped(interruption.number, len(found), len(cells))
        return {cell: found[cell] for cell in cells}

    def _read(self, cell: Cell) -> Figures | None:
        try:
            entry = json.loads((self.directory / cell.file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return None  # damaged: computed again
        same = isinstance(entry, dict) and all(entry.get(k) == v for k, v in vars(cell).items())
        return entry if same else None

    def _compute(
        self, cells: Sequence[Cell], interruption: Interruption
    ) -> Iterator[tuple[Cell, Figures]]:
        threads = self.comparison.settings.threads
        if self.jobs == 1 or len(cells) < 2:
            with _threads(threads):
                for cell in cells:
                    yield cell, compute(self.comparison, cell)
            return
        if self._pool is None:
            self._pool = futures.ProcessPoolExecutor(
                self.jobs,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(config.dump(self.comparison.settings), threads),
            )
        try:
            waiting = {self._pool.submit(_compute_in_worker, cell): cell for cell in cells}
            while waiting and interruption.number is None:
                done, _ = futures.wait(waiting, 0.2, futures.FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        except futures.process.BrokenProcessPool as error:
            raise RunError(
                f"a process of the comparison died (out of memory?): {one_line(error)} Finished "
                "cells are kept; go on with --resume and fewer --jobs"
            ) from error


_worker: Comparison | None = None


def _start_worker(text: str, threads: int) -> None:
    """Set up a process: the parent alone hears Ctrl-C, and the config is read once."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    from mlseg.config import yaml12

    values, _ = yaml12.read(text, "config")
    _worker = parse(config.Tree(values))


def _end_with_parent() -> None:
    """End this process once its parent has, however that ended: nobody would read the figures.

    What is waited for is a pipe whose other end the parent alone holds.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # the main thread may be in the midst of a cell


def _compute_in_worker(cell: Cell) -> Figures:
    assert _worker is not None
    return compute(_worker, cell)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
