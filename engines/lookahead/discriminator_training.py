"""Training of LoAd's discriminator on real and aggregated label maps, to early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from mlseg import parallel
from mlseg.checkpoint import require_form
from mlseg.config import Settings
from mlseg.engines.lookahead.label_maps import LabelMapBatches
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import RunError
from mlseg.multilevel.problem import Problem


class DiscriminatorTrainingSettings(Settings):
    """When the discriminator has learned enough; the paper says only that it stops early.

    Attributes:
        max_epochs: passes over all real and fake maps at most.
        patience: passes without a lower loss on the hold-out after which it stops.
        min_delta: by how much the loss has to be lower.
        accuracy: balanced accuracy on the hold-out at which it stops, with the weights that have
            reached it; None: never for that.
        keep_optimizer: go on with the optimizer's state of the training before; by default each
            training starts with a fresh one, on the weights that the one before left.
    """

    max_epochs: PositiveInt = 20
    patience: PositiveInt = 2
    min_delta: NonNegativeFloat = 0.0
    accuracy: float | None = Field(default=None, gt=0.5, le=1.0)
    keep_optimizer: bool = False


class DiscriminatorTraining:
    """One training at a time, in pieces: a step, or the evaluation that ends a pass.

    After each pass over ``batches`` the loss on the hold-out decides; at the end the weights of the
    best pass are put back (within one training: a discriminator is never rolled back with its
    model).

    Args:
        problem: the discriminator's, which steps on ``batches``. Its ``verdict(batch)`` gives, in
            evaluation mode and without gradient, (B,) logits and the weighted loss's sum, a scalar.
        batches: of label maps.
        settings: when to stop.
    """

    def __init__(
        self, problem: Problem, batches: LabelMapBatches, settings: DiscriminatorTrainingSettings
    ) -> None:
        self.problem = problem
        self.batches = batches
        self.settings = settings
        self.running = False
        self._best = Snapshot(problem.module)
        self._fresh = Snapshot(None, problem.optimizer)
        self._fresh.take()
        self._epoch = 0
        self._patience = 0
        self._lowest = math.inf
        self._accuracy = 0.0
        self._evaluates = False

    def begin(self) -> None:
        """Start a training on the buffer as it is now."""
        if not self.settings.keep_optimizer:
            self._fresh.restore()
        self.running = True
        self._epoch = self._patience = 0
        self._lowest, self._accuracy = math.inf, 0.0
        self.batches.shuffle()

    def step(self) -> None:
        """A step by itself, for measurements."""
        if self.batches.exhausted:
            self.begin()
        self.problem.step_normal()

    def wants_step(self) -> bool:
        """Whether the next piece is a step of the problem; begins a training where none runs."""
        if not self.running:
            self.begin()
        self._evaluates = self.batches.exhausted
        return not self._evaluates

    def after_step(self) -> dict[str, Any] | None:
        """The rest of a piece: nothing after a step, else the evaluation that ends a pass.

        Returns:
            what came of the training, once it is over.

        Raises:
            RunError: the loss isn't finite.
        """
        if not self._evaluates:
            return None
        self._epoch += 1
        loss, accuracy = self._evaluate()
        if not math.isfinite(loss):
            raise RunError(
                f"the discriminator's loss on the hold-out is {loss} after {self._epoch} epochs; "
                "the best model so far is kept; try a lower problems.discriminator.optimizer.lr"
            )
        enough = self.settings.accuracy is not None and accuracy >= self.settings.accuracy
        if enough or loss < self._lowest - self.settings.min_delta:
            self._lowest, self._accuracy, self._patience = loss, accuracy, 0
            self._best.take()
        else:
            self._patience += 1
        exhausted = self._patience >= self.settings.patience
        if not (enough or exhausted or self._epoch >= self.settings.max_epochs):
            self.batches.shuffle()
            return None
        self.running = False
        self._best.restore()
        reason = "accuracy" if enough else "patience" if exhausted else "max_epochs"
        return {
            "epochs": self._epoch,
            "loss": self._lowest,
            "accuracy": self._accuracy,
            "reason": reason,
        }

    def _evaluate(self) -> tuple[float, float]:
        """Weighted loss and balanced accuracy on the hold-out; one synchronisation."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.batches.device)
        for batch in self.batches.of_hold_out():
            logits, loss = self.problem.verdict(batch)
            real = batch[2] > 0
            right = (logits > 0) == real
            sums += torch.stack(
                [loss, (right & real).sum(), real.sum(), (right & ~real).sum(), (~real).sum()]
            )
        loss_sum, right_real, reals, right_fake, fakes = parallel.summed(sums).tolist()
        accuracy = (right_real / max(reals, 1) + right_fake / max(fakes, 1)) / 2
        return loss_sum / self.batches.held_out, accuracy

    def state_dict(self) -> dict[str, Any]:
        """Where the training is."""
        return {
            **self.batches.state_dict(),
            "running": self.running,
            "epoch": self._epoch,
            "patience": self._patience,
            "lowest": self._lowest,
            "accuracy": self._accuracy,
            "best": self._best.state_dict() if self.running else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        own = {key: value for key, value in self.state_dict().items() if key != "best"}
        for key in own.keys() - self.batches.state_dict().keys():
            require_form(own[key], state[key], key)
        self.batches.load_state_dict(state)
        self.running = state["running"]
        self._epoch = state["epoch"]
        self._patience = state["patience"]
        self._lowest = state["lowest"]
        self._accuracy = state["accuracy"]
        self._best.load_state_dict(state["best"])
