"""A page of a run, or of several side by side: one file that opens anywhere, without a network.

    python -m mlseg.report runs/try                            writes runs/try/report.html
    python -m mlseg.report runs/a runs/b runs/c --out my.html  side by side, paired by image

Every run writes its own when it ends or is interrupted. A run may be somebody else's: its files are
read, nothing that it names is imported unless ``--trust`` says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlseg import signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

from mlseg import config
from mlseg.commands import guarded, make_console, named
from mlseg.config.registry import run_imports
from mlseg.reports.page import PAGE, write_page


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(prog="mlseg report", description="A page of one or more runs.")
    made.add_argument("runs", type=named, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("--out", type=named, help=f"RUN/{PAGE}; of several runs {PAGE} here")
    made.add_argument(
        "--overwrite", action="store_true", help="also a file there that is no page of mlseg's"
    )
    made.add_argument(
        "--trust",
        action="store_true",
        help="import the modules that the runs' configs list, which may add sections of their own",
    )
    return made


def _run(arguments: argparse.Namespace) -> int:
    runs: list[Path] = arguments.runs
    path = arguments.out or (runs[0] / PAGE if len(runs) == 1 else Path(PAGE))
    if arguments.trust:
        for run in runs:
            run_imports(config.load(run / "config.yaml"))
    write_page(runs, path, arguments.overwrite)
    make_console().print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
