"""Whether a data set's files are there, after a download where that is wanted."""

from pathlib import Path

from mlseg.errors import UserError
from mlseg.segmentation.data.entry import Entry
from mlseg.segmentation.data.fetch import fetch, incomplete
from mlseg.segmentation.data.settings import DataSettings, root_here


def absent(root: Path) -> bool:
    """Whether there is nothing at ``root``; UserError where that can't be known."""
    try:
        return not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"{root}: can't be looked into ({error.strerror})") from None


def available(entry: Entry, root: Path, settings: DataSettings) -> bool:
    """Whether the data are there, after a download where that is wanted."""
    if settings.when_missing == "download" and (absent(root) or incomplete(root)):
        fetch(entry, root, parts=_needed(entry, settings))
    elif incomplete(root):
        raise UserError(
            f"{root}: a download was interrupted; finish it with: "
            f"python -m mlseg.data {entry.spec.name} --root {root}"
        )
    if not absent(root):
        return True
    if settings.when_missing == "error":
        raise missing(entry, root)
    return False


def _needed(entry: Entry, settings: DataSettings) -> tuple[str, ...] | None:
    if settings.splits == "official":
        return tuple({archive.part: None for archive in entry.archives})
    return None


def missing(entry: Entry, root: Path) -> UserError:
    """The error for data that aren't there."""
    for here in root_here(root):
        if not absent(here):
            return UserError(
                f"{root}: no data of {entry.spec.name} here, where $MLSEG_DATA has a relative root "
                f"start; what lies in the working directory is named by its whole path: {here}"
            )
    expected = ", ".join(entry.expected) or "a CSV file with the columns image and mask"
    return UserError(
        f"{root}: no data of {entry.spec.name} here; get them from {entry.source}, laid out as "
        f"{expected}, or set data.root, or data.when_missing to synthetic or download"
    )
