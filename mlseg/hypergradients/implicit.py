"""The minimiser as the best response, by the implicit function theorem.

At a minimum ``w*`` of a level's objective ``l(w, s)`` the gradient by ``w`` is zero for every
``s``; differentiating that gives

    (dw*/ds)^T v = -(d2l / ds dw) x,    (H + damping I) x = v,    H = d2l / dw dw

Methods differ in how they solve for ``x``. Here ``H`` is the Hessian of what the level's optimizer
descends: an L2 weight decay of the optimizer belongs to the objective and is added to the diagonal,
and an optimizer that maximises has the opposite sign. ``H`` is never formed (``exact`` apart): the
gradient's graph is built once, each product is a backward pass through it, and the mixed product at
the end is another one.

Parameters that the loss doesn't use, or that the optimizer doesn't hold, don't respond, and have no
part in the system.

Solvers are functions of an operator and a vector that know nothing of a level:
``solver(operator, v, *, settings) -> (solution, diagnostics)``, each in its method's file. What
belongs to the level is wrapped around them here: the point of linearisation, damping, warm start.

Source: Bengio: Gradient-based optimization of hyperparameters, Neural Computation 12, 2000;
Lorraine, Vicol, Duvenaud: Optimizing millions of hyperparameters by implicit differentiation,
AISTATS 2020.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from mlseg import parallel
from mlseg.hypergradients.base import Diagnostics, Differentiating
from mlseg.hypergradients.hop import Cotangents, Hop, Point
from mlseg.hypergradients.kronecker import Factors, Kronecker, without_factors
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import objective
from mlseg.hypergradients.second_order.products import pull_through
from mlseg.hypergradients.trajectory import Keeps
from mlseg.hypergradients.vectors import filled, flatten, unflatten

Operator = Callable[[Tensor], Tensor]
"""A symmetric linear map of flat vectors, (n,) to (n,)."""
Solution = tuple[Tensor, Diagnostics]
"""What a solver gives: ``x``, and how it went (``residual``, ``iterations``, ``diverged``, ...)."""


class Hessian:
    """Products with the Hessian of a level's objective, from one graph of its gradient.

    Vectors are flat: the parameters that respond, in a row.

    Args:
        loss: the whole loss, with its graph.
        hop: whose level it is the loss of.
    """

    def __init__(self, loss: Tensor, hop: Hop) -> None:
        self.hop = hop
        gradient = torch.autograd.grad(loss, hop.parameters, create_graph=True, allow_unused=True)
        signs, decays = objective(hop.parameters, hop.level.stepping.optimizer)
        self._respond = [
            g is not None and g.requires_grad and sign != 0
            for g, sign in zip(gradient, signs, strict=True)
        ]
        chosen = [i for i, responds in enumerate(self._respond) if responds]
        self.parameters = [hop.parameters[i] for i in chosen]
        self.gradient: list[Tensor] = []
        for i in chosen:
            g = gradient[i]
            assert g is not None
            self.gradient.append(g if signs[i] > 0 else -g)
        self._decay: Tensor | None = None
        if any(isinstance(decays[i], Tensor) or decays[i] for i in chosen):
            self._decay = flatten([torch.zeros_like(hop.parameters[i]) + decays[i] for i in chosen])

    def restrict(self, vector: Vector) -> Tensor:
        """A vector over all of the hop's parameters, as a flat one over those that respond."""
        kept = [v for v, responds in zip(vector, self._respond, strict=True) if responds]
        return flatten(kept) if kept else torch.zeros(0)

    def __call__(self, x: Tensor) -> Tensor:
        """``H x``."""
        self.hop.products += 1
        product = pull_through(
            self.gradient, unflatten(x, self.parameters), self.parameters, retain_graph=True
        )
        (result,) = parallel.average([flatten(filled(product, self.parameters))])
        if self._decay is not None:
            result += self._decay * x
        return result

    def mixed(self, x: Tensor) -> Cotangents:
        """``(d2l / d(inputs) dw) x`` of this process; the last product, which frees the graph."""
        self.hop.products += 1
        return pull_through(self.gradient, unflatten(x, self.parameters), self.hop.inputs)


