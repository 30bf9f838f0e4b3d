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
               step and in the two evaluations of the hop
segmentor      real and synthetic half once, validation once; the synthetic half       5 F, 5 B
               twice, backward to the image only, for the hop W -> (G, A)
=============  =====================================================================  ==========

Where this departs from the paper, and why:

* The generator steps before its discriminator, which then judges the same fake image: one generator
  pass instead of two. Over iterations it is the same alternation.
* The segmentor sees validation images in evaluation mode, so that its BatchNorm statistics come
  from training images alone.
* The paper gives no learning rate for ``A``; see ``docs/results.md`` for how ours was chosen.

Source: E2EAug, sections 3.1 to 3.3, equations 1 to 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.segmentation import SegmentationEngine, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.hypergradients import Interface
from mlseg.multilevel.problem import Problem
from mlseg.problems.building import Builder
from mlseg.problems.e2eaug import records
from mlseg.problems.e2eaug.networks.architecture import Architecture as ArchitectureModule
from mlseg.problems.e2eaug.networks.patchgan import PatchGAN
from mlseg.problems.e2eaug.networks.pix2pix import SearchableGenerator
from mlseg.problems.e2eaug.settings import E2EAugSettings
from mlseg.problems.systems import system
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import Augmentation, load_data
from mlseg.segmentation.losses import Criterion, build_loss, gan_loss

# --------------------------------------------------------------------------- the levels


class Generator(Problem):
    """Level 1: mask to image, against the discriminator. Adversarial + ``l1`` * L1 (pix2pix)."""

    l1: float
    num_classes: int
    pair: tuple[Tensor, Tensor, Tensor]
    """Label, image and fake of the last step, for the discriminator."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Loss on a batch of real pairs, image and mask swapped (D_gan)."""
        image, mask = batch
        label = encode(mask, self.num_classes)
        fake = self(label)
        if not self.replaying:
            self.pair = (label, image, fake.detach())
        adversarial = gan_loss(self.discriminator(label, fake), real=True)
        reconstruction = functional.l1_loss(fake, image)
        return {
            "loss": adversarial + self.l1 * reconstruction,
            "adversarial": adversarial,
            "reconstruction": reconstruction,
        }

    def forward(self, label: Tensor) -> Tensor:
        """(B, C, H, W) encoded label map to an image in [-1, 1], with the present architecture."""
        return full(self.module(label, self.selection()))

    def selection(self) -> Tensor | None:
        """(cells, 3) selection weights; None for a generator without cells."""
        return self.architecture() if self.module.num_cells else None

    def export(self) -> nn.Module:
        """The generator as it is now, merged into plain operators, for weights that stay fixed."""
        with torch.no_grad():
            return self.module.merged(self.selection())


class Discriminator(Problem):
    """Level 1, the critic: tells real from generated images, given the label map."""

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pair of the generator's last step: the same fake, at no further pass."""
        return self.generator.pair

    def training_step(self, batch: Any) -> Tensor:
        """Vanilla GAN loss; real and fake pass separately, each by its own BatchNorm statistics."""
        label, image, fake = batch
        real = gan_loss(self(label, image), real=True)
        return 0.5 * (real + gan_loss(self(label, fake), real=False))

    def forward(self, label: Tensor, image: Tensor) -> Tensor:
        """Patch logits of a pair."""
        return self.module(torch.cat([label, image], dim=1))


class Segmentor(Problem):
    """Level 2: learns from real pairs, and from augmented masks with the images made of them."""

    criterion: Criterion
    num_classes: int
    synthetic_weight: float
    mask_augmentation: Augmentation
    mask_generator: torch.Generator
    frozen_generator: bool
    _exported: nn.Module | None = None

    def get_batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Real images and masks, and the masks augmented: the draw is part of the batch."""
        image, mask = super().get_batch()
        if not self.synthetic_weight:
            return image, mask, None
        _, augmented = self.mask_augmentation(None, mask, self.mask_generator)
        return image, mask, augmented

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``L_seg(real) + lambda L_seg(synthetic)``, each half its own pass over the network.

        The halves keep separate BatchNorm statistics: only so does the real half not depend on the
        generator, and have no part in a hypergradient.
        """
        image, mask, augmented = batch
        if augmented is None:
            return {"loss": self.criterion(self(image), mask)}
        synthetic = self.synthesise(augmented)
        if self.is_differentiated and not self.replaying:
            self.interface = Interface(
                [synthetic],
                lambda tensors: self.synthetic_loss(tensors[0], augmented),
                self.random_state(),
                rest=lambda: self.criterion(self(image), mask),
            )
        synthetic_loss = self.synthetic_loss(synthetic, augmented)
        real_loss = self.criterion(self(image), mask)
        return {
            "loss": real_loss + synthetic_loss,
            "real": real_loss,
            "synthetic": synthetic_loss / self.synthetic_weight,
        }

    def synthesise(self, mask: Tensor) -> Tensor:
        """Images of ``mask`` (B, H, W) by the present generator, differentiable when A learns."""
        label = encode(mask, self.num_classes)
        if self.frozen_generator:
            if self._exported is None:
                self._exported = self.generator.export()
            with torch.no_grad():
                return full(self._exported(label))
        with torch.set_grad_enabled(self.is_differentiated and torch.is_grad_enabled()):
            return self.generator(label)

    def synthetic_loss(self, image: Tensor, mask: Tensor) -> Tensor:
        """``lambda L_seg`` on a synthetic batch."""
        return self.synthetic_weight * self.criterion(self(image), mask)

    def state_dict(self) -> dict[str, Any]:
        """Betty's, and the generator of mask augmentations."""
        return {**super().state_dict(), "mask_generator": self.mask_generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.mask_generator.set_state(state["mask_generator"])


class Architecture(Problem):
    """Level 3: the alphas, by the segmentor's loss on validation data."""

    criterion: Criterion

    def training_step(self, batch: Any) -> Tensor:
        """``L_seg(D_val; W)``."""
        image, mask = batch
        segmentor = self.segmentor.module
        segmentor.eval()
        loss = self.criterion(self.segmentor(image), mask)
        segmentor.train()
        return loss

    def forward(self) -> Tensor:
        """(cells, 3) selection weights."""
        return self.module()


def encode(mask: Tensor, num_classes: int) -> Tensor:
    """A label map as the generator's input.

    Args:
        mask: (B, H, W) class indices; any other value (an ignore index) belongs to no class.
        num_classes: K.

    Returns:
        (B, 1, H, W) for two classes, else one channel per class; 1 inside, -1 outside.
    """
    if num_classes == 2:
        inside = (mask == 1).unsqueeze(1)
    else:
        classes = torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)
        inside = mask.unsqueeze(1) == classes
    return inside.to(torch.get_default_dtype()) * 2.0 - 1.0


