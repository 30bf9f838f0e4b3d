"""Typed configs: YAML files that inherit, overrides, errors that name the key.

    tree = load("configs/e2eaug_isic.yaml", ["engine.iterations=100"])
    settings = parse(ExperimentSettings, tree)
    Path("config.yaml").write_text(dump(settings))

Three layers are merged, later ones over earlier: the file named by `base:` (and its own
base, and so on), the file, the command line. Mappings merge key by key; lists and
single values replace. One exception: **a mapping that changes its `name:` or `method:`
replaces the inherited mapping as a whole**, since settings of one component (RMSprop's
momentum) mean nothing to another (Adam). So `optimizer: {name: adam}` over `optimizer:
{name: rmsprop, lr: 1e-5}` is Adam with Adam's defaults, and `data.name=ph2` on a
command line starts from the defaults of data settings; what a command line drops in
this way stands in `Tree.notes`. All overrides of a command line are one layer: their
order doesn't matter, unless the same key comes twice, where the last one holds.

Values are those of YAML 1.2's core schema (`mlseg.config.yaml12`). What they may be, each
component states in a `Settings` class next to its code.
"""

import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from mlseg.config import yaml12
from mlseg.config.explaining import explain, quoted
from mlseg.errors import UserError
from mlseg.files import reachable, require_file

COMMAND_LINE = "command line"
MAX_BYTES = 2**19
"""Of a config file; a real one has 2 kB."""
MAX_BASES = 20
_COMPONENT_KEYS = ("name", "method")


class Settings(pydantic.BaseModel):
    """Base of every component's settings.

    Strict (an integer is no string, a bool is no integer; an integer does for a
    float), closed (an unknown key is an error), frozen, and finite (no NaN, no
    infinity). Sequences of a YAML file are lists: annotate a tuple as
    `Annotated[tuple[float, float], pydantic.Strict(False)]`.
    """

    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    @classmethod
    def fitting(cls, values: Any) -> type[pydantic.BaseModel]:
        """The schema that `values` have to fit, where they name one among several."""
        return cls


S = TypeVar("S", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class Tree:
    """A config before it is checked: merged plain values, and where each was set.

    Attributes:
        values: nested dict with string keys, lists, str, int, float, bool, None.
        origins: path of a value to the place that set it, "configs/x.yaml:12" or
            "command line". A path is the tuple of keys and list indices from the top.
        source: the config file as it was named.
        notes: what the author of a command line should know, a line each.
        empty: keys of overrides behind whose = nothing stood.
    """

    values: dict[str, Any]
    origins: dict[yaml12.Path, str] = field(default_factory=dict)
    source: str = "config"
    notes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def where(self, key: str | yaml12.Path) -> str:
        """The place that set `key`, dotted or a path; for a key not set, its parent's place."""
        path = _path(key)
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.source)

    def error(self, key: str | yaml12.Path, text: str) -> UserError:
        """A UserError about `key`: the place that set it, the key, `text`."""
        path = _path(key)
        dotted = f" {'.'.join(str(part) for part in path)}:" if path else ""
        return UserError(f"{self.where(path)}:{dotted} {text}")

    def text(self, key: str) -> str:
        """The string at the dotted `key`, for what has to be known before the schema is.

        Raises:
            UserError: the key is missing or holds something else.
        """
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise self.error(key, "missing; it must be set to a string")
            value = value[part]
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {quoted(value)}")
        return value


