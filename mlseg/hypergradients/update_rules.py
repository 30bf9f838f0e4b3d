"""How far one optimizer step moves a parameter per unit of gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    SGD       eta, times (1 + momentum) with Nesterov; (1 - dampening) from the second step on
    RMSprop   eta / (sqrt(v) + eps); v less the squared mean when centred
    Adam(W)   eta (1 - beta1) / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    Adagrad   eta / (1 + (t - 1) lr_decay) / (sqrt(v) + eps)
    ========  ==================================================================================

    A parameter that the optimizer has no state for (no step yet) or doesn't hold gets the plain
    learning rate, or zero.

    Args:
        vector: one tensor per parameter.
        parameters: in the order of ``vector``.

    Raises:
        ValueError: ``preconditioned`` with an optimizer that isn't in the table.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scaled = []
    for v, p in zip(vector, parameters, strict=True):
        group = groups.get(id(p))
        if group is None:
            scaled.append(torch.zeros_like(v))  # nothing ever steps it
            continue
        lr = group["lr"]
        state = optimizer.state.get(p, {})
        if preconditioned and state:
            scaled.append(v * _diagonal(optimizer, group, state))
        else:
            scaled.append(v * lr)
    return scaled


def _diagonal(optimizer: torch.optim.Optimizer, group: dict, state: dict) -> Tensor | float:
    lr = group["lr"]
    if isinstance(optimizer, torch.optim.SGD):
        momentum, dampening = group["momentum"], group["dampening"]
        fresh = 1.0 - dampening if momentum else 1.0
        return lr * (1.0 + momentum * fresh if group["nesterov"] else fresh)
    if isinstance(optimizer, torch.optim.RMSprop):
        second = state["square_avg"]
        if group["centered"]:
            second = second - state["grad_avg"] ** 2
        return lr / (second.sqrt() + group["eps"])
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        beta1, beta2 = group["betas"]
        # ``step`` is a tensor on the host unless the optimizer is capturable: no synchronisation.
        step = state["step"]
        first = (1.0 - beta1) / (1.0 - beta1**step)
        second = state["exp_avg_sq"] / (1.0 - beta2**step)
        return lr * first / (second.sqrt() + group["eps"])
    if isinstance(optimizer, torch.optim.Adagrad):
        step = state["step"]
        return lr / (1.0 + (step - 1.0) * group["lr_decay"]) / (state["sum"].sqrt() + group["eps"])
    raise ValueError(
        f"scale 'optimizer' knows SGD, RMSprop, Adam, AdamW and Adagrad, not "
        f"{type(optimizer).__name__}; set the hypergradient's scale to 'learning_rate'"
    )
