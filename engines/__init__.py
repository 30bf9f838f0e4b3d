"""Engines: the loop around the problems, with validation, checkpoints and records."""

from mlseg._checkout import require_part

require_part(__name__, __file__)

from mlseg.engines.base import Engine  # noqa: E402
from mlseg.engines.settings import EngineSettings, Stage  # noqa: E402

__all__ = ["Engine", "EngineSettings", "Stage"]
