"""The cells of a comparison, run one after another or in several processes, each kept on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import signal
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
from mlseg.config import yaml12
from mlseg.engines.interruption import Interrupted, Interruption
from mlseg.errors import RunError, one_line
from mlseg.files import Held, locked, write_json
from mlseg.workers import HELD, Here, Pool, Work, shard, work_off

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

    Several may work on one directory: each cell is computed by one of them.

    Args:
        comparison: the checked config.
        directory: each cell is a file in its ``cells``.
        pool: where; None: in this process.
        machine: description of this machine, stored with each cell.
        on_done: called with each cell as it is finished or found.
        part: ``I/N``, one of N parts of each phase's cells; None: all.
    """

    def __init__(
        self,
        comparison: Comparison,
        directory: Path,
        pool: Pool | None,
        machine: Mapping[str, str],
        on_done: Callable[[Cell], None],
        part: str | None = None,
    ) -> None:
        self.comparison, self.directory = comparison, directory.resolve()
        self.machine, self.on_done, self.part = dict(machine), on_done, part
        self.missing: list[Cell] = []
        """Cells of other parts that nobody has computed yet."""
        self._pool = pool or Here()
        self._text = None if pool is None else config.dump(comparison.settings)

    def __enter__(self) -> Runner:
        self._pool.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._pool.__exit__(*raised)

    def __call__(self, cells: Sequence[Cell]) -> dict[Cell, Figures]:
        """Figures of all ``cells``, in their order, but for those that are missing.

        A cell that failed with an exception is tried again; its cause may be gone.

        Raises:
            Stopped: SIGINT, SIGTERM or SIGHUP came.
            RunError: a process died, or a cell can't be written.
        """
        own = shard(cells, self.part)
        pieces = [self._piece(cell) for cell in own]
        with Interruption() as interruption:
            tally = work_off(
                pieces,
                self._pool,
                told=lambda tally, cell, ended: self.on_done(cell),
                stop=lambda: interruption.requested,
                strict=True,
                retries=1,
            )
            for cell, text in tally.failed.items():
                raise RunError(
                    f"{cell.task}, {cell.method}, seed {cell.seed}: {text}; finished cells are "
                    "kept, go on with --resume and fewer --jobs"
                )
            if interruption.number is not None:
                raise Stopped(interruption.number, len(tally.done), len(own))
        found = {cell: figures for cell in cells if (figures := read(self.directory, cell))}
        self.missing += [cell for cell in cells if cell not in found]
        return found

    def _piece(self, cell: Cell) -> Work[Cell]:
        def arguments() -> Sequence[Any]:
            what: Any = self.comparison if self._text is None else self._text
            return (what, cell, self.directory, self.machine)

        return Work(cell, compute_and_keep, arguments, done=lambda: _done(self.directory, cell))


def read(directory: Path, cell: Cell) -> Figures | None:
    """The figures of a cell; None where there are none, or their file is damaged."""
    try:
        entry = json.loads((directory / "cells" / cell.file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(entry, dict) and all(entry.get(k) == v for k, v in vars(cell).items())
    return entry if same else None


def _done(directory: Path, cell: Cell) -> bool:
    kept = read(directory, cell)
    return kept is not None and kept["status"] != FAILED


def compute_and_keep(
    what: Comparison | str, cell: Cell, directory: Path, machine: Mapping[str, str]
) -> str | None:
    """Compute a cell and write it, unless another process is at it or has done so meanwhile.

    Args:
        what: the comparison; or its config, where it is read once for all cells of a process.

    Raises:
        RunError: it can't be written.
    """
    comparison = _parsed(what) if isinstance(what, str) else what
    lock = directory / ".locks" / f"{cell.file}.lock"
    try:
        with locked(lock), _threads(comparison.settings.threads):
            if not _done(directory, cell):
                entry = {**vars(cell), **compute(comparison, cell), "machine": dict(machine)}
                write_json(directory / "cells" / cell.file, _plain(entry))
            with contextlib.suppress(OSError):  # whoever waits for this very file finds it done
                lock.unlink()
                lock.parent.rmdir()
    except Held:
        return HELD
    return None


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Comparison:
    values, _ = yaml12.read(text, "config")
    return parse(config.Tree(values))


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
