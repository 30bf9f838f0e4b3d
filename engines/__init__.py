"""Engines: the loop around the problems, with validation, checkpoints and records."""

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings, Stage

__all__ = ["Engine", "EngineSettings", "Stage"]
