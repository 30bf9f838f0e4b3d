"""Checkpoints: whole or not at all, data and never code, and one line where that fails."""

import collections
import contextlib
import dataclasses
import enum
import errno
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from mlseg import checkpoint
from mlseg.errors import RunError, UserError


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state = {
        "weights": {"w": torch.arange(3.0)},
        "step": 7,
        "list": [1, None, "a"],
        "pair": (1, 2.5),
    }
    path = tmp_path / "new" / "folder" / "last.pt"
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.pop("weights")["w"], torch.arange(3.0))
    assert loaded == {
        "format": checkpoint.FORMAT,
        "step": 7,
        "list": [1, None, "a"],
        "pair": (1, 2.5),
    }
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


class Full(io.BytesIO):
    """A file on a disk with room for a thousand bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files of this process may not grow beyond 64 KiB, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = {"weights": torch.randn(100_000)}


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("former", [True, False])
def test_a_disk_that_fills_up_leaves_the_former_checkpoint(tmp_path: Path, former: bool) -> None:
    path = tmp_path / "last.pt"
    if former:
        checkpoint.save(path, {"step": 1})
    with pytest.raises(RunError) as caught:
        checkpoint.save(path, BIG)
    text = one_line(caught)
    assert text.startswith(f"can't write checkpoint {path}: ")
    assert text.endswith("; the one written before it is kept") == former
    assert [p.name for p in tmp_path.iterdir()] == (["last.pt"] if former else [])
    if former:
        assert checkpoint.load(path)["step"] == 1


def test_the_reason_is_the_operating_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full())
    with pytest.raises(RunError, match="No space left on device"):
        checkpoint.save(tmp_path / "last.pt", BIG)


def test_a_crash_while_writing_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    """The next save replaces what a killed process left half written."""
    path = tmp_path / "last.pt"
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.fsync = lambda fd: os._exit(0)  # dies before the rename
            checkpoint.save(path, {"step": 1})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.save(path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"can't write checkpoint .*last\.pt: "):
        checkpoint.save(tmp_path / "file" / "last.pt", {})


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_line(tmp_path: Path, part: float) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weights": torch.randn(500), "more": [torch.randn(50)] * 3})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert one_line(caught).startswith(f"{path}: truncated or not a checkpoint (")


def test_another_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_text("system: supervised\n")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [({"format": 99}, "checkpoint format 99"), ({"a": 1}, "format None"), ([1], "format None")],
)
def test_other_formats_are_named(tmp_path: Path, state: Any, words: str) -> None:
    path = tmp_path / "last.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match=f"{words}, this mlseg reads format {checkpoint.FORMAT}"):
        checkpoint.load(path)


# ------------------------------------------------------------------------- damage


def a_run(folder: Path) -> dict[str, Any]:
    """Two checkpoints of one; the state of the last."""
    for step in (1, 2):
        state = {"step": step, "problems": {f"w{i}": torch.randn(5, 30) for i in range(4)}}
        checkpoint.save(folder / "last.pt", state)
    return state


def test_no_flipped_bit_changes_what_is_loaded(tmp_path: Path) -> None:
    """Of every 7th byte one bit: refused, or it lies in padding and changes nothing."""
    state, path = a_run(tmp_path), tmp_path / "last.pt"
    content = path.read_bytes()
    weights = content.index(state["problems"]["w2"].numpy().tobytes())
    refused = set()
    for position in (*range(0, len(content), 7), weights):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        loaded: Any = None
        said = f"{path}: truncated or not a checkpoint (damaged: "
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            said = str(error)
            refused.add(position)
        assert said.startswith(f"{path}: truncated or not a checkpoint (damaged: ")
        assert "\n" not in said
        if position not in refused:
            assert tiny.same(loaded, {"format": checkpoint.FORMAT, **state})
    assert weights in refused


def test_the_checkpoint_before_last_is_kept_and_offered(tmp_path: Path) -> None:
    a_run(tmp_path)
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    assert checkpoint.load(last)["step"] == 2
    assert checkpoint.load(previous)["step"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    content = last.read_bytes()
    for damaged in (content[:1000], b"", None):
        last.unlink()
        if damaged is not None:
            last.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            checkpoint.load(last)
        command = f"mv {previous} {last}"
        assert f"the one saved before it is whole; to go on from that: {command}, then" in one_line(
            caught
        )
        if damaged is None:
            last.write_bytes(content)
    subprocess.run(command, shell=True, check=True)
    assert checkpoint.load(last)["step"] == 1
    last.write_bytes(b"")
    with pytest.raises(UserError, match="start the run again"):
        checkpoint.load(last)


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", link)
    a_run(tmp_path)
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


def test_compressed_data_are_refused_unread(tmp_path: Path) -> None:
    a_run(tmp_path)
    with zipfile.ZipFile(tmp_path / "last.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(10**6))
    with pytest.raises(UserError, match="it holds compressed data, and torch writes none"):
        checkpoint.load(tmp_path / "last.pt")


# ------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_what_is_finite(dtype: torch.dtype) -> None:
    """Large numbers, whose sum overflows, are; also integers and tensors of no element."""
    top = torch.finfo(dtype).max
    fine = {
        "large": torch.full((4,), top, dtype=dtype),
        "whole": torch.arange(3),
        "none": torch.zeros(0, dtype=dtype),
    }
    assert checkpoint.first_not_finite(fine) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.zeros(3, dtype=dtype)
        bad[1] = value
        assert checkpoint.first_not_finite({**fine, "bad": bad}) == "bad"


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), -float("inf")])
def test_what_is_finite_of_odd_kinds(value: float) -> None:
    """Sparse tensors by the numbers that they keep, eight bits, a part that isn't contiguous."""
    dense = torch.zeros(4, 6)
    dense[1, 2] = value
    kinds = {
        "sparse": dense.to_sparse(),
        "twice": torch.sparse_coo_tensor(
            torch.zeros(1, 2), torch.tensor([value, 1.0]), (2,)
        ),  # not coalesced
        "rows": dense.to_sparse_csr(),
        "strided": dense[:, ::2],
        "transposed": dense.t(),
        "expanded": dense[1, 2].expand(5),
        "small": dense.to(torch.float8_e5m2),
    }
    for name, tensor in kinds.items():
        found = checkpoint.first_not_finite({"yes": torch.tensor(True), name: tensor})
        assert found == (None if value == 1.0 else name), name


