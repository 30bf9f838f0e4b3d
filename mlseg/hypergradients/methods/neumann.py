"""Implicit differentiation by a truncated Neumann series."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.hypergradients.implicit import (
    Implicit,
    Operator,
    Solution,
    System,
    finished,
    largest_eigenvalue,
)
from mlseg.hypergradients.registry import register


@register("neumann")
class Neumann(Implicit):
    """The inverse Hessian as a truncated series.

    .. math:: x = a \\sum_{k=0}^{K} (I - a H)^k v

    With ``a`` the learning rate it is the derivative through ``K + 1`` steps of gradient descent at
    the minimum. It converges for a positive definite ``H`` and ``0 < a < 2 / lambda_max``; with
    ``a = 1 / lambda_max`` and condition number ``c`` by ``1 - 1/c`` per term.

    For a symmetric ``H`` the terms' norms shrink in every step or grow in every later one. At the
    first term that is larger than the one before, the sum ends without it, and the diagnostics say
    so: the step size is too large, or ``H`` has a negative eigenvalue.

    Cost per hop: 1 forward and 1 backward pass, a Hessian-vector product per term (and
    ``power_iterations`` where the step size isn't given), 1 mixed product: 19 products by default,
    where ``cg`` takes 11. Memory: the graph of the
    gradient, 3 vectors.

    Collectives per hop, in several processes: ``K + P + 1``, with ``K`` terms and ``P`` power
    iterations.

    Source: Lorraine, Vicol, Duvenaud: Optimizing millions of hyperparameters by implicit
    differentiation, AISTATS 2020, section 4.

    Diagnostics: ``residual``, of the sum without its last term, relative to ``v``; ``iterations``,
    terms added; ``step_size``; ``diverged``, 1 where the terms grew.

    Attributes:
        terms: ``K``.
        step_size: ``a``; None takes ``1 / lambda_max``, found by power iteration.
        power_iterations: Hessian-vector products for that.
    """

    terms: NonNegativeInt = 10
    step_size: PositiveFloat | None = None
    power_iterations: PositiveInt = 8

    situation = "a fixed, small number of cheap corrections to the identity"
    because = "with the learning rate for step size: some more steps of descent"
    cost = "1 E + (K + P) H + 1 M"
    symbols = {"K": "terms", "P": "power_iterations"}
    cost_note = "no P with a ``step_size``"
    memory = "graph of the gradient, 3 w"

    when_unsolved = "a smaller step_size, damping, or minres"

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        if self.step_size is None:
            largest = largest_eigenvalue(system, v, self.power_iterations)
            a = 1.0 / largest.clamp_min(torch.finfo(v.dtype).tiny)
        else:
            a = torch.full_like(v.sum(), self.step_size)
        return neumann_series(system, v, terms=self.terms, step_size=a)


def neumann_series(operator: Operator, v: Tensor, *, terms: int, step_size: Tensor) -> Solution:
    """Solve ``operator(x) = v``, see :class:`Neumann`.

    Args:
        operator: symmetric, positive definite if the series is to converge.
        v: (n,).
        terms: at most, beside ``v`` itself.
        step_size: ``a``, a scalar.
    """
    smallest = torch.finfo(v.dtype).tiny
    term = total = v
    size = start = v.norm()
    active, diverged, count = start > 0, torch.zeros_like(start), torch.zeros_like(start)
    # Below this the terms are rounding errors, whose norms may do what they like.
    noise = 8.0 * torch.finfo(v.dtype).eps * start
    for _ in range(terms):
        if finished(active):
            break
        term = term - step_size * operator(term)
        former, size = size, torch.where(active, term.norm(), size)
        # Not "larger": NaN must not pass for progress.
        grown = ~(size <= former * (1.0 + 1e-6)) & ~(size <= noise)
        diverged = torch.where(active & grown, 1.0, diverged)
        active = active & ~grown & (former > 0)
        count = count + active
        total = torch.where(active, total + term, total)
    residual = size / start.clamp_min(smallest)
    return step_size * total, {
        "residual": residual,
        "iterations": count,
        "step_size": step_size,
        "diverged": diverged,
    }
