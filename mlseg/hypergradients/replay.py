"""A level's last steps, taken again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.hypergradients.gradient_hooks import applied, hooked
from mlseg.hypergradients.hop import Hop
from mlseg.hypergradients.optimizers import Moments, optimizer_of
from mlseg.hypergradients.optimizers.step_map import StepMap
from mlseg.hypergradients.second_order.fused import formulas
from mlseg.hypergradients.substitution import pointed_at
from mlseg.hypergradients.trajectory import Step
from mlseg.hypergradients.vectors import accumulate


class Replay:
    """The last steps of a hop's level.

    Each is evaluated at the weights and from the buffers that it started from, on its batches and
    in its random state; the sources and all other levels' weights are as they are now. With more
    steps than the level takes per step of the level above, the earlier ones were taken under other
    values of the sources: they count as if they had been taken under the present ones.

    Args:
        hop: without interface: gradients go to the sources' parameters.
        count: at most so many steps; fewer at the start of training.
        together: whether a step's graph is still to be walked when the next one is evaluated.

    Attributes:
        steps: oldest first.
        parameters: the level's trainable ones.
        rates: its learning rates, where they depend on the sources.
        hooked: whether hooks change its gradient.
    """

    def __init__(self, hop: Hop, count: int, together: bool = False) -> None:
        self.hop, self.level, self._together = hop, hop.level, together
        self.stepping = self.level.stepping
        self.steps = list(self.level.trajectory.steps)[-count:]
        self.parameters = self.level.trainable_parameters()
        with torch.enable_grad():
            self.rates = self.stepping.learning_rates()
        self.hooked = hooked(self.parameters)

    def at(self, weights: list[Tensor]) -> AbstractContextManager[None]:
        """A block in which the level has these weights."""
        return pointed_at(self.parameters, weights)

    def losses(self, step: Step) -> list[Callable[[], Tensor]]:
        """The step's losses, one per accumulated batch, divided by their number."""

        def loss_of(index: int) -> Callable[[], Tensor]:
            batch, random_state = step.seen[index]

            def loss() -> Tensor:
                self.hop.evaluations += 1
                with formulas(self.hop.second_order):
                    loss = self.level.again.loss(batch, random_state, self._together)
                    return loss / len(step.seen)

            return loss

        return [loss_of(index) for index in range(len(step.seen))]

    def gradient(self, step: Step) -> list[Tensor | None]:
        """The step's gradient at the level's present weights, after hooks, without a graph."""
        total: list[Tensor | None] = [None] * len(self.parameters)
        for loss in self.losses(step):
            part = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
            shared = parallel.average_some(part, self.parameters)
            accumulate(total, applied(shared, self.parameters))
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
        rule = optimizer_of(self.level)
        return StepMap(rule, step, gradients, self.stepping.clip, self.rates)
