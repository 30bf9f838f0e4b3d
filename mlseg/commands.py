"""What every command shares: how failures reach the user."""

import argparse
import signal
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from mlseg.config import Tree
from mlseg.engines.interruption import Interrupted
from mlseg.errors import EXIT_RUN_ERROR, EXIT_USER_ERROR, RunError, UserError, one_line


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; a user's mistake and a failed run become one line on stderr and a code."""
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_RUN_ERROR
    except torch.OutOfMemoryError as error:
        print(f"failed: {one_line(error)} Lower a batch_size or image_size.", file=sys.stderr)
        return EXIT_RUN_ERROR
    except Interrupted as interrupted:
        print(f"{interrupted}; go on with --resume", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def say_notes(tree: Tree) -> None:
    """Print what a command line has dropped from a config."""
    for note in tree.notes:
        print(f"note: {note}", file=sys.stderr)


def make_console(stderr: bool = False) -> Console:
    """For tables and messages; where the output is no terminal, wide enough not to cut a table."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=stderr)
    if not made.is_terminal:
        made.width = 140
    return made
