"""A table of builders that configs name: registered by decorator, or found by dotted path."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from mlseg.config import Settings
from mlseg.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A builder with what has to be known of it before it runs.

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


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """Entries of one kind.

    Args:
        entry: their class.
        kind: what they are, in the singular, for messages: ``system``.
        packages: whose modules are imported to find those that register themselves.
        settings: what every entry's settings derive from.
        example: a dotted path, for messages.
    """

    def __init__(
        self,
        entry: type[E],
        kind: str,
        packages: Sequence[str],
        settings: type[Settings],
        example: str,
    ) -> None:
        self.entry, self.kind, self.packages = entry, kind, packages
        self.settings, self.example = settings, example
        self._entries: dict[str, E] = {}

    def register(self, name: str, settings: type[Settings], summary: str) -> Any:
        """Decorator that enters a builder under ``name``."""

        def decorate(build: Callable[..., Any]) -> E:
            made = self.entry(name, summary, settings, build)
            self._entries[name] = made
            return made

        return decorate

    def all(self) -> Sequence[E]:
        """Every registered entry, by name."""
        self._discover()
        return [self._entries[name] for name in sorted(self._entries)]

    def load(self, name: str) -> E:
        """Find an entry by registered name or by dotted path ``package.module:attribute``.

        Raises:
            UserError: there is none of that name, or the path leads to something else.
        """
        if ":" in name:
            return self._from_path(name)
        self._discover()
        if name not in self._entries:
            near = get_close_matches(name, self._entries, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{self.kind}: there is no {name!r}{hint} ({self.kind}s: "
                f"{', '.join(sorted(self._entries))}, or a dotted path such as {self.example})"
            )
        return self._entries[name]

    def _discover(self) -> None:
        for name in self.packages:
            package = importlib.import_module(name)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{name}.{module.name}")

    def _from_path(self, path: str) -> E:
        module_name, _, attribute = path.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # a user's package beside the config, as with python -m
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self.kind}: can't load {path!r} ({error}); it is package.module:function"
            ) from error
        if isinstance(found, self.entry):
            return found
        hints = typing.get_type_hints(found) if callable(found) else {}
        hints.pop("return", None)
        settings = next(iter(hints.values()), None)
        if not (isinstance(settings, type) and issubclass(settings, self.settings)):
            raise UserError(
                f"{self.kind}: {path!r} must be a function whose first parameter is annotated with "
                f"its settings, a subclass of {self.settings.__module__}.{self.settings.__name__}"
            )
        return self.entry(path, found.__doc__ or "", settings, found)
