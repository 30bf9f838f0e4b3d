"""LoAd's aggregation buffer: sets of label maps that models of the past have made."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlseg.checkpoint import require_form
from mlseg.errors import UserError
from mlseg.files import mapped, writing

MIB = 2**20
_FILE = re.compile(r"maps_[0-9]{5,}\.npy")


class MapBuffer:
    """Up to ``size`` entries, each a label map of every image by one model.

    In memory, or in one memory-mapped file per entry where all of them together exceed the limit:
    then only the maps that a batch asks for are read. The files of the last checkpoint live until
    another has been written (:meth:`collect`), so that a run which is killed finds them; those of
    the one before it too, as long as there are no more than 2 B_max.

    Args:
        shape: (N, H, W) of an entry.
        size: B_max.
        directory: for files; without it they are temporary ones.
        limit_mib: size of all entries, MiB, beyond which they are files.
    """

    def __init__(
        self, shape: tuple[int, int, int], size: int, directory: Path | None, limit_mib: float
    ) -> None:
        self.shape = shape
        self.size = size
        self.mapped = size * float(np.prod(shape)) / MIB > limit_mib
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._entries: list[_Entry] = []
        self._made = 0
        self._saved: set[str] = set()
        """Files of the last checkpoint and of the one before it."""
        self._last: set[str] = set()
        self._spare: list[NDArray[np.uint8]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def labels(self) -> list[str]:
        """Names of the models, in order."""
        return [entry.label for entry in self._entries]

    @property
    def folder(self) -> Path:
        """Where the files are."""
        if self._directory is not None:
            return self._directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mlseg-maps-")
        return Path(self._temporary.name)

    # ------------------------------------------------------------------- content

    def open(self, label: str, position: int) -> None:
        """Make room for a new entry at ``position``; its maps follow by :meth:`write`.

        Raises:
            RunError: its file can't be made, as on a full disk.
        """
        assert len(self._entries) < self.size, "the buffer is full"
        self._made += 1
        name = f"maps_{self._made:05d}.npy" if self.mapped else ""
        self._entries.insert(position, _Entry(label, name, self._room(name)))

    def write(self, position: int, start: int, maps: Tensor) -> None:
        """Store maps.

        Args:
            position: of the entry.
            start: index of the first image.
            maps: (n, H, W) uint8.
        """
        self._entries[position].maps[start : start + len(maps)] = maps.cpu().numpy()

    def gather(self, positions: Tensor, images: Tensor) -> Tensor:
        """Maps of some images by some entries.

        Args:
            positions, images: (n,) int64 on the CPU.

        Returns:
            (n, H, W) uint8 on the CPU.
        """
        found = torch.empty((len(images), *self.shape[1:]), dtype=torch.uint8)
        for position in positions.unique().tolist():
            at = (positions == position).nonzero().squeeze(1)
            rows = self._entries[position].maps[images[at].numpy()]
            found[at] = torch.from_numpy(np.ascontiguousarray(rows))
        return found

    def delete(self, position: int) -> None:
        """Remove an entry."""
        self._release(self._entries.pop(position))

    def flush(self, keep: Sequence[int] = ()) -> None:
        """Remove all entries but those at the positions ``keep``, which are then in that order."""
        kept = [self._entries[position] for position in keep]
        for entry in self._entries:
            if not any(entry is other for other in kept):
                self._release(entry)
        self._entries = kept

    # ------------------------------------------------------------------- storage

    def _room(self, name: str) -> NDArray[np.uint8]:
        if not name:
            return self._spare.pop() if self._spare else np.zeros(self.shape, np.uint8)
        self._bound()
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return mapped(path, self.shape)

    def _bound(self) -> None:
        """Before another file is made: give up those of the checkpoint before the last."""
        files = list(self.folder.glob("maps_*.npy"))
        if len(files) < 2 * self.size:
            return
        self._saved = set(self._last)
        for path in files:
            if path.name not in self._saved | {entry.file for entry in self._entries}:
                _remove(path)

    def _release(self, entry: _Entry) -> None:
        if not entry.file:
            self._spare.append(entry.maps)
        elif entry.file not in self._saved:
            _remove(self.folder / entry.file)

    def collect(self) -> None:
        """Remove files that no entry uses; call it once a checkpoint has been written."""
        if not self.mapped:
            return
        before, self._last = self._last, {entry.file for entry in self._entries}
        self._saved = before | self._last
        for path in self.folder.glob("maps_*.npy"):
            if path.name not in self._saved:
                _remove(path)

    def state_dict(self) -> dict[str, Any]:
        """The entries: their maps, or the names of their files, which are then on the disk."""
        if self.mapped:
            for entry in self._entries:
                assert isinstance(entry.maps, np.memmap)
                with writing(self.folder / entry.file):
                    entry.maps.flush()
        return {
            "shape": list(self.shape),
            "made": self._made,
            "entries": [
                {
                    "label": entry.label,
                    "file": entry.file,
                    "maps": None if entry.file else torch.from_numpy(entry.maps),
                }
                for entry in self._entries
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            UserError: an entry's file is missing or damaged, or is for other images.
        """
        if tuple(state["shape"]) != self.shape:
            raise UserError(
                f"the label maps of the checkpoint are {tuple(state['shape'])}, this run's "
                f"{self.shape}; resume with the config it was started with"
            )
        require_form(self._made, state["made"], "made")
        if len(state["entries"]) > self.size:
            raise ValueError(f"{len(state['entries'])} sets of label maps, of {self.size} at most")
        for entry in state["entries"]:
            require_form("", entry["label"], "label")
            # Data from a file, which may not say what else is opened or removed where.
            if entry["file"] and not _FILE.fullmatch(entry["file"]):
                raise ValueError(f"label maps in {str(entry['file'])[:80]!r}")
            if not entry["file"]:
                wanted = torch.empty(self.shape, dtype=torch.uint8, device="meta")
                require_form(wanted, entry["maps"], "maps")
        self._made = state["made"]
        self._saved = self._last = {entry["file"] for entry in state["entries"]}
        self._entries = []
        for entry in state["entries"]:
            if entry["file"]:
                maps = self._reopen(self.folder / entry["file"])
            else:
                maps = entry["maps"].numpy().copy()
            self._entries.append(_Entry(entry["label"], entry["file"], maps))

    def _reopen(self, path: Path) -> NDArray[np.uint8]:
        try:
            # Read-only at first: to write, numpy would fill up a file that has been cut short.
            np.lib.format.open_memmap(path, "r")
            maps = np.lib.format.open_memmap(path, "r+")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: label maps that the checkpoint needs can't be read ({error}); put the "
                "file back, or start the run again"
            ) from None
        if maps.shape != self.shape or maps.dtype != np.uint8:
            raise UserError(f"{path}: label maps of {maps.shape}, expected {self.shape}")
        return maps


def _remove(path: Path) -> None:
    with suppress(OSError):  # what can't be removed is removed with the next
        path.unlink()


class _Entry:
    """One model's maps."""

    def __init__(self, label: str, file: str, maps: NDArray[np.uint8]) -> None:
        self.label = label
        self.file = file
        self.maps = maps
