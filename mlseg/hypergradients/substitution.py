"""Other tensors in the place of a module's parameters, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(
    modules: Iterable[nn.Module], parameters: Sequence[Tensor], by: Sequence[Tensor]
) -> Iterator[None]:
    """Within this block the modules compute with ``by[i]`` where they had ``parameters[i]``.

    A parameter that several (sub)modules share is replaced in all of them; one that is held
    anywhere but in a module's table of parameters is not. The replacements may be
    any tensors of the same shape: with a history, or dual ones of forward-mode differentiation.
    """
    new = {id(p): replacement for p, replacement in zip(parameters, by, strict=True)}
    places = [
        (holder._parameters, name, p)
        for holder in _submodules(modules)
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


def _submodules(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    return {id(m): m for module in modules for m in module.modules()}.values()
