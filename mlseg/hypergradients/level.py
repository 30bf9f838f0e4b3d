"""What a hypergradient method may ask of a level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlseg.hypergradients.trajectory import Trajectory
from mlseg.randomness import RandomState

Vector = list[Tensor]
"""A vector in parameter space, one tensor per parameter."""


@dataclass(frozen=True)
class Interface:
    """The tensors through which alone other problems enter a level's loss.

    A level whose loss depends on others only through some tensors ``z(s)`` (a synthetic image, say)
    can say so. The hop then factorises, ``(dw*/ds)^T v = (dz/ds)^T q``: the networks behind ``z``
    are passed through once, backwards, however many evaluations a method takes to find ``q``.

    Attributes:
        tensors: ``z``, as the step computed them, still attached to the graph behind them.
        loss: the part of the step's loss that depends on ``z``, as a function of ``z``.
        random_state: the state of the generators when the step evaluated that part.
        rest: the other part of the step's loss, which the step evaluated right after ``loss``;
            None where there is none. It has no share in the mixed derivative, but in the Hessian.
    """

    tensors: Sequence[Tensor]
    loss: Callable[[Sequence[Tensor]], Tensor]
    random_state: RandomState
    rest: Callable[[], Tensor] | None


@dataclass(frozen=True)
class Stepping:
    """How a level takes a step.

    Attributes:
        optimizer: whose step it is.
        clip: largest norm that the gradient is scaled down to; 0 for no clipping.
        batches: accumulated for one step.
        hooks: which of ``grad_callback``, ``param_callback`` and ``custom_optimizer_step`` the
            level has: where it changes its steps by code of its own.
        below: whether levels below add their hypergradients to its gradient.
        learning_rates: gives the rate of each parameter group as a scalar with the graph behind
            it; None where they don't depend on other problems.
    """

    optimizer: torch.optim.Optimizer
    clip: float
    batches: int
    hooks: frozenset[str]
    below: bool
    learning_rates: Callable[[], Sequence[Tensor] | None]

    @property
    def changes_its_gradient(self) -> bool:
        """Whether a step goes along anything but the gradient of one batch's loss."""
        return self.batches > 1 or self.below or "grad_callback" in self.hooks


class Again(Protocol):
    """A level's loss, evaluated again in full precision.

    Mixed precision is off: the differences that a method takes drown in bfloat16's rounding.
    """

    def untraced(self) -> AbstractContextManager[None]:
        """A block whose evaluations leave no trace in buffers, random streams and by-products."""

    def rewind(self, random_state: RandomState | None = None) -> None:
        """Within :meth:`untraced`: buffers and generators as given, or as at the start of the last
        step."""

    def last_loss(self) -> Tensor:
        """Rewind, then the loss of the (last) batch of the last finished step."""

    def loss(self, batch: Any, random_state: RandomState | None, apart: bool = False) -> Tensor:
        """Rewind to ``random_state``, then the loss of ``batch``.

        Args:
            apart: its graph is still to be walked when another step is evaluated.
        """

    def fresh_loss(self) -> Tensor:
        """The loss of a batch in a stream apart from training's, with draws of its own."""

    def redrawn(self, place: Any) -> Any:
        """The batch that was drawn at a place of the trajectory's, drawn again without a trace."""

    def step_of_optimizer(
        self,
        parameters: Vector,
        gradients: Sequence[Tensor | None],
        moments: Sequence[dict[str, Tensor]],
        groups: Sequence[dict[str, Any] | None],
    ) -> list[dict[str, Tensor]]:
        """Step the parameters in place, by clipping and optimizer as training does, from these
        moments and settings (see :class:`~mlseg.hypergradients.trajectory.Step`); returns the
        moments after it. The optimizer is afterwards what it was."""

    def modules(self) -> list[nn.Module]:
        """Those of all problems, which the loss may compute with; the level's own first."""


class Source(Protocol):
    """A problem whose parameters enter a level's loss."""

    @property
    def name(self) -> str:
        """As in its engine."""

    def trainable_parameters(self) -> Vector:
        """What a hop's gradient is with respect to."""


class Level(Protocol):
    """All that a method may ask of a level; :class:`mlseg.Problem` is one.

    Attributes:
        trajectory: the last steps, as far as the method keeps them.
        interface: the tensors through which other problems entered the last step's loss, where
            the level declares any; a hop uses it up.
        hop_memory: what methods keep from one hop to the next, by the upper level's name.
    """

    trajectory: Trajectory
    interface: Interface | None
    hop_memory: dict[str, dict[str, Tensor]]

    @property
    def name(self) -> str:
        """As in its engine; for messages."""

    @property
    def count(self) -> int:
        """Batches taken so far."""

    @property
    def unroll_steps(self) -> int:
        """Own steps per step of the level above."""

    @property
    def precision(self) -> str:
        """Of its training steps: ``fp32`` or ``bf16``."""

    @property
    def stepping(self) -> Stepping:
        """How it steps."""

    @property
    def again(self) -> Again:
        """Its loss, evaluated again without a trace."""

    def trainable_parameters(self) -> Vector:
        """Those that its steps move."""

    def meta_trainable_parameters(self) -> Vector:
        """Those by which upper losses are differentiated: all the trainable ones, or some."""

    def sources(self) -> Sequence[Source]:
        """The problems to which a hypergradient goes on from here, on any path."""
