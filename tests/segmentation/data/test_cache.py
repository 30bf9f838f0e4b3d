"""Decoded examples in files: whole, checked, and nothing left of what was killed."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from mlseg.errors import RunError
from mlseg.segmentation.data.cache import Arrays, Shapes, kept

SHAPES: Shapes = ((5, 3, 8, 8), (5, 8, 8))


class Fill:
    """Fills arrays with figures of their own, and counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self.times += 1
        images[:] = np.arange(images.size).reshape(images.shape) % 251
        masks[:] = 1


def is_right(arrays: Arrays) -> bool:
    images, masks = (np.empty(shape, np.uint8) for shape in SHAPES)
    Fill()(images, masks)
    return np.array_equal(arrays[0], images) and np.array_equal(arrays[1], masks)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 4]))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"PK")])
@pytest.mark.parametrize("name", ["images.npy", "masks.npy", "sums.npy"])
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, name: str, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    fill, folder = Fill(), tmp_path / "cache" / "set"
    assert is_right(kept(folder, SHAPES, fill))
    assert is_right(kept(folder, SHAPES, fill))
    assert fill.times == 1
    assert capsys.readouterr().err == ""
    assert callable(damage)
    damage(folder / name)
    assert is_right(kept(folder, SHAPES, fill))
    assert fill.times == 2
    said = capsys.readouterr().err
    assert "damaged" in said
    assert said.count("\n") == 1
    assert [folder] == list(folder.parent.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="claims no space here")
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"can't keep decoded images here \(.*No space left"):
        kept(tmp_path / "cache" / "set", SHAPES, Fill())
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_decoding_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead, alive = (tmp_path / f"{name}.0123.partial" for name in ("dead", "alive"))
    for work in (dead, alive):
        work.mkdir()
        (work / "images.npy").touch()
        (tmp_path / f".{work.name}.lock").touch()
    with FileLock(tmp_path / f".{alive.name}.lock"):
        kept(tmp_path / "set", SHAPES, Fill())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"set", alive.name, f".{alive.name}.lock"}
