"""Programs of levels: the problem, its data, and the gradient that comes from levels above."""

from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

__all__ = ["Config", "Problem"]
