"""Problems: one level of a multilevel program each, and the systems made of them.

A system is one file here (or anywhere, when named by dotted path): its problems, its settings, and
one ``build`` that wires them into an engine, registered with
:func:`mlseg.problems.systems.system`.
"""

from mlseg._checkout import require_part

require_part(__name__, __file__)

from mlseg.problems.base import Problem  # noqa: E402
from mlseg.problems.config import Config  # noqa: E402

__all__ = ["Config", "Problem"]