def full(image: Tensor) -> Tensor:
    """What autocast computed in bfloat16 as float32; anything else as it is."""
    return image.float() if image.dtype == torch.bfloat16 else image


# ----------------------------------------------------------------------------- wiring


@system("e2eaug", E2EAugSettings, "three levels: mask-to-image GAN, segmentor, its architecture")
def build(settings: E2EAugSettings, out: Path | None) -> SegmentationEngine:
    """Data, networks, the four problems, and the engine with its stages."""
    data = load_data(settings.data)
    require_validation(data)
    spec, size, seed = data.spec, data.train.image_size, settings.seed
    channels = 1 if spec.num_classes == 2 else spec.num_classes
    make, levels = Builder(settings, spec), settings.problems
    with seeded(seed, "generator"):
        maker = SearchableGenerator(
            channels, spec.channels, size, **settings.generator.model_dump()
        )
    with seeded(seed, "discriminator"):
        critic = PatchGAN(channels + spec.channels, **settings.discriminator.model_dump())
    if min(size) < critic.smallest_side:
        raise UserError(
            f"discriminator.layers: {critic.layers} need images of {critic.smallest_side} pixels, "
            f"data.image_size is {min(size)}; lower the layers"
        )

    criterion = build_loss(settings.loss, spec.ignore_index)

    loader = make.loader("generator", levels.generator, data.train, settings.gan.augmentation)
    generator = make.problem(Generator, "generator", levels.generator, maker, loader)
    generator.l1, generator.num_classes = settings.gan.l1, spec.num_classes
    discriminator = make.problem(Discriminator, "discriminator", levels.discriminator, critic)
    loader = make.loader("segmentor", levels.segmentor, data.train, settings.augmentation)
    segmentor = make.problem(Segmentor, "segmentor", levels.segmentor, make.segmentor(), loader)
    segmentor.criterion, segmentor.num_classes = criterion, spec.num_classes
    segmentor.synthetic_weight = settings.synthetic_weight
    segmentor.frozen_generator = settings.gan.frozen
    segmentor.mask_augmentation = Augmentation(settings.mask_augmentation, spec.ignore_index)
    segmentor.mask_generator = torch.Generator().manual_seed(derived(seed, "masks"))
    problems = [generator, discriminator, segmentor]
    architecture = None
    if maker.num_cells:
        spread = settings.architecture.spread if settings.architecture.mode == "random" else 1e-3
        with seeded(seed, "architecture"):
            alphas = ArchitectureModule(maker.num_cells, spread)
        level = levels.architecture
        loader = make.loader("architecture", level, data.val)
        architecture = make.problem(Architecture, "architecture", level, alphas, loader)
        architecture.criterion = criterion
        problems.append(architecture)

    gan = records.Gan(settings, generator, discriminator, architecture, out)
    engine = SegmentationEngine(
        problems,
        settings.engine,
        segmentor=segmentor,
        data=data,
        **make.engine_options(out),
        stages=_stages(settings, gan, generator, discriminator, segmentor, architecture),
    )
    gan.prepare()
    records.attach(engine, generator, segmentor, architecture)
    return engine


def _stages(
    settings: E2EAugSettings,
    gan: records.Gan,
    generator: Problem,
    discriminator: Problem,
    segmentor: Problem,
    architecture: Problem | None,
) -> list[Stage]:
    """Pre-training of the GAN, then the levels that the settings leave in play."""
    stages = []
    players = [generator, discriminator]
    if settings.gan.pretrain and settings.gan.pretrained is None and settings.synthetic_weight:
        stages.append(Stage("pretraining", settings.gan.pretrain, players, on_end=gan.finish))
    length = settings.engine.iterations
    if settings.gan.frozen or not settings.synthetic_weight:
        return [*stages, Stage("training", length, [segmentor])]
    l2u: dict[Any, list[Any]] = {generator: [segmentor]}
    if settings.architecture.mode != "learned" or architecture is None:
        return [*stages, Stage("training", length, [*players, segmentor], {}, l2u)]
    l2u[segmentor] = [architecture]
    u2l: dict[Any, list[Any]] = {architecture: [generator, segmentor]}
    return [*stages, Stage("search", length, [*players, segmentor, architecture], u2l, l2u)]
