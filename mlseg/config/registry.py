"""One way to extend: whatever a config names is found in the registry of its kind.

    SEGMENTORS = Registry(
        "segmentor", base=Callable, packages=["mlseg.segmentation.nets"],
        example="my_package.nets:MyNet",
    )

    @SEGMENTORS.register("unet")
    class UNet(nn.Module): ...

    SEGMENTORS.get("unet")                    # what has registered itself under that name
    SEGMENTORS.get("my_package.nets:MyNet")   # or any importable attribute, by dotted path

No table is kept by hand: a registry imports the modules of its own packages when a name is first
asked for, then those of the plug-in package ``mlseg.problems``, whose folders register what their
systems bring.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Generic, TypeVar

from mlseg.config.explaining import quoted
from mlseg.config.loading import Settings, Tree
from mlseg.errors import UserError, one_line, printable


@dataclass
class _Trust:
    """Whether names may bring code that isn't mlseg's own, and what of it is known to be named."""

    given: bool = True
    said: bool = False
    modules: tuple[str, ...] = ()


_trust = _Trust()


@contextmanager
def strangers(trusted: bool, said: bool = True) -> Iterator[None]:
    """Within this block a run that somebody else may have made is read.

    What such a run names is code that would be executed here. Without trust only what mlseg's own
    modules have registered is found, by name or by place: a dotted path may lead to any function of
    any module, among them those that remove files, and settings are its arguments. With it, every
    module is said before it is imported.

    Args:
        said: False: they stand in the user's own command.
    """
    global _trust
    before, _trust = _trust, _Trust(given=trusted, said=said)
    try:
        yield
    finally:
        _trust = before


def trusted() -> bool:
    """Whether what is read may name code from anywhere."""
    return _trust.given


def say_foreign(values: Any) -> None:
    """Have a refusal name all modules that a config's values seem to lead to."""
    found = {text.partition(":")[0] for text in _strings(values) if _DOTTED_PATH.fullmatch(text)}
    wanted = values.get("imports") if isinstance(values, Mapping) else None
    found |= {name for name in wanted or () if isinstance(name, str)}
    _trust.modules = tuple(sorted(name for name in found if not _own(name)))


