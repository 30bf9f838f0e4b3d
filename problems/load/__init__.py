"""The system ``load``; see :mod:`mlseg.problems.load.levels`."""

from mlseg.problems.load.wiring import build

__all__ = ["build"]
