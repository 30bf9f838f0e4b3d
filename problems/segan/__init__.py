"""The system ``segan``; see :mod:`mlseg.problems.segan.levels`."""

from mlseg.problems.segan.wiring import build

__all__ = ["build"]
