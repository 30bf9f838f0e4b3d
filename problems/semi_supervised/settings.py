"""What a config of the system ``semi_supervised`` says."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from mlseg.config import Settings
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.semi_supervised.losses import ramp
from mlseg.problems.systems import RunSettings, merged
from mlseg.segmentation.data import AugmentationSettings, DataSettings
from mlseg.segmentation.losses import LossSettings
from mlseg.segmentation.nets import SegmentorSettings


class RampSettings(Settings):
    """A weight that grows: ``weight exp(-5 (1 - s)^2)``, see ``ramp``.

    Attributes:
        weight: at the end of the ramp, and after it.
        epochs: into how many equal parts the run is divided; the weight keeps its value in each.
        begin: the part from which on there is a weight; s is 0 there.
        end: the part from which on it is whole.
    """

    weight: NonNegativeFloat
    epochs: PositiveInt
    begin: NonNegativeInt = 0
    end: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> RampSettings:
        if not self.begin < self.end <= self.epochs:
            raise ValueError(
                f"begin: from {self.begin} to {self.end} of {self.epochs} epochs; begin must lie "
                "before end, and end within the epochs"
            )
        return self

    def after(self, steps: int, iterations: int) -> float:
        """The weight after so many steps of a run of so many iterations."""
        epoch = min(self.epochs, self.epochs * steps // iterations)
        return self.weight * ramp(epoch, self.begin, self.end)


class AdversarialSettings(RampSettings):
    """DCT's term on images that mislead a network.

    Attributes:
        epsilon: how far each pixel may be from the image's, black being 0 and white 1.
    """

    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 0.03


class LevelSettings(Settings):
    """The networks. What ``partner`` doesn't say is as for ``segmentor``."""

    segmentor: ProblemSettings
    partner: ProblemSettings


class SemiSupervisedSettings(RunSettings):
    """A config of the system ``semi_supervised``.

    Attributes:
        method: ``ctbct``, cross teaching between CNN and transformer; or ``dct``, deep co-training.
            It fills in what the config doesn't set.
        data: with ``unlabelled`` images.
        segmentor: the first network, which is validated, chosen and scored.
        partner: the second; Swin-UNet for ctbct, the same as the first for dct.
        loss: on labelled images.
        augmentation: of labelled images with their masks, and of others alike.
        consistency: weight of agreement on images without masks; of weight 0 none are looked at.
        adversarial: dct's term on images that mislead a network.
        unlabelled_batch_size: others in a step; None: as many as labelled ones.
    """

    takes_unlabelled: ClassVar[bool] = True

    method: Literal["ctbct", "dct"]
    data: DataSettings
    segmentor: SegmentorSettings = SegmentorSettings()
    partner: SegmentorSettings
    loss: LossSettings
    augmentation: AugmentationSettings = AugmentationSettings.off()
    consistency: RampSettings
    adversarial: AdversarialSettings | None = None
    unlabelled_batch_size: PositiveInt | None = None
    problems: LevelSettings

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        method = values.get("method")
        found = merged(PRESETS.get(method, {}) if isinstance(method, str) else {}, values)
        if method == "dct":
            found.setdefault("partner", found.get("segmentor", {}))
        levels = found.get("problems")
        if isinstance(levels, dict) and isinstance(levels.get("segmentor"), dict):
            partner = levels.get("partner", {})
            if isinstance(partner, dict):
                found["problems"] = {**levels, "partner": merged(levels["segmentor"], partner)}
        return found

    @model_validator(mode="after")
    def _check(self) -> SemiSupervisedSettings:
        if not self.data.unlabelled:
            raise ValueError(
                f"data.unlabelled: 0 images without masks, from which {self.method} learns; say "
                "how many"
            )
        if self.method == "ctbct" and self.adversarial is not None:
            raise ValueError("adversarial: is a part of dct; drop it, or set method to dct")
        first, second = self.problems.segmentor, self.problems.partner
        alike = ["accumulate", "unroll_steps"] + ["batch_size"] * (self.method == "ctbct")
        for key in alike:
            if getattr(first, key) != getattr(second, key):
                raise ValueError(
                    f"problems.partner.{key}: the networks step together, on the segmentor's "
                    f"batch; set problems.segmentor.{key} alone"
                )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "ctbct": {
        "partner": {"name": "swin_unet"},
        "loss": {"name": "cross_entropy_and_squared_dice"},
        "consistency": {"weight": 0.1, "epochs": 200, "begin": 0, "end": 200},
    },
    "dct": {
        "loss": {"name": "weighted_sum", "cross_entropy": 1.0},
        "consistency": {"weight": 0.5, "epochs": 120, "begin": 0, "end": 50},
        "adversarial": {"weight": 0.05, "epochs": 120, "begin": 20, "end": 50, "epsilon": 0.03},
    },
}
"""The methods' public code, as ``docs/e2eaug.md`` says."""
