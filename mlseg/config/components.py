"""What a config says of a thing that it names: the keys are those that the thing takes.

    class SegmentorSettings(Component):
        registry, given = SEGMENTORS, 2       # called with (in_channels, num_classes)

    settings = SegmentorSettings(name="unet", channels=32)
    network = settings.build(3, 2)            # UNet(3, 2, channels=32, levels=4)

The schema is made of the signature: annotations may be pydantic's, as in
``levels: Annotated[int, Field(ge=1)] = 4``, and defaults stand there alone.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError

from mlseg.config.loading import Settings
from mlseg.config.registry import Registry
from mlseg.errors import UserError

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Choices:
    """The things of one kind.

    Attributes:
        kind: as messages call it.
        example: a dotted path, which may stand in a name's place.
        things: by name.
        key: of the name.
    """

    kind: str
    example: str
    things: Mapping[str, Any]
    key: str = "name"


class Component(Settings):
    """A named class or function with its settings, checked as strictly as any others.

    An instance has the settings of what it names as attributes, defaults included, beside the
    fields that a subclass declares. Null for a key that takes none is as if it weren't there, so
    that a file can undo what it inherits. In place of a class or function with a signature, a
    :class:`Settings` class with a method ``build`` may be what is registered.

    Attributes:
        name: registered name, or dotted path ``package.module:attribute``.
        registry: where things of this kind are found.
        given: how many leading parameters the program gives; they are no settings.
        beside: keys that the program reads itself, by name with type and field; a parameter of
            that name goes before one.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    registry: ClassVar[Registry[Any]]
    given: ClassVar[int] = 0
    beside: ClassVar[Mapping[str, tuple[Any, Any]]] = {}

    name: str

    @classmethod
    def choices(cls) -> Choices:
        """All that a config can name here."""
        registry = cls.registry
        return Choices(registry.kind, registry.example, registry.all())

    @classmethod
    def fitting(cls, values: Any) -> type[pydantic.BaseModel]:
        """The schema of what ``values`` name; this class if they name nothing."""
        try:
            return cls._schema(values) or cls
        except pydantic.ValidationError:
            return cls

    @pydantic.model_validator(mode="before")
    @classmethod
    def _checked(cls, values: Any) -> Any:
        schema = cls._schema(values)
        if schema is None:
            return values
        fields = schema.model_fields
        given = {
            key: value
            for key, value in values.items()
            if value is not None or key == "name" or (key in fields and _takes_null(fields[key]))
        }
        return dict(schema.model_validate(given))

    @classmethod
    def _schema(cls, values: Any) -> type[Settings] | None:
        field = cls.model_fields["name"]
        if not isinstance(values, dict):
            return None
        name = values.get("name", None if field.is_required() else field.default)
        if name is None and "name" not in values:
            registry = cls.registry
            names = f"{', '.join(registry.names())}, or a dotted path such as {registry.example}"
            text = f"missing; it must be set to one of {names}"
            raise located(cls.__name__, ("name",), text, "missing_with_reason")
        if not isinstance(name, str):
            return None
        try:
            found = cls.registry.get(name)
            if isinstance(found, type) and issubclass(found, Settings):
                return found
            return _schema_of(cls, found, name)
        except UserError as error:
            raise located(cls.__name__, ("name",), str(error)) from None

    def build(self, *given: Any, **more: Any) -> Any:
        """Make what is named.

        Args:
            given: what the program gives it, before its settings.
            more: what it gives to the method ``build`` of a class of settings besides.

        Raises:
            UserError: it refuses its settings.
        """
        found = self.registry.get(self.name)
        try:
            if isinstance(found, type) and issubclass(found, Settings):
                fields = found.model_fields
                own: Any = found.model_validate({k: v for k, v in self if k in fields})
                return own.build(*given, **more)
            return found(*given, **self._own())
        except ValueError as error:
            raise UserError(f"{self.registry.kind} {self.name!r}: {error}") from error

    def said(self, key: str) -> Any:
        """The value of a key of ``beside``; None where what is named takes it for itself."""
        return None if key in self._own() else (self.model_extra or {}).get(key)

    def _own(self) -> dict[str, Any]:
        """The keywords of what is named."""
        taken = parameters_of(self.registry.get(self.name)) if self.beside else ()
        given = (self.model_extra or {}).items()
        return {key: value for key, value in given if key in taken or key not in self.beside}

    @property
    def module(self) -> str:
        """The module that has to be imported before ``name`` is found."""
        return str(self.registry.get(self.name).__module__)


