"""How far one optimizer step moves a parameter per unit of gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlseg.errors import UserError


@torch.no_grad()
def one_step_scale(
    vector: Sequence[Tensor],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    preconditioned: bool,
) -> list[Tensor]:
    """Multiply ``vector`` by ``-d(step)/d(gradient)`` of the optimizer's last step.

    Without ``preconditioned`` that is the learning rate of each parameter's group. With it, it is
    the diagonal matrix below, in which second moments are held at their present values (their own
    derivative, of higher order in the gradient, is left out), with ``t`` the number of steps taken:

    ========  ==================================================================================
    SGD       eta, times (1 - dampening) with momentum, times (1 + momentum) with Nesterov
    RMSprop   eta / (sqrt(v) + eps); v less the squared mean when centred
    Adam(W)   eta (1 - beta1) / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); v the largest so
              far with AMSGrad
    Adagrad   eta / (1 + (t - 1) lr_decay) / (sqrt(v) + eps)
    ========  ==================================================================================

    An optimizer that ascends (``maximize``) has the opposite sign. A parameter that the optimizer
    has no state for (no step yet) or doesn't hold gets the plain learning rate, or zero. SGD leaves
    its very first step undampened; nothing in its state tells that step apart, and the table's
    factor is taken there as well.

    Args:
        vector: one tensor per parameter.
        parameters: in the order of ``vector``.

    ``preconditioned`` takes an optimizer of the table, see :func:`check_known`.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scaled = []
    for v, p in zip(vector, parameters, strict=True):
        group = groups.get(id(p))
        if group is None:
            scaled.append(torch.zeros_like(v))  # nothing ever steps it
            continue
        sign = -1.0 if group.get("maximize") else 1.0
        state = optimizer.state.get(p, {})
        if preconditioned and state:
            factor, denominator = _diagonal(optimizer, group, state)
        else:
            factor, denominator = group["lr"], None
        if denominator is None:
            scaled.append(v * (sign * factor))
        else:
            # In the denominator's own storage: these are passes over all of a network's parameters.
            scaled.append(torch.div(v, denominator, out=denominator).mul_(sign * factor))
    return scaled


@torch.no_grad()
def objective(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[list[int], list[Tensor | float]]:
    """What an optimizer descends, compared with the loss it is given.

    That is the loss (its negative, when it maximises) plus half of its L2 weight decay times the
    squared norm. AdamW's decay is decoupled from the gradient: its steps vanish where
    ``g + decay (sqrt(v) + eps) w`` does, with ``v`` the debiased second moment, which counts here
    at its present value.

    Returns:
        per parameter the loss's sign (0: the optimizer doesn't hold it, nothing steps it), and the
        diagonal that the decay adds to the Hessian.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    signs: list[int] = []
    decays: list[Tensor | float] = []
    for p in parameters:
        group = groups.get(id(p))
        if group is None:
            signs.append(0)
            decays.append(0.0)
            continue
        signs.append(-1 if group.get("maximize") else 1)
        decay: Tensor | float = group.get("weight_decay", 0.0)
        if decay and _is_decoupled(optimizer, group):
            state = optimizer.state.get(p, {})
            if state:
                second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
                correction = 1.0 - group["betas"][1] ** _steps(state)
                decay = decay * ((second / correction).sqrt().to(p.dtype) + group["eps"])
            else:
                decay = 0.0
        decays.append(decay)
    return signs, decays


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


def _diagonal(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> tuple[Tensor | float, Tensor | None]:
    """The table's entry as a scalar over a fresh tensor; None stands for 1."""
    lr = group["lr"]
    if isinstance(optimizer, torch.optim.SGD):
        momentum, dampening = group["momentum"], group["dampening"]
        fresh = 1.0 - dampening if momentum else 1.0
        return lr * (1.0 + momentum * fresh if group["nesterov"] else fresh), None
    if isinstance(optimizer, torch.optim.RMSprop):
        second = state["square_avg"]
        if group["centered"]:
            second = second - state["grad_avg"] ** 2
        return lr, second.sqrt().add_(group["eps"])
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        beta1, beta2 = group["betas"]
        step = _steps(state)
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        # Numerator and denominator of the table, both times the square root of the correction.
        root = (1.0 - beta2**step) ** 0.5
        factor = lr * (1.0 - beta1) / (1.0 - beta1**step) * root
        return factor, second.sqrt().add_(group["eps"] * root)
    if isinstance(optimizer, torch.optim.Adagrad):
        rate = lr / (1.0 + (_steps(state) - 1.0) * group["lr_decay"])
        return rate, state["sum"].sqrt().add_(group["eps"])
    raise AssertionError("check_known has let it pass")


def check_known(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer's step per unit of gradient is known.

    Raises:
        UserError: it isn't.
    """
    if not isinstance(optimizer, _KNOWN):
        raise UserError(
            "scale 'optimizer' knows SGD, RMSprop, Adam, AdamW and Adagrad, not "
            f"{type(optimizer).__name__}; set the hypergradient's scale to 'learning_rate'"
        )


_KNOWN = (
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
)


def _steps(state: dict[str, Any]) -> Tensor:
    """Steps taken: on the host, or on the device for a fused optimizer there; never read.

    In double precision, as in torch's own update: 1 - beta^t cancels in single precision.
    """
    return torch.as_tensor(state["step"]).to(torch.float64)
