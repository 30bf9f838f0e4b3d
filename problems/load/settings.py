"""What a config of the system ``load`` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mlseg.config import Settings
from mlseg.engines.lookahead.controller import LookaheadSettings
from mlseg.engines.lookahead.discriminator_training import DiscriminatorTrainingSettings
from mlseg.engines.lookahead.loop import METRIC
from mlseg.engines.settings import EngineSettings, LoopSettings
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.load.convergence import ConvergenceSettings
from mlseg.problems.load.losses import Relaxation
from mlseg.problems.load.networks import DiscriminatorSettings
from mlseg.problems.systems import AnyRunSettings
from mlseg.segmentation.data import AugmentationSettings, DataSettings
from mlseg.segmentation.nets import SegmentorSettings


class PretrainingSettings(Settings):
    """Stage 1: cross-entropy. The paper's recipe for Stanford Background is 4 and 8 epochs.

    Attributes:
        weighted_epochs: with classes weighted by how little of them an image shows.
        epochs: plain, after those.
    """

    weighted_epochs: NonNegativeInt = 4
    epochs: NonNegativeInt = 8


class HoldOutSettings(Settings):
    """The validation images that decide, and are never scored as a test.

    Attributes:
        fraction: of the validation split.
        seed: of their draw.
        batch_size: images at once; None: on CUDA as many as fit.
    """

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    seed: NonNegativeInt = 0
    batch_size: PositiveInt | None = None


class FakesSettings(Settings):
    """The training images that the buffer holds label maps of.

    The discriminator sees the truth of all, and the maps of these. A share of 0.1 takes a tenth of
    the memory and of the time that making maps takes.

    Attributes:
        fraction: of the training split; at least one image.
        seed: of their draw, the same for all entries.
    """

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: NonNegativeInt = 0


class AdversarialSettings(Settings):
    """What the generator learns from the discriminator.

    Attributes:
        relaxation: of the generator's label maps, which reach the discriminator unhardened: see
            :func:`mlseg.problems.load.losses.relax`.
        temperature: of the relaxation.
        loss: ``non_saturating``, -log D, or ``saturating``, log(1 - D).
        weight: lambda, in front of it.
        reduction: over the images of a batch: ``sum``, as the paper prints it (equation 3), or
            ``mean``, which at a batch of 5 is a fifth of the gradient.
        cross_entropy: weight of a pixel-wise cross-entropy beside it, mean over an image's pixels
            and reduced alike: the hybrid loss that the paper sets to 0 in stage 2.
        freeze_batch_norm: whether the generator's BatchNorm statistics stay those of stage 1; its
            batches here are small.
    """

    relaxation: Relaxation = "softmax"
    temperature: PositiveFloat = 1.0
    loss: Literal["non_saturating", "saturating"] = "non_saturating"
    weight: PositiveFloat = 1.0
    reduction: Literal["sum", "mean"] = "mean"
    cross_entropy: NonNegativeFloat = 0.0
    freeze_batch_norm: bool = True


class LevelSettings(Settings):
    """Optimizer and batch size of each problem.

    Attributes:
        pretraining: stage 1.
        generator: the segmentor against the discriminator; its rate isn't scheduled.
        discriminator: batches of label maps, real and fake together.
    """

    pretraining: ProblemSettings
    generator: ProblemSettings
    discriminator: ProblemSettings

    @model_validator(mode="after")
    def _check(self) -> LevelSettings:
        scheduler = self.pretraining.scheduler
        if scheduler is not None and scheduler.step == "validation":
            raise ValueError(
                "pretraining.scheduler: stage 1 isn't validated; let it step per iteration or epoch"
            )
        for name in ("generator", "discriminator"):
            problem: ProblemSettings = getattr(self, name)
            if problem.scheduler is not None:
                raise ValueError(f"{name}.scheduler: the rate isn't scheduled; leave it out")
            if problem.accumulate != 1:
                raise ValueError(f"{name}.accumulate: an update is one batch; leave it out")
        return self


INSTEAD = {  # of what other engines are told, with the value that says nothing
    "metric": (None, "the mIoU on the hold-out chooses the model"),
    "mode": ("max", "a higher mIoU is better"),
    "patience": (None, "lookahead.patience and lookahead.cycles end the run"),
    "samples": (0, "nothing is validated on the way; `pictures` are written at the end"),
}


class LoadEngineSettings(LoopSettings):
    """How long, and what to keep. The hold-out's mIoU decides, and the controller when it is over.

    Attributes:
        iterations: pieces of the lookahead's work at most: updates, batches of label maps, batches
            and evaluations of the discriminator. For trials: what it cuts off is no result.
        validate_every: pieces between saves of ``last.pt``, where ``checkpoint_every`` is None.
    """

    iterations: PositiveInt = 1_000_000_000

    @model_validator(mode="before")
    @classmethod
    def _without_validation(cls, values: Any) -> Any:
        """Say what takes the place of a setting; drop one that says nothing, as older runs have."""
        if not isinstance(values, dict):
            return values
        for name, (nothing, instead) in INSTEAD.items():
            if values.get(name, nothing) != nothing:
                raise ValueError(f"{name}: {instead}; leave it out")
        return {key: value for key, value in values.items() if key not in INSTEAD}

    def for_engine(self) -> EngineSettings:
        """What the engine is told."""
        return EngineSettings(metric=METRIC, samples=0, **self.model_dump())


class LoadSettings(AnyRunSettings):
    """A config of the system ``load``.

    Attributes:
        start: a checkpoint of any run with a segmentor of this shape, in place of stage 1.
        convergence: None, or when stage 1, after its epochs, has gone on for long enough; of no
            effect, as ``pretraining``, where ``start`` takes stage 1's place.
        augmentation: of image and label map together, in all of training.
        control: None, or a number of further cross-entropy updates in place of the lookahead, the
            best of them on the hold-out kept.
        descent_ascent: None, or a number of alternating updates in its place: a step of the
            discriminator on what the generator makes now, then one of the generator. Nothing is
            rolled back; the best on the hold-out is kept.
        buffer_limit_mib: label maps beyond this many MiB are kept in memory-mapped files.
        pictures: images in each picture: of those whose label maps changed most, of those that
            gained most, and of label maps across the cycles.
    """

    resumable: ClassVar[Sequence[str]] = (*AnyRunSettings.resumable, "pictures")

    engine: LoadEngineSettings = LoadEngineSettings()
    data: DataSettings
    segmentor: SegmentorSettings = SegmentorSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    start: str | None = None
    pretraining: PretrainingSettings = PretrainingSettings()
    convergence: ConvergenceSettings | None = None
    lookahead: LookaheadSettings = LookaheadSettings()
    hold_out: HoldOutSettings = HoldOutSettings()
    fakes: FakesSettings = FakesSettings()
    adversarial: AdversarialSettings = AdversarialSettings()
    discriminator_training: DiscriminatorTrainingSettings = DiscriminatorTrainingSettings()
    augmentation: AugmentationSettings = AugmentationSettings.preset("flip")
    control: PositiveInt | None = None
    descent_ascent: PositiveInt | None = None
    buffer_limit_mib: NonNegativeFloat = 2048.0
    pictures: NonNegativeInt = 6
    problems: LevelSettings

    @model_validator(mode="after")
    def _check(self) -> LoadSettings:
        epochs = self.pretraining.weighted_epochs + self.pretraining.epochs
        if self.start is None and not epochs:
            raise ValueError("start: an untrained model; set pretraining.epochs, or name a start")
        if self.start is not None and self.segmentor.said("weights"):
            raise ValueError("start: it brings all weights; drop it or segmentor.weights")
        if self.control is not None and self.descent_ascent is not None:
            raise ValueError(
                "descent_ascent: control takes the lookahead's place; drop one of them"
            )
        if self.descent_ascent is not None and self.problems.discriminator.batch_size < 2:
            raise ValueError(
                "problems.discriminator.batch_size: half of the maps are real; give 2 or more, or "
                "drop descent_ascent"
            )
        if self.control is not None and self.problems.pretraining.accumulate != 1:
            raise ValueError(
                "problems.pretraining.accumulate: an update of the control is one batch; "
                "leave it out"
            )
        return self
