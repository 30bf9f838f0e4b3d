"""What a config of the system ``e2eaug`` says."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mlseg.config import Settings
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.e2eaug.networks.architecture import Selection
from mlseg.problems.systems import RunSettings
from mlseg.segmentation.data import AugmentationSettings, DataSettings
from mlseg.segmentation.losses import LossSettings
from mlseg.segmentation.nets import SegmentorSettings


class GeneratorSettings(Settings):
    """The network that makes an image of a mask.

    Attributes:
        channels: of its first layer; deeper ones have up to eight times as many.
        levels: how often it halves the image; null: as often as it can.
        dropout: probability, on the three decoder levels after the innermost.
        search: which cells have candidates: those of encoder and decoder (``both``), of the
            ``decoder`` only, or ``none``.
    """

    channels: PositiveInt = 64
    levels: PositiveInt | None = None
    dropout: NonNegativeFloat = 0.5
    search: Literal["both", "decoder", "none"] = "both"


class DiscriminatorSettings(Settings):
    """PatchGAN.

    Attributes:
        channels: of its first layer.
        layers: that halve the image; with 3 each of its outputs sees 70 by 70 pixels.
    """

    channels: PositiveInt = 64
    layers: PositiveInt = 3


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
        l1: weight of the reconstruction loss.
        augmentation: of the real pairs that the GAN learns from.
    """

    pretrain: NonNegativeInt | EpochsSettings = EpochsSettings(epochs=200)
    pretrain_lr: PositiveFloat = 1e-5
    pretrained: str | None = None
    frozen: bool = False
    l1: NonNegativeFloat = 100.0
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
    """

    selection: Selection = "softmax"
    mode: Literal["learned", "frozen", "random"] = "learned"
    spread: PositiveFloat = 1.0


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
            fills in what the config doesn't set.
        loss: L_seg, of the real half, the synthetic half and the validation loss alike.
        augmentation: of real pairs, image and mask together; the paper's method has none.
        mask_augmentation: of the masks that synthetic images are made of.
        synthetic_weight: lambda.
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
    problems: LevelSettings

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return merged(PRESETS.get(values.get("preset", "paper"), PRESETS["paper"]), values)

    @model_validator(mode="after")
    def _check(self) -> E2EAugSettings:
        for name in ("generator", "discriminator"):
            if getattr(self.problems, name).scheduler is not None:
                raise ValueError(f"problems.{name}.scheduler: the GAN's rate is not scheduled")
        learned = self.architecture.mode == "learned" and not self.gan.frozen
        if learned and self.generator.search == "none" and self.synthetic_weight:
            raise ValueError(
                "generator.search: none leaves no architecture to learn; search decoder or both, "
                "or set architecture.mode to frozen"
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
        "generator": {"search": "decoder"},
        "gan": {"pretrain_lr": 2e-5},
        "mask_augmentation": "genseg",
        "loss": {"name": "weighted_sum", "cross_entropy": 1.0, "jaccard": 1.0},
        "problems": {
            **_PAPER["problems"],
            "architecture": {"optimizer": {"name": "adam", "lr": 1e-6, "weight_decay": 1e-5}},
        },
    },
}


def merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``; a mapping that names another component replaces the default."""
    result = dict(defaults)
    for key, value in values.items():
        default = result.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and _same(default, value):
            result[key] = merged(default, value)
        else:
            result[key] = value
    return result


def _same(default: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether both are settings of one component."""
    return all(value.get(key, default.get(key)) == default.get(key) for key in ("name", "method"))
