"""Attention that can be differentiated twice.

torch picks a kernel for ``scaled_dot_product_attention`` by device and shape; of them only the one
made of matrix products has a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def _by_products(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    with sdpa_kernel(SDPBackend.MATH):
        return function(*args, **kwargs)


HANDLERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    function: partial(_by_products, function)
    for function in (
        functional.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
    )
}
"""What stands in for torch's functions; None as their result: take torch's own."""
