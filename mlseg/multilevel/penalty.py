"""An upper level that needs no hypergradient: the lower level's optimality as a penalty.

    min_x  f(x, y*(x)),   y*(x) = argmin_y g(x, y)

is, up to an error in proportion to ``1 / lambda``, the one-level program

    min_{x, y}  f(x, y) + lambda (g(x, y) - min_z g(x, z))

whose gradient is made of first derivatives alone: ``z`` is the lower level as it trains, ``y`` a
twin of its weights that the upper level keeps and descends with.

    class Reweighting(PenaltyProblem):        # otherwise an upper level like any other
        lower = "weights"
        penalty = PenaltySettings(strength=50.0)

    Engine([weights, reweighting], l2u={weights: [reweighting]})    # no u2l

Source: Kwon et al.: A fully first-order method for stochastic bilevel optimization, ICML 2023
(F2SA, algorithm 1); Liu et al.: BOME! Bilevel optimization made easy: a simple first-order
approach, NeurIPS 2022 (section 3, the dynamic barrier).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.config import Settings
from mlseg.errors import UserError
from mlseg.hypergradients import Vector, pointed_at
from mlseg.hypergradients.gradient_hooks import hooked
from mlseg.hypergradients.vectors import filled
from mlseg.multilevel.problem import Problem


class PenaltySettings(Settings):
    """How :class:`PenaltyProblem` weighs and descends.

    Attributes:
        strength: ``lambda`` at the first step.
        growth: added to ``lambda`` at each step (F2SA's schedule).
        barrier: ``eta`` of BOME's dynamic barrier, which chooses ``lambda`` anew at each step as
            ``max(eta - <df, dq> / |dq|^2, 0)`` with ``q = g(x, y) - g(x, z)``, the gradients by x
            and y together, so that every step decreases ``q`` by at least ``eta |dq|^2``; None
            keeps ``strength`` and ``growth``.
        steps: of the twin per step of the upper level.
        rate: of the twin's descent on ``f / lambda + g``; None: the lower level's learning rate.
    """

    strength: PositiveFloat = 10.0
    growth: NonNegativeFloat = 0.0
    barrier: PositiveFloat | None = None
    steps: PositiveInt = 10
    rate: PositiveFloat | None = None


class PenaltyProblem(Problem):
    """An upper level by a penalty; see the module.

    Write ``training_step`` as for any upper level: its loss ``f``, computed through the lower
    problem, whose weights are the twin's meanwhile. The lower problem's loss ``g`` is taken on its
    last batch, with the randomness of its last step.

    Cost per step: ``steps`` forward and backward passes of ``f`` and ``g``, one more of ``f`` and
    two of ``g`` by ``x``. Memory: three copies of the lower level's weights. Collectives, in
    several processes: ``2 steps + 3``.

    Attributes:
        lower: the lower problem's name.
        penalty: strength and steps.
    """

    lower: str
    penalty = PenaltySettings()
    _twin: Vector | None = None
    _strength: Tensor | None = None

    @property
    def revisits(self) -> str:
        """The problem whose steps are evaluated again by this one."""
        return self.lower

    def _take_gradient(self, batch: Any) -> tuple[dict[str, Any], Vector]:
        lower: Any = self.levels[self.lower]
        parameters, own = lower.trainable_parameters(), self.trainable_parameters()
        if hooked(parameters):
            raise UserError(
                f"problem {self.lower!r}: its parameters have hooks (register_hook), which the "
                "penalty's twin would leave out; change the gradient by the loss itself"
            )
        twin = self._twin or [p.detach().clone() for p in parameters]
        strength = self._strength
        if strength is None:
            strength = torch.full((), self.penalty.strength, device=self.device)
        state = self.random_state()

        def upper_loss() -> tuple[Tensor, dict[str, Any]]:
            self.again.restore_randomness(state)
            return self.get_loss(batch)

        lower_loss = lower.again.last_loss
        with lower.again.untraced():
            rate = self.penalty.rate or lower.optimizer.param_groups[0]["lr"]
            for _ in range(self.penalty.steps):
                with pointed_at(parameters, twin):
                    f = _gradient(upper_loss()[0], parameters)
                    g = _gradient(lower_loss(), parameters)
                twin = [w - rate * (a / strength + b) for w, a, b in zip(twin, f, g, strict=True)]
            below = _gradient(lower_loss(), own)
            with pointed_at(parameters, twin):
                above = _gradient(lower_loss(), [*own, *parameters])
                loss, metrics = upper_loss()
                f = _gradient(loss, [*own, *parameters])
            after = self.random_state()
        self.again.restore_randomness(after)  # the next step draws anew
        excess = [a - b for a, b in zip(above, below, strict=False)]
        if self.penalty.barrier is not None:
            strength = self._barrier(f, [*excess, *above[len(own) :]], self.penalty.barrier)
        else:
            self._strength = strength + self.penalty.growth
        self._twin = twin
        self.set_grads(own, [a + strength * q for a, q in zip(f[: len(own)], excess, strict=True)])
        return {**metrics, "strength": strength}, own

    def _barrier(self, f: Vector, q: Vector, eta: float) -> Tensor:
        square = torch.stack([(b * b).sum() for b in q]).sum()
        along = torch.stack([(a * b).sum() for a, b in zip(f, q, strict=True)]).sum()
        smallest = torch.finfo(square.dtype).tiny
        strength = (eta - along / square.clamp_min(smallest)).clamp_min(0.0)
        # The twin's descent divides by it.
        self._strength = strength.clamp_min(1e-3)
        return strength

    def state_dict(self) -> dict[str, Any]:
        """Betty's, the twin and the strength."""
        return {**super().state_dict(), "twin": self._twin, "strength": self._strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        twin, strength = state["twin"], state["strength"]
        self._twin = None if twin is None else [w.to(self.device) for w in twin]
        self._strength = None if strength is None else strength.to(self.device)


def _gradient(loss: Tensor, parameters: Vector) -> Vector:
    found = filled(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
    return list(parallel.average(found))