@pytest.mark.parametrize(
    ("own", "fits", "misfits"),
    [
        (1, [0, 7], [-1, 1.0, True, "1", None, torch.tensor(1)]),
        (-1, [-1, 4], ["-1", 0.5]),
        (0.5, [0.0, 3, -0.1], [float("nan"), float("inf"), "x", None, True]),
        (float("inf"), [0.5, float("inf")], [float("nan"), "inf", None]),
        (True, [False], [0, 1, "yes", None]),
        ("a", ["", "b"], [b"a", 1, None]),
        (None, [None, 3, "a", [1]], []),
        ([1, 2], [[3, 4], (5, 6)], [[1], [1, "2"], 3, {}]),
        ([], [[], [1, 2]], [None, {}]),
        ({"a": 1}, [{"a": 2}], [{}, {"a": 1, "b": 1}, {"a": "1"}, [1], None]),
        (torch.zeros(2), [torch.ones(2)], [torch.zeros(3), torch.zeros(2).double(), [0.0, 0.0]]),
    ],
    ids=repr,
)
def test_forms(own: Any, fits: list[Any], misfits: list[Any]) -> None:
    for given in fits:
        checkpoint.require_form(own, given, "it")
    for given in misfits:
        with pytest.raises(ValueError, match=r"^it(\.\w+)? is "):
            checkpoint.require_form(own, given, "it")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"last\.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


