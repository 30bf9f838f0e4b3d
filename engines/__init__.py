"""The engine: the loop around the problems, with validation, checkpoints and records."""

from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.settings import EngineSettings, Stage

__all__ = ["Engine", "EngineSettings", "Hooks", "Stage"]
