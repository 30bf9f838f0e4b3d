"""Train a system.

python -m mlseg.run configs/e2eaug_isic_small.yaml
python -m mlseg.run configs/e2eaug_isic.yaml engine.iterations=1000 seed=3 --out runs/try
python -m mlseg.run --resume runs/try
python -m mlseg.run configs/e2eaug_isic.yaml --dry-run
python -m mlseg.run configs/e2eaug_isic.yaml --dry-run --graph levels.svg
python -m mlseg.run --keys e2eaug
torchrun --nproc-per-node=2 -m mlseg.run configs/e2eaug_isic.yaml

What it did is shown by report.html in its directory, also where it was interrupted.

A config is a program: it names modules, which are imported. So is a run directory that is resumed,
by its config.yaml. Run and resume what you trust; what somebody else has made can be looked at by
evaluate, predict and calibrate, which import nothing that isn't mlseg's own.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mlseg import command_line, signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

import torch
from rich.console import Console
from rich.table import Table

from mlseg import checkpoint, config, parallel
from mlseg.commands import (
    INTERVAL,
    guarded,
    interval_cells,
    make_console,
    named,
    print_whole,
    say_notes,
)
from mlseg.config import keys
from mlseg.dry_run import dry_run, timed_dry_run
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.interruption import Interrupted
from mlseg.engines.tracking import Tracking
from mlseg.errors import RunError, UserError, located, unharmed
from mlseg.files import claimed, require_new, write_json, write_text
from mlseg.machine import device_name, versions
from mlseg.problems.building import TakenOver
from mlseg.problems.systems import RunSettings, all_systems, load_system, parse_run
from mlseg.randomness import seed_everything
from mlseg.reports.levels import draw_levels, require_picture
from mlseg.reports.page import PAGE, write_page
from mlseg.reports.starting import note_start
from mlseg.resuming import (
    TrainedWith,
    chosen_threads,
    require_unchanged,
    resumed,
    saved_state,
)
from mlseg.segmentation.data.samples import shapes_alone


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    # Not by a value that may be left out: that would swallow an override behind it.
    given = ["--timed-dry-run" if word == "--dry-run=timed" else word for word in given]
    with _one_voice():
        arguments = command_line.parse(parser(), given)
    arguments.command = shlex.join(["python", "-m", "mlseg.run", *given])
    if arguments.threads is not None:
        arguments.overrides.append(f"threads={arguments.threads}")
    return guarded(_together, arguments, in_several=True)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Within this block, before the others are known, only the first process prints."""
    if parallel.speaks():
        yield
    else:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    systems = "\n".join(f"  {s.name:<12} {s.summary}" for s in all_systems())
    made = argparse.ArgumentParser(
        prog="mlseg run",
        description="Train a system from a config.",
        epilog=f"systems:\n{systems}\n\nexit codes: 0 done, 1 failed in mid-run, 2 a mistake in "
        "config, command or data, 130, 143 and 129 interrupted (Ctrl-C, SIGTERM, SIGHUP) and saved",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("config", nargs="?", help="YAML file; may be left out with --resume")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="engine.iterations=100")
    made.add_argument("--out", type=named, help="run directory (runs/<config>/<time>)")
    made.add_argument("--resume", type=named, metavar="DIR", help="go on with an interrupted run")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="build, count what it asks for without doing it; --dry-run=timed runs each level once",
    )
    made.add_argument(
        "--graph", type=named, metavar="FILE", help="with --dry-run: draw the levels, as SVG or PNG"
    )
    made.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="SYSTEM",
        help="print every key of that system's configs with type, default and meaning; without a "
        "system, those that all of them have",
    )
    made.add_argument("--timed-dry-run", action="store_true", help=argparse.SUPPRESS)
    made.add_argument(
        "--forget-best",
        action="store_true",
        help="with --resume, where best.pt is lost: choose the best weights anew from here on",
    )
    threads.add_flag(made)
    return made


