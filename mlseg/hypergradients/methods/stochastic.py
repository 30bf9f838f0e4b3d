"""Implicit differentiation with a fresh batch per Hessian-vector product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.hypergradients.implicit import (
    Implicit,
    Operator,
    Solution,
    System,
    largest_eigenvalue,
)
from mlseg.hypergradients.registry import register

STEP = "stochastic_step"
"""The step size in a hop's memory."""


@register("stochastic")
class Stochastic(Implicit):
    """``H x = v`` by stochastic gradient descent on ``x^T H x / 2 - x^T v``.

    .. math:: x_{k+1} = x_k - a \\, (H_k x_k - v)

    with ``H_k`` the Hessian on a batch of its own, drawn from the level's data in a stream apart
    from training's. The other implicit methods invert the Hessian of *one*
    batch, which for small batches is far from the inverse of the mean Hessian; here the mean is
    what the iteration goes to, up to a noise in proportion to ``a``. Started from the last hop's
    solution, a few iterations per hop are enough to follow it while the level trains.

    Cost per hop: per iteration 1 forward, 1 backward pass and 1 Hessian-vector product; 1 forward
    and 1 backward pass and 1 mixed product on the level's own batch; ``power_iterations`` products
    at the first hop where the step size isn't given. Memory: the graph of two gradients, 2 vectors.

    Collectives per hop, in several processes: ``K + 1``, with ``K`` iterations; ``P`` more where
    the step size is found.

    Source: Ji, Yang, Liang: Bilevel optimization: convergence analysis and enhanced design, ICML
    2021 (stocBiO, a fresh batch per factor); Arbel and Mairal: Amortized implicit differentiation
    for stochastic bilevel optimization, ICLR 2022 (AmIGO, warm start); Dagréou et al.: A framework
    for bilevel optimization that enables stochastic and global variance reduction algorithms,
    NeurIPS 2022 (SOBA).

    Where the residual of the last system is more than twice ``v``, the hop carries one step from
    zero, ``a v``, and the next one starts there. Where it has grown within the hop as well, the
    iteration diverges: the Hessian is indefinite, or the step too large. The next hop takes half
    the step then, unless it was given.

    Diagnostics: ``residual`` of the last iteration's system, relative to ``v``; ``step_size``;
    ``diverged``.

    Attributes:
        iterations: batches.
        step_size: ``a``; None takes half of ``1 / lambda_max`` of the level's batch at the first
            hop, found by power iteration, and keeps it until it diverges.
        power_iterations: Hessian-vector products for that.
        warm_start: whether to start from the last hop's solution.
    """

    iterations: PositiveInt = 10
    step_size: PositiveFloat | None = None
    power_iterations: PositiveInt = 8
    warm_start: bool = True

    situation = (
        "the level is near its minimum, with batches so small that one batch's Hessian says "
        "little about the mean"
    )
    because = (
        "a fresh batch per product, going on from the last solution; positive definite mean "
        "Hessian only"
    )
    cost = "(K + 1) E + (K + P) H + 1 M"
    symbols = {"K": "iterations", "P": "power_iterations"}
    cost_note = "P at the first hop only, none with a ``step_size``"
    memory = "graphs of two gradients, 2 w"

    when_unsolved = "a smaller step_size, damping, or unrolled"

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        a = self._step(system, v)
        x, diagnostics = stochastic_descent(
            system.on_fresh_batch, v, iterations=self.iterations, step_size=a, start=system.start
        )
        if self.step_size is None:
            diverged = diagnostics["diverged"] > 0
            system.hop.memory[STEP] = torch.where(diverged, 0.5 * a, a)
        return x, diagnostics

    def _step(self, system: System, v: Tensor) -> Tensor:
        if self.step_size is not None:
            return torch.full_like(v.sum(), self.step_size)
        memory = system.hop.memory
        if STEP not in memory:
            largest = largest_eigenvalue(system, v, self.power_iterations)
            memory[STEP] = 0.5 / largest.clamp_min(torch.finfo(v.dtype).tiny)
        return memory[STEP]


def stochastic_descent(
    draw: Callable[[], Operator],
    v: Tensor,
    *,
    iterations: int,
    step_size: Tensor,
    start: Tensor | None = None,
) -> Solution:
    """Solve ``E[draw()](x) = v``, see :class:`Stochastic`.

    Args:
        draw: gives symmetric operators with a positive definite mean.
        v: (n,).
        iterations: operators that are drawn.
        step_size: ``a``, a scalar.
        start: ``x`` to begin with; None: zero.
    """
    x = torch.zeros_like(v) if start is None else start
    first = r = v
    for iteration in range(iterations):
        r = v - draw()(x)
        first = r if iteration == 0 else first
        x = x + step_size * r
    residual = r.norm() / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    # Not "larger": NaN must not pass for progress.
    astray = ~(residual <= 2.0)
    diverged = astray & ~(r.norm() <= first.norm())
    x = torch.where(astray, step_size * v, x)
    return x, {"residual": residual, "step_size": step_size, "diverged": diverged.to(v.dtype)}
