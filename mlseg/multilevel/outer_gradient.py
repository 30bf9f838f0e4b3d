"""The outer gradient of a level, over every path of the graph at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from betty.hypergradient import jvp_fn_mapping
from betty.problems import Problem as BettyProblem
from torch import Tensor

from mlseg.hypergradients import Diagnostics, Hop, Vector
from mlseg.hypergradients.vectors import norm

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem


class OuterGradient:
    """Reverse accumulation over the levels below a problem.

    Betty walks each path by itself: for E2EAug's two, A-W-A and A-W-G-A, that is two backward
    passes of the validation loss and the hop over W twice. Since a hop is linear in the vector that
    it carries, the vectors of all paths may be added up where they meet and each level's hop be
    taken once, to all the problems that its loss depends on together.

    Args:
        upper: the problem whose gradient is wanted.
        paths: Betty's: each starts and ends with ``upper``, and each hop goes from an element to
            the next one, ``[upper, level, ..., upper]``.
    """

    def __init__(self, upper: Problem, paths: Sequence[Sequence[BettyProblem]]) -> None:
        self.upper = upper
        self.first: list[BettyProblem] = []
        self.sources: dict[BettyProblem, list[BettyProblem]] = {}
        for path in paths:
            _append_new(self.first, path[1])
            for level, source in pairwise(path[1:]):
                _append_new(self.sources.setdefault(level, []), source)

    def __call__(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[Vector, Diagnostics]:
        """The gradient of ``loss`` by ``params``, direct and through the levels below.

        Returns:
            one tensor per element of ``params``, and diagnostics: the norm carried over each hop
            that arrives at ``upper`` (``hypergradient/<level>``), the norm of the vector that
            starts at each first level, and what the methods report.
        """
        groups = [list(level.meta_trainable_parameters()) for level in self.first]
        flat = [*params, *(p for group in groups for p in group)]
        gradients = torch.autograd.grad(loss, flat, retain_graph=retain_graph, allow_unused=True)
        filled = iter(
            torch.zeros_like(p) if g is None else g for p, g in zip(flat, gradients, strict=True)
        )
        total = [next(filled) for _ in params]
        vectors: dict[BettyProblem, Vector] = {
            level: [next(filled) for _ in group]
            for level, group in zip(self.first, groups, strict=True)
        }
        diagnostics: Diagnostics = {}
        for level in self._in_order():
            vector, sources = vectors.pop(level), self.sources[level]
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
        from mlseg.multilevel.problem import Problem

        if isinstance(level, Problem):
            return level.hypergradient(vector, Hop(level, sources, self.upper.name))
        # A plain Betty level: its own method, source by source.
        method = jvp_fn_mapping[level.config.type]
        return [list(method(vector, level, source, False)) for source in sources], {}

    def _in_order(self) -> list[BettyProblem]:
        """The levels, each after all those that carry something to it."""
        waiting = list(self.sources)
        ordered: list[BettyProblem] = []
        while waiting:
            ready = [
                level
                for level in waiting
                if not any(level in self.sources[other] for other in waiting if other is not level)
            ]
            assert ready, "the graph of levels has a cycle"
            ordered += ready
            waiting = [level for level in waiting if level not in ready]
        return ordered


def _append_new(items: list[BettyProblem], item: BettyProblem) -> None:
    if not any(item is known for known in items):
        items.append(item)
