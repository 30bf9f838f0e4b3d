"""The table of hypergradient methods, ours, a user's own and Betty's."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from betty.hypergradient import jvp_fn_mapping
from pydantic import ValidationError
from torch import Tensor

if TYPE_CHECKING:
    from mlseg.hypergradients.base import Method

_METHODS: dict[str, type["Method"]] = {}
BETTYS = dict(jvp_fn_mapping)
"""Betty's own methods, for problems with a config of Betty's."""
_M = TypeVar("_M", bound="Method")


def register(name: str) -> Callable[[type[_M]], type[_M]]:
    """Class decorator: make a :class:`~mlseg.hypergradients.Method` known as ``name``.

    The method is entered in Betty's own table too, so that Betty's engine finds it as
    ``Config(type=name)`` for a level that derives from :class:`mlseg.Problem`. Where Betty has a
    method of that name, levels with a config of Betty's keep Betty's.

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
        jvp_fn_mapping[name] = _for_betty(name)
        return cls

    return enter


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def resolve(spec: "str | Mapping[str, Any] | Method") -> "Method":
    """A method from its name, from a mapping with ``method`` and its settings, or as it is.

    Raises:
        ValueError: no method has that name, or a setting doesn't belong to it.
    """
    from mlseg.hypergradients.base import Method

    if isinstance(spec, Method):
        return spec
    values = {"method": spec} if isinstance(spec, str) else dict(spec)
    name = values.pop("method", "finite_difference")
    if name not in _METHODS:
        near = get_close_matches(str(name), _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no hypergradient method {name!r}{hint} (there are {', '.join(names())})")
    cls = _METHODS[name]
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            takes = ", ".join(sorted(cls.model_fields)) or "none"
            raise ValueError(f"{name} has no setting {key!r} (it takes {takes})") from None
        raise ValueError(f"{name}, setting {key!r}: {first['msg']}") from None


def _for_betty(name: str) -> Callable[..., list[Tensor] | None]:
    """The method under Betty's calling convention ``(vector, curr, prev, sync)``."""

    def method(vector: list[Tensor], curr: Any, prev: Any, sync: bool) -> list[Tensor] | None:
        from mlseg.hypergradients.base import Hop
        from mlseg.multilevel.problem import Problem

        ours = isinstance(curr, Problem)
        if name in BETTYS and not (ours and curr.method is not None):
            return BETTYS[name](vector, curr, prev, sync)
        if not ours:
            raise TypeError(
                f"{name} replays the step of problem {curr.name!r}: derive it from mlseg.Problem"
            )
        (gradient,), _ = curr.hypergradient(list(vector), Hop(curr, [prev]))
        if not sync:
            return gradient
        prev.set_grads(prev.trainable_parameters(), gradient)
        return None

    return method
