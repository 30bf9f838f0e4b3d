"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from mlseg.hypergradients.optimizers.base import (
    COUNT,
    Diagonal,
    Hold,
    Moments,
    count_of,
    descent,
    factors,
    register,
    safe_sqrt,
    sign_of,
)


@register
class RmsProp(Diagonal):
    """``torch.optim.RMSprop``.

    Attributes:
        momentum: how much of the last step's direction is kept.
        alpha: how much of the running mean of the squared gradient is kept.
        eps: added to its root.
    """

    name: Literal["rmsprop"] = "rmsprop"
    momentum: NonNegativeFloat = 0.0
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    eps: PositiveFloat = 1e-8

    torch_class = torch.optim.RMSprop

    @staticmethod
    def step(
        w: Tensor, g: Tensor, moments: Moments, group: Mapping[str, Any], hold: Hold
    ) -> tuple[Tensor, Moments]:
        """Centred or not, momentum, L2 weight decay."""
        g = descent(w, g, group)
        alpha, zero = group["alpha"], torch.zeros_like(w)
        second = alpha * moments.get("square_avg", zero) + (1.0 - alpha) * g * g
        second = hold("square_avg", second)
        after: Moments = {COUNT: count_of(moments) + 1.0, "square_avg": second}
        spread = second
        if group["centered"]:
            mean = hold("grad_avg", alpha * moments.get("grad_avg", zero) + (1.0 - alpha) * g)
            after["grad_avg"] = mean
            spread = second - mean * mean
        direction = g / (safe_sqrt(spread) + group["eps"])
        if group["momentum"]:
            direction = group["momentum"] * moments.get("momentum_buffer", zero) + direction
            after["momentum_buffer"] = direction
        return w - group["lr"] * direction, after

    @classmethod
    def scaled_together(
        cls, v: list[Tensor], moments: Sequence[Moments], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``eta v / (sqrt(u) + eps)``, with ``u`` the second moment, less the squared mean when
        centred."""
        second = [m["square_avg"] for m in moments]
        if group["centered"]:
            mean = [m["grad_avg"] for m in moments]
            second = list(torch._foreach_sub(second, torch._foreach_mul(mean, mean)))
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        result = list(torch._foreach_div(v, denominators))
        torch._foreach_mul_(result, factors(sign_of(group) * group["lr"], len(result)))
        return result
