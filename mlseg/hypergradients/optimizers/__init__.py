"""Optimizers, a file each: settings, the step as a differentiable map, what follows from it.

A file's class is found by the class of ``torch.optim`` that it names. To add an optimizer, add a
file with an :class:`Optimizer` that is decorated with :func:`register`.
"""

from mlseg.hypergradients.optimizers.base import (
    COUNT,
    OPTIMIZERS,
    Moments,
    Optimizer,
    register,
)
from mlseg.hypergradients.optimizers.finding import check_known, find, known, optimizer_of
from mlseg.hypergradients.optimizers.scale import objective, one_step_scale

__all__ = [
    "COUNT",
    "OPTIMIZERS",
    "Moments",
    "Optimizer",
    "check_known",
    "find",
    "known",
    "objective",
    "one_step_scale",
    "optimizer_of",
    "register",
]
