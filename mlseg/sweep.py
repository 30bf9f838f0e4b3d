"""Run a grid of runs, and make its tables and pictures.

python -m mlseg.sweep configs/tables/e2eaug_isic_small.yaml --jobs 2
python -m mlseg.sweep configs/tables/e2eaug_isic.yaml --dry-run
python -m mlseg.sweep configs/tables/e2eaug_isic.yaml --only row=ours,vanilla images=40 --seeds 0 1
python -m mlseg.sweep configs/tables/e2eaug_isic.yaml --shard 3/16       # a part of it, for arrays
python -m mlseg.sweep configs/tables/e2eaug_isic.yaml --ray auto         # on a Ray cluster
python -m mlseg.sweep configs/tables/e2eaug_isic.yaml --table            # of what has finished
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mlseg import command_line, signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

from rich.console import Console
from rich.table import Table

from mlseg.commands import guarded, make_console, named, require_extra
from mlseg.dry_run import span
from mlseg.errors import EXIT_RUN_ERROR, EXIT_USER_ERROR, UserError
from mlseg.files import Held, locked
from mlseg.sweeps import running
from mlseg.sweeps.grid import CONFIG, Cell, Grid
from mlseg.workers import Pool, Tally, make_pool, shard

NEEDED = {"matplotlib": "matplotlib", "pandas": "pandas"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line.parse(parser(), given)
    arguments.command = shlex.join(["python", "-m", "mlseg.sweep", *given])
    return guarded(_sweep, arguments)


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(
        prog="mlseg sweep",
        description="Run a grid of runs, and make its tables and pictures.",
        epilog="Called again it goes on: finished cells are kept, interrupted ones resumed. exit "
        "codes: 0 done, 1 a cell has failed, 2 a mistake in grid or command, 130, 143 and 129 "
        "interrupted; what was at work has saved",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("grid", type=named, help="YAML file")
    made.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of every cell that has such a key"
    )
    made.add_argument("--out", type=named, help="directory (runs/<grid>)")
    made.add_argument("--seeds", type=int, nargs="+", help="instead of the grid's")
    made.add_argument(
        "--only", action="append", default=[], metavar="AXIS=VALUE,...",
        help="these cells, and what they build on; for several axes give it several times",
    )  # fmt: skip
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    made.add_argument("--shard", metavar="I/N", help="one of N parts, I from 0")
    made.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster; local: one made here")
    made.add_argument("--strict", action="store_true", help="stop at the first cell that fails")
    made.add_argument("--dry-run", action="store_true", help="list cells, time and memory")
    made.add_argument("--table", action="store_true", help="run nothing, make the tables")
    return made


def _sweep(arguments: argparse.Namespace) -> int:
    out = arguments.out or Path("runs") / arguments.grid.stem
    grid = Grid(arguments.grid, out, arguments.overrides, arguments.seeds)
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    whole = grid.closure(grid.shown)
    chosen = shard(grid.chosen(grid.shown, arguments.only), arguments.shard)
    cells = grid.closure(chosen)
    running.check_found(grid, whole)
    console = make_console()
    if arguments.dry_run:
        _list(grid, cells, console)
        return 0
    require_extra("sweep", NEEDED)
    if not chosen and arguments.shard is None:
        raise UserError("--only: no cell is left; name others")
    if arguments.table:
        if not any(running.finished(grid, cell) for cell in grid.shown):
            raise UserError(f"no run below {out} has finished yet")
        _write(grid, console)
        return 0
    pool = make_pool(arguments.jobs, arguments.ray, fresh=True, what="mlseg sweep")
    _take_place(grid, whole, arguments.command)
    code = _run(arguments, grid, cells, pool)
    if code > EXIT_USER_ERROR:
        return code  # a signal: no time for tables
    running.check_found(grid, whole)
    done = [running.finished(grid, cell) for cell in grid.shown]
    if all(done) or (any(done) and arguments.shard is None):
        _write(grid, console)
    return code


def _take_place(grid: Grid, cells: Sequence[Cell], command: str) -> None:
    """Note the command in the directory, unless that is another thing's."""
    from mlseg.sweeps import report

    own = (report.HISTORY, "logs")
    # Hidden files are locks, and what another caller writes just now; its history comes first.
    other = [path for path in grid.out.glob("[!.]*") if path.name not in own]
    runs = (cell for cell in cells if (grid.directory(cell) / CONFIG).exists())
    if other and not (grid.out / report.HISTORY).exists() and next(runs, None) is None:
        raise UserError(
            f"--out: {grid.out} holds {other[0].name} and no run of this grid; name another "
            "directory"
        )
    with contextlib.suppress(Held), locked(grid.out / ".table.lock"):
        report.remember(grid, command)


def _run(arguments: argparse.Namespace, grid: Grid, cells: Sequence[Cell], pool: Pool) -> int:
    console = make_console(stderr=True)
    console.print(f"{len(cells)} cells, writing to {grid.out}", markup=False)
    jobs = arguments.jobs if arguments.ray is None else 1
    tally, number = running.run(grid, cells, pool, jobs, arguments.strict, console)
    _say(tally, console)
    if number is not None:
        done = f"{len(tally.done)} of {len(cells)} cells are done"
        print(f"stopped: {done}; the same command goes on", file=sys.stderr)
        return 128 + number
    return EXIT_RUN_ERROR if tally.failed else 0


def _say(tally: Tally[Cell], console: Console) -> None:
    for cell, text in tally.failed.items():
        console.print(f"failed: {cell}: {text}", markup=False, soft_wrap=True)


def _write(grid: Grid, console: Console) -> None:
    """The tables of what has finished, unless another caller is writing them."""
    from mlseg.sweeps import report
    from mlseg.sweeps.frame import Finished

    try:
        with locked(grid.out / ".table.lock"):
            text = report.write(grid, Finished(grid, grid.shown))
    except Held:
        console.print(f"Another process is writing {grid.out / 'table.md'}", markup=False)
        return
    print(text)
    console.print(f"All of it is in {grid.out}", markup=False)


def _list(grid: Grid, cells: Sequence[Cell], console: Console) -> None:
    """What there is to do, and what it is expected to take."""
    expected = running.expectations(grid, cells)
    table = Table(*grid.axes, "seed", "state", "expected", "MiB", title=grid.settings.title)
    left, unknown = 0.0, 0
    for cell in cells:
        there = grid.directory(cell)
        state = "done" if running.finished(grid, cell) else ""
        state = state or ("begun" if (there / CONFIG).exists() else "")
        seconds, memory = expected.get(cell, (None, None))
        if state != "done":
            left, unknown = left + (seconds or 0.0), unknown + (seconds is None)
        table.add_row(
            *(value for _, value in cell.at),
            str(cell.seed),
            state,
            "" if seconds is None else span(seconds),
            "" if memory is None else f"{memory:,.0f}",
        )
    console.print(table)
    done = sum(running.finished(grid, cell) for cell in cells)
    console.print(f"{len(cells)} cells, {done} done; {span(left)} of work left on one process")
    if unknown:
        console.print(
            f"{unknown} of them are of rows of which none has finished, and aren't in that; "
            "python -m mlseg.run CONFIG --dry-run measures one"
        )


if __name__ == "__main__":
    sys.exit(main())
