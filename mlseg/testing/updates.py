"""Optimizers' updates as differentiable functions, second moments held at their present values.

Each takes the optimizer after its step, its ``state_dict`` before it, the parameter's index, the
parameter before the step and the gradient; it returns the parameter after the step.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Update = Callable[[torch.optim.Optimizer, dict[str, Any], int, Tensor, Tensor], Tensor]


def sgd(optimizer: Any, before: dict[str, Any], index: int, p: Tensor, g: Tensor) -> Tensor:
    """``torch.optim.SGD``."""
    group = optimizer.param_groups[0]
    g = g + group["weight_decay"] * p
    g = -g if group["maximize"] else g
    if group["momentum"]:
        former = before["state"].get(index)
        buffer = g
        if former is not None:
            buffer = group["momentum"] * former["momentum_buffer"] + (1 - group["dampening"]) * g
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return p - group["lr"] * g


def rmsprop(optimizer: Any, before: dict[str, Any], index: int, p: Tensor, g: Tensor) -> Tensor:
    """``torch.optim.RMSprop``."""
    group, now = optimizer.param_groups[0], _state(optimizer, index)
    second = now["square_avg"]
    if group["centered"]:
        second = second - now["grad_avg"] ** 2
    g = g + group["weight_decay"] * p
    direction = g / (second.sqrt() + group["eps"])
    if group["momentum"]:
        direction = direction + group["momentum"] * _before(before, index, "momentum_buffer", g)
    return p - group["lr"] * direction


def adam(optimizer: Any, before: dict[str, Any], index: int, p: Tensor, g: Tensor) -> Tensor:
    """``torch.optim.Adam`` and ``AdamW``."""
    group, now = optimizer.param_groups[0], _state(optimizer, index)
    (beta1, beta2), t = group["betas"], float(now["step"])
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    decay = group["weight_decay"]
    g = g if decoupled else g + decay * p
    first = beta1 * _before(before, index, "exp_avg", g) + (1 - beta1) * g
    second = now["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    direction = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"])
    return p * (1 - group["lr"] * decay * decoupled) - group["lr"] * direction


def adagrad(optimizer: Any, before: dict[str, Any], index: int, p: Tensor, g: Tensor) -> Tensor:
    """``torch.optim.Adagrad``."""
    group, now = optimizer.param_groups[0], _state(optimizer, index)
    rate = group["lr"] / (1 + (float(now["step"]) - 1) * group["lr_decay"])
    return p - rate * (g + group["weight_decay"] * p) / (now["sum"].sqrt() + group["eps"])


def _before(before: dict[str, Any], index: int, key: str, like: Tensor) -> Tensor:
    """A moment before the step, zero before the first one."""
    return before["state"].get(index, {}).get(key, torch.zeros_like(like))


def _state(optimizer: Any, index: int) -> dict[str, Tensor]:
    """Of the parameter ``index`` after the step."""
    return copy.deepcopy(optimizer.state_dict()["state"][index])
