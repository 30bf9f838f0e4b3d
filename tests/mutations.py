"""Seeded changes to what a checkpoint holds: values, keys and shapes that no run writes."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, ...]

VALUES: list[Any] = [
    None, "text", "", -1, 10**12, 2**70, -1.5, float("nan"), float("inf"), True, b"x",
    [], [1, 2], (), {}, {"a": 1}, {1: 2},
    torch.zeros(3), torch.zeros(0), torch.full((2, 2), float("nan")), torch.arange(4),
]  # fmt: skip
KINDS = ("value", "value", "value", "delete", "rename", "add", "tensor", "swap")


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in it; of long lists the first ones."""
    if at:
        yield at
    keys = list(tree) if isinstance(tree, dict) else []
    if isinstance(tree, (list, tuple)):
        keys = list(range(min(len(tree), 4)))
    for key in keys:
        yield from places(tree[key], (*at, key))


def changed(state: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with one change, and what that is. Every depth is as likely as any other."""
    state = copy.deepcopy(state)
    known = [place for place in places(state) if place != ("format",)]
    depth = draw.choice(sorted({len(place) for place in known}))
    level = [place for place in known if len(place) == depth]
    place, kind = draw.choice(level), draw.choice(KINDS)
    holder, old = _at(state, place[:-1]), _at(state, place)
    if kind == "delete" and isinstance(holder, dict):
        del holder[place[-1]]
    elif kind == "rename" and isinstance(holder, dict):
        holder["renamed"] = holder.pop(place[-1])
    elif kind == "add" and isinstance(old, dict):
        old[draw.choice(["more", "step", 0])] = draw.choice(VALUES)
    elif kind == "tensor" and isinstance(old, Tensor):
        others = [old.double(), old.reshape(-1), old[None], old.long(), torch.zeros(7), "tensor"]
        _put(state, place, draw.choice([*others, old * float("nan")]))
    elif kind == "swap":
        _put(state, place, copy.deepcopy(_at(state, draw.choice(level))))
    else:
        _put(state, place, draw.choice(VALUES))
    return state, f"{kind} at {'.'.join(map(str, place))}"


def _at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _put(tree: Any, place: Place, value: Any) -> None:
    *above, last = place
    holder = _at(tree, tuple(above))
    if isinstance(holder, tuple):
        _put(tree, tuple(above), (*holder[:last], value, *holder[last + 1 :]))
    else:
        holder[last] = value
