"""`mlseg COMMAND ...`: the commands under one name, each also `python -m mlseg.COMMAND`."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from mlseg import signals, threads
from mlseg.errors import EXIT_USER_ERROR

COMMANDS = {
    "run": ("mlseg.run", "train a system from a config"),
    "evaluate": ("mlseg.evaluate", "score a finished run on any data set"),
    "report": ("mlseg.report", "a page of a run, or of several side by side"),
    "predict": ("mlseg.predict", "images in, mask PNGs and overlays out"),
    "export": ("mlseg.export", "a trained model as a file for other programs"),
    "compare": ("mlseg.compare", "hypergradient methods side by side"),
    "sweep": ("mlseg.sweep", "grids of runs: a paper's tables and figures"),
    "calibrate": ("mlseg.calibrate", "choose k and threshold on validation images"),
    "data": ("mlseg.data", "fetch a data set, or say where to get it"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: mlseg COMMAND ...", "", *lines, "", "mlseg COMMAND --help says more."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, with the rest.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code; 2 for a command that doesn't exist.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return EXIT_USER_ERROR
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from mlseg import __version__

        print(f"mlseg {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"mlseg: no command '{name}'; {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    threads.bound_spinning()
    if argv is None:  # the program's own, not a call from another
        signals.end_at_once()
    # Only now: a command brings torch and more with it.
    code: int | None = import_module(COMMANDS[name][0]).main(rest)
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