def _together(arguments: argparse.Namespace) -> int:
    """With the other processes, if torchrun has started several."""
    parallel.start()
    try:
        code = _run(arguments)
    except Interrupted:
        parallel.stop()
        raise
    except BaseException:
        parallel.abandon()
        raise
    parallel.stop()
    return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.keys is not None:
        schema = load_system(arguments.keys).settings if arguments.keys else RunSettings
        if parallel.is_first():
            print("\n".join(keys.printed(schema)))
        return 0
    tree = _what(arguments)
    if arguments.dry_run or arguments.timed_dry_run:
        if parallel.several():
            raise UserError("--dry-run: one process does it; leave torchrun out")
        return _train(arguments, tree, None)
    parent = Path("runs") / Path(arguments.config or "").stem
    with ExitStack() as claim:

        def claim_it() -> Path:
            directory = claim.enter_context(claimed(arguments.resume or arguments.out, parent))
            if arguments.resume is None:
                require_new(directory)
            return directory

        return _train(arguments, tree, parallel.done_by_first(claim_it))


def _draw(engine: Engine, path: Path | None) -> None:
    """The levels, where a picture of them is asked for."""
    if path is not None:
        draw_levels(engine, path)
        make_console(stderr=True).print(f"Drew the levels in {path}")
        engine.enter_stage(0)


def bring_to_end(directory: Path, tree: config.Tree | None = None) -> None:
    """Start a run in a directory that is claimed, or go on with the one that it holds.

    Args:
        tree: of a run that starts; None goes on with ``config.yaml``.

    Raises:
        UserError, RunError, Interrupted: as the command says them.
    """
    going_on = tree is None
    arguments = argparse.Namespace(
        config=None,
        overrides=[],
        resume=directory if going_on else None,
        out=None,
        threads=None,
        forget_best=False,
        command=None,
    )
    _train(arguments, resumed(arguments) if tree is None else tree, directory)


def _train(arguments: argparse.Namespace, tree: config.Tree, directory: Path | None) -> int:
    settings, build = parse_run(tree)
    saved = None if directory is None or arguments.resume is None else saved_state(directory)
    if saved is not None and directory is not None:
        path = directory / "checkpoints" / checkpoint.LAST
        require_unchanged(settings, tree, saved.get("config"), path)
    chosen, remark = chosen_threads(arguments, settings)
    settings = settings.model_copy(update={"threads": chosen.use().number})
    say_notes(tree)
    seed_everything(settings.seed)
    if directory is None:
        if arguments.timed_dry_run:
            engine = build(settings, None)
            _draw(engine, arguments.graph)
            timed_dry_run(engine)
            return 0
        with shapes_alone():
            engine = build(settings, None)
            _draw(engine, arguments.graph)
            if settings.init is not None:
                TakenOver(engine.problems, goes_on=False)
            dry_run(engine)
        return 0
    more: list[Hooks] = []
    if settings.log.tracker is not None and parallel.is_first():
        more.append(Tracking(settings.log, settings.model_dump(mode="json"), directory))
    # A run that goes on has its weights, and the file may be gone.
    made = settings if saved is None else settings.model_copy(update={"init": None})
    engine = build(made, directory)
    if engine.directory is None:
        raise UserError(
            f"system {settings.system!r} makes its engine without the run directory, so that "
            "nothing would be saved; pass it on: Engine(..., out=out)"
        )
    if settings.init is not None:
        more.append(TakenOver(engine.problems, goes_on=saved is not None))
    engine._hooks += [TrainedWith(settings), *more]
    console = make_console(stderr=True)
    if saved is not None:
        engine.resume(directory, saved, arguments.forget_best)
        del saved
        console.print(f"Resuming after step {engine.global_step}")
        if engine.stopped_early:
            console.print("It had stopped early: nothing is left to train, scoring it again")
    elif arguments.resume is not None:
        console.print("No checkpoint was written yet: starting anew")
    if parallel.is_first():
        write_text(directory / "config.yaml", config.dump(settings))
        note_start(directory, arguments.command, tree, engine.device, engine.global_step)
    console.print(f"Writing to {directory}, running on {engine.device}")
    if remark is not None:
        console.print(remark)
    _say(console, engine.notices)
    try:
        with _blaming_checkpoint(engine):
            engine.run()
    except Interrupted:
        if parallel.is_first():
            with unharmed(PAGE):  # all is saved by now
                write_page([directory], directory / PAGE)
        raise
    results = {
        **engine.results(),
        "system": settings.system,
        "seed": settings.seed,
        "precision": settings.precision,
        "versions": versions(),
        "device": device_name(engine.device),
        "threads": chosen.record(),
        "world_size": parallel.size(),
    }
    if parallel.is_first():
        write_json(directory / "results.json", results)
        with unharmed(PAGE):
            write_page([directory], directory / PAGE)
    report(engine, results, make_console())
    _say(console, engine.notices)
    console.print(f"All of it is in {directory}; look at {directory / PAGE}")
    for reason in results.get("lost", {}).values():
        raise RunError(f"{reason}; {directory / 'results.json'} has no scores of it")
    return 0


