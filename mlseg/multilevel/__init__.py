"""Programs of levels: the problem, its data, and the gradient that comes from levels above."""

import mlseg._betty  # noqa: F401, its version is checked before anything is built on it
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

__all__ = ["Config", "Problem"]
