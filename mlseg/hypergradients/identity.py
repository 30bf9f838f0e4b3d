"""Identity inverse Hessian, the mixed second derivative by automatic differentiation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mlseg.hypergradients.base import Hop, Method, Vector
from mlseg.hypergradients.registry import register


@register
class Identity(Method):
    """Mixed second derivative along the incoming vector, by double backward.

    .. math:: q = \\nabla_s \\langle \\nabla_w l(w, s), v \\rangle

    No step size to choose, exact for one step of descent with ``linearise: before_step``; it needs
    operations that can be differentiated twice.

    Cost per hop: 1 forward and 1 backward pass of the level's loss, then a backward pass over both.
    Memory: the graph of the gradient as well as that of the
    loss. Assumes what :class:`~mlseg.hypergradients.finite_difference.FiniteDifference` assumes,
    but for ``detach()``, which is respected everywhere.

    Source: Luketina et al.: Scalable gradient-based tuning of continuous regularization
    hyperparameters, ICML 2016, section 2 (the T1-T2 method).
    """

    method: Literal["identity"] = "identity"

    passes: ClassVar[str] = "1 forward, 1 backward, 1 double backward"

    def mixed_product(
        self, vector: Vector, hop: Hop
    ) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        with hop.evaluation() as loss:
            gradient = torch.autograd.grad(
                loss(), hop.parameters, create_graph=True, allow_unused=True
            )
            terms = [
                (g * v).sum()
                for g, v in zip(gradient, vector, strict=True)
                if g is not None and g.requires_grad
            ]
            if not terms:
                return [None] * len(hop.inputs), {}
            # A gradient may be linear in w alone, and then depends on no input.
            product = torch.autograd.grad(torch.stack(terms).sum(), hop.inputs, allow_unused=True)
        return product, {}
