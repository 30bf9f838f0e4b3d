"""The system ``e2eaug``; see :mod:`mlseg.problems.e2eaug.levels`."""

from mlseg.problems.e2eaug import tiny_task  # noqa: F401, registers itself
from mlseg.problems.e2eaug.wiring import build

__all__ = ["build"]
