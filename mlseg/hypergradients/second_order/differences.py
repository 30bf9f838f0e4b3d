"""Mixed second derivatives along a direction by differences of gradients, and how far they are off.

Where a product with the graph of a gradient costs a multiple of a forward and backward pass, two
passes at weights on either side cost two. What that is worth depends on the loss: a difference sees
kinks (ReLU, max-pooling) that it steps over, which no second derivative has, and rounding where the
step is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mlseg.errors import RunError
from mlseg.hypergradients.level import Level
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.vectors import filled, norm


def central(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    targets: Sequence[Tensor],
    epsilon: float,
) -> list[Tensor | None]:
    """``d/d(targets) <dl/d(parameters), direction>`` by a central difference.

    Args:
        loss: evaluates ``l``; twice.
        parameters: at whose present values.
        direction: one tensor per parameter.
        targets: leaves, the parameters themselves among them if wanted.
        epsilon: the step, relative to the norm of the parameters.

    Returns:
        one tensor per target, None for zero.
    """
    here = [p.data for p in parameters]
    size = norm(direction)
    # Without a direction the two gradients agree, whatever the step.
    smallest = torch.finfo(size.dtype).tiny ** 0.5
    step = epsilon * norm(here).clamp_min(1e-8)
    step = step / torch.where(size == 0, 1.0, size.clamp_min(smallest))

    def gradient_at(distance: Tensor) -> Sequence[Tensor | None]:
        moved = list(torch._foreach_mul(list(direction), distance))
        torch._foreach_add_(moved, here)
        with pointed_at(parameters, moved):
            return torch.autograd.grad(loss(), targets, allow_unused=True)

    above, below = gradient_at(step), gradient_at(-step)
    return [
        None if a is None or b is None else (a - b) / (2.0 * step)
        for a, b in zip(above, below, strict=True)
    ]


def relative_error(
    found: Sequence[Tensor | None], exact: Sequence[Tensor | None], like: Sequence[Tensor]
) -> Tensor:
    """The norm of the difference, relative to that of ``exact``; 0 where both are zero."""
    true = filled(exact, like)
    off = norm(torch._foreach_sub(filled(found, like), true))
    size = norm(true)
    return torch.where(off == 0, 0.0, off / size.clamp_min(torch.finfo(size.dtype).tiny))


_LATE: WeakKeyDictionary[Level, Tensor] = WeakKeyDictionary()
"""Errors of the last hops on devices, on their way to the host."""


def refuse_above(tolerance: float, error: Tensor, level: Level, instead: str) -> None:
    """Refuse an error above a tolerance. A device's is looked at one hop later: nothing waits.

    Args:
        instead: what to set instead.

    Raises:
        RunError: it is above.
    """
    if error.device.type in ("cpu", "meta"):
        arrived: Tensor | None = error if error.device.type == "cpu" else None
    else:
        arrived = _LATE.get(level)
        host = torch.zeros((), dtype=error.dtype, pin_memory=True)
        _LATE[level] = host.copy_(error, non_blocking=True)
    if arrived is not None and float(arrived) > tolerance:
        raise RunError(
            f"problem {level.name!r}: differences of its gradients are off by {float(arrived):.2g} "
            f"of an exact product, more than the tolerance {tolerance:g}: its loss has kinks "
            f"(ReLU, max-pooling) or epsilon doesn't fit it; set the hypergradient's {instead}"
        )
