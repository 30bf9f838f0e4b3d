"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from mlseg.hypergradients.optimizers.base import (
    Diagonal,
    Hold,
    Moments,
    descent,
    factors,
    register,
    sign_of,
)


@register
class Sgd(Diagonal):
    """Stochastic gradient descent; ``torch.optim.SGD``.

    Attributes:
        momentum: how much of the last step's direction is kept.
        nesterov: whether the gradient is looked up ahead, where momentum leads to.
    """

    name: Literal["sgd"] = "sgd"
    momentum: NonNegativeFloat = 0.0
    nesterov: bool = False

    torch_class = torch.optim.SGD
    fused = True

    @staticmethod
    def step(
        w: Tensor, g: Tensor, moments: Moments, group: Mapping[str, Any], hold: Hold
    ) -> tuple[Tensor, Moments]:
        """Momentum, dampening, Nesterov, L2 weight decay."""
        g = descent(w, g, group)
        after: Moments = {}
        if group["momentum"]:
            buffer = g
            if "momentum_buffer" in moments:
                fresh = 1.0 - group["dampening"]
                buffer = group["momentum"] * moments["momentum_buffer"] + fresh * g
            after["momentum_buffer"] = buffer
            g = g + group["momentum"] * buffer if group["nesterov"] else buffer
        return w - group["lr"] * g, after

    @classmethod
    def scaled_together(
        cls, v: list[Tensor], moments: Sequence[Moments], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``eta v``, times (1 - dampening) with momentum, times (1 + momentum) with Nesterov.

        SGD leaves its very first step undampened; nothing in its state tells that step apart, and
        it counts as dampened here.
        """
        momentum = group["momentum"]
        fresh = 1.0 - group["dampening"] if momentum else 1.0
        factor = group["lr"] * (1.0 + momentum * fresh if group["nesterov"] else fresh)
        return list(torch._foreach_mul(v, factors(sign_of(group) * factor, len(v))))
