"""SAMA: identity inverse Hessian, with the optimizer's Jacobian in front."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from mlseg.hypergradients.base import Diagnostics
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.methods.finite_difference import difference
from mlseg.hypergradients.one_step import OneStep
from mlseg.hypergradients.optimizers import optimizer_of
from mlseg.hypergradients.optimizers.step_map import StepMap
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.trajectory import Keeps


@register("sama")
class Sama(OneStep):
    """One step of the level's own optimizer, the mixed derivative by finite differences.

    .. math::
        -\\frac{\\partial^2 l}{\\partial s \\, \\partial w} P v, \\qquad
        P = -\\left(\\frac{\\partial u(w, g, m)}{\\partial g}\\right)^T

    with ``u`` the optimizer's map from weights, gradient and moments to the next weights, clipping
    included, differentiated at the step as it was taken. Unlike ``scale: optimizer`` of
    ``finite_difference``, this counts how the second moments themselves change with the gradient: a
    step of Adam along a gradient much larger than those before hardly depends on its size.

    With gradient accumulation the Jacobian is that of the whole step, the mixed derivative that of
    its last batch.

    Cost per hop: 2 forward and 2 backward passes of the level's loss, the backward to ``s`` only.
    Memory: copies of the level's weights, moments and gradient, and one of the perturbed weights.

    Betty's ``sama`` has this for SGD and Adam without their learning rate; here SGD (momentum,
    dampening, Nesterov), Adam, AdamW, AMSGrad, RMSprop and Adagrad, the learning rate included.

    Collectives per hop, in several processes: ``1``.

    Source: Choe et al.: Making scalable meta learning practical, NeurIPS 2023, section 3.2.

    Attributes:
        epsilon: step relative to the norm of the level's parameters.
        scheme: ``central`` or ``forward``.
    """

    epsilon: PositiveFloat = 1e-2
    scheme: Literal["central", "forward"] = "central"

    situation = (
        "the levels alternate, and the level's optimizer is adaptive (Adam, RMSprop); or "
        "take ``scale: optimizer`` of ``finite_difference`` or ``identity``"
    )
    because = "the optimizer's step per unit of gradient differs from weight to weight"
    cost = "2 E"
    cost_note = "to ``s`` only"
    memory = "weights, moments, gradient, 1 w"
    first_derivatives_alone = True

    def keeps(self, level: Level) -> Keeps:
        """The last step whole."""
        return Keeps(steps=1, moments=True, gradient=True)

    def check(self, level: Level) -> None:
        """Refuse an optimizer whose step can't be differentiated."""
        optimizer_of(level)

    def scaled(self, vector: Vector, hop: Hop) -> Vector:
        """``P vector``."""
        level = hop.level
        step = level.trajectory.steps[-1]
        taken = StepMap(optimizer_of(level), step, step.gradient, level.stepping.clip)
        spread = hop.spread(vector)
        _, along, _, _ = taken.pull_back(spread, [{} for _ in spread])
        return hop.gather([a.neg_() for a in along])

    def mixed_product(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        return difference(vector, hop, self.epsilon, self.scheme)
