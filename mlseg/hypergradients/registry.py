"""The table of hypergradient methods, ours and a user's own.

Modules of :mod:`mlseg.hypergradients.methods` enter theirs; they are loaded when a name is first
asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mlseg.hypergradients.base import Method

_METHODS: dict[str, type[Method]] = {}
_LISTENERS: list[Callable[[str], None]] = []
_M = TypeVar("_M", bound=Method)


def register(name: str) -> Callable[[type[_M]], type[_M]]:
    """Class decorator: make a :class:`~mlseg.hypergradients.Method` known as ``name``.

    Raises:
        ValueError: another method has that name.
    """

    def enter(cls: type[_M]) -> type[_M]:
        known = _METHODS.get(name)
        places = [(c.__module__, c.__qualname__) for c in (cls, known) if c is not None]
        if len(set(places)) > 1:  # the same place: its module was loaded again
            raise ValueError(f"a hypergradient method named {name!r} is registered already")
        cls.name = name
        _METHODS[name] = cls
        for call in _LISTENERS:
            call(name)
        return cls

    return enter


def listen(call: Callable[[str], None]) -> None:
    """Call ``call`` with the name of every method, those registered later too."""
    _LISTENERS.append(call)
    for name in _METHODS:
        call(name)


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "methods")]):
        importlib.import_module(f"{__package__}.methods.{module.name}")


def classes() -> dict[str, type[Method]]:
    """All registered methods' classes, by name."""
    _discover()
    return {name: _METHODS[name] for name in sorted(_METHODS)}


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return list(classes())


def resolve(spec: str | Mapping[str, Any] | Method) -> Method:
    """A method from its name, from a mapping with ``method`` and its settings, or as it is.

    Raises:
        ValueError: no method has that name, or a setting doesn't belong to it.
    """
    if isinstance(spec, Method):
        return spec
    values = {"method": spec} if isinstance(spec, str) else dict(spec)
    name = values.pop("method", "finite_difference")
    known = classes()
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no hypergradient method {name!r}{hint} (there are {', '.join(known)})")
    cls = known[name]
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            takes = ", ".join(sorted(cls.model_fields)) or "none"
            raise ValueError(f"{name} has no setting {key!r} (it takes {takes})") from None
        raise ValueError(f"{name}, setting {key!r}: {first['msg']}") from None
