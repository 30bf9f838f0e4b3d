"""Files: written whole or not at all, and what is said when they can't be."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlseg.errors import RunError, one_line


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into the one line a user needs.

    Raises:
        RunError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"can't write {path}: {one_line(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same folder; what is written there becomes ``path`` at the end.

    It is flushed to the disk first, so that a crash, a full disk or a power cut at any moment
    leaves the former file in place. After an exception the temporary file is removed.

    Args:
        path: the file to be; its folder is made when missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # one name: a crash's rest is overwritten
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all.

    Raises:
        RunError: it can't be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all; the folder is made when missing.

    Raises:
        RunError: it can't be written.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def timestamp() -> str:
    """Local time as the name of a run directory."""
    return time.strftime("%Y%m%d-%H%M%S")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be flushed."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
