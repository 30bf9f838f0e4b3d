"""Implicit differentiation by conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlseg.hypergradients.implicit import Krylov, Operator, Solution, System, finished
from mlseg.hypergradients.registry import register


@register("cg")
class ConjugateGradients(Krylov):
    """``H x = v`` by conjugate gradients, for positive definite Hessians.

    .. math::
        x_{k+1} = x_k + a_k p_k, \\quad r_{k+1} = r_k - a_k H p_k, \\quad
        p_{k+1} = r_{k+1} + \\frac{r_{k+1}^T r_{k+1}}{r_k^T r_k} p_k, \\quad
        a_k = \\frac{r_k^T r_k}{p_k^T H p_k}

    The error in the norm of ``H`` shrinks at least by ``(sqrt(c) - 1) / (sqrt(c) + 1)`` per
    iteration, with ``c`` the condition number; in exact arithmetic it is zero after as many
    iterations as ``H`` has distinct eigenvalues.

    A direction along which the curvature ``p^T H p`` isn't positive shows that ``H`` is indefinite,
    as that of a network often is. The iteration then ends with what it has; if that is nothing, as
    on the first direction, with a step along it by the modulus of its curvature (Nocedal and
    Wright: Numerical Optimization, 2nd edition, algorithm 7.1 stops there likewise), or with
    nothing where there is no curvature at all. Take ``damping`` or ``minres`` then.

    Cost per hop: 1 forward and 1 backward pass, a Hessian-vector product per iteration (and one for
    a warm start), 1 mixed product. Memory: the graph of the gradient, 4 vectors.

    Collectives per hop, in several processes: ``K + 1``, with ``K`` iterations.

    Source: Hestenes and Stiefel, 1952; for hypergradients Pedregosa: Hyperparameter optimization
    with approximate gradient, ICML 2016; Rajeswaran et al.: Meta-learning with implicit gradients,
    NeurIPS 2019.

    Diagnostics: ``residual`` relative to ``v``, ``iterations`` used, ``curvature``, the smallest
    Rayleigh quotient met (not positive: ended by it).
    """

    situation = (
        "the level is trained near its minimum between upper steps, its Hessian positive "
        "definite (regularised regression, a last layer)"
    )
    because = "fewest products for a given residual"
    cost = "1 E + K H + 1 M"
    symbols = {"K": "iterations"}
    cost_note = "at most; a warm start 1 H"
    memory = "graph of the gradient, 4 w"

    when_unsolved = "minres, damping above the modulus of the curvature, or more iterations"

    def is_unsolved(self, figures: Mapping[str, float]) -> bool:
        """Also where it has ended at a direction without positive curvature."""
        ended = figures.get("curvature", 1.0) <= 0.0 and figures.get("residual", 0.0) > 1e-3
        return ended or super().is_unsolved(figures)

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        return system.solved_by(
            conjugate_gradients, v, iterations=self.iterations, tolerance=self.tolerance
        )


def conjugate_gradients(
    operator: Operator,
    v: Tensor,
    *,
    iterations: int = 10,
    tolerance: float = 1e-10,
    start: Tensor | None = None,
) -> Solution:
    """Solve ``operator(x) = v``, see :class:`ConjugateGradients`.

    Args:
        operator: positive definite.
        v: (n,).
        iterations: at most.
        tolerance: residual, relative to ``v``, at which it ends.
        start: ``x`` to begin with; None: zero, which spares a product.
    """
    x = torch.zeros_like(v) if start is None else start
    r = v if start is None else v - operator(start)
    p, rr, vv = r, r.dot(r), v.dot(v)
    smallest = torch.finfo(v.dtype).tiny
    bound = tolerance**2 * vv
    active, count = rr > bound, torch.zeros_like(rr)
    curvature = torch.full_like(rr, torch.inf)
    for k in range(iterations):
        if finished(active):
            break
        hp = operator(p)
        bend = p.dot(hp)
        quotient = bend / p.dot(p).clamp_min(smallest)
        curvature = torch.where(active, torch.minimum(curvature, quotient), curvature)
        flat = torch.finfo(v.dtype).eps * p.norm() * hp.norm()
        positive = bend > flat
        step = torch.where(active & positive, rr / bend, 0.0)
        if k == 0 and start is None:
            step = torch.where(active & (bend < -flat), -rr / bend, step)
        count = count + active
        active = active & positive
        x, r = x + step * p, r - step * hp
        former, rr = rr, r.dot(r)
        p = r + (rr / former.clamp_min(smallest)) * p
        active = active & (rr > bound)
    x = torch.where(rr.isnan(), torch.nan, x)  # a NaN ends the loop: it must not pass unseen
    residual = (rr / vv.clamp_min(smallest)).sqrt()
    return x, {"residual": residual, "iterations": count, "curvature": curvature}
