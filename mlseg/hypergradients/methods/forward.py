"""Forward-mode differentiation through the level's last steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.hypergradients.base import Diagnostics, Differentiating
from mlseg.hypergradients.gradient_hooks import applied, pushed
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import Moments, optimizer_of
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.replay import Replay
from mlseg.hypergradients.trajectory import Keeps, Step
from mlseg.hypergradients.vectors import filled, flatten


@register("forward")
class Forward(Differentiating):
    """The exact derivative through the last ``T`` steps, one hyperparameter at a time.

    For each of the sources' ``n`` numbers ``s_j`` the tangent ``dz/ds_j`` of weights and moments is
    carried along, from zero, over the same maps ``z' = U(z, g(w, s))`` as in ``unrolled``:

    .. math::
        \\dot z' = \\frac{\\partial U}{\\partial z} \\dot z
            + \\frac{\\partial U}{\\partial g} \\left(\\frac{\\partial g}{\\partial w} \\dot w
            + \\frac{\\partial g}{\\partial s_j}\\right)

    For few hyperparameters: weights of losses, learning rates
    (:meth:`mlseg.Problem.learning_rates`). It gives what ``unrolled`` gives, whatever ``T``.

    Cost per hop: per step 1 forward and 1 backward pass, and ``n`` Hessian-vector products. Memory:
    ``T`` copies of weights and moments, the graph of one gradient, ``n`` tangents.

    Collectives per hop, in several processes: ``2 T + 1``.

    Source: Franceschi et al.: Forward and reverse gradient-based hyperparameter optimization, ICML
    2017, section 3.2 (Forward-HG).

    Diagnostics: ``steps`` differentiated.

    Attributes:
        steps: ``T``; None: the level's ``unroll_steps``.
        limit: refuse sources with more numbers than this.
    """

    steps: PositiveInt | None = None
    limit: PositiveInt = 64

    through_interface: ClassVar[bool] = False  # the sources' own numbers are what counts

    best_response = "the last steps, as they were taken"
    in_several = True
    situation = (
        "few hyperparameters (up to some dozens), many inner steps; learning rates are learned"
    )
    because = (
        "what ``unrolled`` gives; a product per hyperparameter and step instead of one per step"
    )
    cost = "T E + T n H"
    memory = "T weights and moments, graph of one gradient, n tangents"

    def keeps(self, level: Level) -> Keeps:
        """``T`` steps; gradients where the last graph's value isn't all of it."""
        return Keeps(
            steps=self.steps or level.unroll_steps,
            moments=True,
            gradient=level.stepping.changes_its_gradient,
        )

    def carries_hooks(self) -> bool:
        """It does."""
        return True

    def check(self, level: Level) -> None:
        """Refuse optimizers that can't be differentiated, and too many hyperparameters."""
        optimizer_of(level)
        self._check_count(level, [p for s in level.sources() for p in s.trainable_parameters()])

    def _check_count(self, level: Level, inputs: Sequence[Tensor]) -> None:
        count = sum(t.numel() for t in inputs)
        if count > self.limit:
            raise UserError(
                f"problem {level.name!r}: its sources have {count} parameters, the hypergradient "
                f"method forward takes up to {self.limit}: raise its limit, or take unrolled"
            )

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        self._check_count(hop.level, hop.inputs)
        count = sum(t.numel() for t in hop.inputs)
        replay = Replay(hop, self.steps or hop.level.unroll_steps)
        tangents = [_Tangent(replay, j) for j in range(count)]
        with hop.level.again.untraced():
            for step in replay.steps:
                self._advance(replay, step, tangents)
        final = flatten(hop.spread(vector))
        flat = torch.stack([final.dot(flatten(t.weights)) for t in tangents])
        parts = flat.split([t.numel() for t in hop.inputs])
        result = [part.view_as(t).to(t.dtype) for part, t in zip(parts, hop.inputs, strict=True)]
        return result, {"steps": len(replay.steps)}

    def _advance(self, replay: Replay, step: Step, tangents: list[_Tangent]) -> None:
        parameters, inputs = replay.parameters, replay.hop.inputs
        along: list[list[Tensor]] = [[torch.zeros_like(p) for p in parameters] for _ in tangents]
        values: list[Tensor | None] = list(step.gradient) or [None] * len(parameters)
        with replay.at(step.weights):
            for loss in replay.losses(step):
                gradient = torch.autograd.grad(
                    loss(), [*parameters, *inputs], create_graph=True, allow_unused=True
                )
                by_weights, by_inputs = gradient[: len(parameters)], gradient[len(parameters) :]
                found = [None if g is None else g.detach() for g in by_weights]
                own = parallel.average_some(found, parameters)
                if not step.gradient:
                    values = applied(own, parameters)
                replay.hop.products += len(tangents)
                changes: Iterable[list[Tensor]] = (
                    t.product(by_weights, by_inputs) for t in tangents
                )
                if parallel.several():
                    changes = _shared(list(changes))
                for change, total in zip(changes, along, strict=True):
                    torch._foreach_add_(total, pushed(change, own, parameters))
        taken = replay.map(step, values)
        for tangent, change in zip(tangents, along, strict=True):
            tangent.weights, tangent.moments = taken.push_forward(
                tangent.weights, change, tangent.moments, tangent.rates
            )


def _shared(vectors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Several vectors, averaged over all processes in one collective."""
    parts = iter(parallel.average([t for vector in vectors for t in vector]))
    return [[next(parts) for _ in vector] for vector in vectors]


class _Tangent:
    """The derivative of a level's weights and moments by the ``j``-th number of the inputs."""

    def __init__(self, replay: Replay, j: int) -> None:
        self.parameters = replay.parameters
        self.weights = [torch.zeros_like(p) for p in replay.parameters]
        self.moments: list[Moments] = [{} for _ in replay.parameters]
        index = 0
        while j >= replay.hop.inputs[index].numel():
            j -= replay.hop.inputs[index].numel()
            index += 1
        self.place = (index, j)
        source = replay.hop.inputs[index]
        self.rates = None if replay.rates is None else [self._rate(r, source) for r in replay.rates]

    def _rate(self, rate: Tensor, source: Tensor) -> Tensor:
        if not rate.requires_grad:
            return torch.zeros_like(rate)
        slopes = torch.autograd.grad(rate, [source], allow_unused=True, retain_graph=True)
        (slope,) = filled(slopes, [source])
        return slope.reshape(-1)[self.place[1]].reshape(rate.shape)

    def product(
        self, by_weights: tuple[Tensor | None, ...], by_inputs: tuple[Tensor | None, ...]
    ) -> list[Tensor]:
        """``dg/dw w_dot + dg/ds_j``: the symmetric Hessian's columns by a backward pass."""
        terms = [
            (g * t).sum()
            for g, t in zip(by_weights, self.weights, strict=True)
            if g is not None and g.requires_grad
        ]
        index, j = self.place
        mine = by_inputs[index]
        if mine is not None and mine.requires_grad:
            terms.append(mine.reshape(-1)[j])
        if not terms:
            return [torch.zeros_like(p) for p in self.parameters]
        product = torch.autograd.grad(
            torch.stack(terms).sum(), self.parameters, allow_unused=True, retain_graph=True
        )
        return filled(product, self.parameters)
