"""mlseg: multilevel optimization for image segmentation, built on Betty.

Importing it loads neither torch nor Betty: a name below brings them when it is first used, so that
a command can say how threads are to wait before torch asks (:mod:`mlseg.threads`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlseg._checkout import require_one_checkout
from mlseg._distribution import require_own_distribution
from mlseg._version import __version__

require_own_distribution()
require_one_checkout()

if TYPE_CHECKING:
    from mlseg import comparison as comparison
    from mlseg import engines as engines
    from mlseg import hypergradients as hypergradients
    from mlseg import multilevel as multilevel
    from mlseg import problems as problems
    from mlseg import segmentation as segmentation
    from mlseg.engines import Engine, EngineSettings, Hooks, Stage
    from mlseg.multilevel import Config, Problem
    from mlseg.segmentation.model import Model, load

__all__ = [
    "Config",
    "Engine",
    "EngineSettings",
    "Hooks",
    "Model",
    "Problem",
    "Stage",
    "__version__",
    "load",
]

_HOMES = {
    "Config": "mlseg.multilevel",
    "Engine": "mlseg.engines",
    "EngineSettings": "mlseg.engines",
    "Hooks": "mlseg.engines",
    "Model": "mlseg.segmentation.model",
    "Problem": "mlseg.multilevel",
    "Stage": "mlseg.engines",
    "load": "mlseg.segmentation.model",
}
_PACKAGES = (
    "comparison",
    "engines",
    "hypergradients",
    "multilevel",
    "problems",
    "segmentation",
)


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
