"""What a config's author reads when it doesn't fit its schema: one line per run.

pydantic reports every fault with the path through its own schema, where a union's
members stand between the keys. Here the path becomes the config's, faults of one
key under several members of a union become one, and each text says what is
expected, what was given and what comes nearest.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}


def explain(
    error: pydantic.ValidationError, settings: type[pydantic.BaseModel], values: Any
) -> tuple[Path, str, int]:
    """Say what is wrong with a config.

    Args:
        error: what pydantic raised for `values`.
        settings: the schema.
        values: the config as plain values.

    Returns:
        The path of the first faulty key, one line of text about it (without the key),
        and the number of other faulty keys.
    """
    faults: dict[Path, list[ErrorDetails]] = {}
    for path, details in _of_meant_members(error.errors(), values):
        faults.setdefault(path, []).append(details)
    # A member of a union that fits in shape says more than those that don't.
    above = {path[:length] for path in faults for length in range(len(path))}
    paths = [path for path in faults if path not in above]
    first = paths[0]
    return first, _text(first, faults[first], settings, values), len(paths) - 1


def quoted(value: Any) -> str:
    """A value as an error shows it: its kind and, shortened, itself."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string {_short(repr(value))}"
    if isinstance(value, Mapping):
        keys = _short(", ".join(map(str, value)), 200)
        return f"a mapping with {keys}" if value else "an empty mapping"
    if isinstance(value, Sequence):
        return f"the list {_short(repr(list(value)))}"
    return _short(repr(value))


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _of_meant_members(
    errors: Sequence[ErrorDetails], values: Any
) -> Iterator[tuple[Path, ErrorDetails]]:
    """The errors and their paths, less those of union members that another name rules out.

    For a union without discriminator pydantic reports every member, also those whose
    `name: Literal[...]` the config contradicts while another member's fits.
    """
    located = [(*_config_path(details, values), details) for details in errors]
    members = {details["loc"][:position] for _, tags, details in located for position in tags}
    ruled_out = {
        details["loc"][:-1]
        for _, _, details in located
        if details["type"] == "literal_error" and details["loc"][:-1] in members
    }
    kept = {member[:-1] for member in members - ruled_out}
    for path, tags, details in located:
        prefixes = [details["loc"][:position] for position in tags]
        if not any(member in ruled_out and member[:-1] in kept for member in prefixes):
            yield path, details


def _config_path(details: ErrorDetails, values: Any) -> tuple[Path, list[int]]:
    """pydantic's location without the members of unions, which are no keys of the config.

    Returns:
        The path, and for each union on the way the length of the location up to and
        with its member.
    """
    path: list[str | int] = []
    tags: list[int] = []
    node = values
    location = details["loc"]
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, Sequence) and not isinstance(node, str) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        elif not (last and details["type"] in ("missing", "missing_with_reason")):
            tags.append(position + 1)
            continue
        path.append(part)
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(str(details["ctx"]["discriminator"]).strip("'"))
    if details["type"] == "missing" and isinstance(path[-1], int):
        path.pop()  # an item of a tuple: the list is too short
    return tuple(path), tags


def _text(
    path: Path, faults: list[ErrorDetails], settings: type[pydantic.BaseModel], values: Any
) -> str:
    kinds = {fault["type"] for fault in faults}
    first = faults[0]
    if kinds == {"extra_forbidden"}:
        return _unknown_key(path, settings, values)
    if kinds == {"missing"} and isinstance(first["loc"][-1], int):
        return f"expected at least {first['loc'][-1] + 1} items, got {quoted(first['input'])}"
    if kinds == {"missing"}:
        return f"missing; it must be set{_wanted(path, settings, values)}"
    if "union_tag_not_found" in kinds:
        return f"missing; it must be set{_wanted(path, settings, values)}"
    if "union_tag_invalid" in kinds:
        choices = [tag.strip().strip("'") for tag in first["ctx"]["expected_tags"].split(",")]
        return _no_choice(first["ctx"]["tag"], choices)
    # What is said in words (a bound, a validator's text) beats "expected another type".
    for fault in faults:
        if fault["type"] in ("value_error", "assertion_error", "missing_with_reason"):
            return " ".join(str(fault["ctx"]["error"]).split())
    choices = [choice for fault in faults for choice in _choices(fault)]
    expected = [_EXPECTED[fault["type"]] for fault in faults if fault["type"] in _EXPECTED]
    others = [f for f in faults if f["type"] not in _EXPECTED and f["type"] != "literal_error"]
    if others:
        said = others[0]["msg"].removeprefix("Input ")
        return f"{said[0].lower()}{said[1:]}, got {quoted(others[0]['input'])}"
    if choices and not expected and not isinstance(first["input"], (Mapping, list)):
        return _no_choice(first["input"], choices)
    expected += [repr(choice) if isinstance(choice, str) else str(choice) for choice in choices]
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {quoted(first['input'])}"


