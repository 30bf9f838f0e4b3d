"""The table of hypergradient methods, ours, a user's own and Betty's."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from betty.hypergradient import jvp_fn_mapping
from pydantic import ValidationError
from torch import Tensor

from mlseg.config import Settings
from mlseg.config.components import located
from mlseg.config.explaining import explain
from mlseg.config.registry import Registry
from mlseg.errors import UserError

if TYPE_CHECKING:
    from mlseg.hypergradients.base import Method

METHODS: Registry[type["Method"]] = Registry(
    "hypergradient method",
    base=Settings,
    packages=["mlseg.hypergradients.methods"],
    example="my_package.methods:Mine",
)
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
    enter = METHODS.register(name)
    return lambda cls: _known_as(name, enter(cls))


def _known_as(name: str, cls: type[_M]) -> type[_M]:
    cls.name = name
    jvp_fn_mapping[name] = _for_betty(name)
    return cls


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return METHODS.names()


def chosen(spec: str | Mapping[str, Any]) -> tuple[type["Method"], dict[str, Any]]:
    """The class that a config names, and its settings as they are given.

    Raises:
        UserError: no method has that name, or stands at that dotted path.
    """
    from mlseg.hypergradients.base import Method

    values = {"method": spec} if isinstance(spec, str) else dict(spec)
    name = values.pop("method", "finite_difference")
    if not isinstance(name, str):
        raise UserError(f"a hypergradient method's name is a string, not {name!r}")
    cls = METHODS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(
            f"hypergradient method {name!r}: derive it from mlseg.hypergradients.Method"
        )
    return (cls if cls.__dict__.get("name") else _known_as(name, cls)), values


def validated(spec: "str | Mapping[str, Any] | Method") -> "Method":
    """As :func:`resolve`, for a validator: an error says which key of ``spec`` is wrong.

    Raises:
        pydantic.ValidationError: no method has that name, or a setting doesn't belong to it.
    """
    from mlseg.hypergradients.base import Method

    if isinstance(spec, Method):
        return spec
    try:
        cls, values = chosen(spec)
    except UserError as error:
        raise located("Method", () if isinstance(spec, str) else ("method",), str(error)) from None
    return cls.model_validate(values)


def resolve(spec: "str | Mapping[str, Any] | Method") -> "Method":
    """A method from its name, from a mapping with ``method`` and its settings, or as it is.

    Raises:
        UserError: no method has that name, or a setting doesn't belong to it.
    """
    from mlseg.hypergradients.base import Method

    if isinstance(spec, Method):
        return spec
    cls, values = chosen(spec)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        path, text, _ = explain(error, cls, values)
        raise UserError(f"{cls.name}: {'.'.join(map(str, path))}: {text}") from None


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