class System:
    """The linear system of a hop; as a function of ``x``, its left side ``(H + damping I) x``.

    Args:
        hessian: ``H``.
        damping: added to its diagonal.
        start: the last hop's solution, for a warm start; None: from zero.
        factors: Kronecker factors of ``H``, where the method asks for them.

    Attributes:
        hop: whose system it is.
    """

    def __init__(
        self,
        hessian: Hessian,
        damping: float = 0.0,
        start: Tensor | None = None,
        factors: Factors | None = None,
    ) -> None:
        self.hessian, self.damping, self.start, self.factors = hessian, damping, start, factors
        self.hop = hessian.hop

    def __call__(self, x: Tensor) -> Tensor:
        """``(H + damping I) x``."""
        result = self.hessian(x)
        return result.add_(x, alpha=self.damping) if self.damping else result

    def solved_by(self, solver: Callable[..., Solution], v: Tensor, **settings: Any) -> Solution:
        """``solver``'s solution; with factors that of the system between their roots.

        With ``L L^T`` the factors' inverse, ``L^T (H + damping I) L y = L^T v`` and ``x = L y``:
        the solution is the same, the condition that of ``L^T H L``. Figures are of that system.
        """
        f = self.factors
        if f is None or not f.layers:
            return solver(self, v, start=self.start, **settings)
        start = None if self.start is None else f.root_inverse(self.start)

        def between(y: Tensor) -> Tensor:
            return f.root_transposed(self(f.root(y)))

        y, figures = solver(between, f.root_transposed(v), start=start, **settings)
        return f.root(y), figures

    def on_fresh_batch(self) -> System:
        """The same system with the Hessian on a batch of its own."""
        return System(Hessian(self.hop.fresh_loss(), self.hop), self.damping)


class Implicit(Differentiating):
    """A hop over the level's minimiser. Subclass it and write :meth:`solve`.

    A subclass with a setting ``warm_start`` finds the last hop's solution in ``system.start`` where
    that is set.

    Attributes:
        linearise: the weights at which the loss is evaluated again: ``after_step``, those the level
            has now, or ``before_step``, those that its last step started from.
        damping: added to the Hessian's diagonal: it keeps the solution small along directions of
            little curvature, at the price of a bias.
    """

    linearise: Point = "after_step"
    damping: NonNegativeFloat = 0.0

    best_response: ClassVar = "the minimiser"
    in_several: ClassVar = True

    def keeps(self, level: Level) -> Keeps:
        """The weights before the last step, to linearise there."""
        return Keeps(steps=int(self.linearise == "before_step"))

    def cotangents(self, vector: Vector, hop: Hop) -> tuple[Cotangents, Diagnostics]:
        """Solve, then minus the mixed product of the solution."""
        warm = getattr(self, "warm_start", False)
        with hop.linearised(self.linearise), hop.evaluation(whole=True) as loss:
            factors = self.factors(hop)
            hessian = Hessian(loss() if factors is None else factors.evaluated(loss), hop)
            if not hessian.parameters:
                return [None] * len(hop.inputs), {}
            factors = factors and factors.over(hessian.parameters)
            v = hessian.restrict(vector)
            start = hop.remembered(self.name, v) if warm else None
            solution, diagnostics = self.solve(System(hessian, self.damping, start, factors), v)
            if warm:
                hop.remember(self.name, solution)
            product = hessian.mixed(solution)
        return [None if q is None else q.neg() for q in product], diagnostics

    def factors(self, hop: Hop) -> Factors | None:
        """Kronecker factors for :attr:`System.factors`, where it wants any."""
        return None

    @abstractmethod
    def solve(self, system: System, v: Tensor) -> Solution:
        """``x`` with ``system(x) = v``, as nearly as the settings ask.

        Args:
            system: the damped Hessian, as a function of flat vectors.
            v: (n,) the incoming vector.
        """


class Krylov(Implicit):
    """A hop solved iteratively over Krylov spaces.

    Attributes:
        iterations: at most.
        tolerance: residual, relative to ``v``, at which it ends.
        warm_start: whether to start from the last hop's solution.
        preconditioner: Kronecker factors of the curvature, ``kfac`` with their settings' defaults;
            fewer iterations where conditions are bad, at an evaluation's price per hop. Residual
            and curvature are then those between the factors' roots.
    """

    iterations: PositiveInt = 10
    tolerance: NonNegativeFloat = 1e-10
    warm_start: bool = False
    preconditioner: Kronecker | Literal["kfac"] | None = None

    def factors(self, hop: Hop) -> Factors | None:
        """Those of ``preconditioner``."""
        if self.preconditioner is None:
            return None
        given = self.preconditioner
        return Factors(hop, Kronecker() if given == "kfac" else given)

    def remark(self, level: Level) -> str | None:
        """On the parameters without factors."""
        return None if self.preconditioner is None else without_factors(level)


def finished(active: Tensor) -> bool:
    """Whether a loop may end early because ``active`` is false.

    Only asked on the CPU. On a device reading the answer would make the host wait; there the loop
    runs on with its values frozen, and ends with the same result.
    """
    return active.device.type == "cpu" and not bool(active)


def largest_eigenvalue(operator: Operator, v: Tensor, iterations: int) -> Tensor:
    """The operator's eigenvalue of largest modulus, from below, by power iteration.

    It starts from ``v``, where the solution lies, plus as much of a fixed random vector, so that no
    eigenvector is missed.
    """
    generator = torch.Generator(v.device).manual_seed(0)
    noise = torch.randn(v.shape, generator=generator, device=v.device, dtype=v.dtype)
    smallest = torch.finfo(v.dtype).tiny
    x = v / v.norm().clamp_min(smallest) + noise / noise.norm()
    size = x.norm()
    for _ in range(iterations):
        x = operator(x / size.clamp_min(smallest))
        size = x.norm()
    return size
