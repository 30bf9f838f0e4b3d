"""The engine: the loop around the problems, with validation, checkpoints and records."""

import mlseg._betty  # noqa: F401, its version is checked before anything is built on it
from mlseg._checkout import require_part
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.settings import EngineSettings, Stage

__all__ = ["Engine", "EngineSettings", "Hooks", "Stage"]

require_part(__name__, __file__)
