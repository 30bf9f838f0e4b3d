"""Supervised training of a segmentor alone: the rows Vanilla, Rotate, Flip, Translate, Combine.

One problem, no game. Image and mask are augmented together, by the same draw. The segmentor, its
optimizer, its data order and its initial weights are those of E2EAug's second level at the same
seed: with lambda = 0 the two systems are the same, step for step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlseg.config import Settings
from mlseg.data import Augmentation, AugmentationSettings, BatchLoader, DataSettings, load_data
from mlseg.engines.segmentation import SegmentationEngine
from mlseg.engines.settings import Stage, choose_device
from mlseg.losses import LossSettings, SegmentationLoss
from mlseg.nets import SegmentorSettings, build_segmentor
from mlseg.problems.base import Problem
from mlseg.problems.settings import ProblemSettings
from mlseg.problems.systems import RunSettings, system
from mlseg.randomness import derived, seeded


class Segmentor(Problem):
    """A segmentor on labelled pairs."""

    criterion: SegmentationLoss

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
    data, device = load_data(settings.data), choose_device(settings.device)
    spec, level = data.spec, settings.problems.segmentor
    with seeded(settings.seed, "segmentor"):
        network = build_segmentor(settings.segmentor, spec.channels, spec.num_classes)
    network.to(memory_format=torch.channels_last)  # the layout CPUs and tensor cores like
    optimizer, scheduler = level.build(network.parameters(), settings.engine.mode)
    loader = BatchLoader(
        data.train,
        level.batch_size,
        device,
        seed=derived(settings.seed, "segmentor"),
        augmentation=Augmentation(settings.augmentation, spec.ignore_index),
    )
    config = level.config(settings.precision)
    segmentor = Segmentor("segmentor", network, optimizer, loader, config, scheduler)
    segmentor.criterion = SegmentationLoss(settings.loss, spec.ignore_index)
    return SegmentationEngine(
        [segmentor],
        settings.engine,
        segmentor=segmentor,
        architecture=settings.segmentor,
        data=data,
        device=device,
        out=out,
        stages=[Stage("training", settings.engine.iterations)],
    )
