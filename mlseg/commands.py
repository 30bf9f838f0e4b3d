"""What every command shares: how failures reach the user, and what if nobody listens any more."""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from mlseg.config import Tree
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


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; a user's mistake and a failed run become one line on stderr and a code.

    A closed pipe or terminal ends no run: what can't be shown isn't. Output that can't be written
    for any other reason, to a full disk, is a failure once the work is done.
    """
    with _lasting("stderr"), _lasting("stdout") as output:
        code = _guarded(command, arguments)
        if output is not None:
            output.flush()
            if isinstance(output.failure, OSError) and output.failure.errno not in _GONE:
                print(f"failed: standard output: {one_line(output.failure)}", file=sys.stderr)
                return code or EXIT_RUN_ERROR
        return code


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


def _guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunError as error:
        print(f"failed: {printable(str(error))}", file=sys.stderr)
        return EXIT_RUN_ERROR
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = one_line(error).removesuffix(".")
        print(f"failed: out of memory ({said}); lower a batch_size or image_size, or make a "
              "network smaller", file=sys.stderr)  # fmt: skip
        return EXIT_RUN_ERROR
    except SystemExit as error:  # a user's own code: ours never ends the process from within
        print(f"failed: the process was ended from within ({located(error)})", file=sys.stderr)
        return EXIT_RUN_ERROR
    except Interrupted as interrupted:
        print(f"{interrupted}; go on with --resume", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


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
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    try:
        return reachable(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def say_notes(tree: Tree) -> None:
    """Print what a command line has dropped from a config."""
    for note in tree.notes:
        print(f"note: {printable(note)}", file=sys.stderr)


_WIDEST = 10_000
"""Columns; nothing that is printed has more."""


def make_console(stderr: bool = False) -> Console:
    """For tables and messages; where the output is no terminal, wide enough not to cut a table.

    Text is shown as it is: paths and names may hold what rich takes for its markup.
    """
    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=stderr)
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
