"""Files, written whole or not at all, and directories, held by one process at a time."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mlseg.errors import RunError, UserError, one_line


def reachable(path: str | Path) -> Path:
    """A path as a user wrote it, ``~`` filled in; there need be nothing at it.

    Raises:
        UserError: nobody is called so (``~nobody``), or the system can't even look there: a name
            too long, a loop of links, a folder that may not be entered. An empty text isn't the
            working folder: an unset variable leaves one.
    """
    if not str(path).strip():
        raise UserError("an empty name; the working folder is .")
    try:
        found = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            found.stat()
    except RuntimeError:
        raise UserError(f"{path}: there is no user of that name; write the folder out") from None
    except (OSError, ValueError) as error:  # ValueError: it holds a NUL
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{path}: no usable path ({reason})") from None
    return found


def require_file(path: Path, most: int | None = None) -> None:
    """Check that a path leads to a plain file: reading a pipe or a device may never end.

    Args:
        most: bytes that it may have.

    Raises:
        UserError: it is a pipe, a device or the like, or larger.
        OSError: there is nothing, a folder, or what can't be looked at.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise UserError(f"{path}: a pipe or a device, not a file")
    if most is not None and state.st_size > most:
        raise UserError(f"{path}: {state.st_size / 2**20:.1f} MiB, more than {most / 2**20:g}")


def is_marked(path: Path, mark: str, within: int) -> bool:
    """Whether it is a file, and no link, with ``mark`` among its first bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return mark.encode() in file.read(within)
    except OSError:
        return False


def require_writable(path: Path, option: str = "--out") -> None:
    """Check, before any work, that a file or a folder can be made at a path; makes nothing.

    Raises:
        UserError: it can't.
    """
    place = reachable(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if place == path:
            place = place if place.is_dir() else place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{option}: {path}: can't write there ({one_line(error)})") from None


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
    temporary = _partial(path)
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


def mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A new file of bytes as an array in memory, its room on the disk claimed.

    A full disk is an error here; at the first write to a mapped page it would be a signal that ends
    the process.

    Args:
        path: of the ``.npy`` file; its folder must exist.

    Raises:
        OSError: there is no room, or it can't be made.
    """
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


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


class Held(UserError):
    """Another process is at work in a directory, or on a file."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path``, a lock file, for as long as the block lasts; it stays behind, empty.

    Raises:
        Held: another process does.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise Held(f"{path}: another process is at work on it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def at_rest(directory: Path) -> Iterator[None]:
    """Hold a run directory for a moment in which no process is at work in it.

    Raises:
        Held: one is.
        RunError: nothing can be written there.
    """
    with locked(directory / _LOCK):
        yield


def held(directory: Path) -> bool:
    """Whether a process has claimed this run directory at this moment."""
    path = directory / _LOCK
    if not path.exists():
        return False
    try:
        with locked(path):
            return False
    except Held:
        return True


def _partial(path: Path) -> Path:
    """What a file is called until it is whole; one name, so that a crash's rest is overwritten."""
    return path.with_name(f".{path.name}.partial")


def require_new(directory: Path) -> None:
    """Check that a claimed directory holds nothing yet: no run, and nobody's files.

    What a process leaves that was killed before it had written ``config.yaml`` is nobody's.

    Raises:
        UserError: it does.
    """
    if (directory / "config.yaml").exists():
        raise UserError(
            f"--out: {directory} holds a run already; go on with it by --resume {directory}, or "
            "name another directory"
        )
    own = {_LOCK, _HOLDER, _partial(directory / "config.yaml").name}
    theirs = sorted({path.name for path in directory.iterdir()} - own)
    if theirs:
        raise UserError(
            f"--out: {directory} isn't empty ({theirs[0]} is in it); name a new directory"
        )


_LOCK, _HOLDER = ".lock", ".holder"


@contextmanager
def claimed(directory: Path | None, parent: Path) -> Iterator[Path]:
    """A run directory for this process alone, for as long as the block lasts.

    The lock is the kernel's (``flock`` on a file ``.lock``) and ends with its process, however that
    ends. Over NFS it holds between machines where the server's lock service runs, and only between
    the processes of one machine where it doesn't; SECURITY.md has what holds where. A directory
    that was made for this and stays empty is removed.

    Args:
        directory: None: a new one in ``parent``, named by the local time; two of one second get
            two.

    Raises:
        Held: another process works in it.
        UserError: it can't be made.
    """
    try:
        place = parent if directory is None else directory
        new = [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True, exist_ok=True)
        if directory is None:
            directory = _timestamped(parent)
            new = [directory, *new]
        lock, holder = FileLock(directory / _LOCK, timeout=0), directory / _HOLDER
        theirs = not (directory / _LOCK).exists()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is refused below
                lock.acquire()
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise Held(
                f"{directory}: {who} is at work in it; wait until that has ended, or name another "
                "directory"
            ) from None
        if type(lock) is not FileLock:  # it makes do with a file that outlives its process
            lock.release()
            raise OSError(errno.ENOSYS, "its file system has no locks")
        with suppress(OSError):  # who it is, is for messages alone
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{directory or parent}: can't write there ({one_line(error)}); name another directory"
        ) from error
    try:
        yield directory
    except UserError:
        if theirs:  # refused: it stays as it was found
            with suppress(OSError):
                (directory / _LOCK).unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        with suppress(OSError):
            if {file.name for file in directory.iterdir()} <= {_LOCK}:
                (directory / _LOCK).unlink(missing_ok=True)
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
