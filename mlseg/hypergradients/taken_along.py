"""The gradient by a hop's inputs that a level's training step could have returned.

A one-sided difference of gradients needs the unperturbed one, at the weights that the level's last
step started from. That step's own backward pass passes the inputs anyhow, or nearly: taken along
there it spares the hop an evaluation.

It holds for as long as nothing else that the loss depends on has changed: where another level has
stepped since, or a parameter of it been written to, the gradient is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from mlseg.errors import UserError


class Other(Protocol):
    """Another level."""

    @property
    def name(self) -> str:
        """As in its engine."""


@dataclass(frozen=True)
class Used:
    """A parameter of another level that a loss depended on.

    Attributes:
        level, parameter: whose it is, and itself.
        steps, version: what both had counted then. Fused optimizers' kernels leave a tensor's own
            count of its changes as it is.
    """

    level: Other
    parameter: Tensor
    steps: int
    version: int

    @classmethod
    def now(cls, level: Other, parameter: Tensor) -> Used:
        """As it is at present."""
        return cls(level, parameter, getattr(level, "_steps_taken", 0), parameter._version)

    def has_changed(self) -> bool:
        """Whether it isn't what it was."""
        now = Used.now(self.level, self.parameter)
        return (now.steps, now.version) != (self.steps, self.version)


@dataclass(frozen=True)
class TakenAlong:
    """A gradient, and what it holds for.

    Attributes:
        inputs: that the loss was differentiated by: an interface's tensors, or the sources'
            parameters.
        gradient: one per input, None for zero.
        depends: parameters of other levels that the loss depended on.
    """

    inputs: Sequence[Tensor]
    gradient: Sequence[Tensor | None]
    depends: Sequence[Used]

    def check(self, level: str) -> None:
        """Refuse where it no longer holds.

        Raises:
            UserError: another level of the loss has stepped since.
        """
        for used in self.depends:
            if used.has_changed():
                raise UserError(
                    f"problem {level!r}: {used.level.name!r}, which its loss depends on, has "
                    "stepped between its step and the hop, so that a one-sided difference would "
                    "compare two different losses; set the hypergradient's scheme to central"
                )


def depended_on(
    loss: Tensor, inputs: Sequence[Tensor], others: Sequence[tuple[Other, Tensor]]
) -> list[Used]:
    """Which of other levels' parameters a loss depends on, by its graph; not through ``inputs``.

    What is frozen leaves no trace there, and counts.
    """
    found: set[int] = set()
    seen: set[Node] = {z.grad_fn for z in inputs if z.grad_fn is not None}
    begun = [loss.grad_fn]
    while begun:
        node = begun.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.add(id(variable))
        begun += [following for following, _ in node.next_functions]
    return [Used.now(level, p) for level, p in others if id(p) in found or not p.requires_grad]


def with_inputs(
    loss: Tensor,
    parameters: Sequence[Tensor],
    inputs: Sequence[Tensor],
    others: Sequence[tuple[Other, Tensor]],
    retain_graph: bool,
) -> tuple[Sequence[Tensor | None], TakenAlong]:
    """The gradient by a level's parameters, and with the same pass that by a hop's inputs.

    Args:
        others: parameters of other levels, with these.
        retain_graph: as of ``torch.autograd.grad``.
    """
    used = depended_on(loss, inputs, others)
    wanted = [z for z in inputs if z.requires_grad]
    both = torch.autograd.grad(
        loss, [*parameters, *wanted], allow_unused=True, retain_graph=retain_graph
    )
    rest = iter(both[len(parameters) :])
    by_inputs = [next(rest) if z.requires_grad else None for z in inputs]
    return both[: len(parameters)], TakenAlong(inputs, by_inputs, used)
