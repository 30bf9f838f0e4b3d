"""Tasks: multilevel programs small enough that their exact hypergradient can be had.

``python -m mlseg.compare`` measures hypergradient methods on them. A task is one file here (or
anywhere, when named by dotted path): its settings, its losses, its exact hypergradient, registered
with :func:`mlseg.comparison.tasks.base.task`.
"""

from mlseg.comparison.tasks.base import Conditions, Program, TaskSettings, task

__all__ = ["Conditions", "Program", "TaskSettings", "task"]
