"""What a class of the library calls its own, beside what classes derived from it keep.

Programs written for Betty derive from its engine and its problems, and keep what they like under
names of their own: ``self.best``, ``self.seconds``, ``self.metrics``. Here such a name stays
theirs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Generic, TypeVar, overload

from mlseg.errors import UserError

T = TypeVar("T")


class Shown(Generic[T]):
    """Shows the attribute of the same name with an underscore before it.

    What a derived class keeps under the name itself goes before it, and harms nothing: the library
    reads and writes the one with the underscore.

    Args:
        unless: an attribute; where it is true, there is nothing to see: ``hasattr`` says no.
    """

    def __init__(self, unless: str | None = None) -> None:
        self._unless = unless

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Shown[T]: ...
    @overload
    def __get__(self, holder: object, owner: type) -> T: ...
    def __get__(self, holder: Any, owner: type) -> Any:
        if holder is None:
            return self
        if self._unless is not None and getattr(holder, self._unless):
            raise AttributeError(self._name)
        return getattr(holder, f"_{self._name}")


class OwnNames:
    """Keeps derived classes off the methods and properties that the library calls.

    Attributes:
        FREE: names of the library's own that may be overridden.
        TYPES: of attributes that the library reads.
    """

    FREE: frozenset[str] = frozenset()
    TYPES: dict[str, tuple[type, ...]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        own: Any = type(self)
        if name in _watched(own):
            wrong = name in taken(own) and not callable(value)
            if wrong or (name in self.TYPES and not isinstance(value, self.TYPES[name])):
                raise UserError(
                    f"{type(self).__name__}: {name!r} is a name of mlseg's {_library(type(self))} "
                    "already; keep yours under another one"
                )
        super().__setattr__(name, value)

    def check_names(self) -> None:
        """Raise UserError where a derived class defines what the library calls."""
        own: Any = type(self)
        names = taken(own)
        for cls in type(self).__mro__:
            if cls.__module__.startswith("mlseg."):
                continue
            if cls is OwnNames or cls.__module__.startswith("betty."):
                return
            for name in vars(cls).keys() & names:
                raise UserError(
                    f"{cls.__name__}: {name!r} is a method of mlseg's {_library(type(self))} "
                    "already; give yours another name"
                )


@cache
def taken(cls: Any) -> frozenset[str]:
    """Methods and properties of the library's own, private ones too, which a derived class would
    override unawares: not Betty's, not free, not Python's."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("mlseg.")]
    bettys = [base for base in cls.__mro__ if base.__module__.startswith("betty.")]
    known = {name for base in bettys for name in vars(base)}
    free = {name for base in ours for name in getattr(base, "FREE", ())}
    return frozenset(
        name
        for base in ours
        for name, value in vars(base).items()
        if not name.startswith("__")
        and name not in known | free
        and (callable(value) or isinstance(value, property))
    )


@cache
def _watched(cls: Any) -> frozenset[str]:
    """What isn't set unseen."""
    return taken(cls) | cls.TYPES.keys()


def _library(cls: type) -> str:
    return next(
        base.__name__
        for base in cls.__mro__
        if base.__module__.startswith(("mlseg.multilevel.", "mlseg.engines."))
    )