@contextmanager
def _blaming_checkpoint(engine: Engine) -> Iterator[None]:
    """Until a run that goes on has saved anything itself, what fails is a checkpoint's fault.

    Much of what a checkpoint holds, an optimizer's state or a method's memory, shows only when it
    is used whether it is of use.
    """
    try:
        yield
    except (UserError, RunError, Interrupted, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if engine._unproven is None:
            raise
        raise RunError(f"{engine._unproven}: can't go on from it ({located(error)})") from error


def _what(arguments: argparse.Namespace) -> config.Tree:
    if arguments.graph is not None:
        if not (arguments.dry_run or arguments.timed_dry_run):
            raise UserError("--graph: draws the levels of a dry run; give --dry-run too")
        require_picture(arguments.graph)
    if arguments.forget_best and arguments.resume is None:
        raise UserError("--forget-best: only a run that goes on has a best; give --resume DIR")
    if arguments.resume is not None:
        return resumed(arguments)
    if arguments.config is None:
        raise UserError("name a config, such as configs/e2eaug_isic_small.yaml (see --help)")
    return config.load(arguments.config, arguments.overrides)


def _say(console: Console, notices: Sequence[str]) -> None:
    for notice in notices:
        console.print(notice, style="bold yellow")


def report(engine: Engine, results: dict[str, Any], console: Console) -> None:
    """Print the final scores, and what the system has to add."""
    scores, best = results.get("scores", {}), results.get("best")
    if scores:
        metric = results["metric"]
        shown = list(dict.fromkeys([metric, "jaccard", "dice", "accuracy"]))
        table = Table("weights", "split", "images", *shown, title=f"Scores, {_counted(results)}")
        steps = {"last": results["steps"], **({"best": best["step"]} if best else {})}
        for weights, splits in scores.items():
            label = f"{weights} (step {steps[weights]})" if weights in steps else weights
            for split, values in splits.items():
                table.add_row(
                    label,
                    split,
                    str(int(values["images"])),
                    *(f"{values[name]:.4f}" for name in shown),
                )
                spans = results.get("intervals", {}).get(weights, {}).get(split)
                if spans:
                    table.add_row("", INTERVAL, "", *interval_cells(spans, shown))
        print_whole(console, table)
    for summary in engine.summaries():
        console.print(summary)


def _counted(results: Mapping[str, Any]) -> str:
    """How the final scores are counted, which needn't be how those of validations were."""
    sizes = {"native": "the size of each mask's file", "trained": "the network's size"}
    return f"mean over images, counted at {sizes[results['scored_at']]}"


if __name__ == "__main__":
    sys.exit(main())
