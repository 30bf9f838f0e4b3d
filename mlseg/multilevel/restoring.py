"""Whether what a checkpoint holds of a level can be that level's: all that torch doesn't check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlseg.checkpoint import require_form, require_types

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem


def check(problem: Problem, state: Mapping[str, Any]) -> None:
    """Check a level's state before anything of it is taken over.

    ``load_state_dict`` of modules checks names and shapes itself, that of optimizers the number of
    groups and parameters, that of schedulers nothing at all.

    Raises:
        ValueError, KeyError: it isn't this level's; names the place.
    """
    for name, own in (
        ("count", problem.count),
        ("inner_loop_start", True),
        ("ready", problem.ready),
    ):
        require_form(own, state[name], name)
    if len(state["ready"]) != len(problem.ready):
        raise ValueError(f"ready has {len(state['ready'])} entries, not {len(problem.ready)}")
    require_types(problem.module.state_dict(), state["module"])
    for name, figure in state["metrics"].items():
        if not isinstance(name, str) or not isinstance(figure, (Tensor, int, float)):
            raise ValueError(f"metrics.{name} is no figure")
    if problem.optimizer is not None:
        check_optimizer(problem.optimizer, state["optimizer"])
    if problem.scheduler is not None:
        check_scheduler(problem.scheduler, state["scheduler"])


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Check an optimizer's state; ValueError or KeyError if it isn't this one's."""
    own = optimizer.state_dict()
    for index, (mine, its) in enumerate(
        zip(own["param_groups"], state["param_groups"], strict=True)
    ):
        name = f"optimizer.param_groups.{index}"
        if mine["params"] != its["params"]:
            raise ValueError(f"{name}.params are other ones")
        for key in (mine.keys() & its.keys()) - {"params"}:  # torch knows more of them over time
            # A rate may be a number of either kind, or where the level sets it a tensor.
            if not (isinstance(its[key], Tensor) and its[key].numel() == 1):
                require_form(mine[key], its[key], f"{name}.{key}", loose=True)
            if key == "lr" and not float(its[key]) >= 0:
                raise ValueError(f"{name}.lr is {float(its[key])}")
    check_slots(optimizer, state["state"])


_SCALARS = ("step", "eta", "mu", "mu_product")
"""What torch's optimizers keep of a parameter that hasn't its shape."""


def check_slots(optimizer: torch.optim.Optimizer, slots: Mapping[int, Any]) -> None:
    """Check what an optimizer keeps of its parameters.

    Fused kernels go through the memory of a parameter and of its moments side by side, and don't
    ask how much of it there is.

    Args:
        slots: by the parameter's number, counted over all groups.

    Raises:
        ValueError: a tensor hasn't its parameter's shape, or something else is no tensor.
        IndexError: there is no such parameter.
    """
    if not type(optimizer).__module__.startswith("torch.optim") or isinstance(
        optimizer, (torch.optim.LBFGS, torch.optim.Adafactor)
    ):
        return  # what others keep, only they know
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kinds: set[frozenset[str]] = set()
    for index, values in slots.items():
        shape = parameters[index].shape
        kinds.add(frozenset(values))
        for key, value in values.items():
            name = f"optimizer.state.{index}.{key}"
            if key in _SCALARS:
                if not float(value) >= 0:  # a tensor of several elements makes no float
                    raise ValueError(f"{name} is {float(value)}")
            elif isinstance(value, Tensor):
                if value.shape != shape:
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            elif value is not None:
                raise ValueError(f"{name} is no tensor")
    if len(kinds - {frozenset()}) > 1:
        raise ValueError("optimizer.state has other entries for some parameters than for others")


def check_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Check a scheduler's state; ValueError or KeyError if it isn't this one's."""
    own = scheduler.state_dict()
    for key, value in state.items():
        if key in own:
            require_form(own[key], value, f"scheduler.{key}", loose=not key.endswith("epoch"))
        elif hasattr(scheduler, key):
            raise ValueError(f"scheduler.{key} is none of its state")
    missing = [key for key in own if key not in state and not key.startswith("_")]
    if missing:
        raise ValueError(f"scheduler.{missing[0]} is missing")
