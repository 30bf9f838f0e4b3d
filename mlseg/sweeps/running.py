"""Bringing the cells of a grid to their end, and what is said meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlseg import config, threads
from mlseg.commands import guarded
from mlseg.config import Tree
from mlseg.dry_run import MIB, span
from mlseg.engines.interruption import Interruption
from mlseg.errors import UserError
from mlseg.files import Held, claimed, held, require_new, write_json
from mlseg.machine import choose_device, peak_memory
from mlseg.problems.systems import parse_run
from mlseg.run import bring_to_end
from mlseg.sweeps.checks import value_at
from mlseg.sweeps.grid import CONFIG, RESULTS, Cell, Grid
from mlseg.workers import HELD, STOPPED, Ended, Failed, Pool, Tally, Work, work_off

NOTE = "cell.json"
"""Of each cell, beside what every run leaves: its place in the grid, what it took, what it cost."""
_SIGNALS = (129, 130, 143)


def finished(grid: Grid, cell: Cell) -> bool:
    """Whether its run has come to its end."""
    return (grid.directory(cell) / RESULTS).exists()


def results(grid: Grid, cell: Cell) -> dict[str, Any]:
    """``results.json`` of a finished cell.

    Raises:
        UserError: it can't be read.
    """
    return _read(grid.directory(cell) / RESULTS)


def check_found(grid: Grid, cells: Sequence[Cell]) -> None:
    """That every run found belongs to this grid, so that no table mixes settings.

    Raises:
        UserError: one has other settings, lacks what the grid requires, or took something that has
            been made anew since.
    """
    for cell in cells:
        path = grid.directory(cell) / CONFIG
        if not path.exists():
            if (grid.directory(cell) / RESULTS).exists():
                raise UserError(
                    f"{path}: missing, beside a {RESULTS}; remove that, or name another --out"
                )
            continue
        tree, taken = grid.config(cell), grid.takes(cell)
        before, now = (parse_run(t)[0].model_dump(mode="json") for t in (config.load(path), tree))
        left = {"threads", *taken}
        changed = [
            key
            for key in config.differences(before, now)
            if key not in left and not any(key.startswith(f"{other}.") for other in taken)
        ]
        if changed:
            raise UserError(
                f"{path}: {changed[0]} is not what this grid asks for ({tree.where(changed[0])}); "
                f"name another --out, or remove {path.parent}"
            )
        if finished(grid, cell):
            _check_result(grid, cell, before)


def _check_result(grid: Grid, cell: Cell, stored: Mapping[str, Any]) -> None:
    directory, wrong = grid.directory(cell), []
    own = results(grid, cell)
    for key, wanted in grid.settings.require.items():
        if (value := value_at(own, key)) != wanted:
            wrong.append(f"{key} is {json.dumps(value)}, the grid requires {json.dumps(wanted)}")
    note = _read(directory / NOTE) if (directory / NOTE).exists() else {}
    for key, (dependency, other) in grid.takes(cell).items():
        if not finished(grid, other):
            continue
        if dependency.result is not None:
            value = value_at(results(grid, other), dependency.result)
            if value_at(stored, key) != value:
                wrong.append(f"{key} is {value_at(stored, key)}, {other} has {value} by now")
        else:
            now = _digest(grid.directory(other) / str(dependency.file))
            if note.get("took", {}).get(key, now) != now:
                wrong.append(f"{other} has another {dependency.file} by now")
    if wrong:
        raise UserError(f"{directory}: {'; '.join(wrong)}; remove it to run it again")


def run(
    grid: Grid,
    cells: Sequence[Cell],
    pool: Pool,
    jobs: int,
    strict: bool,
    console: Console,
) -> tuple[Tally[Cell], int | None]:
    """Bring ``cells`` to their end.

    Returns:
        What became of each, and the number of the signal that ended it early, or None.
    """
    expected = expectations(grid, cells)
    pieces = [_work(grid, cell, jobs) for cell in cells]
    said = False

    def stop() -> bool:
        nonlocal said
        if interruption.requested and not said:
            said = True
            console.print("stopping: what is at work saves; the same command goes on")
        return interruption.requested

    with Interruption() as interruption, Display(console, cells, expected, jobs) as display, pool:
        tally = work_off(
            pieces, pool, told=display.told, stop=stop, saves=True, strict=strict, retries=1
        )
    return tally, interruption.number


def _work(grid: Grid, cell: Cell, jobs: int) -> Work[Cell]:
    directory = grid.directory(cell).resolve()

    def arguments() -> Sequence[Any]:
        taken: dict[str, Any] = {}
        digests = {}
        for key, (dependency, other) in grid.takes(cell).items():
            if dependency.file is not None:
                path = grid.directory(other).resolve() / dependency.file
                taken[key], digests[key] = str(path), _digest(path)
            else:
                taken[key] = value_at(results(grid, other), str(dependency.result))
                if taken[key] is None:
                    raise UserError(
                        f"{grid.directory(other) / RESULTS} has no {dependency.result}, which "
                        f"{key} is to be; name another result in the grid's dependencies"
                    )
        tree = grid.config(cell, taken)
        settings = parse_run(tree)[0]
        if settings.threads == "auto":
            tree.values["threads"] = threads.choose(settings.work(), jobs).number
        note = {"cell": cell.values, "seed": cell.seed, "took": digests}
        return (tree, str(directory), str(grid.log(cell).resolve()), note)

    return Work(
        cell,
        run_cell,
        arguments,
        done=lambda: finished(grid, cell),
        free=lambda: not held(directory),
        after=grid.after(cell),
        needs=grid.resources(cell),
    )


def run_cell(tree: Tree, directory: str, log: str, note: dict[str, Any]) -> Any:
    """In a process of its own: start the run, go on with it, or leave it to who is at it.

    Returns:
        None, :data:`HELD`, :data:`STOPPED`, or what has failed.
    """
    place = Path(directory)

    def work(_: argparse.Namespace) -> int:
        with claimed(place, place.parent):
            if (place / RESULTS).exists():
                return 0
            going_on = (place / CONFIG).exists()
            if not going_on:
                (place / NOTE).unlink(missing_ok=True)  # of one that didn't get to begin
                require_new(place)
                write_json(place / NOTE, note)
            started = time.time()
            bring_to_end(place, None if going_on else tree)
            kept = _read(place / NOTE) if (place / NOTE).exists() else note
            device = choose_device(tree.values.get("device", "auto"))
            cost = {
                "seconds": round(kept.get("seconds", 0.0) + time.time() - started, 1),
                "memory_mib": round(peak_memory(device) / MIB),
            }
            write_json(place / NOTE, {**kept, **cost})
        return 0

    with _printing_to(Path(log)) as printed:
        try:
            code = guarded(work_unless_held(work), argparse.Namespace())
        except Exception:  # noqa: BLE001, a bug: its traceback is in the log
            traceback.print_exc()
            code = 1
    if code == _HELD:
        return HELD
    if code in _SIGNALS:
        return STOPPED
    return Failed(f"{printed()} (see {log})") if code else None


_HELD = -1


def work_unless_held(work: Callable[[argparse.Namespace], int]) -> Callable[[Any], int]:
    """``work``, but for directories where another process is at work: a code of their own."""

    def guarded_work(arguments: argparse.Namespace) -> int:
        try:
            return work(arguments)
        except Held:
            return _HELD

    return guarded_work


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[Callable[[], str]]:
    """Within this block everything printed goes to a file, added to what is there.

    Yields:
        a function that gives the last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        try:
            for descriptor in (1, 2):  # also what libraries print
                os.dup2(file.fileno(), descriptor)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield lambda: _last_line(log)
        finally:
            file.flush()
            for descriptor, before in zip((1, 2), kept, strict=True):
                os.dup2(before, descriptor)
                os.close(before)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


# -------------------------------------------------------------------------- what is expected


def expectations(grid: Grid, cells: Sequence[Cell]) -> dict[Cell, tuple[float, float | None]]:
    """Seconds and MiB that cells are expected to take: means of finished ones of other seeds."""
    known: dict[Any, list[tuple[float, float | None]]] = {}
    for cell in grid.closure(grid.shown):
        if finished(grid, cell):
            path = grid.directory(cell) / NOTE
            note = _read(path) if path.exists() else {}
            seconds = note.get("seconds", results(grid, cell).get("seconds"))
            if seconds is not None:
                known.setdefault(cell.at, []).append((seconds, note.get("memory_mib")))
    found: dict[Cell, tuple[float, float | None]] = {}
    for cell in cells:
        if costs := known.get(cell.at):
            memories = [memory for _, memory in costs if memory is not None]
            mean = sum(seconds for seconds, _ in costs) / len(costs)
            found[cell] = (mean, max(memories, default=None))
    return found


class Display:
    """A line for every cell that has ended, with how far the whole is; on a terminal a bar too."""

    def __init__(
        self,
        console: Console,
        cells: Sequence[Cell],
        expected: Mapping[Cell, tuple[float, float | None]],
        jobs: int,
    ) -> None:
        self.console, self.expected, self.jobs = console, expected, jobs
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(cells))

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def told(self, tally: Tally[Cell], cell: Cell, ended: Ended | None) -> None:
        """Say what has become of a cell."""
        if cell in tally.failed:
            what = f"failed: {tally.failed[cell]}"
        elif ended is None:
            what = "kept"
        else:
            what = f"done in {span(tally.seconds[cell])}"
        counts = f"{len(tally.done)} done, {len(tally.running)} running, {len(tally.failed)} failed"
        whole = f"{counts}, {len(tally.waiting) + len(tally.held)} waiting{self._left(tally)}"
        self.console.print(f"{cell}: {what} | {whole}", markup=False, soft_wrap=True)
        ended_so_far = len(tally.done) + len(tally.failed)
        self._bar.update(self._task, completed=ended_so_far, description=whole)

    def _left(self, tally: Tally[Cell]) -> str:
        """The time left, from what cells of the same row took, or else all of them."""
        mean = sum(tally.seconds.values()) / len(tally.seconds) if tally.seconds else None
        of_row: dict[Any, list[float]] = {}
        for cell, seconds in tally.seconds.items():
            of_row.setdefault(cell.at, []).append(seconds)
        left = 0.0
        now = time.monotonic()
        for cell in (*tally.waiting, *tally.running, *tally.held):
            own = of_row.get(cell.at)
            whole = sum(own) / len(own) if own else self.expected.get(cell, (mean, None))[0]
            if whole is None:
                return ""
            left += max(whole - (now - tally.running.get(cell, now)), 0.0)
        return f", about {span(left / self.jobs)} left" if left else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); remove {path.parent}, to run it again"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no mapping; remove {path.parent} to run it again")
    return found


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
