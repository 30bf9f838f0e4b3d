"""Hypergradient methods: a file each in ``methods/``, one registry.

``register`` makes a method known by name, ``resolve`` finds it, ``names`` lists all. ``Method`` is
what to derive from, or one of its kinds: ``OneStep`` and ``Scaled`` (one step of descent),
``Implicit`` (a linear system). :mod:`mlseg.hypergradients.hop` says what a method is given.

A method's class is an attribute of this module as well, found when it is asked for:
``mlseg.hypergradients.ConjugateGradients``.
"""

from typing import Any

import mlseg._betty  # noqa: F401, its version is checked before anything is built on it
from mlseg.hypergradients.base import Diagnostics, Differentiating, Method
from mlseg.hypergradients.hop import Cotangents, Hop
from mlseg.hypergradients.implicit import Implicit, Krylov, System
from mlseg.hypergradients.level import Interface, Level, Stepping, Vector
from mlseg.hypergradients.one_step import OneStep, Scaled
from mlseg.hypergradients.registry import classes, names, register, resolve
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import Keeps, Trajectory

__all__ = [
    "Cotangents",
    "Diagnostics",
    "Differentiating",
    "Hop",
    "Implicit",
    "Interface",
    "Keeps",
    "Krylov",
    "Level",
    "Method",
    "OneStep",
    "Scaled",
    "Stepping",
    "System",
    "Trajectory",
    "Vector",
    "names",
    "pointed_at",
    "register",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for cls in classes().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
