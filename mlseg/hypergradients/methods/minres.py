"""Implicit differentiation by minimal residuals, for indefinite Hessians."""

from __future__ import annotations

import torch
from torch import Tensor

from mlseg.hypergradients.implicit import Krylov, Operator, Solution, System, finished
from mlseg.hypergradients.registry import register


@register("minres")
class MinimalResidual(Krylov):
    """``H x = v`` by MINRES: any symmetric ``H``, also an indefinite or a singular one.

    Iteration ``k`` gives the vector of the Krylov space of ``v, H v, ..., H^(k-1) v`` with the
    smallest residual ``|v - H x|``, from a Lanczos tridiagonalisation and its QR factorisation by
    Givens rotations. The residual never grows. On a singular, inconsistent system it ends at a
    least-squares solution.

    Cost per hop: 1 forward and 1 backward pass, a Hessian-vector product per iteration (and one for
    a warm start), 1 mixed product. Memory: the graph of the gradient, 7 vectors.

    Collectives per hop, in several processes: ``K + 1``, with ``K`` iterations.

    Source: Paige and Saunders: Solution of sparse indefinite systems of linear equations, SIAM
    Journal on Numerical Analysis 12, 1975, section 6.

    Diagnostics: ``residual`` relative to ``v`` (of the recurrence), ``iterations`` used,
    ``curvature``, the smallest Rayleigh quotient of the Lanczos vectors (negative: ``H`` is
    indefinite).
    """

    situation = (
        "the level is near its minimum, its Hessian indefinite (most networks); or take "
        "``cg`` with ``damping``"
    )
    because = "conjugate gradients end at the first direction of negative curvature"
    cost = "1 E + K H + 1 M"
    symbols = {"K": "iterations"}
    cost_note = "at most; a warm start 1 H"
    memory = "graph of the gradient, 7 w"

    when_unsolved = "more iterations, warm_start, or damping"

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        return system.solved_by(
            minimal_residual, v, iterations=self.iterations, tolerance=self.tolerance
        )


def minimal_residual(
    operator: Operator,
    v: Tensor,
    *,
    iterations: int = 10,
    tolerance: float = 1e-10,
    start: Tensor | None = None,
) -> Solution:
    """Solve ``operator(x) = v``, see :class:`MinimalResidual`.

    Args:
        operator: symmetric.
        v: (n,).
        iterations: at most.
        tolerance: residual, relative to ``v``, at which it ends.
        start: ``x`` to begin with; None: zero, which spares a product.
    """
    x = torch.zeros_like(v) if start is None else start
    r = v if start is None else v - operator(start)
    smallest, size = torch.finfo(v.dtype).tiny, v.norm()
    beta = r.norm()  # of the Lanczos vector
    left = beta.clone()  # the residual, with its sign
    q_before, q = torch.zeros_like(v), r / beta.clamp_min(smallest)
    w_before, w = torch.zeros_like(v), torch.zeros_like(v)
    one, zero = torch.ones_like(beta), torch.zeros_like(beta)
    c_before, s_before, c, s = one, zero, one, zero
    active, count = left > tolerance * size, torch.zeros_like(beta)
    curvature = torch.full_like(beta, torch.inf)
    beta = zero
    for _ in range(iterations):
        if finished(active):
            break
        count = count + active
        product = operator(q)
        alpha = q.dot(product)
        curvature = torch.where(active, torch.minimum(curvature, alpha), curvature)
        following = product - alpha * q - beta * q_before
        beta_after = following.norm()
        # The new column of the tridiagonal matrix, under the last two rotations, then its own.
        above2 = s_before * beta
        above1 = s * alpha + c_before * c * beta
        pivot = c * alpha - c_before * s * beta
        diagonal = torch.hypot(pivot, beta_after)
        safe = diagonal.clamp_min(smallest)
        c_after, s_after = pivot / safe, beta_after / safe
        w_after = (q - above2 * w_before - above1 * w) / safe
        x = x + torch.where(active, c_after * left, 0.0) * w_after
        left = torch.where(active, -s_after * left, left)
        q_before, q = q, following / beta_after.clamp_min(smallest)
        w_before, w, beta = w, w_after, beta_after
        c_before, s_before, c, s = c, s, c_after, s_after
        # The Krylov space is exhausted where the next vector is rounding's.
        exhausted = beta_after <= torch.finfo(v.dtype).eps * diagonal
        active = active & (left.abs() > tolerance * size) & ~exhausted
    x = torch.where(left.isnan(), torch.nan, x)  # a NaN ends the loop: it must not pass unseen
    residual = left.abs() / size.clamp_min(smallest)
    return x, {"residual": residual, "iterations": count, "curvature": curvature}
