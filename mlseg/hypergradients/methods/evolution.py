"""Zeroth-order differentiation by antithetic evolution strategies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.errors import UserError
from mlseg.hypergradients.base import Diagnostics, Method
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import Moments, optimizer_of
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.replay import Replay
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import Keeps
from mlseg.hypergradients.vectors import flatten, unflatten


@register("evolution")
class Evolution(Method):
    """How the level's last ``T`` steps would have gone under other sources, by trying.

    .. math::
        \\bar s = \\frac{1}{n} \\sum_{i=1}^{n} \\frac{v^T w_T(s + \\sigma e_i)
            - v^T w_T(s - \\sigma e_i)}{2 \\sigma} \\, e_i, \\qquad e_i \\sim N(0, I)

    with ``w_T(s)`` the weights after the steps, taken again from the first on, on the same batches
    and random draws. It is an unbiased estimate of the gradient of ``v^T w_T`` smoothed by a
    Gaussian of width ``sigma``, and never differentiates the loss by the sources: for losses with
    thresholds, sampling or lookup behind them. Its relative error is about ``sqrt(d / n)`` for
    ``d`` numbers in ``s``: for few of them, or for many pairs. ``orthogonal`` directions (rows of a
    random rotation, times ``sqrt(d)``; up to ``d`` pairs) have less variance, and none at all with
    ``n = d``.

    Cost per hop: 2 n T forward and backward passes, to the level's weights only. Memory: ``T``
    copies of weights and moments; with ``orthogonal`` directions n copies of the sources.

    Collectives per hop, in several processes: ``2 P T + 1``, with ``P`` pairs; ``T`` more for a
    level with lower ones or a callback.

    Source: Salimans et al.: Evolution strategies as a scalable alternative to reinforcement
    learning, 2017, section 2; for unrolled steps Metz et al.: Understanding and correcting
    pathologies in the training of learned optimizers, ICML 2019; orthogonal directions:
    Choromanski et al.: Structured evolution with compact architectures for scalable policy
    optimization, ICML 2018.

    Diagnostics: ``steps`` taken again, ``spread``: the standard error of the estimate over pairs,
    relative to its norm (Gaussian directions).

    Attributes:
        steps: ``T``; None: the level's ``unroll_steps``.
        pairs: ``n``.
        sigma: width of the perturbation, in units of the sources' parameters.
        directions: see above.
        seed: of the directions, which differ from step to step.
    """

    steps: PositiveInt | None = None
    pairs: PositiveInt = 8
    sigma: PositiveFloat = 1e-2
    directions: Literal["gaussian", "orthogonal"] = "gaussian"
    seed: NonNegativeInt = 0

    through_interface: ClassVar[bool] = False  # it is the sources that are perturbed

    best_response = "the last steps, as they were taken"
    in_several = True
    situation = (
        "the loss can't be differentiated by the upper level's variables (thresholds, "
        "sampling, lookup)"
    )
    because = "only differentiates by the level's own weights"
    cost = "2 P T E"
    symbols = {"P": "pairs"}
    cost_note = "to ``w`` only; T E more for a level with lower ones or a ``grad_callback``"
    memory = "T weights and moments"
    first_derivatives_alone = True

    def keeps(self, level: Level) -> Keeps:
        """``T`` steps, and what lower levels or a callback added to their gradients."""
        return Keeps(
            steps=self.steps or level.unroll_steps,
            moments=True,
            gradient=level.stepping.changes_its_gradient,
        )

    def carries_hooks(self) -> bool:
        """It does."""
        return True

    def check(self, level: Level) -> None:
        """Refuse levels whose steps can't be taken again."""
        optimizer_of(level)
        if "param_callback" in level.stepping.hooks:
            raise UserError(
                f"problem {level.name!r}: evolution would take its steps again without its "
                "param_callback; take unrolled, which doesn't need it"
            )

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        replay = Replay(hop, self.steps or hop.level.unroll_steps)
        v = flatten(hop.spread(vector))
        size = sum(t.numel() for t in hop.inputs)
        total = v.new_zeros(size)
        square = v.new_zeros(())
        count = min(self.pairs, size) if self.directions == "orthogonal" else self.pairs
        with hop.level.again.untraced():
            offsets = self._offsets(replay)
            for e in self._directions(count, total, hop):
                with pointed_at(hop.inputs, _shifted(hop.inputs, self.sigma * e)):
                    above = flatten(self._run(replay, offsets))
                with pointed_at(hop.inputs, _shifted(hop.inputs, -self.sigma * e)):
                    below = flatten(self._run(replay, offsets))
                slope = v.dot(above - below) / (2.0 * self.sigma)
                total += slope * e
                square += slope**2 * e.dot(e)
        estimate = total / count
        norm2 = estimate.dot(estimate)
        diagnostics: Diagnostics = {"steps": len(replay.steps)}
        if self.directions == "gaussian" and count > 1:
            variance = ((square / count - norm2) / (count - 1)).clamp_min(0.0)
            tiny = torch.finfo(v.dtype).tiny
            diagnostics["spread"] = (variance / norm2.clamp_min(tiny)).sqrt()
        return list(unflatten(estimate, hop.inputs)), diagnostics

    def _run(self, replay: Replay, offsets: list[list[Tensor]]) -> list[Tensor]:
        """The weights after the steps, under the sources' present values."""
        weights = replay.steps[0].weights
        moments: list[Moments] = replay.steps[0].moments
        rates = replay.stepping.learning_rates()
        for index, step in enumerate(replay.steps):
            with replay.at(weights):
                gradient = replay.gradient(step)
            if offsets:
                gradient = [
                    o if g is None else g + o for g, o in zip(gradient, offsets[index], strict=True)
                ]
            taken = replay.map(step, gradient, weights, moments)
            taken.rates = None if rates is None else [rate.detach() for rate in rates]
            weights, moments = taken.value()
        return weights

    def _offsets(self, replay: Replay) -> list[list[Tensor]]:
        """What lower levels or a callback added to each step's gradient; constant here."""
        offsets = []
        for step in replay.steps:
            if not step.gradient:
                return []
            with replay.at(step.weights):
                own = replay.gradient(step)
            offsets.append(
                [
                    torch.zeros_like(w) if whole is None else whole - (0.0 if g is None else g)
                    for whole, g, w in zip(step.gradient, own, step.weights, strict=True)
                ]
            )
        return offsets

    def _directions(self, count: int, like: Tensor, hop: Hop) -> Iterator[Tensor]:
        generator = hop.generator(self.seed, like.device)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=like.device, dtype=like.dtype)

        if self.directions == "gaussian":
            yield from (draw(like.numel()) for _ in range(count))
            return
        rows = torch.linalg.qr(draw(like.numel(), count))[0].T
        yield from rows * like.numel() ** 0.5


def _shifted(tensors: list[Tensor], shift: Tensor) -> list[Tensor]:
    """The tensors' values, ``shift`` further on."""
    return [t.data + by for t, by in zip(tensors, unflatten(shift, tensors), strict=True)]
