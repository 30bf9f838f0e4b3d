"""Fetching data sets that have a public address.

The archives are large (ISIC 2018's training images take 10 GB), and often a few hundred images are
wanted. So a zip is read where it lies: its directory first, then only the members that are needed,
by range requests. Every member is checked against the size and CRC-32 in the directory and appears
under its name only then; what is there already and passes the same check isn't fetched again, so an
interrupted download goes on where it stopped. What is there and differs is never replaced: it may
be somebody's work.

An archive is a stranger's file: what it may claim and how long its server may be silent is bounded.
"""

import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlseg.errors import RunError, UserError, one_line
from mlseg.files import reachable, replacing, writing
from mlseg.segmentation.data.entry import Archive, Entry
from mlseg.segmentation.data.layout import choose_layout, match

MARKER = ".mlseg-download-incomplete"
ATTEMPTS = 4
SILENCE = 15.0
"""Seconds that a server may take to connect, or be silent in mid-answer, before a new attempt."""
REQUEST = 300.0
"""Seconds that one answer may take in all."""
MAX_MEMBER = 2**28
"""Bytes of a file in an archive; it is held in memory. The largest published image has 2**24."""
MAX_DIRECTORY = 2**25
"""Bytes of an archive's directory, some 50 a file."""
MAX_RATIO = 20
"""Bytes unpacked to packed, of all wanted files together: photographs have 1, masks below 10."""
# Bytes fetched beyond what is asked for: neighbouring members then come with one request.
_BLOCK = 2**20


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: Archive
    info: zipfile.ZipInfo

    @property
    def path(self) -> str:
        return self.info.filename


def incomplete(root: Path) -> bool:
    """Whether a download into `root` was begun and not finished."""
    return (root / MARKER).exists()


def how_to_get(entry: Entry) -> str:
    """Where a data set is and what its folder must look like, on several lines."""
    lines = [
        f"{entry.spec.name} has no public address that can be read by program.",
        f"Get it: {entry.source}",
    ]
    if entry.expected:
        lines += ["Unpack it so that its folder holds", *(f"    {path}" for path in entry.expected)]
        lines += ["({id}: an example's name; *: any name; **/: any folders, or none)"]
    return "\n".join(lines)


