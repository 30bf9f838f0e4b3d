"""Values that a checkpoint holds, in what ``torch.load(weights_only=True)`` reads.

That reads tensors, plain values and dicts, lists and tuples of them. What a batch or a state may
hold beside that (arrays, paths, named tuples, dataclasses, dicts of a class of their own, tensors
of a subclass) is written as a dict that says what it was. Reading it back makes an object of a
class that is loaded already, without calling anything of it.
"""

import dataclasses
import enum
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_KIND, _CLASS, _VALUE = "mlseg.kind", "class", "value"
_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_LEAVES = frozenset({*_VALUES, *_TENSORS})


def as_plain(value: Any, where: str = "") -> Any:
    """``value`` in what ``torch.load`` reads; TypeError names the place of what isn't known."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind in (dict, OrderedDict):
        pairs = ((_key(k, where), v) for k, v in value.items())
        return kind(
            (k, v if type(v) in _LEAVES else as_plain(v, f"{where}.{k}" if where else str(k)))
            for k, v in pairs
        )
    if kind in (list, tuple):
        return kind(as_plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, np.generic):
        if type(value.item()) not in _VALUES:
            raise TypeError(f"{where} is {_article(kind.__name__)}")
        return value.item()
    if isinstance(value, np.ndarray):
        return _array(value, where)
    if isinstance(value, PurePath):
        return {_KIND: "path", _VALUE: str(value)}
    if isinstance(value, SimpleNamespace):
        return {_KIND: "namespace", _VALUE: as_plain(vars(value), where)}
    name = f"{kind.__module__}:{kind.__qualname__}"
    for family, (fits, parts, _) in _FAMILIES.items():
        if fits(kind) and _loaded(name) is kind:
            return {_KIND: family, _CLASS: name, _VALUE: as_plain(parts(value), where)}
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum):
        plain = next(t for t in (int, float, str) if isinstance(value, t))
        return plain(value)
    raise TypeError(f"{where or 'the state'} is {_article(kind.__name__)}")


def _key(key: Any, where: str) -> Any:
    if type(key) is str:
        return key
    key = key.item() if isinstance(key, np.generic) else key
    if isinstance(key, (str, int, float, type(None), bytes)) and type(key) in _VALUES:
        return key
    if type(key) is tuple:
        return tuple(_key(part, where) for part in key)
    raise TypeError(f"a key of {where or 'the state'} is {_article(type(key).__name__)}")


def _array(value: np.ndarray, where: str) -> dict[str, Any]:
    if value.dtype.kind in "US":
        return {_KIND: "strings", _CLASS: value.dtype.str, _VALUE: value.tolist()}
    try:
        native = value.astype(value.dtype.newbyteorder("="))
        return {_KIND: "array", _VALUE: torch.from_numpy(native)}
    except TypeError:
        raise TypeError(f"{where} is an array of {value.dtype}") from None


def _attributes(value: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _with_attributes(cls: Any, values: Mapping[str, Any]) -> Any:
    made = object.__new__(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"it has an attribute {name!r} that {cls.__name__} hasn't")
        object.__setattr__(made, name, value)
    return made


def _items(value: Any) -> dict[str, Any]:
    held = getattr(value, "__dict__", {})
    return {"items": dict(value), "itself": held is value, "held": {} if held is value else held}


def _with_items(cls: Any, values: Mapping[str, Any]) -> Any:
    made = dict.__new__(cls)
    dict.update(made, values["items"])
    if values["itself"]:
        made.__dict__ = made
    elif values["held"]:
        made.__dict__.update(values["held"])
    return made


def _harmless(cls: Any, base: type) -> bool:
    """Whether making an object of a class, and letting go of it, runs nothing of the class's."""
    return isinstance(cls, type) and issubclass(cls, base) and not hasattr(cls, "__del__")


_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "tensor": (
        lambda cls: _harmless(cls, Tensor),
        lambda value: value.as_subclass(Tensor),
        lambda cls, value: value.as_subclass(cls),
    ),
    "tuple": (
        lambda cls: _harmless(cls, tuple),
        lambda value: list(value),
        lambda cls, value: tuple.__new__(cls, value),
    ),
    "dict": (lambda cls: _harmless(cls, dict), _items, _with_items),
    "dataclass": (
        lambda cls: _harmless(cls, object) and dataclasses.is_dataclass(cls),
        _attributes,
        _with_attributes,
    ),
    "enum": (
        lambda cls: _harmless(cls, enum.Enum),
        lambda value: value.name,
        lambda cls, value: cls.__members__[value],
    ),
}
"""Which classes, what is written of an object, and how it is made again."""


def as_it_was(value: Any) -> Any:
    """The inverse of :func:`as_plain`."""
    if isinstance(value, dict) and _KIND in value:
        family, name, inner = value[_KIND], str(value.get(_CLASS)), value[_VALUE]
        if family == "path":
            return Path(inner)
        if family == "array":
            return inner.cpu().numpy()
        if family == "strings":
            return np.array(inner, dtype=name)
        if family == "namespace":
            return SimpleNamespace(**as_it_was(inner))
        fits, _, made = _FAMILIES[family]
        cls = _loaded(name)
        if cls is None or not fits(cls):
            raise TypeError(f"it holds {_article(name)} ({family}), which this program hasn't")
        return made(cls, as_it_was(inner))
    if isinstance(value, dict):
        return type(value)((k, as_it_was(v)) for k, v in value.items())
    return type(value)(map(as_it_was, value)) if type(value) in (list, tuple) else value


def _loaded(name: str) -> Any:
    """A class by its name, if its module is loaded; nothing is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
