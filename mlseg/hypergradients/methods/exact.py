"""Implicit differentiation with the Hessian in full: the oracle for small problems."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from mlseg.errors import UserError
from mlseg.hypergradients.implicit import Implicit, Operator, Solution, System
from mlseg.hypergradients.level import Level
from mlseg.hypergradients.registry import register


@register("exact")
class Exact(Implicit):
    """``H x = v`` by the eigendecomposition of ``H``, which is formed column by column.

    Directions without curvature, up to rounding, are left out: the solution is that of smallest
    norm.

    Cost per hop: 1 forward and 1 backward pass, as many Hessian-vector products as the level has
    parameters, about 10 n^3 operations, 1 mixed product. Memory: 3 n^2 numbers.

    Collectives per hop, in several processes: ``N + 1``, with ``N`` parameters of the level.

    Diagnostics: ``residual`` relative to ``v``; ``curvature``, the smallest eigenvalue;
    ``condition``, the ratio of the largest modulus of an eigenvalue to the smallest.

    Attributes:
        limit: refuse levels with more parameters than this.
    """

    limit: PositiveInt = 4096

    situation = "a small level, to check another method"
    because = "a dense Hessian, up to ``limit`` parameters"
    cost = "1 E + N H + 1 M"
    cost_note = "about 10 N^3 operations"
    memory = "3 N^2 numbers"

    when_unsolved = "damping: the Hessian is singular"

    def check(self, level: Level) -> None:
        """Refuse a level with too many parameters."""
        n = sum(p.numel() for p in level.trainable_parameters())
        if n > self.limit:
            raise UserError(
                f"problem {level.name!r} has {n} parameters, the hypergradient method exact takes "
                f"up to {self.limit}: raise its limit, or take cg or minres"
            )

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        return dense_solution(system, v)


def dense_solution(operator: Operator, v: Tensor) -> Solution:
    """Solve ``operator(x) = v``, see :class:`Exact`.

    Args:
        operator: symmetric.
        v: (n,).
    """
    n = v.numel()
    matrix = torch.stack([operator(e) for e in torch.eye(n, dtype=v.dtype, device=v.device)])
    matrix = 0.5 * (matrix + matrix.T)
    if not matrix.isfinite().all():
        return v * torch.nan, {}  # the run's guard against NaN says where it began
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    moduli, tiny = eigenvalues.abs(), torch.finfo(v.dtype).tiny
    curved = moduli > n * torch.finfo(v.dtype).eps * moduli.max()
    solution = vectors @ torch.where(curved, vectors.T @ v / eigenvalues, 0.0)
    residual = (matrix @ solution - v).norm() / v.norm().clamp_min(tiny)
    return solution, {
        "residual": residual,
        "curvature": eigenvalues[0],
        "condition": moduli.max() / moduli.min().clamp_min(tiny),
    }
