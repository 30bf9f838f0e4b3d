"""Weights that nothing but their decay moves, on a processor.

A tap of a kernel that meets only padding, or a candidate whose weight is 0, has no gradient but
that of its L2 penalty. An optimizer that divides by the gradient's own size takes such a weight to
0, and on through numbers that its type barely holds: weight and moments become subnormal. A CPU
calculates with those some hundred times as slowly.
"""

from typing import Any

import torch
from torch import Tensor

EVERY = 20
"""Steps of the optimizer between two looks: a look reads every weight once."""


def clear(optimizer: Any) -> None:
    """Set to 0, every so many steps, weights that their decay has taken next to it.

    Those are weights whose square is below the smallest normal number (1e-19 in single precision):
    far below any rounding of what is trained. Their moments are set to 0 as well.

    The steps are the optimizer's own, from its state, so that a step that is taken again, and a
    resumed run, does the same.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):  # Betty takes other things too
        return
    for group in optimizer.param_groups:
        # Without an eps, a moment of 0 is what the step is divided by.
        if not (group.get("weight_decay") and group.get("eps")):
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not _is_due(parameter, state.get("step")):
                continue
            small = parameter.detach().abs() < torch.finfo(parameter.dtype).tiny ** 0.5
            if small.any():
                for tensor in (parameter, *state.values()):
                    if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                        tensor.detach().masked_fill_(small, 0)


def _is_due(parameter: Tensor, step: Any) -> bool:
    if type(step) is not Tensor or {parameter.device.type, step.device.type} != {"cpu"}:
        return False  # a device doesn't mind, and isn't waited for
    return parameter.dim() > 0 and parameter.is_floating_point() and int(step) % EVERY == 0
