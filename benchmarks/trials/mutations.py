"""Damage, drawn by a seed: bytes, values by their type, structure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, ...]
"""Keys and indices from the top."""

_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 13000)
TEXTS = (
    "",
    " ",
    "nobody",
    "a" * 300,
    "../outside",
    "/etc/passwd",
    "~nobody",
    "[bold]x[/red]",
    "a\0b",
    "\ud7ff\u202e\x1b[2J",
    "1e400",
    "os:system",
    "${HOME}",
    "%s%n{0.__class__}",
)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 2**31, -(2**31), 2**63, -(2**63) - 1, 10**30,
    0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def damaged(draw: random.Random, data: bytes) -> bytes:
    """A file's bytes with one to three kinds of damage; never the same."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(_DAMAGE)(draw, found)
    if found == data:
        _flip(draw, found)
    return bytes(found)


def _span(draw: random.Random, data: bytearray, most: int = 64) -> slice:
    start = draw.randrange(len(data) + 1)
    return slice(start, min(len(data), start + draw.randint(1, most)))


def _flip(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _fill(draw: random.Random, data: bytearray) -> None:
    span = _span(draw, data, 512)
    value = draw.choice((0, 0xFF, None))
    for place in range(span.start, span.stop):
        data[place] = draw.randrange(256) if value is None else value


def _truncate(draw: random.Random, data: bytearray) -> None:
    del data[draw.randrange(len(data) + 1) :]


def _cut(draw: random.Random, data: bytearray) -> None:
    del data[_span(draw, data, max(64, len(data) // 4))]


def _repeat(draw: random.Random, data: bytearray) -> None:
    span = _span(draw, data, 256)
    data[span.start : span.start] = data[span] * draw.choice((1, 1, 3))


def _insert(draw: random.Random, data: bytearray) -> None:
    place = draw.randrange(len(data) + 1)
    data[place:place] = draw.randbytes(draw.randint(1, 64))


def _word(draw: random.Random, data: bytearray) -> None:
    """A number of the format itself, a length or an offset most likely near an end of the file."""
    size = draw.choice((1, 2, 4, 8))
    if len(data) < size:
        return
    near = min(len(data) - size, draw.choice((64, 256, len(data))))
    place = draw.randint(0, near)
    if draw.random() < 0.5:
        place = len(data) - size - place
    value = draw.choice(_WORDS) & (256**size - 1)
    data[place : place + size] = value.to_bytes(size, draw.choice(("big", "little")))


_DAMAGE: Sequence[Callable[[random.Random, bytearray], None]] = (
    _flip, _flip, _fill, _truncate, _cut, _repeat, _insert, _word, _word,
)  # fmt: skip


# --------------------------------------------------------------------------- nested values


def places(value: Any, here: Place = ()) -> list[Place]:
    """Every place of a nested value below its top, keys and indices."""
    found: list[Place] = []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        found += [(*here, key), *places(item, (*here, key))]
    return found


def at(value: Any, place: Place) -> Any:
    """What stands there."""
    for key in place:
        value = value[key]
    return value


def changed(draw: random.Random, value: Any, tensors: bool = False) -> tuple[Any, list[str]]:
    """A nested value with one to three changes, and what they are.

    Args:
        tensors: it holds tensors, and may get odd ones.
    """
    said = []
    value = _thawed(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        known = places(value)
        if not known:
            break
        # By depth first, or the many weights would leave hardly a chance to all else.
        depth = draw.choice(sorted({len(place) for place in known}))
        place = draw.choice([place for place in known if len(place) == depth])
        said.append(_change(draw, value, place, tensors))
    return value, said


def _thawed(value: Any) -> Any:
    """A copy in which tuples are lists."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _change(draw: random.Random, whole: Any, place: Place, tensors: bool) -> str:
    above, key = at(whole, place[:-1]), place[-1]
    name = ".".join(map(str, place))
    kind = draw.choice(("value", "value", "value", "type", "remove", "rename", "nest", "swap"))
    if kind == "remove":
        del above[key]
    elif kind == "rename" and isinstance(above, dict):
        above[draw.choice((f"{key}x", *TEXTS))] = above.pop(key)
    elif kind == "nest":
        above[key] = draw.choice(([above[key]], {"x": above[key]}, {str(key): above[key]}))
    elif kind == "swap" and len(above) > 1:
        keys = list(above) if isinstance(above, dict) else list(range(len(above)))
        other = draw.choice([k for k in keys if k != key])
        above[key], above[other] = above[other], above[key]
    else:
        above[key] = _other(draw, above[key], kind == "type", tensors)
    said = repr(above[key])[:60] if kind in ("value", "type") and _has(above, key) else ""
    return f"{kind} {name} {said}".strip()


def _has(above: Any, key: Any) -> bool:
    return key in above if isinstance(above, dict) else key < len(above)


def _other(draw: random.Random, value: Any, of_another_type: bool, tensors: bool) -> Any:
    if of_another_type:
        plain: list[Any] = [None, True, draw.choice(NUMBERS), draw.choice(TEXTS), [], {}, [1, "a"]]
        return draw.choice([*plain, torch.zeros(2), torch.tensor(1)] if tensors else plain)
    if isinstance(value, Tensor):
        return _other_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        near = [value + 1, value - 1, -value, value * 2, value / 3]
        return draw.choice([*near, draw.choice(NUMBERS), draw.choice(NUMBERS)])
    if isinstance(value, str):
        return draw.choice([value + "x", value.upper(), value[:-1], draw.choice(TEXTS)])
    if isinstance(value, list):
        return draw.choice([[], value + value, value[:-1], list(reversed(value)), [value]])
    if isinstance(value, dict):
        return draw.choice([{}, dict(list(value.items())[:-1]), {**value, "x": 1}, list(value)])
    return draw.choice([0, "", [], False])


def _other_tensor(draw: random.Random, value: Tensor) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: value.double(),
        lambda: value.to(torch.int64),
        lambda: value.to(torch.complex64),
        lambda: value.half(),
        lambda: value.reshape(-1)[:-1],
        lambda: value.unsqueeze(0),
        lambda: value.new_zeros((0,)),
        lambda: value.reshape(-1),
        lambda: torch.cat([value.reshape(-1), value.reshape(-1)]),
        lambda: value.float() * float("nan"),
        lambda: value.float() + float("inf"),
        lambda: value.to_sparse(),
        lambda: value.float() * 1e30,
        lambda: value.new_zeros(1).expand(2**20, 2**20),
    ]
    return draw.choice(ways)()
