"""mlseg: multilevel optimization for image segmentation, built on Betty."""

from mlseg._betty import require_betty

require_betty()

from mlseg._version import __version__  # noqa: E402
from mlseg.engines import Engine, EngineSettings, Hooks, Stage  # noqa: E402
from mlseg.multilevel import Config, Problem  # noqa: E402

__all__ = ["Config", "Engine", "EngineSettings", "Hooks", "Problem", "Stage", "__version__"]
