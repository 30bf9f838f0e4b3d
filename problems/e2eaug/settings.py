"""What a config of the system ``e2eaug`` says."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mlseg.config import Settings
from mlseg.config.components import Component
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.e2eaug.learned_masks import starting_values
from mlseg.problems.e2eaug.losses import Adversarial
from mlseg.problems.e2eaug.networks.architecture import Selection
from mlseg.problems.e2eaug.networks.discriminator import DISCRIMINATORS
from mlseg.problems.e2eaug.networks.generator import GENERATORS
from mlseg.problems.systems import RunSettings, merged
from mlseg.segmentation.data import AugmentationSettings, DataSettings
from mlseg.segmentation.losses import LossSettings
from mlseg.segmentation.nets import SegmentorSettings


class GeneratorSettings(Component):
    """A mask-to-image generator by name, with the settings that it takes.

    ``pix2pix``, ``spade`` or ``asapnet``. ``search`` says where its cells are: ``none`` is the
    network as published; pix2pix has them in encoder and decoder (``both``), or ``decoder`` only.
    """

    registry = GENERATORS
    given = 3

    name: str = "pix2pix"


class DiscriminatorSettings(Component):
    """A discriminator by name: ``patchgan``, whose 3 layers see 70 by 70 pixels, or ``multiscale``.

    Where the config names none, ``spade`` and ``asapnet`` bring the latter.
    """

    registry = DISCRIMINATORS
    given = 1

    name: str = "patchgan"


class EpochsSettings(Settings):
    """A length that follows the number of images.

    Attributes:
        epochs: passes over the training images.
    """

    epochs: PositiveFloat


class GanSettings(Settings):
    """The GAN's training before and while the three levels run.

    Attributes:
        pretrain: iterations of generator and discriminator alone, before the segmentor starts; or
            ``{epochs: N}``, N times the training images.
        pretrain_lr: their learning rate in it. The paper gives none but that of the GAN's training,
            1e-5; its public code has 2e-5.
        pretrained: a ``checkpoints/gan.pt`` of another run, in place of pre-training.
        frozen: generator and alphas are not trained further (rows GAN and Separate).
        adversarial: ``vanilla`` (pix2pix) or ``hinge`` (SPADE).
        l1: weight of the reconstruction loss.
        feature_matching: weight of the distance between the discriminator's features of fake and
            real images; the discriminator has to be ``multiscale``.
        perceptual: features of VGG-19 between which fake and real images are compared: ``none``,
            ``random`` weights, or a file, torchvision's state dict of it. The run keeps them.
        perceptual_weight: of that.
        augmentation: of the real pairs that the GAN learns from.
    """

    pretrain: NonNegativeInt | EpochsSettings = EpochsSettings(epochs=200)
    pretrain_lr: PositiveFloat = 1e-5
    pretrained: str | None = None
    frozen: bool = False
    adversarial: Adversarial = "vanilla"
    l1: NonNegativeFloat = 100.0
    feature_matching: NonNegativeFloat = 0.0
    perceptual: str = "none"
    perceptual_weight: NonNegativeFloat = 10.0
    augmentation: AugmentationSettings = AugmentationSettings.off()

    def pretraining(self, images: int, batch_size: int) -> int:
        """Iterations of pre-training on so many images, in batches of ``batch_size``."""
        if isinstance(self.pretrain, int):
            return self.pretrain
        return math.ceil(self.pretrain.epochs * images / batch_size)


class ArchitectureSettings(Settings):
    """What becomes of the alphas.

    Attributes:
        selection: weights from alphas: ``softmax``, those of a cell sum to 1 (DARTS, which the
            paper follows); ``sigmoid``, each in [0, 1] by itself (the paper's section 3.2).
        mode: ``learned``; or a control: ``frozen`` at uniform weights, or ``random`` and frozen.
        spread: standard deviation of random alphas.
        draw: number of the draw of random alphas, the same whatever the seed is; None: the seed's.
        choice: with ``frozen``, the candidate that every cell has alone, such as ``4-2-1``.
    """

    selection: Selection = "softmax"
    mode: Literal["learned", "frozen", "random"] = "learned"
    spread: PositiveFloat = 1.0
    draw: NonNegativeInt | None = None
    choice: str | None = None


class LevelThreeSettings(Settings):
    """What level three is besides the alphas; nothing of it is the paper's.

    Attributes:
        synthetic_weight: lambda is learned too, from the config's on, by the same hypergradient.
        mask_augmentation: ranges and probabilities of ``mask_augmentation`` are learned too, from
            the config's on: of rotation, translation, scale and flips, as far as it has them. What
            it applies to every mask begins at a probability of 0.9.
        mask_temperature: of whether an operation happens, a relaxed Bernoulli variable: towards 0
            it is either 0 or 1, and its gradient noisier.
        guidance: the generator also steps along what the segmentor's validation loss asks of it,
            at this size relative to its own gradient.
        guidance_steps: over so many of its steps the size falls to zero, linearly; None: it stays.
    """

    synthetic_weight: bool = False
    mask_augmentation: bool = False
    mask_temperature: PositiveFloat = 0.2
    guidance: NonNegativeFloat = 0.0
    guidance_steps: PositiveInt | None = None

    @property
    def is_on(self) -> str | None:
        """The first setting that asks for something."""
        asks = ("synthetic_weight", "mask_augmentation", "guidance")
        return next((name for name in asks if getattr(self, name)), None)


class LevelSettings(Settings):
    """Optimizer, scheduler, hypergradient of each level; defaults from the paper's section 4.1."""

    generator: ProblemSettings
    discriminator: ProblemSettings
    segmentor: ProblemSettings
    architecture: ProblemSettings


class E2EAugSettings(RunSettings):
    """A config of the system ``e2eaug``.

    Attributes:
        preset: ``paper``, or ``genseg`` for what the method's public code does differently; either
            fills in what the config doesn't set. The generators ``spade`` and ``asapnet`` fill in
            their own discriminator and losses.
        loss: L_seg, of the real half, the synthetic half and the validation loss alike.
        augmentation: of real pairs, image and mask together; the paper's method has none.
        mask_augmentation: of the masks that synthetic images are made of.
        synthetic_weight: lambda.
        level3: what is learned beside the alphas.
    """

    preset: Literal["paper", "genseg"] = "paper"
    data: DataSettings
    segmentor: SegmentorSettings = SegmentorSettings()
    generator: GeneratorSettings = GeneratorSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    gan: GanSettings = GanSettings()
    architecture: ArchitectureSettings = ArchitectureSettings()
    loss: LossSettings = LossSettings()
    augmentation: AugmentationSettings = AugmentationSettings.off()
    mask_augmentation: AugmentationSettings = AugmentationSettings.preset("paper")
    synthetic_weight: NonNegativeFloat = 1.0
    level3: LevelThreeSettings = LevelThreeSettings()
    problems: LevelSettings

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")  # whatever a file says: the field's type is checked later
        defaults = PRESETS.get(preset if isinstance(preset, str) else "", PRESETS["paper"])
        generator = values.get("generator")
        if isinstance(generator, dict) and generator.get("name") in ("spade", "asapnet"):
            defaults = merged(defaults, _SPADE)
        return merged(defaults, values)

    @model_validator(mode="after")
    def _check(self) -> E2EAugSettings:
        for name in ("generator", "discriminator"):
            if getattr(self.problems, name).scheduler is not None:
                raise ValueError(f"problems.{name}.scheduler: the GAN's rate is not scheduled")
        learned = self.architecture.mode == "learned" and not self.gan.frozen
        search = getattr(self.generator, "search", None)
        if learned and search == "none" and self.synthetic_weight:
            raise ValueError(
                "generator.search: none leaves no architecture to learn; search decoder or both, "
                "or set architecture.mode to frozen"
            )
        if self.level3.is_on and not (learned and self.synthetic_weight):
            why = (
                "synthetic_weight 0 makes no synthetic pairs"
                if learned
                else "with gan.frozen or alphas that aren't learned there is no level three"
            )
            raise ValueError(f"level3.{self.level3.is_on}: {why}; drop it")
        if self.level3.guidance_steps is not None and not self.level3.guidance:
            raise ValueError("level3.guidance_steps: goes with level3.guidance above 0")
        if self.level3.mask_augmentation:
            starting_values(self.mask_augmentation)
        if self.architecture.choice is not None and self.architecture.mode != "frozen":
            raise ValueError("architecture.choice: goes with architecture.mode: frozen")
        if self.architecture.draw is not None and self.architecture.mode != "random":
            raise ValueError("architecture.draw: goes with architecture.mode: random")
        critic = DISCRIMINATORS.get(self.discriminator.name)
        if self.gan.feature_matching and not critic.has_features:
            raise ValueError(
                f"gan.feature_matching: {self.discriminator.name} gives no features to match; set "
                "discriminator.name to multiscale, or gan.feature_matching to 0"
            )
        parts = (self.augmentation, self.mask_augmentation, self.gan.augmentation)
        if any(part.window is not None for part in parts):
            raise ValueError("augmentation.window: the generator makes images of one size; drop it")
        if self.gan.frozen and not self.gan.pretrain and self.gan.pretrained is None:
            raise ValueError("gan.frozen: an untrained generator; set gan.pretrain or pretrained")
        return self


_GAN_STEP = {"name": "adam", "lr": 1e-5, "betas": [0.5, 0.999], "weight_decay": 1e-3}
# The derivative of one step as the optimizer takes it, preconditioned: the paper's words are "one-
# step gradient descent", whose letter is ``scale: learning_rate``. See docs/e2eaug.md.
_ONE_STEP = {"method": "finite_difference", "scale": "optimizer", "linearise": "before_step"}
_PAPER: dict[str, Any] = {
    "problems": {
        "generator": {"optimizer": _GAN_STEP, "hypergradient": _ONE_STEP},
        "discriminator": {"optimizer": _GAN_STEP},
        "segmentor": {
            "optimizer": {"name": "rmsprop", "lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-3},
            "scheduler": {"name": "reduce_on_plateau"},
            "hypergradient": _ONE_STEP,
        },
        # Adam's eps has to lie below the hypergradient, which carries the lower levels' rates.
        "architecture": {"optimizer": {"name": "adam", "lr": 1e-2, "eps": 1e-16}},
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "genseg": {
        **_PAPER,
        "generator": {"name": "pix2pix", "search": "decoder"},
        "gan": {"pretrain_lr": 2e-5},
        "mask_augmentation": "genseg",
        "loss": {"name": "weighted_sum", "cross_entropy": 1.0, "jaccard": 1.0},
        "problems": {
            **_PAPER["problems"],
            "architecture": {"optimizer": {"name": "adam", "lr": 1e-6, "weight_decay": 1e-5}},
        },
    },
}

# SPADE, section 3 and appendix A; ASAP-Net, section 4, trains by the same.
_SPADE: dict[str, Any] = {
    "discriminator": {"name": "multiscale"},
    "gan": {"adversarial": "hinge", "feature_matching": 10.0, "l1": 0.0},
}