def _choices(fault: ErrorDetails) -> list[Any]:
    """The values of a Literal. pydantic gives them as text only: "'a', 'b' or 'c'"."""
    if fault["type"] != "literal_error":
        return []
    text = str(fault["ctx"]["expected"])
    return [part.strip().strip("'") for chunk in text.split(" or ") for part in chunk.split(",")]


def _no_choice(given: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(given), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    shown = f"'{given}'" if isinstance(given, str) else quoted(given)
    return f"{shown} is none of {', '.join(map(str, choices))}{hint}"


def _unknown_key(path: Path, settings: type[pydantic.BaseModel], values: Any) -> str:
    key = str(path[-1])
    models = list(_models(settings, path[:-1], values))
    valid = list(dict.fromkeys(name for model in models for name in _keys(model)))
    near = difflib.get_close_matches(key, valid, n=1)
    # A whole word of a longer key is another key, not a slip: encoder, where encoder_weights is.
    if near and not near[0].startswith(f"{key}_"):
        return f"unknown key; did you mean '{'.'.join(map(str, (*path[:-1], near[0])))}'?"
    here = ".".join(map(str, path))
    elsewhere = [dotted for dotted in _all_keys(settings) if dotted.split(".")[-1] == key]
    if elsewhere and here not in elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
        if len(path) > 1 and valid:  # the whole config's keys are too many to be of use
            return f"unknown key; valid here: {', '.join(valid)}; or {hint}"
        return f"unknown key here; {hint}"
    return f"unknown key; valid here: {', '.join(valid) or 'none'}"


def _wanted(path: Path, settings: type[pydantic.BaseModel], values: Any) -> str:
    """' to one of ...' or ' (a string)' for a key that is missing, where that can be told."""
    key = path[-1]
    for model in _models(settings, path[:-1], values):
        for name, info in model.model_fields.items():
            if key in (name, info.alias):
                choices = [
                    choice
                    for other in _models(settings, path[:-1], values)
                    for choice in _literals(other, str(key))
                ]
                if choices:
                    return f" to one of {', '.join(map(str, dict.fromkeys(choices)))}"
                simple: dict[Any, str] = {
                    str: "a string",
                    int: "an integer",
                    float: "a number",
                    list: "a list",
                }
                kind = simple.get(get_origin(info.annotation) or info.annotation)
                return f" to {kind}" if kind else ""
    return ""


def _keys(model: type[pydantic.BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _literals(model: type[pydantic.BaseModel], name: str) -> tuple[Any, ...]:
    info = model.model_fields.get(name)
    if info is None or get_origin(info.annotation) is not Literal:
        return ()
    return get_args(info.annotation)


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without Annotated, aliases and unions."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _fitting(model: Any, values: Any) -> Any:
    """The schema that a model's values are checked by: see `Settings.fitting`."""
    return model.fitting(values) if hasattr(model, "fitting") else model


def _models(annotation: Any, path: Path, value: Any) -> Iterator[type[pydantic.BaseModel]]:
    """The schemas that may hold at `path`: of a union's members, those that fit the literals."""
    models = [_fitting(member, value) for member in _members(annotation) if _is_model(member)]
    if isinstance(value, Mapping):
        named = [model for model in models if _fits(model, value)]
        models = named or models
    if not path:
        yield from models
        return
    part, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        below = value.get(part)
    elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
        below = value[part]
    else:
        below = None
    for model in models:
        for name, info in model.model_fields.items():
            if part in (name, info.alias):
                yield from _models(info.annotation, rest, below)
    for member in _members(annotation):
        if get_origin(member) in (list, tuple, dict) and get_args(member):
            # dict[str, X] and list[X]: the last argument is what the key or index leads to.
            inner = [arg for arg in get_args(member) if arg is not Ellipsis][-1]
            yield from _models(inner, rest, below)


def _fits(model: type[pydantic.BaseModel], value: Mapping[str, Any]) -> bool:
    return all(
        value[name] in _literals(model, name)
        for name in model.model_fields
        if name in value and _literals(model, name)
    )


def _all_keys(annotation: Any, prefix: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    for model in _members(annotation):
        if _is_model(model) and model not in above:
            for name, info in _fitting(model, {}).model_fields.items():
                dotted = prefix + (info.alias or name)
                yield dotted
                yield from _all_keys(info.annotation, dotted + ".", (*above, model))
