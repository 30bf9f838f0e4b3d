"""What every command shares: how failures reach the user, and what if nobody listens any more."""

import argparse
import contextlib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from mlseg import parallel, signals
from mlseg.config import Tree
from mlseg.config.registry import strangers
from mlseg.engines.interruption import Interrupted
from mlseg.errors import (
    EXIT_RUN_ERROR,
    EXIT_USER_ERROR,
    RunError,
    UserError,
    located,
    one_line,
    printable,
)
from mlseg.files import reachable


def guarded(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    in_several: bool = False,
) -> int:
    """Run a command; a user's mistake and a failed run become one line on stderr and a code.

    Of several processes one says it.

    A closed pipe or terminal ends no run: what can't be shown isn't. Output that can't be written
    for any other reason, to a full disk, is a failure once the work is done.

    SIGINT, SIGTERM and SIGHUP end it as exceptions do: nothing half-written stays, 130, 143 or 129.

    A command with ``--trust`` reads runs of which, without it, nothing is imported.

    Args:
        in_several: whether the command is one that several processes (torchrun) do together.
    """
    if not in_several:
        command = _alone(command)
    trust = getattr(arguments, "trust", None)
    reading = contextlib.nullcontext() if trust is None else strangers(trust)
    with reading, signals.raised(), _lasting("stderr"), _lasting("stdout") as output:
        code = _exit_code(lambda: command(arguments))
        if output is not None:
            output.flush()
            if isinstance(output.failure, OSError) and output.failure.errno not in _GONE:
                print(f"failed: standard output: {one_line(output.failure)}", file=sys.stderr)
                return code or EXIT_RUN_ERROR
        return code


def _alone(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def refused(arguments: argparse.Namespace) -> int:
        require_one_process()
        return command(arguments)

    return refused


def require_one_process() -> None:
    """Raise UserError where torchrun has started several."""
    place = parallel.launch()
    if place is not None:
        raise UserError(
            f"{place.size} processes were started for a command that one does; leave torchrun out "
            "(it is for mlseg.run)"
        )


_GONE = (errno.EPIPE, errno.EIO)
"""The reader has gone: a closed pipe, a closed terminal."""


class _Lasting:
    """A stream that takes everything, also after what it is connected to has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a file's name that is no text, or a terminal of few letters
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._end(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self.failure = self.failure or error
        # What its buffer still holds would fail again when Python flushes it at its end.
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting(name: str) -> Iterator[_Lasting | None]:
    """Within this block ``sys.stdout`` or ``sys.stderr`` outlives its reader; None if closed."""
    former = getattr(sys, name)
    made = None if former is None else _Lasting(former)
    setattr(sys, name, made)
    try:
        yield made
    finally:
        setattr(sys, name, former)


def as_script(main: Callable[[], int | None]) -> int:
    """A script's exit code; a mistake and a failure are one line, as those of a command are."""
    return _exit_code(main, may_exit=True)


def _exit_code(work: Callable[[], int | None], may_exit: bool = False) -> int:
    """An exit code; how it failed has been said. ``may_exit``: it is what reads a command line."""
    try:
        return work() or 0
    except UserError as error:
        _say(f"error: {printable(str(error))}")
        return EXIT_USER_ERROR
    except RunError as error:
        _say(f"failed: {printable(str(error))}")
        return EXIT_RUN_ERROR
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = one_line(error).removesuffix(".")
        _say(f"failed: out of memory ({said}); lower a batch_size or image_size, or make a "
             "network smaller")  # fmt: skip
        return EXIT_RUN_ERROR
    except SystemExit as error:  # a user's own code: ours never ends the process from within
        if may_exit:
            raise
        _say(f"failed: the process was ended from within ({located(error)})")
        return EXIT_RUN_ERROR
    except Interrupted as interrupted:
        _say(f"{interrupted}; go on with --resume")
        return interrupted.exit_code
    except KeyboardInterrupt as interrupt:
        _say(f"{interrupt}: interrupted" if str(interrupt) else "interrupted")
        return signals.exit_code(interrupt)


def counted(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return int(text)


def _say(line: str) -> None:
    """On stderr; of several processes the first that asks says it."""
    if parallel.speaks():
        print(line, file=sys.stderr)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out; on the processor torch has no class for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator: " in str(error)
    )


def named(text: str) -> Path:
    """A path, for argparse; an empty one, left by an unset variable, isn't the working folder.

    A leading ``~`` is the home; a shell fills it in at the beginning of a word alone, so not in
    ``--out=~/runs``.
    """
    try:
        return reachable(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def worded(text: str) -> str:
    """A name that isn't empty, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    return text


def say_notes(tree: Tree) -> None:
    """Print what a command line has dropped from a config."""
    for note in tree.notes if parallel.is_first() else ():
        print(f"note: {printable(note)}", file=sys.stderr)


INTERVAL = "95 % over images"
"""What a row of a table is called that holds the intervals of the row above."""


def interval_cells(spans: Mapping[str, Sequence[float]], shown: Sequence[str]) -> list[str]:
    """The intervals of scores, for a table's cells; empty where there is none."""
    return ["{:.3f}-{:.3f}".format(*spans[name]) if name in spans else "" for name in shown]


_WIDEST = 10_000
"""Columns; nothing that is printed has more."""


def make_console(stderr: bool = False) -> Console:
    """For tables and messages; where the output is no terminal, wide enough not to cut a table.

    Text is shown as it is: paths and names may hold what rich takes for its markup.
    """
    made = Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        soft_wrap=stderr,
        quiet=not parallel.is_first(),
    )
    if not made.is_terminal:
        made.width = 140
    return made


def print_whole(console: Console, table: Table) -> None:
    """Print a table with no cell cut, however wide: a narrow terminal wraps its lines."""
    former, console.width = console.width, _WIDEST
    try:
        console.width = max(former, console.measure(table).maximum)
        console.print(table, crop=False)
    finally:
        console.width = former


def require_extra(extra: str, needed: Mapping[str, str]) -> None:
    """Refuse a command where what its extra brings is missing.

    Args:
        extra: bears the command's name.
        needed: distributions by the module that each brings.

    Raises:
        UserError: naming those that are missing.
    """
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"mlseg {extra} needs {' and '.join(missing)}; install what is missing: uv pip install "
            f"{' '.join(missing)} (or in the checkout, all of the extra: uv pip install "
            f"'.[{extra}]')"
        )
