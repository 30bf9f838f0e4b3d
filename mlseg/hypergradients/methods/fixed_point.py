"""Implicit differentiation of the fixed point of the level's own optimizer."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.hypergradients.base import Diagnostics, Differentiating
from mlseg.hypergradients.gradient_hooks import applied, transposed
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.implicit import finished
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import Moments, optimizer_of
from mlseg.hypergradients.optimizers.step_map import StepMap
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.second_order.products import pull_through
from mlseg.hypergradients.trajectory import present
from mlseg.hypergradients.vectors import filled, norm


@register("fixed_point")
class FixedPoint(Differentiating):
    """The limit of unrolling for ever at the present point.

    Where the level's optimizer has come to rest, weights and moments are a fixed point
    ``z = U(z, g(w, s))`` of its map, and

    .. math::
        \\bar z_{k+1} = \\left(\\frac{\\partial U}{\\partial z}
            + \\frac{\\partial U}{\\partial g} \\frac{\\partial g}{\\partial z}\\right)^T \\bar z_k
            + \\bar z_0, \\qquad
        \\bar s = \\left(\\frac{\\partial U}{\\partial g}
            \\frac{\\partial g}{\\partial s}\\right)^T \\bar z

    with the incoming vector for ``z_0`` converges as fast as the optimizer does: like ``neumann``
    with plain gradient descent, by ``1 - 1/sqrt(c)`` instead of ``1 - 1/c`` per iteration with the
    right momentum, preconditioned with Adam, RMSprop or Adagrad. Second moments count as constants:
    at a fixed point steps vanish, and so does their derivative by them. The learning rate is the
    optimizer's present one; a small rate needs many iterations.

    Cost per hop: 1 forward and 1 backward pass, a Hessian-vector product per iteration, 1 mixed
    product. Memory: the graph of the gradient, and twice weights and moments.

    Collectives per hop, in several processes: ``K + 2``, with ``K`` iterations.

    Source: Grazzi et al.: On the iteration complexity of hypergradient computation, ICML 2020,
    section 3 (the fixed-point method); momentum: Ghadimi, Feyzmahdavian, Johansson: Global
    convergence of the heavy-ball method for convex optimization, 2015.

    Diagnostics: ``residual``, the weights' last change relative to the incoming vector;
    ``iterations``; ``diverged``, 1 where the changes grew to a thousand times it. The result is
    that of the iteration with the smallest change.

    Attributes:
        iterations: at most.
        tolerance: relative change at which it ends.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-10

    best_response = "the fixed point of the optimizer's map"
    in_several = True
    situation = (
        "the level is near its minimum, ill-conditioned, and its optimizer has momentum or adapts"
    )
    because = "converges as fast as the optimizer did"
    cost = "1 E + K H + 1 M"
    symbols = {"K": "iterations"}
    cost_note = "at most"
    memory = "graph of the gradient, twice weights and moments"

    when_unsolved = "more iterations, a smaller learning rate of the level, or unrolled"

    def carries_hooks(self) -> bool:
        """It does."""
        return True

    def check(self, level: Level) -> None:
        """Refuse optimizers that can't be differentiated."""
        optimizer_of(level)

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        level = hop.level
        parameters = level.trainable_parameters()
        start = hop.spread(vector)
        with hop.evaluation(whole=True) as loss:
            gradient = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
            step = present(parameters, level.stepping.optimizer)
            found = [None if g is None else g.detach() for g in gradient]
            raw = parallel.average_some(found, parameters)
            step.stepped = [g is not None for g in raw]
            taken = StepMap(optimizer_of(level), step, applied(raw, parameters), hold=True)
            now = (start, taken.zero_moments())
            best, size = now, norm(start)
            bound = size.clamp_min(torch.finfo(size.dtype).tiny)
            change = smallest = size
            active, diverged, count = size > 0, torch.zeros_like(size), torch.zeros_like(size)
            for _ in range(self.iterations):
                if finished(active):
                    break
                count = count + active
                before, along, moments, _ = taken.pull_back(*now)
                hop.products += 1
                along = transposed(along, raw, parameters)
                product = pull_through(gradient, along, parameters, retain_graph=True)
                shared = parallel.average(filled(product, parameters))
                terms = zip(before, shared, start, strict=True)
                weights = [b + q + s for b, q, s in terms]
                moved = norm(torch._foreach_sub(weights, now[0]))
                change = torch.where(active, moved, change)
                # Not "larger": NaN must not pass for progress.
                grown = ~(moved <= 1e3 * bound)
                diverged = torch.where(active & grown, 1.0, diverged)
                active = active & ~grown
                now = _select(active, (weights, moments), now)
                closer = active & (moved < smallest)
                smallest, best = torch.where(closer, moved, smallest), _select(closer, now, best)
                active = active & (moved > self.tolerance * size)
            _, along, _, _ = taken.pull_back(*best)
            hop.products += 1
            product = pull_through(gradient, transposed(along, raw, parameters), hop.inputs)
        return product, {
            "residual": change / bound,
            "iterations": count,
            "diverged": diverged,
        }


Cotangent = tuple[list[Tensor], list[Moments]]
"""Of weights and moments."""


def _select(condition: Tensor, new: Cotangent, old: Cotangent) -> Cotangent:
    """``new`` where the condition holds, else ``old``; on the device."""
    weights = [torch.where(condition, a, b) for a, b in zip(new[0], old[0], strict=True)]
    moments = [
        {key: torch.where(condition, a[key], b[key]) for key in b}
        for a, b in zip(new[1], old[1], strict=True)
    ]
    return weights, moments
