"""The aggregation buffer, in memory and in files."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.errors import RunError, UserError

SHAPE = (7, 4, 5)


def maps(seed: int) -> torch.Tensor:
    return torch.randint(9, SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def filled(folder: Path, limit_mib: float, labels: str = "abc") -> MapBuffer:
    buffer = MapBuffer(SHAPE, 3, folder, limit_mib)
    for position, label in enumerate(labels):
        buffer.open(label, position)
        buffer.write(position, 0, maps(ord(label))[:4])
        buffer.write(position, 4, maps(ord(label))[4:])
    return buffer


def content(buffer: MapBuffer) -> list[torch.Tensor]:
    everything = torch.arange(SHAPE[0])
    return [
        buffer.gather(torch.full_like(everything, position), everything)
        for position in range(len(buffer))
    ]


@pytest.fixture(params=[1.0, 0.0], ids=["memory", "files"])
def limit(request: pytest.FixtureRequest) -> float:
    return request.param


def test_entries_are_what_was_written(tmp_path: Path, limit: float) -> None:
    buffer = filled(tmp_path, limit)
    assert buffer.mapped == (limit == 0)
    assert buffer.labels == ["a", "b", "c"]
    assert all(torch.equal(x, maps(ord(y))) for x, y in zip(content(buffer), "abc", strict=True))
    which, images = torch.tensor([2, 0, 2, 1]), torch.tensor([6, 0, 1, 3])
    found = buffer.gather(which, images)
    expected = [maps(ord("abc"[w]))[i] for w, i in zip(which.tolist(), images, strict=True)]
    assert torch.equal(found, torch.stack(expected))


def test_entries_come_and_go(tmp_path: Path, limit: float) -> None:
    buffer = filled(tmp_path, limit)
    buffer.delete(1)
    buffer.open("d", 2)
    buffer.write(2, 0, maps(ord("d")))
    assert buffer.labels == ["a", "c", "d"]
    buffer.flush([2, 0])
    buffer.open("e", 0)
    buffer.write(0, 0, maps(ord("e")))
    assert buffer.labels == ["e", "d", "a"]
    assert all(torch.equal(x, maps(ord(y))) for x, y in zip(content(buffer), "eda", strict=True))


def test_it_goes_on_from_a_checkpoint(tmp_path: Path, limit: float) -> None:
    buffer = filled(tmp_path, limit)
    state = buffer.state_dict()
    state = torch.load(_saved(tmp_path, state), weights_only=True)
    buffer.collect()
    buffer.flush()  # what came after the checkpoint, before a crash
    buffer.open("x", 0)
    buffer.write(0, 0, maps(1))
    again = MapBuffer(SHAPE, 3, tmp_path, limit)
    again.load_state_dict(state)
    assert again.labels == ["a", "b", "c"]
    assert all(torch.equal(x, maps(ord(y))) for x, y in zip(content(again), "abc", strict=True))
    again.collect()
    assert len(list(tmp_path.glob("maps_*.npy"))) == (3 if limit == 0 else 0)


def _saved(folder: Path, state: object) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_memory_is_used_again(tmp_path: Path) -> None:
    buffer = filled(tmp_path, 1.0)
    before = {id(entry.maps) for entry in buffer._entries}
    for _ in range(3):
        buffer.delete(1)
        buffer.open("n", 2)
    assert {id(entry.maps) for entry in buffer._entries} == before


@pytest.mark.parametrize("every", [1, 4, 100])
def test_files_are_bounded_however_seldom_a_checkpoint_is_written(
    every: int, tmp_path: Path
) -> None:
    buffer = filled(tmp_path, 0.0)
    for number in range(20):
        if number % every == 0:
            state = buffer.state_dict()
            buffer.collect()
        if number % 5 == 4:
            buffer.flush([0])
        else:
            buffer.delete(1)
        while len(buffer) < 3:
            buffer.open("n", len(buffer))
        assert len(list(tmp_path.glob("maps_*.npy"))) <= 6
        again = MapBuffer(SHAPE, 3, tmp_path, 0.0)
        again.load_state_dict(state)  # as after a crash here


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = filled(tmp_path, 0.0).state_dict()
    with pytest.raises(UserError, match="resume with the config"):
        MapBuffer((8, 4, 5), 3, tmp_path, 0.0).load_state_dict(state)
    whole = (tmp_path / "maps_00002.npy").read_bytes()
    for content in (b"broken", b"", whole[:-1], whole[: len(whole) // 2]):
        (tmp_path / "maps_00002.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"maps_00002\.npy: label maps that the checkpoint"):
            MapBuffer(SHAPE, 3, tmp_path, 0.0).load_state_dict(state)
        assert (tmp_path / "maps_00002.npy").read_bytes() == content, "left as it was found"
    (tmp_path / "maps_00002.npy").unlink()
    with pytest.raises(UserError, match=r"maps_00002\.npy"):
        MapBuffer(SHAPE, 3, tmp_path, 0.0).load_state_dict(state)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"can't write .*maps_00001\.npy: .*No space left"):
        filled(tmp_path, 0.0)


def test_without_a_folder_files_are_temporary() -> None:
    buffer = MapBuffer(SHAPE, 3, None, 0.0)
    buffer.open("a", 0)
    assert list(buffer.folder.iterdir())
