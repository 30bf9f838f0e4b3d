"""Hypergradient methods: a file each, one registry.

``register`` makes a method known by name, ``resolve`` finds it, ``Method`` is what to derive from.
"""

from mlseg.hypergradients.base import Hop, Interface, Method, Vector
from mlseg.hypergradients.finite_difference import FiniteDifference
from mlseg.hypergradients.identity import Identity
from mlseg.hypergradients.registry import names, register, resolve

__all__ = [
    "FiniteDifference",
    "Hop",
    "Identity",
    "Interface",
    "Method",
    "Vector",
    "names",
    "register",
    "resolve",
]
