"""Hypergradient methods: a file each, one registry.

``register`` makes a method known by name, ``resolve`` finds it. ``Method`` is what to derive from,
or one of its kinds: ``OneStep`` and ``Scaled`` (one step of descent), ``Implicit`` (a linear
system). :mod:`mlseg.hypergradients.base` says what a method is given.
"""

import mlseg._betty  # noqa: F401, its version is checked before anything is built on it
from mlseg.hypergradients.base import Cotangents, Diagnostics, Hop, Interface, Method, Vector
from mlseg.hypergradients.cg import ConjugateGradients
from mlseg.hypergradients.evolution import Evolution
from mlseg.hypergradients.exact import Exact
from mlseg.hypergradients.finite_difference import FiniteDifference
from mlseg.hypergradients.fixed_point import FixedPoint
from mlseg.hypergradients.forward import Forward
from mlseg.hypergradients.identity import Identity
from mlseg.hypergradients.implicit import Hessian, Implicit, Krylov
from mlseg.hypergradients.minres import MinimalResidual
from mlseg.hypergradients.neumann import Neumann
from mlseg.hypergradients.nystrom import Nystrom
from mlseg.hypergradients.one_step import OneStep, Scaled
from mlseg.hypergradients.penalty import Penalty
from mlseg.hypergradients.registry import names, register, resolve
from mlseg.hypergradients.sama import Sama
from mlseg.hypergradients.stochastic import Stochastic
from mlseg.hypergradients.trajectory import Keeps, Trajectory
from mlseg.hypergradients.unrolled import Unrolled

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
