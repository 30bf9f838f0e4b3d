"""What a config of the system ``segan`` says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mlseg.config import Settings
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.segan.losses import Reduction
from mlseg.problems.segan.networks.critic import KERNELS
from mlseg.problems.systems import RunSettings
from mlseg.segmentation.data import AugmentationSettings, DataSettings
from mlseg.segmentation.nets import SegmentorSettings

Open = Annotated[float, Field(gt=0.0, lt=1.0)]


class CriticSettings(Settings):
    """The critic of figure 1, and what it is kept within.

    Attributes:
        channels, layers, global_kernel: see ``Critic``.
        classes: for more than two classes, ``each``: one critic per class, the mean of their
            losses; or ``stacked``: one critic on the masked images of all classes.
        clamp: every parameter is clamped to [-clamp, clamp] after each of its steps; None: not.
        clamp_norm: whether BatchNorm's parameters are, too, as the paper says.
        masked_range: images are multiplied by a label map with values in ``unit`` [0, 1], where a
            masked pixel is black, or ``signed`` [-1, 1], where it is mid grey.
        pixel_level: whether the masked image itself is the first feature: a direct L1 term between
            label maps, whose gradient doesn't pass through any of the critic's weights.
        output: ``features``, whose distances are the loss, or ``scalar``: one logit an image and
            the loss of a conventional GAN, which the paper's section 2.3 argues against.
    """

    channels: PositiveInt = 64
    layers: Annotated[int, Field(ge=1, le=len(KERNELS))] = len(KERNELS)
    global_kernel: PositiveInt | None = 9
    classes: Literal["each", "stacked"] = "each"
    clamp: PositiveFloat | None = 0.05
    clamp_norm: bool = True
    masked_range: Literal["unit", "signed"] = "unit"
    pixel_level: bool = True
    output: Literal["features", "scalar"] = "features"


class LogisticSettings(Settings):
    """How k is annealed: it is multiplied by ``decay`` each ``every`` epochs, down to ``floor``.

    A floor of 1 is the plain sigmoid.

    Attributes:
        decay: what k is multiplied by.
        every: epochs between two of its changes.
        floor: the smallest k.
    """

    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    every: PositiveInt = 25
    floor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3


class GameLossSettings(Settings):
    """The loss of both players.

    Attributes:
        reduction: of the multi-scale L1 loss, see ``multi_scale_l1``.
        dice_weight: of a soft Dice term in the segmentor's loss alone; 0 is the paper.
    """

    reduction: Reduction = "layer_mean"
    dice_weight: NonNegativeFloat = 0.0


class LevelSettings(Settings):
    """The players. The batch size is the critic's: the segmentor takes the same batch."""

    critic: ProblemSettings
    segmentor: ProblemSettings


class SegANSettings(RunSettings):
    """A config of the system ``segan``.

    Attributes:
        game: ``alternating``, each player by its own loss alone; or ``stackelberg``: the
            segmentor's gradient also passes through the critic's best response, by the method of
            ``problems.critic.hypergradient``.
        threshold: of the label map at prediction, for two classes.
        warmup_epochs: epochs, before the game, in which the segmentor alone learns from the Dice
            term alone; 0 is the paper.
    """

    game: Literal["alternating", "stackelberg"] = "alternating"
    data: DataSettings
    augmentation: AugmentationSettings = AugmentationSettings.off()
    segmentor: SegmentorSettings = Field(default_factory=lambda: SegmentorSettings(name="segan"))
    critic: CriticSettings = CriticSettings()
    logistic: LogisticSettings = LogisticSettings()
    loss: GameLossSettings = GameLossSettings()
    threshold: Open = 0.4
    warmup_epochs: NonNegativeInt = 0
    problems: LevelSettings

    @model_validator(mode="before")
    @classmethod
    def _one_batch(cls, values: Any) -> Any:
        """The segmentor's batch size is the critic's, so that the resolved config says so."""
        levels = values.get("problems") if isinstance(values, dict) else None
        if not isinstance(levels, dict):
            return values
        critic, segmentor = levels.get("critic"), levels.get("segmentor")
        if not (isinstance(critic, dict) and isinstance(segmentor, dict)):
            return values
        if "batch_size" not in critic:
            return values
        filled = {"batch_size": critic["batch_size"], **segmentor}
        return {**values, "problems": {**levels, "segmentor": filled}}

    @model_validator(mode="after")
    def _check(self) -> SegANSettings:
        if self.problems.segmentor.batch_size != self.problems.critic.batch_size:
            raise ValueError(
                "problems.segmentor.batch_size: the segmentor takes the critic's batch; set "
                "problems.critic.batch_size alone"
            )
        if self.loss.reduction == "concat" and not self.critic.pixel_level:
            raise ValueError(
                "critic.pixel_level: the weights of loss.reduction concat begin with the masked "
                "image; set it to true, or take layer_mean or sum"
            )
        return self
