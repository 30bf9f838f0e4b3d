"""YAML as configs use it: the core schema of YAML 1.2, strict, with line numbers.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `010` is eight and
`2018-01-01` is a date; a key written twice silently keeps its last value. In an
experiment's config each of these is a trap, so the loader here resolves scalars
by the 1.2 core schema (section 10.3.2 of the specification, without its octals)
and refuses a repeated key. The dumper shares the schema: it quotes exactly the
strings that the loader would otherwise take for something else.

ruamel.yaml (0.19, pure, YAML 1.2) would not make this shorter: it refuses repeated keys itself, but
reads `010` as ten and `2018-01-01` as a date, lets unknown tags, keys that are no text and a value
within itself pass, and loses U+0085, so that table, walk and dumper were needed all the same.
"""

import re
from typing import Any

import yaml

from mlseg.errors import UserError

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]
"""Where a value stands: mapping keys and list indices from the top."""

MAX_DEPTH = 50
MAX_VALUES = 20_000
MAX_LENGTH = 4096
MAX_BITS = 1000
"""How deep a document may nest, how many values it may have once references are followed, how many
characters a string, how many bits an integer. Real configs stay far below; without bounds nine
nested anchors fill a machine's memory."""

_TAG = "tag:yaml.org,2002:"
_SURROGATES = re.compile("[\ud800-\udfff]")
"""What an escape can say and no UTF-8 file can hold."""
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
_CORE_SCHEMA = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # No leading zeros: 010 stays text, since identifiers are written like that.
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema, for documents of bounded depth."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes by the same schema, writes tuples as lists and no anchors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds Unicode's line breaks into spaces unless they are written as escapes.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


Dumper.add_representer(str, _represent_str)
Dumper.add_representer(tuple, yaml.representer.SafeRepresenter.represent_list)


def read(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Read one YAML document.

    Args:
        text: the document; an empty one is null.
        name: what an error calls it, a file's name or "command line".

    Returns:
        The value, made of dict (string keys), list, str, int, float, bool and None,
        and for the path of everything in it the line, from 1, that sets it.

    Raises:
        UserError: the text isn't YAML, repeats a key, has a key that is no string,
            uses tags or references beyond the core schema, or exceeds the bounds above.
    """
    lines: dict[Path, int] = {}
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _build(loader, node, (), lines, name, frozenset())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        said = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise UserError(f"{name}{line}: not valid YAML: {_one_line(said)}") from None
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{name}:{line_number}: not valid YAML: character {error.character!r} is not allowed"
        ) from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # PyYAML's own, of "\U00110000"
        line_number = loader.line + 1
        raise UserError(f"{name}:{line_number}: not valid YAML: {_one_line(str(error))}") from None
    return value, lines


def write(value: Any) -> str:
    """YAML text of plain values that `read` turns into the same values (tuples into lists)."""
    return _dump(value, default_flow_style=None, width=96)


def write_line(value: Any) -> str:
    """The same in one line, as an override gives it; a string of several lines keeps its own."""
    text = _dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _dump(value: Any, **style: Any) -> str:
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, **style)
    return text


def _build(
    loader: Loader,
    node: yaml.Node,
    path: Path,
    lines: dict[Path, int],
    name: str,
    above: frozenset[int],
) -> Any:
    """Turn a node into plain values, noting the line of everything in it."""
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(path) > MAX_DEPTH:
        raise UserError(f"{name}:{line}: more than {MAX_DEPTH} levels deep, by references (*)")
    if len(lines) > MAX_VALUES:
        raise UserError(f"{name}:{line}: more than {MAX_VALUES} values, references (*) followed")
    if id(node) in above:
        raise UserError(f"{name}:{line}: a reference (*) to a value that contains it")
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(loader, key_node, name)
            here = key_node.start_mark.line + 1
            if key in mapping:
                first = lines[(*path, key)]
                raise UserError(
                    f"{name}:{here}: key '{key}' is written twice, first in line {first}; "
                    "keep one of them"
                )
            lines[(*path, key)] = here
            mapping[key] = _build(loader, value_node, (*path, key), lines, name, above)
        return mapping
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [
            _build(loader, item, (*path, index), lines, name, above)
            for index, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return _scalar(loader, node, name)
    raise UserError(f"{name}:{line}: the YAML tag '{node.tag}' has no meaning in a config")


def _scalar(loader: Loader, node: yaml.ScalarNode, name: str) -> Scalar:
    line = node.start_mark.line + 1
    if len(node.value) > MAX_LENGTH:
        raise UserError(f"{name}:{line}: {len(node.value)} characters; at most {MAX_LENGTH}")
    try:
        value: Scalar = loader.construct_object(node)
    except Exception:  # noqa: BLE001, an explicit tag that the text doesn't fit, as in `!!int x`
        kind = node.tag.removeprefix(_TAG)
        raise UserError(f"{name}:{line}: {node.value[:60]!r} can't be read as {kind}") from None
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise UserError(f"{name}:{line}: an integer of more than {MAX_BITS} bits")
    if isinstance(value, str) and (bad := _SURROGATES.search(value)):
        raise UserError(f"{name}:{line}: character {bad[0]!r} is not allowed")
    return value


def _key(loader: Loader, node: yaml.Node, name: str) -> str:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        raise UserError(f"{name}:{line}: a key is a single word, not a list or a mapping")
    key = _scalar(loader, node, name)
    if not isinstance(key, str):
        raise UserError(f"{name}:{line}: key {node.value} is no text; write '{node.value}'")
    return key


def _one_line(text: str) -> str:
    return " ".join(text.split())
