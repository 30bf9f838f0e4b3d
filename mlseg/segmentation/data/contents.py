"""Digests of the files that examples are read from, by which a run knows its data again."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from mlseg.errors import UserError, one_line

How = Literal["sample", "all"]
Files = Mapping[str, Mapping[str, Sequence[Path]]]
"""The files of every example: by set (``data``, or an out-of-distribution set's name) and id."""

WHOLE, PIECES, PIECE = 2**20, 16, 2**16
"""Bytes up to which a file is read whole; of a larger one these many pieces of so many bytes."""


def digest(path: Path, how: How) -> str:
    """A file's size and SHA-256, of all of it or of a sample; neither its place nor its time.

    A sample is the first and the last piece and others evenly between them.

    Raises:
        UserError: it can't be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(str(size).encode())
            if how == "all" or size <= WHOLE:
                while piece := file.read(WHOLE):
                    found.update(piece)
            else:
                for index in range(PIECES):
                    file.seek(index * (size - PIECE) // (PIECES - 1))
                    found.update(file.read(PIECE))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({one_line(error)})") from None
    return found.hexdigest()[:32]


def digests(files: Files, how: How) -> dict[str, dict[str, list[str]]]:
    """Those of every example's files, in the form of ``files``; read on several threads."""
    paths = list(dict.fromkeys(p for sets in files.values() for own in sets.values() for p in own))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        known = dict(zip(paths, pool.map(lambda path: digest(path, how), paths), strict=True))
    return {
        name: {id: [known[path] for path in own] for id, own in examples.items()}
        for name, examples in files.items()
    }


def changed(files: Files, stored: Mapping[str, Any]) -> list[Path]:
    """Which files are other ones than those of :func:`record`, compared in the way it was made."""
    how: How = "all" if stored["how"] == "all" else "sample"
    found = []
    for name, examples in digests(files, how).items():
        before = stored["files"].get(name, {})
        for id, own in examples.items():
            was = before.get(id, own)  # a set or an example that the run didn't know
            if len(was) != len(own):
                found.append(files[name][id][0])
            found += [
                path
                for path, now, then in zip(files[name][id], own, was, strict=False)
                if now != then
            ]
    return found


def record(files: Files, how: How) -> dict[str, Any]:
    """What ``splits.json`` keeps of them."""
    return {"how": how, "files": digests(files, how)}
