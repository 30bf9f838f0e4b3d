"""The model that the lookahead starts from, where it comes from another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mlseg import checkpoint
from mlseg.errors import UserError, one_line
from mlseg.multilevel import restoring
from mlseg.multilevel.problem import Problem


def load_start(network: nn.Module, path: Path, num_classes: int) -> dict[str, Any]:
    """Load the segmentor of another run; returns the whole checkpoint.

    Args:
        path: its ``checkpoints/best.pt``, ``last.pt`` or ``start.pt``.

    Raises:
        UserError: no checkpoint, one without a segmentor, or of other classes or another shape.
    """
    state = checkpoint.load(path)
    description = state.get("segmentor")
    if description is None:
        raise UserError(f"start: {path} has no segmentor; name a run's checkpoints/best.pt")
    with checkpoint.taking(f"start: {path}", "name another run's checkpoint"):
        classes, settings = description["num_classes"], description["settings"]
        tensors = state["problems"][description["problem"]]["module"]
    if classes != num_classes:
        raise UserError(
            f"start: {path} has {str(classes)[:40]} classes, the data have {num_classes}; "
            "name a model of the same classes, or train one (start=null)"
        )
    try:
        checkpoint.load_module(network, tensors)
    except Exception as error:  # the file may hold anything
        raise UserError(
            f"start: {path} doesn't fit the segmentor of this config "
            f"({settings}); use the same segmentor settings "
            f"[{one_line(error)}]"
        ) from error
    return state


def go_on(pretraining: Problem, start: dict[str, Any]) -> None:
    """Let the control go on with stage 1's optimizer and rate, if the start model brings them.

    A fresh optimizer would take its first steps without averages, at the rate that stage 1 began
    with: worse steps than a run that had simply gone on would take.

    Raises:
        UserError: the optimizer or the scheduler is of another kind.
    """
    if "pretraining" not in start:
        return
    with checkpoint.taking("start: the optimizer", "name another run's checkpoint"):
        _go_on(pretraining, start["pretraining"])


def _go_on(pretraining: Problem, saved: dict[str, Any]) -> None:
    optimizer, scheduler = pretraining.optimizer, pretraining.scheduler
    kinds = {
        "optimizer": (optimizer.param_groups[0], saved["optimizer"]["param_groups"][0]),
        "scheduler": (scheduler.state_dict() if scheduler else {}, saved["scheduler"] or {}),
    }
    for key, (mine, its) in kinds.items():
        # A scheduler leaves its mark on the optimizer's groups.
        if set(mine) - {"initial_lr"} != set(its) - {"initial_lr"}:
            raise UserError(
                f"problems.pretraining.{key}: the start model was trained with another kind; use "
                "the same for the control to go on from it"
            )
    restoring.check_optimizer(optimizer, saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        restoring.check_scheduler(scheduler, saved["scheduler"])
        scheduler.load_state_dict(saved["scheduler"])


def training_state(problem: Problem) -> dict[str, Any]:
    """Of its optimizer and its scheduler, if it has one: what :func:`go_on` needs."""
    scheduler = problem.scheduler
    return {
        "optimizer": problem.optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }
