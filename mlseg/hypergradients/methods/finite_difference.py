"""Identity inverse Hessian, the mixed second derivative by finite differences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from mlseg.errors import UserError
from mlseg.hypergradients.base import Diagnostics
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.one_step import Scaled
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import Keeps
from mlseg.hypergradients.vectors import norm


@register("finite_difference")
class FiniteDifference(Scaled):
    """Mixed second derivative along the incoming vector, by differences of gradients.

    .. math::
        q = \\frac{\\nabla_s l(w + h v, s) - \\nabla_s l(w - h v, s)}{2 h}, \\qquad
        h = \\epsilon \\, \\lVert w \\rVert / \\lVert v \\rVert

    The step is relative to the parameters' norm, so that one ``epsilon`` serves networks of any
    size; DARTS takes the absolute step 0.01 / ||v||. One-sided differences are one order less
    accurate. ``forward`` ones save nothing (the unperturbed gradient with respect to ``s`` is
    evaluated): they are for losses that may only be evaluated on one side. ``one_sided`` ones take
    the unperturbed gradient from the level's own training step, which takes it along: half the
    price, for ``linearise: before_step`` and where no other level of the loss steps in between.

    Cost per hop: 2 forward and 2 backward passes of the level's loss, the backward to ``s`` only.
    Memory: one perturbed copy of the level's parameters. Assumes a Hessian near a multiple of the
    identity (or one step of descent, for which it is exact as epsilon goes to 0) and a loss that is
    twice differentiable along ``v``. ReLU, max-pooling and L1 are not: their second derivative
    lives in kinks, which a difference takes in as far as it steps over them. There a small epsilon
    gives noise, and the default is large for that reason; for smooth losses in double precision
    take 1e-5. ``benchmarks/secant_check.py`` measures what a trained network wants. ``detach()``
    inside the loss is respected with regard to ``s`` but not to ``w``.

    Collectives per hop, in several processes: ``1``.

    Source: Liu, Simonyan, Yang: DARTS, ICLR 2019, section 2.3, equations 7 and 8; Choe et al.:
    Betty, 2022, section 3 for hops of any graph.

    Attributes:
        epsilon: step relative to the norm of the level's parameters.
        scheme: ``central``, ``forward`` or ``one_sided``.
    """

    epsilon: PositiveFloat = 1e-2
    scheme: Literal["central", "forward", "one_sided"] = "central"

    situation = (
        "the default: the levels alternate step by step, networks are large (neural "
        "architecture search, learned data or weights) and kinked (ReLU), memory is short"
    )
    because = "two evaluations, nothing to converge, no graph of a gradient"
    cost = "2 E"
    cost_note = (
        "backwards to ``s`` only; ``scheme: one_sided`` 1, and a training step that goes back to "
        "``s`` as well"
    )
    memory = "1 w"
    first_derivatives_alone = True

    def mixed_product(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        return difference(vector, hop, self.epsilon, self.scheme)

    def keeps(self, level: Level) -> Keeps:
        """The weights before the last step, and ``one_sided`` its gradient by the inputs."""
        one_sided = self.scheme == "one_sided"
        return replace(super().keeps(level), by_inputs=one_sided)

    def check(self, level: Level) -> None:
        """Refuse what a one-sided difference can't be had of."""
        super().check(level)
        if self.scheme != "one_sided":
            return
        stepping, why = level.stepping, ""
        if self.linearise != "before_step":
            why = "is taken where the last step started: set linearise to before_step"
        elif level.precision != "fp32":
            why = f"needs its training step in full precision, not in {level.precision}"
        elif stepping.batches > 1:
            why = "needs steps of one batch: set accumulate to 1"
        elif stepping.below:
            why = "serves levels without lower ones"
        if why:
            raise UserError(
                f"problem {level.name!r}: scheme: one_sided {why}, or scheme to central"
            )


def difference(
    vector: Vector, hop: Hop, epsilon: float, scheme: str
) -> tuple[Cotangents, Diagnostics]:
    """:meth:`FiniteDifference.mixed_product`, for methods that share it."""
    parameters = hop.parameters
    with torch.no_grad():
        size = norm(vector)
        # An all-zero vector has no direction: the gradients agree, q is zero, whatever the step.
        smallest = torch.finfo(size.dtype).tiny ** 0.5
        size = torch.where(size > 0, size.clamp_min(smallest), 1.0)
        step = epsilon * norm(parameters).clamp_min(1e-8) / size
    with hop.evaluation() as loss:
        above = _gradient_at(parameters, vector, step, loss, hop.inputs)
        below = hop.unperturbed() if scheme == "one_sided" else None
        if below is None:
            other = -step if scheme == "central" else None
            below = _gradient_at(parameters, vector, other, loss, hop.inputs)
    width = 2.0 * step if scheme == "central" else step
    product = [
        None if a is None or b is None else (a - b) / width
        for a, b in zip(above, below, strict=True)
    ]
    return product, {"step": step}


def _gradient_at(
    parameters: Vector,
    vector: Vector,
    step: Tensor | None,
    loss: Callable[[], Tensor],
    inputs: Vector,
) -> Cotangents:
    """``d loss / d inputs`` with ``step * vector`` (None: nothing) added to the parameters."""
    moved = here = [p.data for p in parameters]
    if step is not None:
        moved = list(torch._foreach_mul(vector, step))
        torch._foreach_add_(moved, here)
    with pointed_at(parameters, moved):
        return torch.autograd.grad(loss(), inputs, allow_unused=True)