def load(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a config file with the files it inherits from, and apply overrides.

    Args:
        path: a YAML file. Its top-level `base:` names another, relative to the file.
        overrides: `KEY=VALUE` strings, KEY dotted (`engine.iterations=100`), VALUE read
            as YAML (`1e-5`, `null`, `[ph2, dermis]`). Nothing after the = is what a shell's
            unset variable leaves: `parse` refuses it.

    Raises:
        UserError: a file is missing or unreadable, isn't YAML, inherits from itself, or
            an override isn't of that form.
    """
    source = os.path.normpath(reachable(path))
    tree = _load_file(Path(source), (), None)
    override(tree, read_overrides(overrides))
    return tree


@dataclass(frozen=True)
class Override:
    """One value for one key of a config.

    Attributes:
        key: dotted.
        value: plain.
        origins: places by path below the key; the empty path is the key's own.
        empty: nothing stood there to be read.
    """

    key: str
    value: Any
    origins: Mapping[yaml12.Path, str]
    empty: bool = False


def override(tree: Tree, overrides: Sequence[Override]) -> None:
    """Lay overrides over a config, in place, as one layer; what it drops goes to the notes."""
    layer = Tree({}, {}, COMMAND_LINE)
    last = {given.key: given for given in overrides}
    _require_side_by_side(list(last.values()))
    for given in overrides:
        if last[given.key] is not given:
            continue
        # As one layer: the rule about `name:` is for layers, not for keys side by side.
        parts = given.key.split(".")
        node = layer.values
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{COMMAND_LINE}: {given.key}: {part} is given without keys, too")
        _lay_beside(node, parts[-1], copy.deepcopy(given.value))
        layer.origins.update({(*parts, *below): at for below, at in given.origins.items()})
    tree.notes.extend(_dropped(tree.values, layer.values))
    tree.empty.extend(given.key for given in overrides if given.empty)
    known = set(tree.origins)
    _merge(tree, layer)
    for given in overrides:
        parts = given.key.split(".")
        for above in (tuple(parts[:length]) for length in range(1, len(parts))):
            if above not in known:  # a mapping that the key has made without saying so
                tree.origins[above] = given.origins.get((), COMMAND_LINE)


def _require_side_by_side(overrides: Sequence[Override]) -> None:
    """Refuse a key below one that has no mapping: one of the two would be lost."""
    single = {given.key: given for given in overrides if not isinstance(given.value, dict)}
    for given in overrides:
        parts = given.key.split(".")
        for above in (".".join(parts[:length]) for length in range(1, len(parts))):
            if above in single:
                name = f"; name a component by {above}.name" * isinstance(single[above].value, str)
                raise UserError(
                    f"{COMMAND_LINE}: {above}: given as {quoted(single[above].value)}, which has "
                    f"no key of {given.key}{name}"
                )


def _lay_beside(node: dict[str, Any], key: str, value: Any) -> None:
    """A value beside those of the same layer: mappings hold the keys of both."""
    before = node.get(key)
    if isinstance(before, dict) and isinstance(value, dict):
        for name, item in value.items():
            _lay_beside(before, name, item)
    else:
        node[key] = value


def parse(settings: type[S], tree: Tree) -> S:
    """Check a config against its schema.

    Raises:
        UserError: one line that names the first faulty key, where it was set, what is
            wrong and what is allowed, and how many more faults there are.
    """
    if tree.empty:
        key = tree.empty[0]
        # Whatever a file has set in its place since.
        raise UserError(
            f"{COMMAND_LINE}: {key}: nothing stands behind the =; if that is meant, write "
            f"{key}=null"
        )
    try:
        return settings.model_validate(tree.values)
    except pydantic.ValidationError as error:
        path, text, more = explain(error, settings, tree.values)
        suffix = f" (and {more} more)" if more else ""
        raise tree.error(path, text + suffix) from None


def require_names(settings: pydantic.BaseModel, tree: Tree) -> None:
    """Refuse texts that are empty, where every text is a name or a path.

    Raises:
        UserError: one is, and not by default; names its key.
    """
    for path in _empty_texts(settings):
        raise tree.error(path, "an empty text is no name and no path; leave the key out")


def _empty_texts(value: Any, path: yaml12.Path = ()) -> Iterator[yaml12.Path]:
    if isinstance(value, str):
        if not value.strip():
            yield path
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _empty_texts(item, (*path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _empty_texts(item, (*path, key))
    elif isinstance(value, pydantic.BaseModel):
        values = dict(value)
        schema = value.fitting(values) if isinstance(value, Settings) else type(value)
        for key, item in values.items():
            known = schema.model_fields.get(key)
            # What somebody's own function takes, it says itself.
            if known is None or (known.default != item and known.annotation != dict[str, Any]):
                yield from _empty_texts(item, (*path, key))


def dump(settings: pydantic.BaseModel) -> str:
    """YAML of every setting, defaults included, that `load` and `parse` read back as equal."""
    return yaml12.write(settings.model_dump())


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Dotted keys at which two configs, as plain values, differ.

    What isn't plain, as in a damaged checkpoint, differs from everything.
    """
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if _same(before, now) else [key]
    return [
        found
        for name in {**before, **now}
        for found in differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    ]


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return not differences(before, now)
    plain = (str, int, float, type(None))
    return isinstance(before, plain) and isinstance(now, plain) and before == now


def _path(key: str | yaml12.Path) -> yaml12.Path:
    if isinstance(key, tuple):
        return key
    return tuple(key.split(".")) if key else ()


def _load_file(path: Path, below: tuple[Path, ...], named_by: str | None) -> Tree:
    """One file over its base. `below`: the files that inherit from it, the nearest last."""
    text = _read_text(path, named_by)
    real = path.resolve()
    if len(below) == MAX_BASES:
        raise UserError(f"{named_by}: base: more than {MAX_BASES} files, one over the other")
    if real in below:
        chain = " -> ".join(os.path.relpath(file) for file in (*below[below.index(real) :], real))
        raise UserError(f"{named_by}: base: a config can't inherit from itself ({chain})")
    name = str(path)
    values, lines = yaml12.read(text, name)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{name}: a config is a mapping of keys to values, not {quoted(values)}")
    origins = {key: f"{name}:{line}" for key, line in lines.items() if key}
    tree = Tree(values, origins, name)
    if "base" not in values:
        return tree
    base = values.pop("base")
    at_base = origins.pop(("base",))
    if not isinstance(base, str):
        raise UserError(f"{at_base}: base: expected a file's name, got {quoted(base)}")
    try:
        base_path = Path(os.path.normpath(path.parent / reachable(base)))
    except UserError as error:
        raise UserError(f"{at_base}: base: {error}") from None
    merged = _load_file(base_path, (*below, real), at_base)
    _merge(merged, tree)
    return Tree(merged.values, merged.origins, name)


def _read_text(path: Path, named_by: str | None) -> str:
    prefix = "" if named_by is None else f"{named_by}: base: "
    try:
        require_file(reachable(path), MAX_BYTES)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{prefix}{path}: no such file{_nearest_files(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{prefix}{path}: can't be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def _nearest_files(path: Path) -> str:
    """'; did you mean ...?' with up to three YAML files of a like name, from there or configs/."""
    folders = dict.fromkeys((path.parent, Path("configs")))
    files = [file for folder in folders for file in sorted(folder.glob("*.y*ml"))]
    by_stem = {file.stem: file for file in reversed(files)}
    nearest = difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5)
    if nearest:
        return "; did you mean " + " or ".join(str(by_stem[stem]) for stem in nearest) + "?"
    here = [file.name for file in files if file.parent == files[0].parent]
    return f"; {files[0].parent} has {', '.join(here[:8])}" if files else ""


def read_overrides(texts: Sequence[str]) -> list[Override]:
    """`KEY=VALUE` strings of a command line.

    Raises:
        UserError: one isn't of that form.
    """
    found = []
    for text in texts:
        key, equals, written = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(
                f"{COMMAND_LINE}: '{text}' is no override; write KEY=VALUE with a dotted "
                "key, as in engine.iterations=100"
            )
        if parts[0] == "base":
            raise UserError(f"{COMMAND_LINE}: base: only a file can say what it inherits from")
        if len(parts) > yaml12.MAX_DEPTH:
            raise UserError(f"{COMMAND_LINE}: a key of more than {yaml12.MAX_DEPTH} parts")
        value, paths = yaml12.read(written, f"{COMMAND_LINE}: {key.strip()}")
        origins = dict.fromkeys([(), *paths], COMMAND_LINE)
        empty = value is None and written.strip().lower() not in ("null", "~")
        found.append(Override(key.strip(), value, origins, empty))
    return found


def _dropped(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """A line for each mapping that `new` replaces by another component's."""
    for key, value in new.items():
        before, here = old.get(key), f"{above}{key}"
        if isinstance(before, dict) and isinstance(value, str):
            name = next((k for k in _COMPONENT_KEYS if isinstance(before.get(k), str)), None)
            if name is not None and len(before) > 1:  # the short form of a component
                yield _loss(here, here, value, [k for k in before if k != name])
            continue
        if not (isinstance(before, dict) and isinstance(value, dict)):
            continue
        if not _other(before, value):
            yield from _dropped(before, value, f"{here}.")
        elif lost := [inherited for inherited in before if inherited not in value]:
            name = next(k for k in _COMPONENT_KEYS if k in value and before.get(k) != value[k])
            yield _loss(f"{here}.{name}", here, value[name], lost)


def _loss(key: str, component: str, name: str, lost: Sequence[str]) -> str:
    dropped = ", ".join(f"{component}.{inherited}" for inherited in lost)
    return f"{key}={name} starts from the defaults of {name}; dropped: {dropped}"


def _merge(into: Tree, over: Tree) -> None:
    """Lay one tree over another, in place."""
    replaced: set[yaml12.Path] = set()
    _merge_mapping(into, over, into.values, over.values, (), replaced)

    def gone(place: yaml12.Path) -> bool:
        return any(place[:length] in replaced for length in range(1, len(place) + 1))

    kept = {place: origin for place, origin in into.origins.items() if not gone(place)}
    new = {place: origin for place, origin in over.origins.items() if gone(place)}
    into.origins.clear()
    # An override's KEY makes the mappings above it without saying so.
    into.origins.update(kept | dict.fromkeys(replaced, COMMAND_LINE) | new)


def _merge_mapping(
    into: Tree,
    over: Tree,
    old: dict[str, Any],
    new: dict[str, Any],
    path: yaml12.Path,
    replaced: set[yaml12.Path],
) -> None:
    """Merge the mappings at `path`; adds to `replaced` what was taken over as it is."""
    for key, value in new.items():
        here = (*path, key)
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and not _other(before, value):
            _merge_mapping(into, over, before, value, here, replaced)
            into.origins[here] = over.origins.get(here, into.origins.get(here, COMMAND_LINE))
        else:
            old[key] = value
            replaced.add(here)


def _other(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `new` names another component than `old`."""
    return any(
        key in old and key in new and old[key] != new[key] and not isinstance(old[key], dict)
        for key in _COMPONENT_KEYS
    )
