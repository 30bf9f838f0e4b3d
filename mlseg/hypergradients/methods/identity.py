"""Identity inverse Hessian, the mixed second derivative by automatic differentiation."""

from mlseg.hypergradients.base import Diagnostics, Differentiating
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.level import Vector
from mlseg.hypergradients.one_step import Scaled
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.second_order.fused import SecondOrder
from mlseg.hypergradients.second_order.products import Mode, directional


@register("identity")
class Identity(Differentiating, Scaled):
    """Mixed second derivative along the incoming vector, by automatic differentiation.

    .. math:: q = \\nabla_s \\langle \\nabla_w l(w, s), v \\rangle

    No step size to choose, exact for one step of descent with ``linearise: before_step``; it needs
    operations that can be differentiated twice.

    Cost per hop: 1 forward and 1 backward pass of the level's loss, then a backward pass over both;
    ``forward_over_reverse``: 1 forward pass with tangents and 1 backward pass to ``s`` only, about
    half of that where ``s`` enters late (weights of a loss). Memory: the graph of the gradient as
    well as that of the loss; ``forward_over_reverse``: twice the latter. Assumes what
    ``finite_difference`` assumes, but for ``detach()``, which is respected everywhere.

    Collectives per hop, in several processes: ``1``.

    Source: Luketina et al.: Scalable gradient-based tuning of continuous regularization
    hyperparameters, ICML 2016, section 2 (the T1-T2 method). Forward over reverse: Pearlmutter:
    Fast exact multiplication by the Hessian, Neural Computation 6, 1994.

    Attributes:
        mode: order of differentiation, see :data:`mlseg.hypergradients.second_order.products.Mode`.
    """

    mode: Mode = "double_backward"

    situation = "the levels alternate step by step, networks are smooth, levels small"
    because = "no step size to choose: an evaluation and a mixed product"
    cost = "1 E + 1 M"
    cost_note = "``forward_over_reverse``: 1 forward with tangents, 1 backward to ``s``"
    memory = "graph of the gradient; with tangents as much again as the loss's graph"

    def formulas(self) -> SecondOrder:
        """``second_order`` where a graph is differentiated."""
        return self.second_order if self.mode == "double_backward" else "torch"

    def mixed_product(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """See the class."""
        hop.products += 1
        with hop.evaluation() as loss:
            product = directional(loss, hop.level, hop.parameters, vector, hop.inputs, self.mode)
        return product, {}
