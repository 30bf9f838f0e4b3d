"""Training of LoAd's discriminator on real and aggregated label maps, to early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from mlseg.config import Settings
from mlseg.data import Augmentation, AugmentationSettings, Samples, to_float
from mlseg.engines.map_buffer import MapBuffer
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import RunError
from mlseg.problems.base import Problem
from mlseg.transfer import to_device

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images (B, C, H, W) in [-1, 1]; label maps (B, H, W) int64, real or fake, with the ignore index
of the truth in both; 1 for real and 0 for fake, (B,); weights of the examples, (B,)."""


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


class Critic(Protocol):
    """What the training asks of the discriminator's problem beside being one."""

    source: Any
    """``source()`` gives the next batch."""

    def verdict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Evaluation mode, no gradient: (B,) logits, and the weighted loss's sum, a scalar."""


class DiscriminatorTraining:
    """One training at a time, in pieces: a batch, or the evaluation that ends a pass.

    A pass goes over |B| + 1 maps of every training image in random order, the truth and each of the
    buffer's, with real maps weighted (|B| + 1) / 2 and fake ones (|B| + 1) / (2 |B|), so that
    either side has half of the weight and a mean weight of one. An image and its maps are flipped
    together. After each pass the loss on the hold-out decides; at the end the weights of the best
    pass are put back (within one training: a discriminator is never rolled back with its model).
    Where training cuts windows, the hold-out's are cut at places that stay the same.

    Args:
        problem: the discriminator's.
        train, hold_out: examples; entries of ``buffer`` hold the maps of both, in this order.
        buffer: label maps of former models.
        settings: when to stop.
        batch_size: maps per step.
        augmentation: of image and map together.
        device: where the problem is.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        problem: Problem,
        train: Samples,
        hold_out: Samples,
        buffer: MapBuffer,
        settings: DiscriminatorTrainingSettings,
        *,
        batch_size: int,
        augmentation: Augmentation,
        device: torch.device,
        seed: int,
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.running = False
        self._parts = {"train": (train, 0), "hold_out": (hold_out, len(train))}
        self._buffer = buffer
        self._batch_size = batch_size
        self._augmentation = augmentation
        # The hold-out is seen as training is, in windows of its images where there are such.
        self._window = Augmentation(AugmentationSettings(window=augmentation.settings.window))
        self._device = device
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._best = Snapshot(problem.module)
        self._fresh = Snapshot(None, problem.optimizer)
        self._fresh.take()
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0
        self._epoch = 0
        self._patience = 0
        self._lowest = math.inf
        self._accuracy = 0.0
        problem.source = self._next

    # -------------------------------------------------------------------- course

    def begin(self) -> None:
        """Start a training on the buffer as it is now."""
        if not self.settings.keep_optimizer:
            self._fresh.restore()
        self.running = True
        self._epoch = self._patience = 0
        self._lowest, self._accuracy = math.inf, 0.0
        self._shuffle()

    def batch(self) -> None:
        """A step by itself, for measurements."""
        if self._position >= self._end:
            self.begin()
        self.problem.step_normal()

    def advance(self) -> dict[str, Any] | None:
        """One step, or the evaluation after a pass; what came of it once the training is over."""
        if self._position < self._end:
            self.problem.step_normal()
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
            self._shuffle()
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

    @property
    def batches_per_epoch(self) -> int:
        """With the buffer as it is now."""
        return max(1, len(self._parts["train"][0]) * (len(self._buffer) + 1) // self._size)

    @property
    def _size(self) -> int:
        return min(self._batch_size, len(self._parts["train"][0]) * (len(self._buffer) + 1))

    @property
    def _end(self) -> int:
        # Whole batches alone, as in every training here: a rest of one upsets batch statistics.
        return len(self._order) // self._size * self._size

    def _shuffle(self) -> None:
        count = len(self._parts["train"][0]) * (len(self._buffer) + 1)
        self._order = torch.randperm(count, generator=self._generator)
        self._position = 0

    # ------------------------------------------------------------------- batches

    def _next(self) -> Batch:
        chosen = self._order[self._position : self._position + self._size]
        self._position += len(chosen)
        return self._batch("train", chosen, self._augmentation, self._generator)

    def _batch(
        self, part: str, chosen: Tensor, augmentation: Augmentation, generator: torch.Generator
    ) -> Batch:
        """Examples by number: of image i the truth, then its maps by each entry."""
        samples, offset = self._parts[part]
        sets = len(self._buffer) + 1
        image_index, which = chosen // sets, chosen % sets
        truth = samples.masks[image_index]
        labels, fake = truth.clone(), which > 0
        if fake.any():
            maps = self._buffer.gather(which[fake] - 1, image_index[fake] + offset)
            ignore = samples.spec.ignore_index
            # Ignored pixels are ignored on both sides: they mustn't tell real from fake.
            ignored = torch.zeros_like(maps, dtype=torch.bool)
            if ignore is not None:
                ignored = truth[fake] == ignore
            labels[fake] = torch.where(ignored, truth[fake], maps)
        real = (~fake).float()
        weights = torch.where(fake, sets / (2 * max(sets - 1, 1)), sets / 2)
        image = to_float(to_device(samples.images[image_index], self._device))
        label = to_device(labels, self._device).to(torch.int64)
        image, label = augmentation(image, label, generator)
        return image, label, to_device(real, self._device), to_device(weights.float(), self._device)

    def _evaluate(self) -> tuple[float, float]:
        """Weighted loss and balanced accuracy on the hold-out; one synchronisation."""
        samples, _ = self._parts["hold_out"]
        count = len(samples) * (len(self._buffer) + 1)
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)
        places = torch.Generator().manual_seed(self._seed)  # the same windows every time
        for start in range(0, count, self._batch_size):
            chosen = torch.arange(start, min(start + self._batch_size, count))
            batch = self._batch("hold_out", chosen, self._window, places)
            logits, loss = self.problem.verdict(batch)
            real = batch[2] > 0
            right = (logits > 0) == real
            sums += torch.stack(
                [loss, (right & real).sum(), real.sum(), (right & ~real).sum(), (~real).sum()]
            )
        loss_sum, right_real, reals, right_fake, fakes = sums.tolist()
        accuracy = (right_real / max(reals, 1) + right_fake / max(fakes, 1)) / 2
        return loss_sum / count, accuracy

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the training is."""
        return {
            "running": self.running,
            "order": self._order.clone(),
            "position": self._position,
            "epoch": self._epoch,
            "patience": self._patience,
            "lowest": self._lowest,
            "accuracy": self._accuracy,
            "best": self._best.state_dict() if self.running else {},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.running = state["running"]
        self._order = state["order"]
        self._position = state["position"]
        self._epoch = state["epoch"]
        self._patience = state["patience"]
        self._lowest = state["lowest"]
        self._accuracy = state["accuracy"]
        self._best.load_state_dict(state["best"])
        self._generator.set_state(state["generator"])
