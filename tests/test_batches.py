"""Batches on their way to a device keep their types."""

import collections
import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from mlseg.errors import UserError
from mlseg.transfer import batch_to_device

X = torch.ones(2, 3)


class Attributes(dict[str, Any]):
    """An attribute dict."""

    __getattr__ = dict.__getitem__


class Itself(dict[str, Any]):
    """An attribute dict whose attributes are its items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Fixed(Mapping[str, Any]):
    """A mapping that nothing can be put into, with a constructor of its own."""

    def __init__(self, x: Tensor, name: str) -> None:
        self._values = {"x": x, "name": name}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Moves:
    """Has a method ``to``."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> "Moves":
        return Moves(self.x.to(device))


class MovesItself(Moves):
    def to(self, device: Any) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.x, self.parts, self.name = x, [x], "a"


Named = collections.namedtuple("Named", "x name")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    length: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", len(self.x))


BATCHES: dict[str, Any] = {
    "dict": {"x": X, "name": "a"},
    "ordered": OrderedDict(x=X),
    "default": defaultdict(list, x=X),
    "attributes": Attributes(x=X, name="a"),
    "itself": Itself(x=X),
    "user": UserDict(x=X),
    "proxy": MappingProxyType({"x": X}),
    "moves": Moves(X),
    "moves itself": MovesItself(X),
    "plain": Plain(X),
    "namespace": SimpleNamespace(x=X),
    "named": Named(X, "a"),
    "frozen": Frozen(X),
    "list": [X, {"x": X}],
    "tuple": (X, "a", X.shape),
}


def tensor(batch: Any) -> Tensor:
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "x"):
        return batch[0]
    return batch.x if hasattr(batch, "x") else batch["x"]


@pytest.mark.parametrize("name", BATCHES)
def test_types_are_kept(name: str) -> None:
    for device in ("cpu", "meta"):
        batch = BATCHES[name] if name != "moves itself" else MovesItself(X)
        moved = batch_to_device(batch, device)
        assert type(moved) is type(batch)
        assert tensor(moved).device.type == device
        assert tensor(moved).shape == X.shape
    if name != "moves itself":
        assert tensor(BATCHES[name]) is X, "what the loader has stays where it was"


def test_what_else_they_hold_is_kept() -> None:
    assert batch_to_device(BATCHES["default"], "meta").default_factory is list
    assert batch_to_device(BATCHES["itself"], "meta").x.device.type == "meta"
    assert batch_to_device(BATCHES["frozen"], "meta").length == 2
    moved = batch_to_device(BATCHES["plain"], "meta")
    assert (moved.name, moved.parts[0].device.type) == ("a", "meta")
    for untouched in ("a", 1, None, torch.float32, object()):
        assert batch_to_device(untouched, "meta") is untouched


def test_packed_sequences_move() -> None:
    moved = batch_to_device(pack_sequence([X[0], X[0, :2]]), "meta")
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"


def test_what_can_not_be_moved_is_refused() -> None:
    fixed = Fixed(X, "a")
    assert batch_to_device(fixed, "cpu") is fixed
    with pytest.raises(UserError, match="a batch is a Fixed, which can't be copied"):
        batch_to_device(fixed, "meta")

    class Quantity:
        def to(self, unit: str) -> None:
            raise ValueError(f"no unit {unit}")

    with pytest.raises(UserError, match=r"a batch holds a Quantity whose to\('cpu'\) fails"):
        batch_to_device([Quantity()], "cpu")
