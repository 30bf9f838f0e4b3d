"""Implicit differentiation with the Kronecker-factored inverse of the curvature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.hypergradients.hop import Hop
from mlseg.hypergradients.implicit import Implicit, Solution, System
from mlseg.hypergradients.kronecker import Decay, Factors, Kronecker, without_factors
from mlseg.hypergradients.level import Level
from mlseg.hypergradients.registry import register
from mlseg.hypergradients.trajectory import group_settings
from mlseg.hypergradients.vectors import flatten, unflatten


@register("kfac")
class Kfac(Implicit):
    """The inverse Hessian by Kronecker factors of each layer's curvature.

    .. math::
        X = \\alpha \\, (G + \\sqrt\\rho / \\pi)^{-1} V (A + \\pi \\sqrt\\rho)^{-1}, \\qquad
        A = \\frac{1}{R} \\sum a a^T, \\; G = N \\sum g g^T, \\qquad
        \\pi^2 = \\frac{\\mathrm{tr} A / d_A}{\\mathrm{tr} G / d_G}

    per layer, with ``V`` the incoming vector in the shape of its weight
    (:mod:`mlseg.hypergradients.kronecker` says of which layers, and what ``a`` and ``g`` are), and
    ``rho`` the damping. Parameters without factors count as having the layers' mean curvature; a
    level without any such layer has its learning rate for the inverse, as in ``identity``.

    The factors are those of the empirical Fisher matrix. That is the Hessian, up to a factor, where
    the loss is a mean of negative log-likelihoods and the level fits its data about as well as it
    says; ``rescale`` finds the factor, as the step along ``X`` that solves the system best:
    ``alpha = <v, x> / <x, (H + rho) x>``.

    Cost per hop: 1 forward and 1 backward pass, another backward pass to the layers' outputs, the
    factors (a product of matrices per layer, about a forward pass) and their factorisation, 1
    Hessian-vector product with ``rescale``, 1 mixed product. Memory: the graph of the gradient,
    four square matrices per layer.

    Collectives per hop, in several processes: ``3``, one less without ``rescale`` and one less for
    a level without factors.

    Source: Liao, Dangel, Yu: Efficient bilevel optimization with KFAC-based hypergradients, AISTATS
    2026; Martens and Grosse, ICML 2015, section 6.4 for the scale; Grosse and Martens, ICML 2016.

    Diagnostics: with ``rescale`` the ``residual`` relative to ``v``, and the ``curvature`` along
    ``x``; where that isn't positive, the Hessian is indefinite and ``alpha`` stays 1.

    Attributes:
        damping: ``rho``.
        decay, every: see :class:`~mlseg.hypergradients.kronecker.Kronecker`.
        rescale: see above.
    """

    damping: PositiveFloat = 1e-3
    decay: Decay = 0.95
    every: PositiveInt = 1
    rescale: bool = True

    situation = (
        "the level is near its minimum, a network of linear layers and convolutions with a "
        "likelihood for its loss, too large for many products per hop"
    )
    because = "curvature at the price of a few passes; nothing iterates"
    cost = "1 E + 1 H + 1 M"
    cost_note = "a backward pass to the layers' outputs; the factors, about a forward pass"
    memory = "graph of the gradient, four square matrices per layer"

    when_unsolved = "another damping, or cg or minres with preconditioner: kfac"

    def remark(self, level: Level) -> str | None:
        """On the parameters without factors."""
        return without_factors(level)

    def is_unsolved(self, figures: Mapping[str, float]) -> bool:
        """Also where its direction has no positive curvature."""
        return figures.get("curvature", 1.0) <= 0.0 or super().is_unsolved(figures)

    def factors(self, hop: Hop) -> Factors:
        """Those of the hop's level."""
        settings = Kronecker(damping=self.damping, decay=self.decay, every=self.every)
        return Factors(hop, settings)

    def solve(self, system: System, v: Tensor) -> Solution:
        """See the class."""
        factors = system.factors
        assert factors is not None
        x = factors.inverse(v) if factors.layers else _times_rate(system, v)
        if not self.rescale:
            return x, {}
        product = system(x)
        bend, tiny = x.dot(product), torch.finfo(v.dtype).tiny
        alpha = torch.where(bend > 0, v.dot(x) / bend.clamp_min(tiny), 1.0)
        alpha = torch.where(bend.isnan(), torch.nan, alpha)
        residual = (v - alpha * product).norm() / v.norm().clamp_min(tiny)
        curvature = bend / x.dot(x).clamp_min(tiny)
        return alpha * x, {"residual": residual, "curvature": curvature}


def _times_rate(system: System, v: Tensor) -> Tensor:
    parameters = system.hessian.parameters
    groups = group_settings(parameters, system.hop.level.stepping.optimizer)
    rates = [0.0 if group is None else group["lr"] for group in groups]
    parts = unflatten(v, parameters)
    return flatten([part * rate for part, rate in zip(parts, rates, strict=True)])