_DOTTED_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def _strings(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _strings(value)
    elif isinstance(values, Mapping):
        yield from _strings(list(values.values()))


def _own(module: str) -> bool:
    return module.split(".")[0] == "mlseg"


class NotTrusted(UserError):
    """A name leads to code that isn't mlseg's own, and nobody has said that it may."""


def _not_trusted(what: str) -> NotTrusted:
    named = {what.partition(":")[0]} if ":" in what or not _trust.modules else set()
    modules = ", ".join(sorted({*named, *_trust.modules}))
    return NotTrusted(
        f"{what!r} is code that mlseg doesn't bring; if you trust whoever made this run, give "
        f"--trust, which imports {modules}"
    )


PLUGINS = "mlseg.problems"
"""The package that is searched after a registry's own ones; it may be missing."""

T = TypeVar("T")
M = TypeVar("M")


class Registry(Generic[T]):
    """Things of one kind, by name.

    Args:
        kind: what they are, in the singular, for messages: ``data set``.
        base: the classes of which everything here is an instance or a subclass; None: anything
            that can be called.
        packages: whose modules are imported to find those that register themselves; a module will
            do.
        example: a dotted path, for messages.
    """

    def __init__(
        self,
        kind: str,
        *,
        base: type | tuple[type, ...] | None = None,
        packages: Sequence[str] = (),
        example: str,
    ) -> None:
        self.kind, self.base, self.packages, self.example = kind, base, packages, example
        self._entries: dict[str, T] = {}
        self._places: dict[str, str] = {}
        self._sources: list[Callable[[], Mapping[str, T]]] = []
        self._searched = 0

    def register(self, name: str) -> Callable[[M], M]:
        """Decorator that enters a class, a function or any other object; it returns it unchanged.

        Raises:
            ValueError: another one has that name, or it is none of this kind.
        """
        if not name or ":" in name:
            raise ValueError(f"{self.kind}: {name!r} is no name; it must be a word without a colon")
        caller = sys._getframe(1)

        def enter(thing: M) -> M:
            place = _place(thing) or f"{caller.f_globals['__name__']}, line {caller.f_lineno}"
            if not self._fits(thing):
                raise ValueError(f"{place} is no {self.kind}: it must be {self._wanted()}")
            known = self._places.get(name, place)
            if known != place:  # the same place: its module was loaded again
                raise ValueError(
                    f"two of the kind {self.kind} are named {name!r}: {known} and {place}; "
                    "rename one"
                )
            self._entries[name] = typing.cast(T, thing)
            self._places[name] = place
            return thing

        return enter

    def remove(self, name: str) -> None:
        """Take a registered name out again."""
        del self._entries[name], self._places[name]

    def source(self, source: Callable[[], Mapping[str, T]]) -> Callable[[], Mapping[str, T]]:
        """Decorator for a function that gives further entries by name.

        It is called when nobody else has a name, or when all names are asked for: for another
        library's many classes, which take seconds to import.
        """
        self._sources.append(source)
        return source

    def names(self) -> list[str]:
        """All names, sorted; dotted paths lead to more."""
        return sorted(self.all())

    def all(self) -> dict[str, T]:
        """Everything that has a name, in the order of the names."""
        found = self.registered()
        for source in self._sources:
            found = {**source(), **found}
        return dict(sorted(found.items()))

    def registered(self, plugins: bool = True) -> dict[str, T]:
        """What has registered itself, without the further entries of :meth:`source`.

        Args:
            plugins: look in the plug-in package too, which takes its time to import.
        """
        while (plugins or self._searched < len(self.packages)) and self._search():
            pass
        return dict(self._entries)

    def known(self) -> dict[str, T]:
        """What has registered itself so far, without a search."""
        return dict(self._entries)

    def get(self, name: str) -> T:
        """What is registered as ``name``, or stands at a dotted path ``package.module:attribute``.

        Raises:
            UserError: nothing has that name, or the path leads nowhere, or to something else.
        """
        if ":" in name:
            return self._at(name)
        while name not in self._entries and self._search():
            pass
        if name in self._entries:
            return self._entries[name]
        found = self.all()
        if name in found:
            return found[name]
        if not _trust.given and _trust.modules:
            raise _not_trusted(name)
        near = get_close_matches(name, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"no {self.kind} {name!r}{hint} (there are {', '.join(found)}, or a dotted path such "
            f"as {self.example})"
        )

    def __contains__(self, name: str) -> bool:
        """Whether something has registered itself as ``name``."""
        while name not in self._entries and self._search():
            pass
        return name in self._entries or name in self.all()

    def _search(self) -> bool:
        """Import the next package; False when there is none left."""
        places = [*self.packages, PLUGINS]
        if self._searched >= len(places):
            return False
        place = places[self._searched]
        self._searched += 1  # before the imports, in which a name may be asked for
        try:
            _import_all(place)
        except BaseException:
            self._searched -= 1
            raise
        return True

    def _at(self, path: str) -> T:
        module, _, attribute = path.partition(":")
        if not _trust.given:
            self.registered()
            for name, place in self._places.items():
                if place == path:
                    return self._entries[name]
            raise _not_trusted(path)
        try:
            found = operator.attrgetter(attribute)(import_module(module))
        except UserError as error:
            raise UserError(f"{self.kind} {path!r}: {error}") from error
        except Exception:  # noqa: BLE001, a module's own __getattr__ may raise anything
            near = get_close_matches(attribute, dir(sys.modules[module]), n=1)
            hint = f"; did you mean {module}:{near[0]}?" if near else ""
            raise UserError(f"{self.kind} {path!r}: {module} has no {attribute!r}{hint}") from None
        if not self._fits(found):
            raise UserError(f"{self.kind} {path!r}: it must be {self._wanted()}")
        return typing.cast(T, found)

    def _fits(self, thing: Any) -> bool:
        if self.base is None:
            return callable(thing)
        return isinstance(thing, self.base) or (
            isinstance(thing, type) and issubclass(thing, self.base)
        )

    def _wanted(self) -> str:
        if self.base is None:
            return "a class or a function"
        bases = self.base if isinstance(self.base, tuple) else (self.base,)
        return "a " + " or a ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)


def import_module(name: str) -> ModuleType:
    """Import a user's module, from the working directory too.

    Raises:
        UserError: there is none, or it fails, or isn't trusted; one line with the reason.
    """
    if not _own(name):
        if not _trust.given:
            raise _not_trusted(name)
        if _trust.said and name not in sys.modules:
            print(f"note: --trust: importing {printable(name)}", file=sys.stderr)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a package beside the config, as with python -m
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module may raise while it is executed
        if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
            reason = f"there is no module {error.name!r} here or among what is installed"
        elif isinstance(error, (ImportError, SyntaxError, ValueError, TypeError)) or not (
            frames := traceback.extract_tb(error.__traceback__)
        ):
            reason = one_line(error)
        else:
            reason = f"{frames[-1].filename}:{frames[-1].lineno}: {one_line(error)}"
        raise UserError(f"can't import {name!r} ({reason})") from error


def run_imports(tree: Tree) -> None:
    """Import the modules that a config lists under ``imports:``, before names are looked up.

    Raises:
        UserError: it is no list of modules, or one can't be imported.
    """
    wanted = tree.values.get("imports", [])
    if not isinstance(wanted, list):
        raise tree.error("imports", f"expected a list of modules, got {quoted(wanted)}")
    for position, module in enumerate(wanted):
        if not isinstance(module, str):
            raise tree.error(("imports", position), f"expected a string, got {quoted(module)}")
        try:
            import_module(module)
        except UserError as error:
            raise tree.error(("imports", position), str(error)) from error


def _import_all(name: str) -> None:
    """Import a module and, below a package, everything in it."""
    if importlib.util.find_spec(name) is None:
        return
    module = importlib.import_module(name)
    for below in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        importlib.import_module(below.name)


def _place(thing: Any) -> str | None:
    """Where a class or function is defined: ``package.module:name``."""
    thing = inspect.unwrap(thing) if hasattr(thing, "__wrapped__") else thing
    if not (isinstance(thing, type) or inspect.isroutine(thing)):
        return None
    return f"{thing.__module__}:{thing.__qualname__}"


@dataclass(frozen=True)
class Entry:
    """A builder with what has to be known of it before it runs: a system, a task.

    Attributes:
        name: as in a config.
        summary: one line for ``--help``.
        settings: class of what a config says of it.
        build: called with these settings first.
    """

    name: str
    summary: str
    settings: type[Any]
    build: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """So that the place of an entry is that of its function."""
        return self.build


E = TypeVar("E", bound=Entry)


def find_entry(registry: Registry[Any], cls: type[E], settings: type[Settings], name: str) -> E:
    """An entry by registered name; or one made of a function by dotted path.

    Args:
        cls: of the entry.
        settings: what the first parameter of a function by dotted path must be annotated with, or
            a subclass.

    Raises:
        UserError: there is none, or it isn't such a function.
    """
    found = registry.get(name)
    if isinstance(found, cls):
        return found
    try:
        hints = typing.get_type_hints(found) if inspect.isroutine(found) else {}
    except Exception as error:  # an annotation may be any expression
        raise UserError(
            f"{registry.kind} {name!r}: its annotations can't be read ({one_line(error)})"
        ) from error
    hints.pop("return", None)
    own = next(iter(hints.values()), None)
    if not (isinstance(own, type) and issubclass(own, settings)):
        raise UserError(
            f"{registry.kind} {name!r}: it must be a function whose first parameter is annotated "
            f"with its settings, a subclass of {settings.__module__}.{settings.__name__}"
        )
    return cls(name, found.__doc__ or "", own, found)
