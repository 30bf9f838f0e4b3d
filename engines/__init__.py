"""Engines: the loop around the problems, with validation, checkpoints and records."""

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings, Stage

__all__ = ["Engine", "EngineSettings", "Stage"]
