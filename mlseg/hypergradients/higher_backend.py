"""Unrolled differentiation by the library ``higher``, on a level's recorded steps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.hypergradients.gradient_hooks import applied
from mlseg.hypergradients.hop import Cotangents
from mlseg.hypergradients.level import Level, Vector
from mlseg.hypergradients.optimizers import COUNT
from mlseg.hypergradients.replay import Replay
from mlseg.hypergradients.substitution import check_none_left, substituted
from mlseg.hypergradients.trajectory import Step

_HOOKS = ("param_callback", "grad_callback", "custom_optimizer_step")
"""Where a level changes its steps, which ``higher`` knows nothing of."""


def check_differentiable(level: Level, wants_graphs: bool) -> None:
    """Refuse a level that ``higher`` would differentiate wrongly, or not at all.

    Raises:
        UserError: with the mend.
    """
    stepping, why = level.stepping, None
    optimizer = stepping.optimizer
    if wants_graphs:
        why = "builds graphs of its own: set store to weights"
    elif type(optimizer) not in higher.optim._opt_mapping:
        known = sorted(cls.__name__ for cls in higher.optim._opt_mapping)
        why = f"doesn't know {type(optimizer).__name__}, only {', '.join(known)}"
    elif any(group.get("maximize") for group in optimizer.param_groups):
        why = "doesn't know maximize: set backend to mlseg"
    elif stepping.batches > 1 or stepping.clip:
        why = "takes one batch a step, unclipped, here: set backend to mlseg"
    elif changed := [hook for hook in _HOOKS if hook in stepping.hooks]:
        why = f"takes its steps again without {changed[0]}: set backend to mlseg, or leave it out"
    elif stepping.below:
        why = "serves levels without lower ones here: set backend to mlseg"
    if why is not None:
        raise UserError(f"problem {level.name!r}: the backend higher {why}")


def backward_through(replay: Replay, vector: Vector, fresh: bool) -> Cotangents:
    """``(dw_T / d inputs)^T vector``, the steps taken again from the first on.

    Args:
        fresh: start with a new optimizer's state.
    """
    level = replay.level
    optimizer = _optimizer(replay, fresh)
    weights: Sequence[Tensor] = [w.clone().requires_grad_() for w in replay.steps[0].weights]
    with level.again.untraced():
        for step in replay.steps:
            (loss,) = replay.losses(step)
            with substituted(level.again.modules(), replay.parameters, weights):
                value = loss()
                # Within the block: what is checkpointed passes its networks again in here.
                left = torch.autograd.grad(
                    value, replay.parameters, retain_graph=True, allow_unused=True
                )
                check_none_left(level.name, left, "backend to mlseg")
                weights = optimizer.step(
                    value,
                    params=weights,
                    override=_rates(replay, step),
                    grad_callback=lambda gradients: applied(
                        parallel.averaged(gradients), replay.parameters
                    ),
                )
            replay.hop.products += 1
    pairs = [
        (w, v)
        for w, v in zip(weights, replay.hop.spread(vector), strict=True)
        if w.requires_grad and w.grad_fn is not None
    ]
    if not pairs:
        return [None] * len(replay.hop.inputs)
    outputs, along = zip(*pairs, strict=True)

    def refuse(*_: Any) -> None:
        raise UserError(
            f"problem {level.name!r}: a checkpointed part (torch.utils.checkpoint) of its loss is "
            "passed again where the backend higher has put the weights of each step aside; set "
            "backend to mlseg"
        )

    passes = register_module_forward_pre_hook(refuse)
    try:
        return torch.autograd.grad(
            outputs, replay.hop.inputs, grad_outputs=along, allow_unused=True
        )
    finally:
        passes.remove()


def _optimizer(replay: Replay, fresh: bool) -> DifferentiableOptimizer:
    first = replay.steps[0]
    # A stand-in for the level's optimizer as it was at the first step.
    before = copy.copy(replay.stepping.optimizer)
    trainable = {id(p) for p in replay.parameters}
    before.param_groups = [
        {**group, "params": [p for p in group["params"] if id(p) in trainable]}
        for group in before.param_groups
    ]
    before.state = defaultdict(dict)
    if not fresh:
        for p, moments in zip(replay.parameters, first.moments, strict=True):
            if moments:
                state: dict[str, Any] = {k: v.clone() for k, v in moments.items()}
                if COUNT in state:
                    state[COUNT] = int(state[COUNT])
                before.state[p] = state
    return higher.optim.get_diff_optim(before, replay.parameters, track_higher_grads=True)


def _rates(replay: Replay, step: Step) -> dict[str, list[Any]]:
    """The step's learning rate per parameter group."""
    if replay.rates is not None:
        return {"lr": list(replay.rates)}
    rates = [group["lr"] for group in replay.stepping.optimizer.param_groups]
    for settings in step.groups:
        if settings is not None:
            rates[settings["index"]] = settings["lr"]
    return {"lr": rates}
