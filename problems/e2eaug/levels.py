"""E2EAug: end-to-end data augmentation for segmentation, three levels deep.

    min_A  L_seg(D_val; W*)                                                   architecture
    s.t.   W* = argmin_W L_seg(D_tr; W) + lambda L_seg(D_aug(D_tr; G*, A); W) segmentor
           G*, E* = argmin_G max_E L_gan(D_gan; G, A, E)                      generator, critic

A mask-to-image GAN turns augmented masks into synthetic training pairs; the segmentor learns from
real and synthetic pairs; the architecture of the generator is learned from how well the segmentor
then does on validation data. One gradient step per level and iteration. The validation gradient
reaches the alphas ``A`` on two paths: through the synthetic image directly, W -> A, and through the
generator's weights, W -> G -> A.

Passes over a batch per iteration, counted in ``tests/problems/e2eaug/test_passes.py``:

=============  =====================================================================  ==========
network        for                                                                    passes
=============  =====================================================================  ==========
generator      its own step; the synthetic batch, whose one backward pass serves       4 F, 4 B
               both paths; the finite difference of the hop G -> A (two)
discriminator  its own step (real and fake); judging the fake in the generator's       5 F, 5 B
               step and in the two evaluations of the hop. With feature matching the
               generator's step judges the real pair too, and the discriminator's
               step goes back through that
segmentor      real and synthetic half once, validation once; the synthetic half       5 F, 5 B
               twice, backward to the image only, for the hop W -> (G, A)
=============  =====================================================================  ==========

What level three may learn besides (``level3``, ``generator.candidates``) takes none more.

Where this departs from the paper, and why:

* The generator steps before its discriminator, which then judges the same fake image: one generator
  pass instead of two. Over iterations it is the same alternation.
* The segmentor sees validation images in evaluation mode, so that its BatchNorm statistics come
  from training images alone.
* The paper gives no learning rate for ``A``; see ``docs/results.md`` for how ours was chosen.

Source: E2EAug, sections 3.1 to 3.3, equations 1 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.hypergradients import Interface
from mlseg.multilevel.batch_norm import follow
from mlseg.multilevel.problem import Problem
from mlseg.precision import full
from mlseg.problems.building import Setup
from mlseg.problems.e2eaug.losses import (
    Adversarial,
    feature_matching,
    fooling,
    perceptual_loss,
    telling,
)
from mlseg.problems.e2eaug.masks import Masks, encode
from mlseg.problems.e2eaug.networks.discriminator import Judgement
from mlseg.problems.e2eaug.networks.spectral import spectral, turn
from mlseg.segmentation.losses import Criterion


class Generator(Problem):
    """Level 1: mask to image, against the discriminator.

    Its loss is adversarial + ``l1`` * L1 (pix2pix), and where their weights are above zero feature
    matching and a perceptual loss (SPADE).

    Args:
        l1, feature_matching, perceptual_weight: weights.
        adversarial: which loss, the generator's half.
        perceptual: image to features; None for no perceptual loss. Nothing in it is trained.

    Attributes:
        pair: label, image and fake of the last step, for the discriminator.
    """

    pair: tuple[Tensor, Tensor, Tensor]

    def __init__(
        self,
        setup: Setup,
        *,
        l1: float,
        num_classes: int,
        adversarial: Adversarial = "vanilla",
        feature_matching: float = 0.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
    ) -> None:
        super().__init__(*setup)
        self.l1, self.num_classes, self.adversarial = l1, num_classes, adversarial
        self.feature_matching = feature_matching
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self._spectral = spectral(self.module)
        # Of the last step's real images; whose they are stands beside them.
        self._judged: tuple[Tensor, Judgement] | None = None
        self._features: tuple[Tensor, list[Tensor]] | None = None

    def get_batch(self) -> Any:
        """A batch; spectral vectors of both players go on, and then stand still till the next."""
        if not self.replaying:
            turn(self._spectral)
            turn(self.discriminator.spectral)
        return super().get_batch()

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Loss on a batch of real pairs, image and mask swapped (D_gan)."""
        image, mask = batch
        label = encode(mask, self.num_classes)
        fake = self(label)
        if not self.replaying:
            self.pair = (label, image, fake.detach())
        judged = self.discriminator(label, fake)
        adversarial = fooling(self.adversarial, judged)
        reconstruction = functional.l1_loss(fake, image)
        loss = adversarial + self.l1 * reconstruction
        figures = {"adversarial": adversarial, "reconstruction": reconstruction}
        if self.feature_matching:
            matching = feature_matching(judged, self._judge_real(label, image))
            loss = loss + self.feature_matching * matching
            figures["feature_matching"] = matching
        if self.perceptual is not None and self.perceptual_weight:
            distance = perceptual_loss(self.perceptual(fake), self._see_real(image))
            loss = loss + self.perceptual_weight * distance
            figures["perceptual"] = distance
        return {"loss": loss, **figures}

    def _judge_real(self, label: Tensor, image: Tensor) -> Judgement:
        """What the discriminator makes of a real pair: constants of this level's loss.

        They are computed once a step, with the graph by which the discriminator then steps; the
        evaluations of a hypergradient take them from there.
        """
        if not self.replaying:
            self._judged = (image, self.discriminator(label, image))
        if self._judged is not None and self._judged[0] is image:
            return self._judged[1]
        with torch.no_grad():
            judged: Judgement = self.discriminator(label, image)
        return judged

    def _see_real(self, image: Tensor) -> list[Tensor]:
        """The perceptual features of real images, once a step."""
        if self._features is None or self._features[0] is not image:
            assert self.perceptual is not None
            with torch.no_grad():
                self._features = (image, self.perceptual(image))
        return self._features[1]

    def take_judgement(self, image: Tensor) -> Judgement | None:
        """The discriminator's judgement of these real images, with its graph, and only once."""
        judged, self._judged = self._judged, None
        return judged[1] if judged is not None and judged[0] is image else None

    def forward(self, label: Tensor) -> Tensor:
        """(B, C, H, W) encoded label map to an image in [-1, 1], with the present architecture."""
        return full(self.module(label, self.selection()))

    def selection(self) -> Tensor | None:
        """(cells, K) selection weights; None for a generator without cells."""
        return self.architecture() if self.module.num_cells else None

    def export(self) -> nn.Module:
        """The generator as it is now, merged into plain operators, for weights that stay fixed."""
        with torch.no_grad():
            made: nn.Module = self.module.merged(self.selection())
        follow(made, self.module)
        return made