def fetch(
    entry: Entry,
    root: Path,
    limit: int | None = None,
    parts: Sequence[str] | None = None,
    archives: Sequence[Archive] | None = None,
    pause: float = 1.0,
) -> int:
    """Fetch a data set, or the first examples of it, into `root`.

    Args:
        entry: of the data set.
        limit: number of examples of each part, the first by id; None: all.
        parts: official parts; None: those that the set's default split is made from.
        archives: other addresses of the same archives (a mirror).
        pause: seconds before the first new attempt after a network fault; doubles each time.

    Returns:
        the number of examples that are complete in `root`.

    Raises:
        UserError: the set has no public address (the text says where to get it), or no such part;
            a file in `root` stands where another belongs.
        RunError: the network, the archive or the disk failed; calling again goes on.
    """
    name = entry.spec.name
    archives = entry.archives if archives is None else archives
    if not archives:
        raise UserError(
            f"{name} can't be downloaded by program; get it from {entry.source}, laid out as "
            f"{', '.join(entry.expected) or 'you like'}"
        )
    known = tuple(dict.fromkeys(archive.part for archive in archives))
    if parts is None:
        parts = known if entry.official else known[:1]
    for part in parts:
        if part not in known:
            raise UserError(f"{name} has no part {part!r}; there are {', '.join(known)}")
    console = Console(stderr=True, markup=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(f"{root}: can't write here ({one_line(error)})") from None
    opened = {a: _Remote(a.url, pause) for a in archives if a.part in parts}
    try:
        wanted: list[Member] = []
        number = 0
        for part in parts:
            console.print(f"{name} ({part}): reading the directory of the archive")
            members = [
                Member(archive, info)
                for archive, remote in opened.items()
                if archive.part == part
                for info in remote.members()
            ]
            chosen, count = _choose(entry, part, members, limit)
            wanted += chosen
            number += count
        missing = _missing(wanted, root)
        with writing(root):
            (root / MARKER).touch()
        _fetch_members(missing, opened, root, console)
    finally:
        for remote in opened.values():
            remote.close()
    (root / MARKER).unlink(missing_ok=True)
    console.print(f"{name}: {number} images with their masks in {root}")
    return number


def _choose(
    entry: Entry, part: str, members: Sequence[Member], limit: int | None
) -> tuple[list[Member], int]:
    """The members that hold the first `limit` examples with image and masks; how many these are."""
    by_path = {member.path: member for member in members}
    layout = choose_layout(entry, by_path)
    if layout is None or part not in layout:
        raise RunError(f"{members[0].archive.url if members else entry.source}: not the expected "
                       f"archive of {entry.spec.name}; no {entry.expected[0]} in it")  # fmt: skip
    images, masks = match(layout[part], by_path, entry.ids)
    if len(by_path) < len(members):
        twice = next(m for m in members if by_path[m.path] is not m)
        raise RunError(f"{twice.archive.url}: {twice.path!r} is in it twice")
    complete = sorted(name for name in images if all(name in found for found in masks))[:limit]
    if not complete:
        raise RunError(f"{entry.spec.name} ({part}): the archives hold no image with its mask")
    paths = [path for name in complete for found in (images, *masks) for path in found[name]]
    return [by_path[path] for path in paths], len(complete)


def _missing(wanted: Sequence[Member], root: Path) -> list[Member]:
    """The members that aren't in `root` yet.

    Raises:
        UserError: something else stands in one's place.
        RunError: an archive claims what no archive of images would, or the disk is too small.
    """
    for member in wanted:
        info = member.info
        if max(info.file_size, info.compress_size) > MAX_MEMBER:
            raise RunError(
                f"{member.archive.url}: {member.path!r} would take "
                f"{info.file_size / 2**20:.0f} MiB; refused, as no image does"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RunError(
                f"{member.archive.url}: {member.path!r} is packed by method {info.compress_type}; "
                "only stored and deflated files are unpacked"
            )
    packed = sum(member.info.compress_size for member in wanted)
    unpacked = sum(member.info.file_size for member in wanted)
    if unpacked > MAX_RATIO * packed + MAX_MEMBER // 16:
        raise RunError(
            f"{wanted[0].archive.url}: {packed / 2**20:.1f} MiB that would become "
            f"{unpacked / 2**20:.0f}; refused, as images don't shrink to less than a {MAX_RATIO}th"
        )
    missing = []
    for member in wanted:
        target = _inside(root, member)
        try:
            there = os.path.lexists(reachable(target))
            if there and not _same(target, member.info):
                raise UserError(
                    f"{target}: is there already and differs from the archive's; nothing is "
                    "replaced: move it away, or name another --root"
                )
        except OSError as error:
            raise UserError(f"{target}: can't be read ({one_line(error)})") from None
        if not there:
            missing.append(member)
    needed, free = sum(m.info.file_size for m in missing), shutil.disk_usage(root).free
    if needed > free:
        raise RunError(
            f"{root}: {needed / 2**20:.0f} MiB are to be fetched, but only {free / 2**20:.0f} MiB "
            "are free there"
        )
    return missing


def _fetch_members(
    wanted: Sequence[Member], opened: dict[Archive, "_Remote"], root: Path, console: Console
) -> None:
    # In the order in which they lie in the archive: neighbours come with one request.
    places = {archive: number for number, archive in enumerate(opened)}
    wanted = sorted(wanted, key=lambda m: (places[m.archive], m.info.header_offset))
    total = sum(member.info.file_size for member in wanted)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task(f"{len(wanted)} files", total=total)
        for member in wanted:
            _store(_inside(root, member), opened[member.archive].read(member.info))
            progress.advance(task, member.info.file_size)


class _Remote:
    """A zip at an address, opened when first needed and again after a network fault."""

    def __init__(self, url: str, pause: float) -> None:
        self.url = url
        self.pause = pause
        self._file: Any = None
        self._zip: zipfile.ZipFile | None = None

    def members(self) -> list[zipfile.ZipInfo]:
        found = self._try(lambda archive: archive.infolist())
        assert isinstance(found, list)
        # Hidden files are what macOS adds to a zip. A name may be empty: its first letter was NUL.
        return [
            info
            for info in found
            if info.filename[-1:] not in ("", "/")
            and not PurePosixPath(info.filename).name.startswith(".")
        ]

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The member's content; zipfile compares its CRC-32."""

        def content(archive: zipfile.ZipFile) -> bytes:
            with archive.open(info) as file:
                # Of a stated length: without it, all that comes out is held before it is cut.
                return file.read(info.file_size + 1)

        data = self._try(content)
        assert isinstance(data, bytes)
        return data

    def close(self) -> None:
        for opened in (self._zip, self._file):
            if opened is not None:
                opened.close()
        self._file = self._zip = None

    def _try(self, action: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return action(self._open())
            except _network_errors() as error:
                self.close()
                if attempt + 1 == ATTEMPTS or isinstance(error, FileNotFoundError):
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise RunError(
                        f"{self.url}: can't be read ({reason}); what has come so far is kept, the "
                        f"same command goes on from there"
                    ) from None
                time.sleep(self.pause * 2**attempt)
            except Exception as error:  # an odd archive makes zipfile fail in any way
                raise RunError(
                    f"{self.url}: no archive that can be unpacked ({one_line(error)})"
                ) from error
        raise AssertionError("the loop above returns or raises")

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            import fsspec

            self._file = fsspec.open(
                self.url, "rb", block_size=_BLOCK, cache_type="readahead", **_patience(self.url)
            ).open()
            bounded = _Bounded(self._file, MAX_DIRECTORY)
            self._zip = zipfile.ZipFile(bounded)
            bounded.most = MAX_MEMBER
        return self._zip


class _Bounded:
    """A file that refuses to read much at once, whatever an archive says of its parts' lengths."""

    def __init__(self, file: Any, most: int) -> None:
        self._file, self.most = file, most

    def read(self, number: int = -1) -> bytes:
        if number > self.most:
            raise ValueError(f"a part of {number / 2**20:.0f} MiB")
        data: bytes = self._file.read(number)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _patience(url: str) -> dict[str, Any]:
    """What fsspec has to know for a silent server to be an error."""
    if not url.startswith("http"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(REQUEST, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}


def _network_errors() -> tuple[type[Exception], ...]:
    import aiohttp  # here, as fsspec is, for they take long to load
    from fsspec.exceptions import FSTimeoutError

    # ValueError: what fsspec says of a server without range requests.
    other = (ValueError, zipfile.BadZipFile, zlib.error, EOFError)
    return (OSError, aiohttp.ClientError, FSTimeoutError, TimeoutError, *other)


def _inside(root: Path, member: Member) -> Path:
    """Where a member belongs; a path that leads out of the folder is refused."""
    path = PurePosixPath(member.path)
    if path.is_absolute() or ".." in path.parts:
        raise RunError(f"{member.archive.url}: refuses to unpack {member.path!r} outside {root}")
    return root.joinpath(*path.parts)


def _same(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    return zlib.crc32(path.read_bytes()) == info.CRC


def _store(path: Path, data: bytes) -> None:
    """Write under another name, then rename: a file of the right name is whole."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise RunError(
            f"{path}: can't be written ({one_line(error)}); the same command goes on"
        ) from None
