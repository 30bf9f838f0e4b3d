"""The table of optimizers: those of this folder's files, and a user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlseg.errors import UserError
from mlseg.hypergradients.optimizers.base import Optimizer, registered

if TYPE_CHECKING:
    from mlseg.hypergradients.level import Level


def known() -> list[type[Optimizer]]:
    """All of them, by name."""
    return sorted(registered().values(), key=lambda cls: str(cls.model_fields["name"].default))


def find(optimizer: torch.optim.Optimizer) -> type[Optimizer] | None:
    """What is known of an optimizer, by its class or the nearest one that it derives from."""
    table = registered()
    return next((table[cls] for cls in type(optimizer).__mro__ if cls in table), None)


def check_known(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    """What is known of an optimizer.

    Raises:
        UserError: nothing, so that its step per unit of gradient isn't.
    """
    kind = find(optimizer)
    if kind is None:
        raise UserError(
            f"scale 'optimizer' knows {_listed()}, not {type(optimizer).__name__}; set the "
            "hypergradient's scale to 'learning_rate'"
        )
    return kind


def optimizer_of(level: Level) -> type[Optimizer]:
    """What is known of a level's optimizer, and thus of its steps.

    Raises:
        UserError: nothing, or the level steps in a way of its own.
    """
    optimizer = level.stepping.optimizer
    what = f"the step of {type(optimizer).__name__}"
    if "custom_optimizer_step" in level.stepping.hooks:
        what = "a custom_optimizer_step"
    elif (kind := find(optimizer)) is not None:
        return kind
    raise UserError(
        f"problem {level.name!r}: {what} can't be differentiated, only that of {_listed()}; take "
        "one of these, a method that doesn't need it (cg, identity), or unrolled with backend: "
        "higher"
    )


def _listed() -> str:
    *most, last = (cls.torch_class.__name__ for cls in known())
    return f"{', '.join(most)} and {last}"
