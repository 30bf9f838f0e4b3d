"""Decoded examples in files, mapped into memory: made once, checked whenever they are opened.

A folder of the cache holds ``images.npy``, ``masks.npy`` and ``sums.npy``, the CRC-32 of each
example, and appears under its name only when all are whole. What is being decoded lies beside it in
a folder ``NAME.partial`` that its process holds locked; what a killed one has left is removed by
the next.
"""

import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mlseg.errors import RunError, one_line, printable
from mlseg.files import mapped

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]

PARTIAL = ".partial"
_NAMES = ("images", "masks")
_CHECKED = 2**26
"""Bytes, about, whose sums are compared when a cache is opened; all of a small one."""


def kept(folder: Path, shapes: Shapes, fill: Callable[..., None]) -> Arrays:
    """The arrays of a cache's folder; decoded into it first where they aren't there, or damaged.

    Args:
        folder: where they are, or will be.
        shapes: of images and masks.
        fill: decodes into such arrays.

    Returns:
        images and masks, writable without the files being changed.

    Raises:
        RunError: they can't be written, as on a full disk, or not be read.
    """
    try:
        damage = _damage(folder, shapes) if folder.is_dir() else None
        if damage is not None:
            said = f"note: {folder}: damaged ({damage}); decoding again"
            print(printable(said), file=sys.stderr)
            with _working(folder) as aside, suppress(FileNotFoundError):  # another was faster
                folder.replace(aside)  # at once: a run that uses it keeps its files
        if not folder.is_dir():
            _make(folder, shapes, fill)
        # Mode "c" gives writable pages that never reach the file; torch wants writable memory.
        images, masks = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in _NAMES)
    except OSError as error:
        raise RunError(
            f"{folder.parent}: can't keep decoded images here ({one_line(error)}); make room, or "
            "set data.cache_dir or data.memory_limit_mib"
        ) from None
    return images, masks


def _make(folder: Path, shapes: Shapes, fill: Callable[..., None]) -> None:
    """Decode into files; the folder appears under its name only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with _working(folder) as work:
        images, masks = (
            mapped(work / f"{name}.npy", shape) for name, shape in zip(_NAMES, shapes, strict=True)
        )
        fill(images, masks)
        np.save(work / "sums.npy", _sums(images, masks, range(len(images))))
        for array in (images, masks):
            assert isinstance(array, np.memmap)
            array.flush()
        del images, masks
        try:
            os.replace(work, folder)
        except OSError:
            if not folder.is_dir():  # else another run has just made the same
                raise


@contextmanager
def _working(folder: Path) -> Iterator[Path]:
    """A folder for what isn't complete, locked while this process lives; removed at the end."""
    work = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    lock = FileLock(_lock(work), timeout=0)
    try:
        with suppress(NotImplementedError):  # a file system without locks: none is swept there
            lock.acquire()
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
        with suppress(OSError):
            _lock(work).unlink(missing_ok=True)


def _sweep(cache: Path) -> None:
    """Remove what killed processes have left."""
    for path in cache.glob(f".*{PARTIAL}.lock"):
        lock = FileLock(path, timeout=0)
        with suppress(OSError, NotImplementedError):  # it is at work, or somebody else's
            lock.acquire()
            shutil.rmtree(cache / path.name[1:].removesuffix(".lock"), ignore_errors=True)
            lock.release()
            path.unlink(missing_ok=True)


def _lock(work: Path) -> Path:
    return work.with_name(f".{work.name}.lock")


def _damage(folder: Path, shapes: Shapes) -> str | None:
    """What is wrong with a cache, by sizes and by the sums of a sample; None: nothing."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _NAMES]
        sums = np.load(folder / "sums.npy")
    except Exception as error:  # noqa: BLE001, as a damaged file makes numpy fail in any way
        return one_line(error)
    for name, array, shape in zip(_NAMES, arrays, shapes, strict=True):
        if array.shape != shape or array.dtype != np.uint8:
            return f"{name}.npy has another shape"
    images, masks = arrays
    number = len(images)
    if not isinstance(sums, np.ndarray) or sums.shape != (number,) or sums.dtype != np.uint32:
        return "sums.npy has another shape"
    chosen = max(1, min(number, _CHECKED // max(1, images[0].nbytes + masks[0].nbytes)))
    sample = np.linspace(0, number - 1, chosen).astype(int)
    if (_sums(images, masks, sample) != sums[sample]).any():
        return "an example isn't as it was written"
    return None


def _sums(
    images: NDArray[np.uint8], masks: NDArray[np.uint8], places: "range | NDArray[np.int64]"
) -> NDArray[np.uint32]:
    return np.array(
        [zlib.crc32(masks[place], zlib.crc32(images[place])) for place in places], np.uint32
    )
