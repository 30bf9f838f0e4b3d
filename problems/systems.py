"""The table of systems: whole multilevel programs that a config can name."""

import importlib
import pkgutil
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt

from mlseg.config import Settings
from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError


class RunSettings(Settings):
    """What every system's config has.

    Attributes:
        system: registered name, or dotted path ``package.module:build``.
        seed: of every random draw but the data split, which has its own.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``bf16`` is autocast; hypergradients are evaluated in fp32 all the same.
        engine: length, validation, checkpoints.
    """

    system: str
    seed: NonNegativeInt = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: EngineSettings = EngineSettings()


@dataclass(frozen=True)
class System:
    """A system: its settings class and the function that builds it.

    Attributes:
        name: as in a config.
        summary: one line for ``--help``.
        settings: class of the whole config.
        build: makes data, networks, problems, and the engine of them; its second argument is the
            run directory, or None to write nothing.
    """

    name: str
    summary: str
    settings: type[RunSettings]
    build: Callable[[Any, Path | None], Engine]

    def __call__(self, settings: Any, out: Path | None = None) -> Engine:
        """Build it; with ``out``, the run directory, its records are written there."""
        return self.build(settings, out)


_SYSTEMS: dict[str, System] = {}


def system(
    name: str, settings: type[RunSettings], summary: str
) -> Callable[[Callable[[Any, Path | None], Engine]], System]:
    """Decorator that registers ``build(settings, out)`` as a system.

    Args:
        name: under which configs name it.
        settings: class of the whole config.
        summary: one line for ``--help``.
    """

    def decorate(build: Callable[[Any, Path | None], Engine]) -> System:
        made = System(name, summary, settings, build)
        _SYSTEMS[name] = made
        return made

    return decorate


def load_system(name: str) -> System:
    """Find a system by registered name or by dotted path ``package.module:attribute``.

    Raises:
        UserError: there is none of that name, or the path leads to something else.
    """
    if ":" in name:
        return _from_path(name)
    _discover()
    if name not in _SYSTEMS:
        near = get_close_matches(name, _SYSTEMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"system: there is no {name!r}{hint} (systems: {', '.join(sorted(_SYSTEMS))}, "
            "or a dotted path such as my_package.games:build)"
        )
    return _SYSTEMS[name]


def all_systems() -> Sequence[System]:
    """Every registered system, by name."""
    _discover()
    return [_SYSTEMS[name] for name in sorted(_SYSTEMS)]


def system_names() -> list[str]:
    """Names of the registered systems, sorted."""
    return [system.name for system in all_systems()]


def _discover() -> None:
    """Import every module beside this one, so that systems register themselves."""
    package = sys.modules[__package__ or "mlseg.problems"]
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _from_path(path: str) -> System:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a user's package beside the config, as with python -m
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"system: can't load {path!r} ({error}); it is package.module:function"
        ) from error
    if isinstance(found, System):
        return found
    hints = typing.get_type_hints(found) if callable(found) else {}
    hints.pop("return", None)
    settings = next(iter(hints.values()), None)
    if not (isinstance(settings, type) and issubclass(settings, RunSettings)):
        raise UserError(
            f"system: {path!r} must be a function whose first parameter is annotated with its "
            "settings, a subclass of mlseg.problems.systems.RunSettings"
        )
    return System(path, found.__doc__ or "", settings, found)
