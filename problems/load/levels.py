"""LoAd: lookahead adversarial learning for semantic segmentation.

    stage 1    min_G  CE(Y, G(X))
    stage 2    min_G  - lambda sum log D(X, G(X))           generator: one update, then evaluate
               min_D  BCE(D(X, Y), 1) + BCE(D(X, B), 0)     discriminator: to early stopping

In stage 2 a controller (:mod:`mlseg.engines.lookahead.controller`) lets the generator run ahead
against a fixed discriminator, watches its mIoU on a hold-out after every update, and takes it back
to the best model when it diverges or the patience is over. The label maps of where it ended go into
the buffer B; on these and the truth the discriminator is trained before the next cycle.

What the paper leaves open, and how it is closed here:

* The discriminator learns on hard maps; the generator gives it soft ones, or what else
  ``adversarial.relaxation`` offers. While the generator steps the discriminator is frozen and in
  evaluation mode: batches of fakes alone would shift its BatchNorm statistics.
* It is never rolled back, starts each training from the weights of the one before, with a fresh
  optimizer. The generator's optimizer is rolled back with its weights.
* BatchNorm statistics of the generator stay those of stage 1 (``adversarial.freeze_batch_norm``).
* Pixels with the ignore index are zero in real and fake maps alike.

Source: LoAd (Jamali-Rad, Szabo and Presutto, arXiv:2006.11227), sections 2 to 4; its workshop
version (ICML 2020 workshop on uncertainty and robustness in deep learning).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlseg import parallel
from mlseg.engines.lookahead.label_maps import Batch, LabelMapBatches
from mlseg.multilevel.problem import Problem
from mlseg.precision import full
from mlseg.problems.building import Setup
from mlseg.problems.load.losses import balanced_cross_entropy, fooling_loss, pixelwise, relax
from mlseg.problems.load.networks import one_hot
from mlseg.problems.load.settings import AdversarialSettings
from mlseg.segmentation.nets.layers import freeze_batch_norm


class Pretraining(Problem):
    """Stage 1, and the control: cross-entropy, at first weighted by class.

    Args:
        ignore_index: of pixels that don't count.
        weighted_steps: steps with weights.
        mean_pixels: (K,) pixels of each class in a training image, on average.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        ignore_index: int | None,
        weighted_steps: int,
        mean_pixels: Tensor,
    ) -> None:
        super().__init__(*setup)
        self.ignore_index = ignore_index
        self.weighted_steps = weighted_steps
        self.mean_pixels = mean_pixels

    def training_step(self, batch: Any) -> Tensor:
        """``CE(Y, G(X))``."""
        image, mask = batch
        self.module.train()  # an evaluation may have come between
        logits = self(image)
        if self.count <= self.weighted_steps:
            return balanced_cross_entropy(logits, mask, self.mean_pixels, self.ignore_index)
        ignore = -100 if self.ignore_index is None else self.ignore_index
        loss = functional.cross_entropy(full(logits), mask, ignore_index=ignore, reduction="sum")
        # A batch of windows may lie in the padding, whole.
        return parallel.ratio(loss, (mask != ignore).sum())


class Generator(Problem):
    """The segmentor against a discriminator that stands still.

    Args:
        adversarial: what it learns from the discriminator, and how.
        ignore_index: of pixels that don't count.
    """

    def __init__(
        self, setup: Setup, *, adversarial: AdversarialSettings, ignore_index: int | None
    ) -> None:
        super().__init__(*setup)
        self.adversarial = adversarial
        self.ignore_index = ignore_index

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``- lambda log D(X, G(X))``, or ``lambda log(1 - D(X, G(X)))``."""
        image, mask = batch
        self.module.train()
        if self.adversarial.freeze_batch_norm:
            freeze_batch_norm(self.module)
        own = self.adversarial
        scores = self(image)
        maps = relax(scores, own.relaxation, own.temperature)
        if self.ignore_index is not None:
            maps = maps * (mask != self.ignore_index).unsqueeze(1)
        logits = self.discriminator.judge(image, maps)
        losses = own.weight * fooling_loss(logits, own.loss == "saturating")
        if own.cross_entropy:
            losses = losses + own.cross_entropy * pixelwise(scores, mask, self.ignore_index)
        loss = parallel.as_mean(losses.sum()) if own.reduction == "sum" else losses.mean()
        return {"loss": loss, "fooled": (logits > 0).float().mean()}


class Discriminator(Problem):
    """Tells drawn label maps from generated ones, given the image.

    Args:
        num_classes: K.
        batches: of label maps, real and fake; None where it never steps (the control).
    """

    def __init__(self, setup: Setup, *, num_classes: int, batches: LabelMapBatches | None) -> None:
        super().__init__(*setup)
        self.num_classes = num_classes
        self.batches = batches

    def get_batch(self) -> Batch:
        """The next one of the pass that its training has begun."""
        assert self.batches is not None
        return self.batches.next()

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Binary cross-entropy; real and fake maps have half of the weight each."""
        self.module.train()
        logits, loss = self._cross_entropy(batch)
        right = ((logits > 0) == (batch[2] > 0)).float().mean()
        return {"loss": loss / len(logits), "accuracy": right}

    @torch.no_grad()
    def verdict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and the sum of the loss, in evaluation mode."""
        self.module.eval()
        logits, loss = self._in_precision(self._cross_entropy, batch)
        return full(logits), loss

    def _cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image, label, real, weight = batch
        logits = self(image, one_hot(label, self.num_classes))
        wide = full(logits)
        loss = functional.binary_cross_entropy_with_logits(
            wide, real.to(wide.dtype), weight, reduction="sum"
        )
        return logits, loss

    def judge(self, image: Tensor, maps_BKHW: Tensor) -> Tensor:
        """(B,) logits, differentiable in the maps; weights and statistics stand still."""
        self.module.eval()
        # Whether a weight gets a gradient is settled in the forward pass.
        self.module.requires_grad_(False)
        try:
            return self(image, maps_BKHW)
        finally:
            self.module.requires_grad_(True)


class AlternatingDiscriminator(Discriminator):
    """One that steps in turn with the generator, on what it makes now: no lookahead, no buffer.

    Each batch is images of the training split with their truth and the generator's hard maps, made
    in evaluation mode: as many real as fake ones.
    """

    def __init__(self, setup: Setup, *, num_classes: int, ignore_index: int | None) -> None:
        super().__init__(setup, num_classes=num_classes, batches=None)
        self.ignore_index = ignore_index

    @torch.no_grad()
    def get_batch(self) -> Batch:
        """Real maps, then fake ones of the same images."""
        image, mask = Problem.get_batch(self)
        module = self.generator.module
        module.eval()  # its own step puts it back
        fake = self._in_precision(module, image).argmax(1)
        if self.ignore_index is not None:
            fake = torch.where(mask == self.ignore_index, mask, fake)
        real = torch.ones(2 * len(image), device=image.device)
        real[len(image) :] = 0
        images, labels = torch.cat([image, image]), torch.cat([mask, fake])
        return images, labels, real, torch.ones_like(real)
