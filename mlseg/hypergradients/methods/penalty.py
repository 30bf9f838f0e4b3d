"""Implicit differentiation by a penalty, with first derivatives alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.hypergradients.base import Diagnostics, Method
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import objective
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.vectors import filled, norm


@register("penalty")
class Penalty(Method):
    """What the incoming vector does to the minimiser, by descending with it.

    Let ``y`` minimise ``l(y, s) + <v, y> / lambda``. Then

    .. math::
        \\bar s = \\lambda \\left(\\frac{\\partial l}{\\partial s}(y, s)
            - \\frac{\\partial l}{\\partial s}(w, s)\\right)

    is the hypergradient up to a bias in proportion to ``1 / lambda``: to first order
    ``y = w - H^-1 v / lambda``. ``y`` is found by gradient descent from ``w`` (or from where it was
    in the last hop), along the *change* of the level's gradient since ``w``, so that a level that
    hasn't converged doesn't count as moved. No second derivative is taken.

    This is the fully first-order method with the upper loss linearised at ``w``; with the upper
    loss as it is, and ``y`` a level in its own right, it is
    :class:`mlseg.multilevel.penalty.PenaltyProblem`.

    Cost per hop: a forward and a backward pass per iteration and one more, and 2 forward and
    backward passes to ``s``. Memory: 3 copies of the level's weights.

    Collectives per hop, in several processes: ``K + 2``, with ``K`` iterations.

    Source: Kwon et al.: A fully first-order method for stochastic bilevel optimization, ICML 2023
    (F2SA), section 3; Liu et al.: BOME! Bilevel optimization made easy, NeurIPS 2022.

    Diagnostics: ``residual`` of the descent's stationarity, relative; ``shift``, how far ``y`` is
    from ``w``, relative to ``w``.

    Attributes:
        strength: ``lambda`` in units of ``|v|``: the linear term has slope ``1 / strength``.
        iterations: of the descent.
        step_size: of the descent; None: the level's learning rate.
        warm_start: whether to start from the last hop's ``y - w``.
    """

    strength: PositiveFloat = 100.0
    iterations: PositiveInt = 10
    step_size: PositiveFloat | None = None
    warm_start: bool = False

    situation = (
        "the level is near its minimum, and there is no second derivative, or no memory for one"
    )
    because = "descends with the incoming vector, by first derivatives alone"
    cost = "(K + 3) E"
    symbols = {"K": "iterations"}
    cost_note = "2 of them to ``s``"
    memory = "3 w"
    first_derivatives_alone = True
    in_several = True

    when_unsolved = "more iterations, or a larger step_size"

    def check(self, level: Level) -> None:
        """Refuse an optimizer that minimises and maximises at once."""
        if (
            len({bool(group.get("maximize")) for group in level.stepping.optimizer.param_groups})
            > 1
        ):
            raise UserError(
                f"problem {level.name!r}: some of its parameter groups maximize and some don't; "
                "the hypergradient method penalty takes one or the other"
            )

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        parameters = hop.parameters
        at = [p.detach().clone() for p in parameters]
        size = norm(vector).clamp_min(torch.finfo(vector[0].dtype).tiny)
        pull = [v / (size * self.strength) for v in vector]
        steps, signs, decays = self._steps(hop)
        shift = self._start(hop, parameters)
        left = torch.zeros_like(size)
        with hop.evaluation(whole=True) as loss:
            here = _descent(parameters, at, None, loss, signs)
            for _ in range(self.iterations):
                there = _descent(parameters, at, shift, loss, signs)
                force = [
                    t - h + d * o + p
                    for t, h, d, o, p in zip(there, here, decays, shift, pull, strict=True)
                ]
                left = norm(force) * self.strength
                shift = [o - a * f for o, a, f in zip(shift, steps, force, strict=True)]
            below = torch.autograd.grad(loss(), hop.inputs, allow_unused=True)
            with pointed_at(parameters, torch._foreach_add(at, shift)):
                above = torch.autograd.grad(loss(), hop.inputs, allow_unused=True)
        if self.warm_start:
            for i, o in enumerate(shift):
                hop.remember(f"penalty_{i}", o)
        factor = self.strength * size * (-1.0 if -1 in signs else 1.0)
        product = [
            None if a is None or b is None else factor * (a - b)
            for a, b in zip(above, below, strict=True)
        ]
        moved = norm(shift) / norm(at).clamp_min(torch.finfo(size.dtype).tiny)
        return product, {"residual": left, "shift": moved}

    def _steps(self, hop: Hop) -> tuple[list[Tensor | float], list[int], list[Tensor | float]]:
        """Per parameter the descent's step, the loss's sign, and the weight decay."""
        optimizer = hop.level.stepping.optimizer
        signs, decays = objective(hop.parameters, optimizer)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        steps = [
            (rates[id(p)] if self.step_size is None else self.step_size) if sign else 0.0
            for p, sign in zip(hop.parameters, signs, strict=True)
        ]
        return steps, signs, decays

    def _start(self, hop: Hop, parameters: Vector) -> Vector:
        known: list[Tensor | None] = [None] * len(parameters)
        if self.warm_start:
            known = [hop.remembered(f"penalty_{i}", p) for i, p in enumerate(parameters)]
        return filled(known, parameters)


def _descent(
    parameters: Vector,
    weights: Vector,
    shift: Vector | None,
    loss: Callable[[], Tensor],
    signs: list[int],
) -> Vector:
    """What the level descends along at ``weights + shift``, without its decay."""
    moved = weights if shift is None else torch._foreach_add(weights, shift)
    with pointed_at(parameters, moved):
        gradient = torch.autograd.grad(loss(), parameters, allow_unused=True)
    shared = parallel.average(filled(gradient, parameters))
    return [sign * g for sign, g in zip(signs, shared, strict=True)]
