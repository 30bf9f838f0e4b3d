"""The system ``load``; see :mod:`mlseg.problems.load.levels`."""

from mlseg.problems.load.system import build

__all__ = ["build"]
