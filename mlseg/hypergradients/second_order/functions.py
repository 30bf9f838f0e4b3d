"""What the autograd functions of this package share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def apply_to(*tensors: Tensor | None) -> bool:
    """Whether a function of this package may stand in for torch's operation on ``tensors``.

    Not where no graph is built, nor where something else than reverse mode looks on: tangents,
    ``torch.func``, autocast, hooks on saved tensors (a checkpoint evaluates its part again later,
    and has to find the same operations), a compiler. There torch's own operation is right.
    """
    first = tensors[0]
    assert first is not None
    given = [t for t in tensors if t is not None]
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in given)
        and first.dtype in (torch.float32, torch.float64)
        and first.numel() > 0
        and all(
            t.dtype == first.dtype and t.device == first.device and t.layout is torch.strided
            for t in given
        )
        and (first.device.type == "meta" or not torch.is_autocast_enabled(first.device.type))
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
    )


def wanted(ctx: Any, count: int) -> list[bool]:
    """Within ``backward``: which of the function's first ``count`` tensors need their gradient now.

    ``ctx.needs_input_grad`` says which could ever need one; a call of ``torch.autograd.grad`` asks
    for some. ``ctx.given`` says which of the tensors weren't None.
    """
    edges = iter(ctx.next_functions)  # of tensors alone
    result = []
    for needs, given in zip(ctx.needs_input_grad[:count], ctx.given, strict=True):
        node = next(edges)[0] if given else None
        result.append(needs and node is not None and _runs(node))
    return result


def _runs(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer for a leaf whose gradient was asked for
        return True


def by_arithmetic(
    operation: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    g: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The double backward of ``operation``, to be differentiated further.

    A third derivative torch either doesn't have (batch norm) or has wrong: that of layer norm takes
    the saved mean and variance for constants. So it is made of sums and products here.

    Args:
        operation: of ``tensors``, in operations that can be differentiated any number of times.
        g: the cotangent of its result.
        cotangents: of the gradients by ``tensors``; None for zero.

    Returns:
        the cotangents of ``g`` and of ``tensors``.
    """
    with torch.enable_grad():
        # Aliases, so that the graph behind the tensors isn't walked here.
        g, given = g.view_as(g), [t for t in tensors if t is not None]
        leaves = iter([t.view_as(t) for t in given])
        operands = [None if t is None else next(leaves) for t in tensors]
        pairs = [
            (t, v)
            for t, v in zip(operands, cotangents, strict=True)
            if t is not None and v is not None
        ]
        if not pairs:
            return [None] * (1 + len(tensors))
        by, along = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(operation(*operands), by, g, create_graph=True)
        targets = [g, *(t for t in operands if t is not None)]
        found = iter(
            torch.autograd.grad(gradients, targets, along, create_graph=True, allow_unused=True)
        )
        return [next(found), *(None if t is None else next(found) for t in operands)]


def normalised(x: Tensor, axes: list[int], eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over ``axes``, for :func:`by_arithmetic`."""
    centred = x - x.mean(axes, keepdim=True)
    return centred * ((centred * centred).mean(axes, keepdim=True) + eps).rsqrt()
