"""Problems: one level of a multilevel program each, and the systems made of them.

A system is one file here (or anywhere, when named by dotted path): its problems, its settings, and
one ``build`` that wires them into an engine, registered with
:func:`mlseg.problems.systems.system`.
"""

import mlseg._betty  # noqa: F401, its version is checked before anything is built on it
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

__all__ = ["Config", "Problem"]
