"""mlseg: multilevel optimization for image segmentation, built on Betty.

Importing it loads neither torch nor Betty: a name below brings them when it is first used, so that
a command can say how threads are to wait before torch asks (:mod:`mlseg.threads`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlseg import data as data
    from mlseg import engines as engines
    from mlseg import hypergradients as hypergradients
    from mlseg import nets as nets
    from mlseg import problems as problems
    from mlseg.engines import Engine, EngineSettings, Stage
    from mlseg.problems import Config, Problem

__version__ = "0.1.0"
__all__ = ["Config", "Engine", "EngineSettings", "Problem", "Stage", "__version__"]

_HOMES = {
    "Config": "mlseg.problems",
    "Engine": "mlseg.engines",
    "EngineSettings": "mlseg.engines",
    "Problem": "mlseg.problems",
    "Stage": "mlseg.engines",
}
_PACKAGES = ("data", "engines", "hypergradients", "nets", "problems")


def __getattr__(name: str) -> Any:
    """A public name at its first use, or one of the packages (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"mlseg.{name}")  # enters itself here
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
