"""A level's last steps, taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlseg.hypergradients.base import Hop
from mlseg.hypergradients.optimizers.maps import Moments, StepMap, rule_of
from mlseg.hypergradients.trajectory import Step
from mlseg.hypergradients.vectors import accumulate

if TYPE_CHECKING:
    from mlseg.multilevel.problem import Problem


def gradient_is_changed(level: Problem) -> bool:
    """Whether a level steps along anything but the gradient of one batch's loss."""
    return level.gas > 1 or bool(level.paths) or level.is_implemented("grad_callback")


class Replay:
    """The last steps of a hop's level.

    Each is evaluated at the weights that it started from, on its batches and in its random state;
    the sources and all other levels are as they are now. With more steps than the level takes per
    step of the level above, the earlier ones were taken under other values of the sources: they
    count as if they had been taken under the present ones.

    Args:
        hop: without interface: gradients go to the sources' parameters.
        count: at most so many steps; fewer at the start of training.

    Attributes:
        steps: oldest first.
        parameters: the level's trainable ones.
    """

    def __init__(self, hop: Hop, count: int) -> None:
        self.hop, self.level = hop, hop.level
        self.steps = list(self.level.trajectory.steps)[-count:]
        self.parameters = self.level.trainable_parameters()
        with torch.enable_grad():
            self.rates = self.level.learning_rates()

    @contextmanager
    def at(self, weights: list[Tensor]) -> Iterator[None]:
        """Within this block the level has these weights."""
        with self.level.at_weights(weights):
            yield

    def losses(self, step: Step) -> list[Callable[[], Tensor]]:
        """The step's losses, one per accumulated batch, divided by their number."""

        def loss_of(index: int) -> Callable[[], Tensor]:
            batch, random_state = step.seen[index]

            def loss() -> Tensor:
                self.hop.evaluations += 1
                self.level.restore_buffers()
                self.level.restore_step_randomness(random_state)
                return self.level.loss(batch) / len(step.seen)

            return loss

        return [loss_of(index) for index in range(len(step.seen))]

    def gradient(self, step: Step) -> list[Tensor | None]:
        """The step's loss's gradient at the level's present weights, without a graph."""
        total: list[Tensor | None] = [None] * len(self.parameters)
        for loss in self.losses(step):
            found = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
            accumulate(total, found)
        return total

    def map(
        self,
        step: Step,
        gradients: list[Tensor | None],
        weights: list[Tensor] | None = None,
        moments: list[Moments] | None = None,
    ) -> StepMap:
        """The optimizer's map in ``step``, there or at other weights and moments."""
        if weights is not None or moments is not None:
            step = Step(
                weights=step.weights if weights is None else weights,
                moments=step.moments if moments is None else moments,
                groups=step.groups,
                stepped=step.stepped,
            )
        return StepMap(
            rule_of(self.level), step, gradients, self.level.gradient_clipping, self.rates
        )