class Discriminator(Problem):
    """Level 1, the critic: tells real from generated images, given the label map.

    Attributes:
        spectral: its network's convolutions with spectral normalisation.
    """

    def __init__(self, setup: Setup, *, adversarial: Adversarial = "vanilla") -> None:
        super().__init__(*setup)
        self.adversarial = adversarial
        self.spectral = spectral(self.module)

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pair of the generator's last step: the same fake, at no further pass."""
        return self.generator.pair

    def training_step(self, batch: Any) -> Tensor:
        """GAN loss; real and fake pass separately, each by its own BatchNorm statistics."""
        label, image, fake = batch
        real = self.generator.take_judgement(image)
        if real is None:
            real = self(label, image)
        return telling(self.adversarial, real, self(label, fake))

    def forward(self, label: Tensor, image: Tensor) -> Judgement:
        """The outputs of its layers for a pair, by scale; patch logits are the last."""
        return self.module.judge(torch.cat([label, image], dim=1))


class Segmentor(Problem):
    """Level 2: learns from real pairs, and from augmented masks with the images made of them.

    Args:
        criterion: L_seg.
        synthetic_weight: lambda.
        masks, mask_seed: what the synthetic half's masks go through, and of its draws.
        frozen_generator: the generator no longer changes.
        learns_weight: lambda is the architecture's, to begin with ``synthetic_weight``.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        criterion: Criterion,
        synthetic_weight: float,
        masks: Masks,
        mask_seed: int,
        frozen_generator: bool = False,
        learns_weight: bool = False,
    ) -> None:
        super().__init__(*setup)
        self.criterion = criterion
        self.synthetic_weight = synthetic_weight
        self.masks = masks
        self.mask_generator = torch.Generator().manual_seed(mask_seed)
        self.frozen_generator = frozen_generator
        self.learns_weight = learns_weight
        self._exported: nn.Module | None = None

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Real images and masks, and what is drawn to augment the masks with."""
        image, mask = super().get_batch()
        if not self.synthetic_weight:
            return image, mask, None
        return image, mask, self.masks.draw(mask, self.mask_generator)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``L_seg(real) + lambda L_seg(synthetic)``, each half its own pass over the network.

        The halves keep separate BatchNorm statistics: only so does the real half not depend on the
        generator, and have no part in a hypergradient.
        """
        image, mask, drawn = batch
        if drawn is None:
            return {"loss": self.criterion(self(image), mask)}
        label, augmented = self.masks(mask, drawn)
        synthetic = self.synthesise(label)
        enters = [synthetic, *self.learned_weight()]
        if self.is_differentiated and not self.replaying:
            self.interface = Interface(
                enters,
                lambda tensors: self.synthetic_loss(tensors[0], augmented, *tensors[1:]),
                self.random_state(),
                rest=lambda: self.criterion(self(image), mask),
            )
        synthetic_loss = self.synthetic_loss(synthetic, augmented, *enters[1:])
        real_loss = self.criterion(self(image), mask)
        return {
            "loss": real_loss + synthetic_loss,
            "real": real_loss,
            "synthetic": synthetic_loss / (enters[1] if enters[1:] else self.synthetic_weight),
        }

    def synthesise(self, label: Tensor) -> Tensor:
        """Images of label maps by the present generator, differentiable when A learns."""
        if self.frozen_generator:
            if self._exported is None:
                self._exported = self.generator.export()
            with torch.no_grad():
                return full(self._exported(label))
        with torch.set_grad_enabled(self.is_differentiated and torch.is_grad_enabled()):
            return self.generator(label)

    def learned_weight(self) -> list[Tensor]:
        """Lambda, differentiable, where it is learned; else nothing."""
        return [self.architecture.module.synthetic_weight()] if self.learns_weight else []

    def synthetic_loss(self, image: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """``lambda L_seg`` on a synthetic batch."""
        factor = self.synthetic_weight if weight is None else weight
        return factor * self.criterion(self(image), mask)

    def state_dict(self) -> dict[str, Any]:
        """Betty's, and the generator of mask augmentations."""
        return {**super().state_dict(), "mask_generator": self.mask_generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.mask_generator.set_state(state["mask_generator"])


class Architecture(Problem):
    """Level 3: the alphas, and what else it learns, by the segmentor's loss on validation data."""

    def __init__(self, setup: Setup, *, criterion: Criterion) -> None:
        super().__init__(*setup)
        self.criterion = criterion

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``L_seg(D_val; W)``, and beside it what is learned besides the alphas."""
        image, mask = batch
        segmentor = self.segmentor.module
        segmentor.eval()
        loss = self.criterion(self.segmentor(image), mask)
        segmentor.train()
        return {"loss": loss, **self.module.besides()}

    def forward(self) -> Tensor:
        """(cells, K) selection weights."""
        return self.module()
