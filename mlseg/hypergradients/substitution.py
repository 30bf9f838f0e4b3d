"""Other values, or other tensors, in the place of parameters, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from mlseg.errors import UserError
from mlseg.modules import submodules


@contextmanager
def pointed_at(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within this block the parameters have these values.

    They are pointed at other storage and back, so that they are afterwards bit for bit what they
    were; adding and subtracting would leave rounding errors behind.
    """
    kept = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


@contextmanager
def substituted(
    modules: Iterable[nn.Module], parameters: Sequence[Tensor], by: Sequence[Tensor]
) -> Iterator[None]:
    """Within this block the modules compute with ``by[i]`` where they had ``parameters[i]``.

    A parameter that several (sub)modules share is replaced in all of them; one that is held
    anywhere but in a module's table of parameters is not (:func:`check_none_left`). The
    replacements may be any tensors of the same shape: with a history, or dual ones of forward-mode
    differentiation.
    """
    new = {id(p): replacement for p, replacement in zip(parameters, by, strict=True)}
    places = [
        (holder._parameters, name, p)
        for holder in submodules(modules)
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


def check_none_left(name: str, gradients: Sequence[Tensor | None], mend: str) -> None:
    """Check that a loss computed under :func:`substituted` read replacements alone.

    Args:
        name: of the problem whose loss it is.
        gradients: of the loss by the parameters that were to be replaced; None where it read none.
        mend: what to set instead.

    Raises:
        UserError: it read a parameter through a tensor or network that is in no problem's module.
    """
    if any(g is not None for g in gradients):
        raise UserError(
            f"problem {name!r}: its loss reads a parameter of its own from outside the problems' "
            f"modules, where nothing can stand in for it; make that network part of a module, or "
            f"set the hypergradient's {mend}"
        )
