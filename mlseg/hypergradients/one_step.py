"""One step of descent as the best response: the identity in place of the inverse Hessian."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from mlseg.hypergradients.base import Diagnostics, Method
from mlseg.hypergradients.hop import Cotangents, Hop, Point
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import check_known, objective, one_step_scale
from mlseg.hypergradients.trajectory import Keeps


class OneStep(Method):
    """A hop over one step ``w* = w - P grad l(w, s)``, which maps ``v -> -(d2l / ds dw) P v``.

    Subclass it, or :class:`Scaled`, and write what is abstract.

    Attributes:
        linearise: the weights at which the loss is evaluated again: ``after_step``, those the level
            has now (no memory), or ``before_step``, those that its last step started from (exact
            for one step; one copy of the weights).
    """

    linearise: Point = "after_step"

    best_response: ClassVar = "one step of the optimizer"
    in_several: ClassVar = True

    def keeps(self, level: Level) -> Keeps:
        """The weights before the last step, to linearise there."""
        return Keeps(steps=int(self.linearise == "before_step"))

    def carries_hooks(self) -> bool:
        """It does."""
        return True

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """Minus the mixed product of the scaled vector."""
        scaled = self.scaled(vector, hop)
        with hop.linearised(self.linearise):
            product, diagnostics = self.mixed_product(hop.through_hooks(scaled), hop)
        return [None if q is None else q.neg() for q in product], diagnostics

    @abstractmethod
    def scaled(self, vector: Vector, hop: Hop) -> Vector:
        """``P vector``."""

    @abstractmethod
    def mixed_product(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """``d/d(inputs) <dl/dw, vector>``, one tensor (or None for zero) per ``hop.inputs``."""


class Scaled(OneStep):
    """A one-step method with a choice of ``P``. Subclass it and write ``mixed_product``.

    Attributes:
        scale: the factor ``P`` in front of each hop.
            ``learning_rate`` (default) is the one-step derivation: the hop carries the level's
            learning rate, parameter group by parameter group, so that paths of different length
            have their true proportion. ``optimizer`` takes the optimizer's whole step per unit of
            gradient, its second moments held fixed. ``none`` drops the factor, as Betty's methods
            do; a path through two levels then weighs 1/eta too much against one through one level.
    """

    scale: Literal["learning_rate", "optimizer", "none"] = "learning_rate"

    def check(self, level: Level) -> None:
        """Refuse an optimizer whose scale isn't known."""
        if self.scale == "optimizer":
            check_known(level.stepping.optimizer)

    def scaled(self, vector: Vector, hop: Hop) -> Vector:
        """``P vector``."""
        optimizer = hop.level.stepping.optimizer
        if self.scale == "none":
            signs, _ = objective(hop.parameters, optimizer)
            return [v if sign else v * 0.0 for v, sign in zip(vector, signs, strict=True)]
        return one_step_scale(
            vector, hop.parameters, optimizer, preconditioned=self.scale == "optimizer"
        )
