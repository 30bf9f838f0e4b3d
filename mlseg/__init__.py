"""mlseg: multilevel optimization for image segmentation, built on Betty."""

from mlseg._betty import require_betty
from mlseg._checkout import require_one_checkout
from mlseg._distribution import require_own_distribution

require_own_distribution()
require_one_checkout()
require_betty()

from mlseg.engines import Engine, EngineSettings, Stage  # noqa: E402
from mlseg.problems import Config, Problem  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Config", "Engine", "EngineSettings", "Problem", "Stage", "__version__"]