Named = collections.namedtuple("Named", "x name")


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    name: str


class Attributes(dict[str, Any]):
    """An attribute dict."""

    __getattr__ = dict.__getitem__


class Itself(dict[str, Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Colour(enum.Enum):
    RED = 1


class Image(Tensor):
    """A subclass of a tensor, as torchvision's and MONAI's."""


KEPT: dict[str, Any] = {
    "float64": (np.float64(0.5), 0.5),
    "bool_": (np.bool_(True), True),
    "int key": ({np.int64(3): 1}, {3: 1}),
    "path": (Path("a") / "b.png", Path("a/b.png")),
    "named tuple": (Named(1, "a"), Named(1, "a")),
    "dataclass": (Batch(torch.ones(()), "a"), Batch(torch.ones(()), "a")),
    "namespace": (SimpleNamespace(a=1), SimpleNamespace(a=1)),
    "attributes": (Attributes(a=1), Attributes(a=1)),
    "itself": (Itself(a=1), Itself(a=1)),
    "enum": (Colour.RED, Colour.RED),
}
"""What is saved, and what it is read as."""


@pytest.mark.parametrize("name", KEPT)
def test_more_than_plain_values_is_saved(tmp_path: Path, name: str) -> None:
    saved, expected = KEPT[name]
    checkpoint.save(tmp_path / "last.pt", {"a": [saved]})
    (loaded,) = checkpoint.load(tmp_path / "last.pt")["a"]
    assert type(loaded) is type(expected)
    assert loaded == expected
    if name == "itself":
        assert loaded.a == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3)[:, ::-1],
        np.arange(3, dtype=">i4"),
        np.array(3, dtype=np.uint16),
        np.array(["a", "bc"]),
        np.zeros((0, 2), np.float32),
    ],
)
def test_arrays_are_saved(tmp_path: Path, array: Any) -> None:
    checkpoint.save(tmp_path / "last.pt", {"a": array})
    loaded = checkpoint.load(tmp_path / "last.pt")["a"]
    assert loaded.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(loaded, array)


def test_tensors_keep_their_class(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", {"a": torch.ones(2).as_subclass(Image)})
    loaded = checkpoint.load(tmp_path / "last.pt")["a"]
    assert type(loaded) is Image
    assert loaded.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: 1, np.array([None]), slice(3)])
def test_what_could_not_be_read_is_said_at_the_save(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": 1})
    with pytest.raises(
        RunError, match=r"can't write .*: problems.low.batch\[1\] is an? "
    ) as caught:
        checkpoint.save(path, {"problems": {"low": {"batch": (1, value)}}})
    assert "the one written before it is kept" in one_line(caught)
    assert checkpoint.load(path)["a"] == 1


def test_classes_that_are_not_loaded_are_named(tmp_path: Path) -> None:
    class Local(NamedTuple):
        x: int

    path = tmp_path / "last.pt"
    with pytest.raises(RunError, match="a is a Local"):
        checkpoint.save(path, {"a": Local(1)})
    value = {"mlseg.kind": "dataclass", "class": "elsewhere:Batch", "value": {"x": 1}}
    torch.save({"format": checkpoint.FORMAT, "a": value}, path)
    with pytest.raises(UserError, match=r"it holds an elsewhere:Batch .*this program hasn't"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["tempfile:_TemporaryFileCloser", "os:_Environ", "builtins:print"])
def test_a_checkpoint_makes_no_objects_of_other_classes(tmp_path: Path, name: str) -> None:
    for family in ("dataclass", "tuple", "dict", "tensor", "enum"):
        value: dict[str, Any] = {"mlseg.kind": family, "class": name, "value": {}}
        torch.save({"format": checkpoint.FORMAT, "a": value}, tmp_path / "last.pt")
        with pytest.raises(UserError, match="this program hasn't"):
            checkpoint.load(tmp_path / "last.pt")
