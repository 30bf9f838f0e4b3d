"""Compare hypergradient methods: against the exact one, and from end to end.

python -m mlseg.compare configs/compare_quadratic.yaml
python -m mlseg.compare configs/compare_ridge.yaml seeds=[0,1,2,3,4] --out runs/ridge --jobs 2
python -m mlseg.compare configs/compare_quadratic.yaml tasks.quadratic.condition=1e4
python -m mlseg.compare --resume runs/ridge
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlseg import command_line, signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlseg import config, machine
from mlseg.commands import guarded, make_console, named, require_extra, say_notes
from mlseg.comparison import figures, phases, report
from mlseg.comparison.cells import Cell, Runner
from mlseg.comparison.settings import Comparison, parse
from mlseg.comparison.tasks.base import all_tasks
from mlseg.errors import UserError
from mlseg.files import Held, claimed, require_new, write_text
from mlseg.hypergradients import names
from mlseg.workers import make_pool, shard

NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line.parse(parser(), given)
    arguments.command = shlex.join(["python", "-m", "mlseg.compare", *given])
    if arguments.threads is not None:
        arguments.overrides.append(f"threads={arguments.threads}")
    return guarded(_compare, arguments)


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    tasks = "\n".join(f"  {task.name:<14} {task.summary}" for task in all_tasks())
    made = argparse.ArgumentParser(
        prog="mlseg compare",
        description="Compare hypergradient methods: accuracy, cost, and scores from end to end.",
        epilog=f"tasks:\n{tasks}\n\nmethods: {', '.join(names())}\n\nexit codes: 0 done, 1 failed "
        "in mid-run, 2 a mistake in config or command, 130 and 143 interrupted; finished cells are "
        "kept",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("config", nargs="?", help="YAML file; may be left out with --resume")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="seeds=[0,1,2]")
    made.add_argument("--out", type=named, help="directory (runs/<config>/<time>)")
    made.add_argument(
        "--resume", type=named, metavar="DIR", help="keep DIR's finished cells, go on"
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    made.add_argument("--shard", metavar="I/N", help="one of N parts of the cells, I from 0")
    made.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster; local: one made here")
    threads.add_flag(made)
    return made


def _compare(arguments: argparse.Namespace) -> int:
    require_extra("compare", NEEDED)
    shard([], arguments.shard)
    if arguments.jobs < 1:
        raise UserError(f"--jobs: {arguments.jobs} processes; give 1 or more")
    tree = _what(arguments)
    parent = Path("runs") / Path(arguments.config or "").stem
    if arguments.shard is not None:
        return _part(arguments, tree)
    with claimed(arguments.resume or arguments.out, parent) as directory:
        if arguments.resume is None:
            require_new(directory)
        comparison = _begin(arguments, tree, directory)
        return _fill(arguments, comparison, directory)


def _part(arguments: argparse.Namespace, tree: config.Tree) -> int:
    """One part of a comparison whose directory others work in too: claimed to begin alone."""
    directory = arguments.resume or arguments.out
    if directory is None:
        raise UserError("--shard: all parts need one directory; name it with --out")
    if (directory / "config.yaml").is_file():
        arguments.resume = directory
    for _ in range(600):
        try:
            with claimed(directory, directory.parent):
                if arguments.resume is None:
                    require_new(directory)
                comparison = _begin(arguments, tree, directory)
            return _fill(arguments, comparison, directory)
        except Held:  # another part begins, or all of it is done in one
            arguments.resume = directory
            time.sleep(0.1)
    raise UserError(f"{directory}: another process is at work in it; wait until that has ended")


def _begin(arguments: argparse.Namespace, tree: config.Tree, directory: Path) -> Comparison:
    _settle_threads(tree, arguments)
    comparison = parse(tree)
    say_notes(tree)
    if arguments.resume is not None:
        _refuse_changes(comparison, directory)
    write_text(directory / "config.yaml", config.dump(comparison.settings))
    return comparison


def _fill(arguments: argparse.Namespace, comparison: Comparison, directory: Path) -> int:
    pool = None
    if arguments.jobs > 1 or arguments.ray is not None:
        pool = make_pool(arguments.jobs, arguments.ray, fresh=False, what="mlseg compare")
    console = make_console(stderr=True)
    console.print(f"Writing to {directory}, running on {comparison.device}")
    where = str(arguments.jobs) if arguments.ray is None else f"ray, {arguments.ray}"
    circumstances = _circumstances(comparison, where)
    with Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        shown = bar.add_task("comparing", total=phases.count(comparison))

        def on_done(cell: Cell) -> None:
            bar.update(shown, advance=1, description=f"{cell.phase}: {cell.task}, {cell.method}")

        with Runner(comparison, directory, pool, circumstances, on_done, arguments.shard) as runner:
            results = phases.run(comparison, runner)
        bar.update(shown, total=bar.tasks[0].completed)
    if runner.missing:
        console.print(
            f"{len(runner.missing)} cells of other parts are missing; once those have ended call "
            "any part again: it does what is left, and the last one writes the report"
        )
        return 0
    alone = contextlib.nullcontext()  # it is claimed, but for parts
    with alone if arguments.shard is None else claimed(directory, directory.parent):
        _finish(comparison, results, directory, {"command": arguments.command, **circumstances})
    return 0


def _settle_threads(tree: config.Tree, arguments: argparse.Namespace) -> None:
    """Where nothing says how many threads a process has: as the comparison began, or as chosen."""
    if tree.values.get("threads", "auto") != "auto":
        return
    stored = None
    if arguments.resume is not None:
        stored = config.load(arguments.resume / "config.yaml").values.get("threads")
    tree.values["threads"] = stored or threads.choose(0, arguments.jobs).number


def _finish(
    comparison: Comparison, results: phases.Results, directory: Path, head: dict[str, str]
) -> None:
    """Write files and print tables."""
    settings = comparison.settings
    head["seeds"] = ", ".join(map(str, settings.seeds))
    pictures = figures.draw(comparison, results, directory)
    report.write(comparison, results, pictures, directory, head)
    console = make_console()
    for made in report.all_tables(comparison, results):
        table = Table(title=made.title)
        table.add_column(made.columns[0], no_wrap=True)
        for column in made.columns[1:]:
            table.add_column(column, justify="right", no_wrap=column in ("aim", "status"))
        for row in made.rows:
            table.add_row(*row)
        console.print(table)
    for cell, found in report.failed(results)[:5]:
        console.print(f"{cell.phase}, {cell.task}, {cell.method}: failed: {found['reason']}")
    console.print(f"All of it is in {directory}; read {directory / 'report.md'}")


def _what(arguments: argparse.Namespace) -> config.Tree:
    if arguments.resume is not None:
        stored = arguments.resume / "config.yaml"
        if arguments.out is not None:
            raise UserError("--out: a resumed comparison stays in its directory; drop it")
        if not stored.is_file():
            raise UserError(
                f"--resume: {arguments.resume} is no comparison's directory (it has no config.yaml)"
            )
        return config.load(arguments.config or stored, arguments.overrides)
    if arguments.config is None:
        raise UserError("name a config, such as configs/compare_quadratic.yaml (see --help)")
    return config.load(arguments.config, arguments.overrides)


def _refuse_changes(comparison: Comparison, directory: Path) -> None:
    before = parse(config.load(directory / "config.yaml")).settings.model_dump(mode="json")
    now = comparison.settings.model_dump(mode="json")
    changed = config.differences(before, now)
    if changed:
        raise UserError(
            f"--resume: {changed[0]} differs from {directory / 'config.yaml'}, whose cells would "
            "not belong to it; start a new comparison with --out"
        )


def _circumstances(comparison: Comparison, processes: str) -> dict[str, str]:
    """What figures may depend on beside the config."""
    found = machine.describe(comparison.device)
    own = {"threads": str(comparison.settings.threads), "spinning": threads.spinning()}
    return {**found, **own, "processes": processes}


if __name__ == "__main__":
    sys.exit(main())
