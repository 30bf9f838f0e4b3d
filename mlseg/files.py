"""Files, written whole or not at all, and directories, held by one process at a time."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlseg.errors import RunError, UserError, one_line


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
def replacing(path: Path, former: Path | None = None) -> Iterator[Path]:
    """Give a temporary name in the same folder; what is written there becomes ``path`` at the end.

    It is flushed to the disk first, so that a crash, a full disk or a power cut at any moment
    leaves the former file in place. After an exception the temporary file is removed.

    Args:
        path: the file to be; its folder is made when missing.
        former: where the file goes that stood there; None: it is lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # one name: a crash's rest is overwritten
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if former is not None and path.exists():
            _keep(path, former)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _keep(path: Path, former: Path) -> None:
    """Give a file a second name, in place of whatever had it; nothing is copied."""
    temporary = former.with_name(f".{former.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # no hard links on this file system: for a moment there is only the former
        path.replace(former)
        return
    temporary.replace(former)
    temporary.unlink(missing_ok=True)  # left where both were the same file already


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


@contextmanager
def claimed(directory: Path | None, parent: Path) -> Iterator[Path]:
    """A run directory for this process alone, for as long as the block lasts.

    The lock is the kernel's (``flock`` on a file ``.lock``) and ends with its process, however that
    ends. Over NFS it holds between machines where the server's lock service runs, and only between
    the processes of one machine where it doesn't. A directory that was made for this and stays
    empty is removed.

    Args:
        directory: None: a new one in ``parent``, named by the local time; two of one second get
            two.

    Raises:
        UserError: another process works in it, or it can't be made.
    """
    try:
        place = parent if directory is None else directory
        new = [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True, exist_ok=True)
        if directory is None:
            directory = _timestamped(parent)
            new = [directory, *new]
        lock, holder = FileLock(directory / ".lock", timeout=0), directory / ".holder"
        try:
            lock.acquire()
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise UserError(
                f"{directory}: {who} is at work in it; wait until that has ended, or name another "
                "directory"
            ) from None
        with suppress(OSError):  # who it is, is for messages alone
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{directory or parent}: can't write there ({one_line(error)}); name another directory"
        ) from error
    try:
        yield directory
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        with suppress(OSError):
            if {file.name for file in directory.iterdir()} <= {".lock"}:
                (directory / ".lock").unlink(missing_ok=True)
                for folder in new:
                    folder.rmdir()  # fails, and ends this, where there is something in it
        lock.release()


def _timestamped(parent: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        directory = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            directory.mkdir()
            return directory
    raise AssertionError("unreachable")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be flushed."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
