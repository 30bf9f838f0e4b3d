"""The table of hypergradient methods, ours and a user's own.

Modules of :mod:`mlseg.hypergradients.methods` enter theirs; they are loaded when a name is first
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from mlseg.config.components import located
from mlseg.config.explaining import explain
from mlseg.config.registry import Registry
from mlseg.errors import UserError
from mlseg.hypergradients.base import Method

METHODS: Registry[type[Method]] = Registry(
    "hypergradient method",
    base=Method,
    packages=["mlseg.hypergradients.methods"],
    example="my_package.methods:Mine",
)
_LISTENERS: list[Callable[[str], None]] = []
_M = TypeVar("_M", bound=Method)


def register(name: str) -> Callable[[type[_M]], type[_M]]:
    """Class decorator: make a :class:`~mlseg.hypergradients.Method` known as ``name``.

    Raises:
        ValueError: another method has that name.
    """
    enter = METHODS.register(name)
    return lambda cls: _known_as(name, enter(cls))


def _known_as(name: str, cls: type[_M]) -> type[_M]:
    cls.name = name
    for call in _LISTENERS:
        call(name)
    return cls


def listen(call: Callable[[str], None]) -> None:
    """Call ``call`` with the name of every method, those registered later too."""
    _LISTENERS.append(call)
    for name in METHODS.known():
        call(name)


def classes() -> dict[str, type[Method]]:
    """All registered methods' classes, by name."""
    return METHODS.all()


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return METHODS.names()


def chosen(spec: str | Mapping[str, Any]) -> tuple[type[Method], dict[str, Any]]:
    """The class that a config names, and its settings as they are given.

    Raises:
        UserError: no method has that name, or stands at that dotted path.
    """
    values = {"method": spec} if isinstance(spec, str) else dict(spec)
    name = values.pop("method", "finite_difference")
    if not isinstance(name, str):
        raise UserError(f"a hypergradient method's name is a string, not {name!r}")
    cls = METHODS.get(name)
    return (cls if cls.__dict__.get("name") else _known_as(name, cls)), values


def validated(spec: str | Mapping[str, Any] | Method) -> Method:
    """As :func:`resolve`, for a validator: an error says which key of ``spec`` is wrong.

    Raises:
        pydantic.ValidationError: no method has that name, or a setting doesn't belong to it.
    """
    if isinstance(spec, Method):
        return spec
    try:
        cls, values = chosen(spec)
    except UserError as error:
        raise located("Method", () if isinstance(spec, str) else ("method",), str(error)) from None
    return cls.model_validate(values)


def resolve(spec: str | Mapping[str, Any] | Method) -> Method:
    """A method from its name, from a mapping with ``method`` and its settings, or as it is.

    Raises:
        UserError: no method has that name, or a setting doesn't belong to it.
    """
    if isinstance(spec, Method):
        return spec
    cls, values = chosen(spec)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        path, text, _ = explain(error, cls, values)
        raise UserError(f"{cls.name}: {'.'.join(map(str, path))}: {text}") from None
