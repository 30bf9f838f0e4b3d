"""Operations whose double backward is fast, in place of torch's own, for any module.

Within :func:`formulas` torch's convolutions and normalisations are evaluated by functions with the
same values and derivatives, up to rounding, whose gradients are differentiated once more by few of
the ordinary kernels; attention takes that kernel of torch's that has a second derivative. Outside
the block nothing is touched, and nothing costs anything. Python's layers around an operation don't
matter: what a module, or a loss, calls of ``torch.nn.functional`` is what is replaced. A scripted
module keeps torch's own, which are as right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlseg.hypergradients.second_order import attention, batch_norm, convolution, group_norm

SecondOrder = Literal["fused", "torch"]
"""Whose formulas differentiate a gradient: those of this package, or torch's."""

_HANDLERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = (
    convolution.HANDLERS | batch_norm.HANDLERS | group_norm.HANDLERS | attention.HANDLERS
)

_PLAIN = frozenset([Tensor, nn.Parameter])
"""A subclass of them has ways of its own."""


class _Fused(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and _PLAIN.issuperset(types):
            result = handler(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **kwargs) if kwargs else func(*args)


def formulas(second_order: SecondOrder) -> AbstractContextManager[Any]:
    """A block whose operations are differentiated twice by these formulas."""
    return _Fused() if second_order == "fused" else nullcontext()