def located(
    title: str,
    path: tuple[str | int, ...],
    text: str,
    kind: Literal["value_error", "missing_with_reason"] = "value_error",
) -> pydantic.ValidationError:
    """An error about one key, for a validator of the mapping around it."""
    error = PydanticCustomError(kind, "{error}", {"error": text})
    return pydantic.ValidationError.from_exception_data(
        title, [InitErrorDetails(type=error, loc=path, input=None)]
    )


def signature_settings(
    thing: Callable[..., Any], given: int = 0, base: type[Settings] = Settings
) -> type[Settings]:
    """A schema of the keywords that a class or function takes.

    Args:
        given: how many leading parameters are none of them.
        base: whose fields the schema has besides.

    Raises:
        UserError: its signature can't be read, or takes what ``base`` has already.
    """
    called: Any = thing
    if isinstance(thing, type):
        called = called.__init__
    try:
        parameters = list(inspect.signature(thing).parameters.values())
        hints = typing.get_type_hints(called, include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"its signature can't be read ({error})") from error
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(takes) < given and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UserError(f"it takes {len(takes)} arguments, and the program gives it {given}")
    fields: dict[str, Any] = {}
    config = pydantic.ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    for parameter in parameters[given:]:
        name, default = parameter.name, parameter.default
        if parameter.kind is parameter.VAR_KEYWORD:
            config["extra"] = "allow"
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if default is not parameter.empty and not _is_plain(default):
            continue  # nothing that a config could say or hold
        if parameter.kind is parameter.POSITIONAL_ONLY or name.startswith("_"):
            raise UserError(f"its parameter {name!r} can't be set by a config")
        if name in base.model_fields:
            raise UserError(f"its parameter {name!r} means something else in a config; rename it")
        annotation = hints.get(name, Any)
        if default is None:
            annotation = annotation | None if annotation is not Any else annotation
        if typing.get_origin(annotation) is tuple:
            annotation = Annotated[annotation, pydantic.Strict(False)]  # YAML has lists only
        fields[name] = (annotation, ... if default is parameter.empty else default)
    # pydantic takes either a base or a config.
    held = type("_Base", (base,), {"model_config": config, "__module__": __name__})
    return pydantic.create_model(thing.__name__, __base__=held, **fields)


def parameters_of(thing: Callable[..., Any]) -> Collection[str]:
    """Names of the parameters that something is called with; none where they can't be read."""
    try:
        return inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return ()


def _takes_null(field: pydantic.fields.FieldInfo) -> bool:
    members = typing.get_args(field.annotation) or (field.annotation,)
    return any(member in (Any, None, type(None)) for member in members)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return type(value) in _PLAIN


@cache
def _schema_of(cls: type[Component], thing: Callable[..., Any], name: str) -> type[Settings]:
    try:
        declared: dict[str, Any] = {
            key: (info.annotation, info) for key, info in cls.model_fields.items()
        }
        taken = parameters_of(thing)
        declared |= {key: field for key, field in cls.beside.items() if key not in taken}
        base = pydantic.create_model(cls.__name__, __base__=Settings, **declared)
        return signature_settings(thing, cls.given, base)
    except UserError as error:
        raise UserError(f"{cls.registry.kind} {name!r}: {error}") from error
