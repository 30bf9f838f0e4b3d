"""Supervised training of a segmentor alone: the rows Vanilla, Rotate, Flip, Translate, Combine.

One problem, no game. Image and mask are augmented together, by the same draw. The segmentor, its
optimizer, its data order and its initial weights are those of E2EAug's second level at the same
seed: with lambda = 0 the two systems are the same, step for step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlseg.config import Settings
from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation
from mlseg.engines.settings import Stage
from mlseg.multilevel.problem import Problem
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.building import Builder, Setup
from mlseg.problems.systems import RunSettings, system
from mlseg.segmentation.data import AugmentationSettings, DataSettings, load_data
from mlseg.segmentation.losses import Criterion, LossSettings, build_loss
from mlseg.segmentation.nets import SegmentorSettings


class Segmentor(Problem):
    """A segmentor on labelled pairs."""

    def __init__(self, setup: Setup, *, criterion: Criterion) -> None:
        super().__init__(*setup)
        self.criterion = criterion

    def training_step(self, batch: Any) -> Any:
        """``L_seg(D_tr; W)``."""
        image, mask = batch
        return self.criterion(self(image), mask)


class LevelSettings(Settings):
    """The one level."""

    segmentor: ProblemSettings


class SupervisedSettings(RunSettings):
    """A config of the system ``supervised``.

    Attributes:
        augmentation: of image and mask together; ``off`` is the row Vanilla.
    """

    data: DataSettings
    segmentor: SegmentorSettings = SegmentorSettings()
    loss: LossSettings = LossSettings()
    augmentation: AugmentationSettings = AugmentationSettings.off()
    problems: LevelSettings


@system("supervised", SupervisedSettings, "a segmentor alone, with or without augmentation")
def build(settings: SupervisedSettings, out: Path | None) -> Engine:
    """Data, network, the problem, the engine."""
    data = load_data(settings.data)
    window = settings.augmentation.output_size(data.train.image_size)
    make, level = Builder(settings, data.spec), settings.problems.segmentor
    loader = make.loader("segmentor", level, data.train, settings.augmentation)
    segmentor = Segmentor(
        make.level("segmentor", level, make.segmentor(), loader),
        criterion=build_loss(settings.loss, data.spec.ignore_index),
    )
    return Engine(
        [segmentor],
        settings.engine,
        stages=[Stage("training", settings.engine.iterations)],
        device=make.device,
        out=out,
        hooks=[Segmentation(segmentor, settings.segmentor, data, window=window)],
    )
