"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from mlseg.hypergradients.optimizers.base import (
    COUNT,
    Diagonal,
    Hold,
    Moments,
    count_of,
    counts_of,
    descent,
    each,
    register,
    safe_sqrt,
    sign_of,
)


@register
class Adagrad(Diagonal):
    """``torch.optim.Adagrad``.

    Attributes:
        lr_decay: by which the rate falls: it is divided by 1 + steps taken x lr_decay.
        eps: added to the root of the sum of squared gradients.
    """

    name: Literal["adagrad"] = "adagrad"
    lr_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-10

    torch_class = torch.optim.Adagrad

    @staticmethod
    def step(
        w: Tensor, g: Tensor, moments: Moments, group: Mapping[str, Any], hold: Hold
    ) -> tuple[Tensor, Moments]:
        """Decay of the rate, initial accumulator, L2 weight decay."""
        g = descent(w, g, group)
        count = hold(COUNT, count_of(moments) + 1.0)
        start = torch.full_like(w, group["initial_accumulator_value"])
        total = hold("sum", moments.get("sum", start) + g * g)
        rate = group["lr"] / (1.0 + (count - 1.0) * group["lr_decay"]).to(w.dtype)
        return w - rate * g / (safe_sqrt(total) + group["eps"]), {COUNT: count, "sum": total}

    @classmethod
    def scaled_together(
        cls, v: list[Tensor], moments: Sequence[Moments], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``eta / (1 + (t - 1) lr_decay) v / (sqrt(u) + eps)``, with ``u`` the second moment and
        ``t`` the steps taken."""
        counts = counts_of(moments, group)
        rate = group["lr"] / (1.0 + (counts - 1.0) * group["lr_decay"])
        denominators = torch._foreach_sqrt([m["sum"] for m in moments])
        torch._foreach_add_(denominators, group["eps"])
        result = list(torch._foreach_div(v, denominators))
        torch._foreach_mul_(result, each(sign_of(group) * rate, v[0]))
        return result
