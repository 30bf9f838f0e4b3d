"""Hypergradient methods: a file each, one registry.

``register`` makes a method known by name, ``resolve`` finds it. ``Method`` is what to derive from,
or one of its kinds: ``OneStep`` and ``Scaled`` (one step of descent), ``Implicit`` (a linear
system). :mod:`mlseg.hypergradients.base` says what a method is given.
"""

from mlseg.hypergradients.base import Cotangents, Diagnostics, Hop, Interface, Method, Vector
from mlseg.hypergradients.implicit import Hessian, Implicit, Krylov
from mlseg.hypergradients.methods.cg import ConjugateGradients
from mlseg.hypergradients.methods.evolution import Evolution
from mlseg.hypergradients.methods.exact import Exact
from mlseg.hypergradients.methods.finite_difference import FiniteDifference
from mlseg.hypergradients.methods.fixed_point import FixedPoint
from mlseg.hypergradients.methods.forward import Forward
from mlseg.hypergradients.methods.identity import Identity
from mlseg.hypergradients.methods.minres import MinimalResidual
from mlseg.hypergradients.methods.neumann import Neumann
from mlseg.hypergradients.methods.nystrom import Nystrom
from mlseg.hypergradients.methods.penalty import Penalty
from mlseg.hypergradients.methods.sama import Sama
from mlseg.hypergradients.methods.stochastic import Stochastic
from mlseg.hypergradients.methods.unrolled import Unrolled
from mlseg.hypergradients.one_step import OneStep, Scaled
from mlseg.hypergradients.registry import names, register, resolve
from mlseg.hypergradients.trajectory import Keeps, Trajectory

__all__ = [
    "ConjugateGradients",
    "Cotangents",
    "Diagnostics",
    "Evolution",
    "Exact",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "Hessian",
    "Hop",
    "Identity",
    "Implicit",
    "Interface",
    "Keeps",
    "Krylov",
    "Method",
    "MinimalResidual",
    "Neumann",
    "Nystrom",
    "OneStep",
    "Penalty",
    "Sama",
    "Scaled",
    "Stochastic",
    "Trajectory",
    "Unrolled",
    "Vector",
    "names",
    "register",
    "resolve",
]
