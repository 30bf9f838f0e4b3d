"""Supervised training of a segmentor alone: the rows Vanilla, Rotate, Flip, Translate, Combine.

One problem, no game. Image and mask are augmented together, by the same draw. The segmentor, its
optimizer, its data order and its initial weights are those of E2EAug's second level at the same
seed: with lambda = 0 the two systems are the same, step for step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlseg.config import Settings
from mlseg.engines.segmentation import SegmentationEngine
from mlseg.engines.settings import Stage
from mlseg.multilevel.problem import Problem
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.building import Builder
from mlseg.problems.systems import RunSettings, system
from mlseg.segmentation.data import AugmentationSettings, DataSettings, load_data
from mlseg.segmentation.losses import Criterion, LossSettings, build_loss
from mlseg.segmentation.nets import SegmentorSettings


class Segmentor(Problem):
    """A segmentor on labelled pairs."""

    criterion: Criterion

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
def build(settings: SupervisedSettings, out: Path | None) -> SegmentationEngine:
    """Data, network, the problem, the engine."""
    data = load_data(settings.data)
    window = settings.augmentation.output_size(data.train.image_size)
    build, level = Builder(settings, data.spec), settings.problems.segmentor
    loader = build.loader("segmentor", level, data.train, settings.augmentation)
    segmentor = build.problem(Segmentor, "segmentor", level, build.segmentor(), loader)
    segmentor.criterion = build_loss(settings.loss, data.spec.ignore_index)
    return SegmentationEngine(
        [segmentor],
        settings.engine,
        segmentor=segmentor,
        data=data,
        window=window,
        stages=[Stage("training", settings.engine.iterations)],
        **build.engine_options(out),
    )
