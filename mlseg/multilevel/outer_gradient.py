"""The outer gradient of a level, over every path of the graph at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from betty.problems import Problem as BettyProblem
from torch import Tensor

from mlseg import parallel
from mlseg.errors import RunError, UserError
from mlseg.hypergradients import Diagnostics, Hop, Vector
from mlseg.hypergradients.vectors import filled, norm
from mlseg.multilevel.betty_tables import carry_by_bettys
from mlseg.multilevel.graph import Hops
from mlseg.multilevel.revisiting import Revisitable

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem


class OuterGradient:
    """Reverse accumulation over the levels below a problem.

    Betty walks each path by itself: for E2EAug's two, A-W-A and A-W-G-A, that is two backward
    passes of the validation loss and the hop over W twice. Since a hop is linear in the vector that
    it carries, the vectors of all paths may be added up where they meet and each level's hop be
    taken once, to all the problems that its loss depends on together. In several processes the
    direct gradients are averaged, all in one collective, so that the vectors that the hops carry
    are the same in all of them.

    Args:
        upper: the problem whose gradient is wanted.
        paths: of its gradient, see :class:`~mlseg.multilevel.graph.Hops`.
    """

    def __init__(self, upper: Problem, paths: Sequence[Sequence[BettyProblem]]) -> None:
        self.upper = upper
        self.hops = Hops(paths)

    def __call__(
        self,
        loss: Tensor,
        params: Sequence[Tensor],
        retain_graph: bool = False,
        allow_unused: bool = True,
    ) -> tuple[Vector, Diagnostics]:
        """The gradient of ``loss`` by ``params``, direct and through the levels below.

        Returns:
            one tensor per element of ``params``, and diagnostics: the norm carried over each hop
            that arrives at ``upper`` (``hypergradient/<level>``), the norm of the vector that
            starts at each first level, and what the methods report.

        Raises:
            RunError: the loss doesn't use one of ``params`` itself, and ``allow_unused`` is False.
        """
        groups = [list(level.meta_trainable_parameters()) for level in self.hops.first]
        for level, group in zip(self.hops.first, groups, strict=True):
            if not group:
                raise UserError(
                    f"problem {self.upper.name!r}: its hypergradient passes {level.name!r}, all "
                    "of whose parameters are frozen (requires_grad) when its training_step "
                    "returns; leave them as they are there, or leave the path out of u2l"
                )
        flat = [*params, *(p for group in groups for p in group)]
        gradients = torch.autograd.grad(loss, flat, retain_graph=retain_graph, allow_unused=True)
        if not allow_unused and any(g is None for g in gradients[: len(params)]):
            raise RunError(
                f"problem {self.upper.name!r}: its loss doesn't use all of its own parameters, and "
                "its config says allow_unused=False; leave it True for an upper level"
            )
        parts = iter(filled(parallel.average_some(gradients, flat), flat))
        total = [next(parts) for _ in params]
        vectors: dict[BettyProblem, Vector] = {
            level: [next(parts) for _ in group]
            for level, group in zip(self.hops.first, groups, strict=True)
        }
        diagnostics: Diagnostics = {}
        for level in self.hops.in_order():
            vector, sources = vectors.pop(level), self.hops.sources[level]
            diagnostics[f"hypergradient/into_{level.name}"] = norm(vector)
            carried, report = self._carry(vector, level, sources)
            for key, value in report.items():
                diagnostics[f"hypergradient/{level.name}_{key}"] = value
            for source, part in zip(sources, carried, strict=True):
                if source is self.upper:
                    diagnostics[f"hypergradient/via_{level.name}"] = norm(part)
                    torch._foreach_add_(total, part)
                elif source in vectors:
                    torch._foreach_add_(vectors[source], part)
                else:
                    vectors[source] = part
        return total, diagnostics

    def _carry(
        self, vector: Vector, level: BettyProblem, sources: list[BettyProblem]
    ) -> tuple[list[Vector], Diagnostics]:
        if isinstance(level, Revisitable):
            return level.hypergradient(vector, Hop(level, sources, self.upper.name))
        return carry_by_bettys(vector, level, sources), {}
