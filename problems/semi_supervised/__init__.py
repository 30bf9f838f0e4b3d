"""The systems ``ctbct`` and ``dct``; see :mod:`mlseg.problems.semi_supervised.levels`."""

from mlseg.problems.semi_supervised.wiring import build

__all__ = ["build"]
