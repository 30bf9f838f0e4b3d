"""Implicit differentiation with a low-rank approximation of the Hessian."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.hypergradients.hop import Hop
from mlseg.hypergradients.implicit import Implicit, Operator, Solution, System
from mlseg.hypergradients.registry import register


@register("nystrom")
class Nystrom(Implicit):
    """The inverse of a Nyström approximation of the Hessian, by the Woodbury identity.

    .. math::
        H \\approx C W^{-1} C^T, \\quad C = H S, \\; W = S^T H S, \\qquad
        x = \\frac{1}{\\rho} \\left(v - C (\\rho W + C^T C)^{-1} C^T v \\right)

    with ``S`` the ``rank`` columns of a random choice: unit vectors (``columns``: a part of the
    Hessian's columns), or orthonormalised Gaussian ones (``gaussian``, which miss no direction),
    and ``rho`` the damping, which this method can't do without. Directions that ``C`` doesn't span
    count as having no curvature at all and are answered by ``v / rho``: with too low a rank the
    hypergradient is too long by far.

    There is no iteration that could diverge, and the products are independent of each other.

    Cost per hop: 1 forward and 1 backward pass, ``rank`` Hessian-vector products, 1 mixed product.
    Memory: the graph of the gradient, ``rank`` vectors.

    Collectives per hop, in several processes: ``R + 2``, with ``R`` the rank.

    Source: Hataya and Yamada: Nyström method for accurate and scalable implicit differentiation,
    AISTATS 2023, section 3; Gaussian sketches: Frangella, Tropp, Udell: Randomized Nyström
    preconditioning, SIAM Journal on Matrix Analysis 44, 2023.

    Diagnostics: ``residual`` of ``(H + rho I) x = v``, relative to ``v``, which takes one more
    product.

    Attributes:
        rank: columns.
        damping: ``rho``.
        sketch: how the columns are chosen.
        seed: of the choice, which differs from step to step.
    """

    rank: PositiveInt = 10
    damping: PositiveFloat = 1e-2
    sketch: Literal["columns", "gaussian"] = "columns"
    seed: NonNegativeInt = 0

    situation = "few directions carry the curvature"
    because = "products don't depend on each other, nothing iterates"
    cost = "1 E + (R + 1) H + 1 M"
    symbols = {"R": "rank"}
    cost_note = "1 for the residual that it reports"
    memory = "graph of the gradient, R w"

    when_unsolved = "a higher rank, a larger damping, or minres"

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        rank = min(self.rank, v.numel())
        sketch = self._sketch(rank, v, system.hop)
        return nystrom_inverse(system.hessian, v, sketch=sketch, damping=self.damping)

    def _sketch(self, rank: int, v: Tensor, hop: Hop) -> Tensor:
        """(rank, n) orthonormal rows."""
        generator = hop.generator(self.seed, v.device)
        if self.sketch == "columns":
            order = torch.randperm(v.numel(), generator=generator, device=v.device)
            rows = torch.zeros(rank, v.numel(), dtype=v.dtype, device=v.device)
            return rows.scatter_(1, order[:rank, None], 1.0)
        gaussian = torch.randn(v.numel(), rank, generator=generator, dtype=v.dtype, device=v.device)
        return torch.linalg.qr(gaussian)[0].T


def nystrom_inverse(operator: Operator, v: Tensor, *, sketch: Tensor, damping: float) -> Solution:
    """Solve ``operator(x) + damping x = v``, see :class:`Nystrom`.

    Args:
        operator: symmetric, without the damping.
        v: (n,).
        sketch: (rank, n) rows, the transposed of ``S``.
        damping: ``rho``.
    """
    rho = damping
    c = torch.stack([operator(column) for column in sketch], dim=1)
    # The small system squares the condition number: in double precision.
    s, wide = sketch.T.double(), c.double()
    w = s.T @ wide
    small = rho * 0.5 * (w + w.T) + wide.T @ wide
    small.diagonal().add_(torch.finfo(torch.float64).eps * small.diagonal().sum())
    inner, _ = torch.linalg.solve_ex(small, wide.T @ v.double())
    x = ((v.double() - wide @ inner) / rho).to(v.dtype)
    residual = (v - operator(x) - rho * x).norm() / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    return x, {"residual": residual}
