"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, Strict
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

Betas = Annotated[tuple[float, float], Strict(False)]


@register
class Adam(Diagonal):
    """``torch.optim.Adam``.

    Attributes:
        betas: of the running means of gradient and squared gradient.
        eps: added to the root of the latter; it matters where gradients are tiny, as hypergradients
            are.
    """

    name: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    fused = True

    @staticmethod
    def step(
        w: Tensor, g: Tensor, moments: Moments, group: Mapping[str, Any], hold: Hold
    ) -> tuple[Tensor, Moments]:
        """L2 or decoupled weight decay, AMSGrad."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if group.get("decoupled_weight_decay"):
            g = -g if group.get("maximize") else g
            w = w * (1.0 - lr * group["weight_decay"])
        else:
            g = descent(w, g, group)
        count, zero = hold(COUNT, count_of(moments) + 1.0), torch.zeros_like(w)
        first = beta1 * moments.get("exp_avg", zero) + (1.0 - beta1) * g
        second = beta2 * moments.get("exp_avg_sq", zero) + (1.0 - beta2) * g * g
        second = hold("exp_avg_sq", second)
        after = {COUNT: count, "exp_avg": first, "exp_avg_sq": second}
        if group["amsgrad"]:
            second = torch.maximum(moments.get("max_exp_avg_sq", zero), second)
            after["max_exp_avg_sq"] = second = hold("max_exp_avg_sq", second)
        # In double precision, as in torch: 1 - beta^t cancels in single precision.
        correction1, correction2 = 1.0 - beta1**count, 1.0 - beta2**count
        denominator = safe_sqrt(second) / correction2.sqrt().to(w.dtype) + group["eps"]
        return w - lr / correction1.to(w.dtype) * first / denominator, after

    @classmethod
    def scaled_together(
        cls, v: list[Tensor], moments: Sequence[Moments], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``eta (1 - beta1) / (1 - beta1^t) v / (sqrt(u / (1 - beta2^t)) + eps)``.

        ``u`` is the second moment, the largest so far with AMSGrad, ``t`` the steps taken.
        """
        (beta1, beta2), counts = group["betas"], counts_of(moments, group)
        second = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        # Numerator and denominator, both times the square root of the correction.
        root = (1.0 - beta2**counts) ** 0.5
        factor = group["lr"] * (1.0 - beta1) / (1.0 - beta1**counts) * root
        denominators = torch._foreach_sqrt([m[second] for m in moments])
        torch._foreach_add_(denominators, each(group["eps"] * root, v[0]))
        result = list(torch._foreach_div(v, denominators))
        torch._foreach_mul_(result, each(sign_of(group) * factor, v[0]))
        return result


@register
class AdamW(Adam):
    """``torch.optim.AdamW``."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    weight_decay: NonNegativeFloat = 1e-2

    torch_class = torch.optim.AdamW
