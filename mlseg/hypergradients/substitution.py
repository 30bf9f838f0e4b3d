"""Other tensors in the place of a module's parameters, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(
    module: nn.Module, parameters: Sequence[Tensor], by: Sequence[Tensor]
) -> Iterator[None]:
    """Within this block ``module`` computes with ``by[i]`` where it had ``parameters[i]``.

    A parameter that several submodules share is replaced in all of them. The replacements may be
    any tensors of the same shape: with a history, or dual ones of forward-mode differentiation.
    """
    new = {id(p): replacement for p, replacement in zip(parameters, by, strict=True)}
    places = [
        (holder._parameters, name, p)
        for holder in module.modules()
        for name, p in holder._parameters.items()
        if p is not None and id(p) in new
    ]
    for table, name, p in places:
        table[name] = new[id(p)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for table, name, p in places:
            table[name] = p
