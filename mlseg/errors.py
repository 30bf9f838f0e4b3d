"""The two kinds of failure that a user sees as one line instead of a traceback.

Everything else that is raised is a bug and keeps its traceback.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_RUN_ERROR = 1


class UserError(ValueError):
    """A mistake in a config, a command line or a data set.

    The text is one line that names the file or key and says how to mend it.
    Commands print it on stderr and exit with code 2, before any work is done.
    """


class RunError(RuntimeError):
    """A run that can't go on: a loss became NaN, the disk is full.

    The text is one line that names what failed and what has been kept.
    Commands print it on stderr and exit with code 1.
    """


def printable(text: str, most: int = 2000) -> str:
    """A text as one line that does nothing to a terminal: the rest as escapes, its middle left out.

    Args:
        most: characters.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException, length: int = 160) -> str:
    """The first line of an exception's text, cut to ``length`` characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:length]


def located(error: BaseException) -> str:
    """An exception of somebody's code in one line: file, line, kind and text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    text = "" if not str(error).strip() else f": {one_line(error)}"
    return f"{place}{type(error).__name__}{text}"


@contextmanager
def unharmed(what: str) -> Iterator[None]:
    """Within this block something is made for people to look at; failing, it is a line on stderr.

    Args:
        what: is missing then.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001, whatever it is, the run and its results stand
        said = printable(f"note: no {what} ({one_line(error)}); everything else stands")
        print(said, file=sys.stderr)
