"""Every key that a config may have, with type, default and meaning, from the schema itself.

    python -m mlseg.run --keys e2eaug

What a key means stands once, in the docstring of the class of settings (section ``Attributes``), or
of the class or function that a config names (section ``Args``).
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union

import annotated_types
import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlseg.config.components import Choices
from mlseg.config.loading import Settings

REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
        path: dotted; ``*`` stands for any name.
        type: in words.
        default: as a file would say it, or ``required``.
        meaning: a sentence or two; empty where its schema says nothing.
    """

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Kind:
    """The things of one kind that a config can name, and what keys each takes beside ``name``.

    Attributes:
        kind: as messages call it.
        key: of the name.
        example: a dotted path, which may stand in a name's place.
        things: by name, in the order of the names.
    """

    kind: str
    key: str
    example: str
    things: Mapping[str, Sequence[Key]]


def keys(schema: type[pydantic.BaseModel], prefix: str = "") -> Iterator[Key]:
    """Its keys, those of the settings within it after it, in the order of the schema."""
    meanings = described(schema)
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        within = list(_schemas(field.annotation))
        meaning = meanings.get(name) or field.description or "".join(_summary(c) for _, c in within)
        yield Key(path, _typed(field), _default(field), meaning)
        for inner, inside in within:
            yield from keys(inside, f"{path}.{inner}")


def _summary(schema: type[pydantic.BaseModel]) -> str:
    """The first paragraph of its own docstring."""
    return " ".join(inspect.cleandoc(schema.__dict__.get("__doc__") or "").split("\n\n")[0].split())


def kinds(schema: type[pydantic.BaseModel]) -> list[Kind]:
    """What a config of that schema can name, each kind once, in the order in which keys take it."""
    found: dict[str, Kind] = {}
    for inside, choices in _choices(schema, set()):
        if choices.kind not in found:
            things = {name: list(_own(inside, name, choices)) for name in choices.things}
            found[choices.kind] = Kind(choices.kind, choices.key, choices.example, things)
    return list(found.values())


def _own(inside: Any, name: str, choices: Choices) -> Iterator[Key]:
    """The keys of one thing, without those that all of its kind have."""
    schema = inside.fitting({choices.key: name})
    meanings = {**described(choices.things[name]), **described(schema)}
    for key, field in schema.model_fields.items():
        if key not in inside.model_fields and key != choices.key:
            meaning = meanings.get(key) or field.description or ""
            yield Key(key, _typed(field), _default(field), meaning)


def printed(schema: type[pydantic.BaseModel]) -> Iterator[str]:
    """All of it for a terminal, a line or two per key."""
    yield from _lines(keys(schema))
    for kind in kinds(schema):
        yield f"\n{kind.key}: {kind.kind}, one of these or a dotted path such as {kind.example}"
        for name, own in kind.things.items():
            yield f"  {name}"
            yield from _lines(own, "    ")


def _lines(found: Iterable[Key], indent: str = "") -> Iterator[str]:
    for key in found:
        yield f"{indent}{key.path}: {key.type} ({key.default})"
        yield from textwrap.wrap(
            key.meaning, 96, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "
        )


def described(thing: Any) -> dict[str, str]:
    """What a docstring says of attributes and arguments; a base class's where it says nothing."""
    found: dict[str, str] = {}
    for owner in reversed(thing.__mro__) if isinstance(thing, type) else (thing,):
        if owner is object or owner.__module__.split(".")[0] == "pydantic":
            continue
        for text in (vars(owner).get("__doc__") or _of_function(owner), _of_init(owner)):
            found.update(_entries(inspect.cleandoc(text)) if isinstance(text, str) else {})
    return found


def _of_function(owner: Any) -> str | None:
    return None if isinstance(owner, type) else owner.__doc__


def _of_init(owner: Any) -> str | None:
    return getattr(owner.__dict__.get("__init__"), "__doc__", None)


_SECTION = re.compile(r"^(?:Attributes|Args):\n((?:(?: {4}.*)?(?:\n|$))*)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}([\w, ]+):\s(.*(?:\n {5,}.*)*)", re.MULTILINE)


def _entries(text: str) -> dict[str, str]:
    found = {}
    for section in _SECTION.findall(text):
        for names, meaning in _ENTRY.findall(section):
            for name in names.split(","):
                found[name.strip()] = " ".join(meaning.split())
    return found


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, annotations taken off; of a list or mapping, those of its items."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _members(argument)
    elif origin is typing.Annotated:
        yield from _members(arguments[0])
    else:
        yield annotation


def _schemas(annotation: Any, path: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """The classes of settings that a value may have, and where under it they stand."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            yield path, member
        elif typing.get_origin(member) in (dict, Mapping):
            yield from _schemas(typing.get_args(member)[1], f"{path}*.")
        elif typing.get_origin(member) in (list, tuple, Sequence):
            for argument in typing.get_args(member)[:1]:
                yield from _schemas(argument, f"{path}N.")


def _choices(
    schema: type[pydantic.BaseModel], seen: set[type]
) -> Iterator[tuple[type[Settings], Choices]]:
    """The classes of settings within it that stand for one thing among several."""
    for field in schema.model_fields.values():
        for _, inside in _schemas(field.annotation):
            if inside in seen:
                continue
            seen.add(inside)
            if (choices := _among(inside)) is not None:
                yield inside, choices
            yield from _choices(inside, seen)


def _among(schema: Any) -> Choices | None:
    return schema.choices() if hasattr(schema, "choices") else None


_WORDS = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def _typed(field: FieldInfo) -> str:
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = "".join(_bounds(metadata))
    if origin is typing.Annotated:
        return _in_words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(a, metadata) for a in arguments))
    if origin is Literal:
        return " or ".join(map(_as_written, arguments))
    if origin is tuple and arguments[-1:] != (...,):
        return f"list of {len(arguments)}: {', '.join(map(_in_words, arguments))}"
    if origin in (list, tuple, Sequence):
        return f"list of {_in_words(arguments[0])}" + bounds
    if origin in (dict, Mapping):
        return f"mapping of {_in_words(arguments[1])}" + bounds
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        choices = _among(annotation)
        return "mapping" if choices is None else f"mapping with {choices.key}: {choices.kind}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(_as_written(member.value) for member in annotation)
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for sign, kind, attribute in _SIGNS:
            if isinstance(item, kind):
                yield f" {sign} {getattr(item, attribute)}"


_SIGNS = (
    (">", annotated_types.Gt, "gt"),
    (">=", annotated_types.Ge, "ge"),
    ("<", annotated_types.Lt, "lt"),
    ("<=", annotated_types.Le, "le"),
)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return REQUIRED
    return _as_written(value)


def _as_written(value: Any) -> str:
    """A value as a config says it."""
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
        return "the defaults of its keys" if not value else _as_written(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value if value else '""'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_as_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_as_written, value)) + "]"
    return json.dumps(value)
