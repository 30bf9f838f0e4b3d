"""The system ``segan``; see :mod:`mlseg.problems.segan.levels`."""

from mlseg.problems.segan.levels import build

__all__ = ["build"]
