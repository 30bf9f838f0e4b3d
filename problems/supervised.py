"""Supervised training of a segmentor alone: the rows Vanilla, Rotate, Flip, Translate, Combine.

One problem, no game. Image and mask are augmented together, by the same draw; the augmented pairs
replace the real ones or, as E2EAug's paper says of its baselines (sections 2 and 4.1), are
additional training data: each step then learns from a batch of real pairs and from their augmented
copies, ``L_seg(D_tr; W) + L_seg(D_aug; W)``, which is equation 2 at lambda = 1. The segmentor, its
optimizer, its data order and its initial weights are those of E2EAug's second level at the same
seed: with lambda = 0 the two systems are the same, step for step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from mlseg.config import Settings
from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation
from mlseg.engines.settings import Stage
from mlseg.multilevel.problem import Problem
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.building import Builder, Setup
from mlseg.problems.systems import RunSettings, system
from mlseg.randomness import derived
from mlseg.segmentation.data import Augmentation, AugmentationSettings, DataSettings, load_data
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


class AugmentedSegmentor(Segmentor):
    """A segmentor on labelled pairs and, beside them, on augmented copies of them.

    Args:
        augmentation: of the copies, image and mask together.
        augmentation_seed: of its draws.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        criterion: Criterion,
        augmentation: Augmentation,
        augmentation_seed: int,
    ) -> None:
        super().__init__(setup, criterion=criterion)
        self.augmentation = augmentation
        self.augmentation_generator = torch.Generator().manual_seed(augmentation_seed)

    def get_batch(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Real pairs, and the same augmented: the draw is part of the batch."""
        image, mask = super().get_batch()
        return (image, mask), self.augmentation(image, mask, self.augmentation_generator)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``L_seg(D_tr; W) + L_seg(D_aug; W)``, each half by its own BatchNorm statistics."""
        real, augmented = (super(AugmentedSegmentor, self).training_step(half) for half in batch)
        return {"loss": real + augmented, "real": real, "augmented": augmented}

    def state_dict(self) -> dict[str, Any]:
        """Betty's, and the generator of augmentations."""
        state = self.augmentation_generator.get_state()
        return {**super().state_dict(), "augmentation_generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.augmentation_generator.set_state(state["augmentation_generator"])


class LevelSettings(Settings):
    """The one level."""

    segmentor: ProblemSettings


class SupervisedSettings(RunSettings):
    """A config of the system ``supervised``.

    Attributes:
        augmentation: of image and mask together; ``off`` is the row Vanilla.
        augmented_pairs: ``replacing`` the real ones, or ``added`` to them.
    """

    data: DataSettings
    segmentor: SegmentorSettings = SegmentorSettings()
    loss: LossSettings = LossSettings()
    augmentation: AugmentationSettings = AugmentationSettings.off()
    augmented_pairs: Literal["replacing", "added"] = "replacing"
    problems: LevelSettings

    @model_validator(mode="after")
    def _check(self) -> SupervisedSettings:
        if self.augmented_pairs == "added" and self.augmentation.window is not None:
            raise ValueError(
                "augmentation.window: real pairs and their copies need one size; drop it, or set "
                "augmented_pairs to replacing"
            )
        return self


@system(
    "supervised",
    SupervisedSettings,
    "a segmentor alone, with or without augmentation",
    in_several=True,
)
def build(settings: SupervisedSettings, out: Path | None) -> Engine:
    """Data, network, the problem, the engine."""
    data = load_data(settings.data)
    window = settings.augmentation.output_size(data.train.image_size)
    make, level = Builder(settings, data.spec, out), settings.problems.segmentor
    # Without an operation the copies would be the real pairs, twice: that is the row Vanilla.
    added = settings.augmented_pairs == "added" and settings.augmentation != AugmentationSettings()
    drawn = AugmentationSettings.off() if added else settings.augmentation
    loader = make.loader("segmentor", level, data.train, drawn)
    setup = make.level("segmentor", level, make.segmentor(), loader)
    criterion = build_loss(settings.loss, data.spec.ignore_index)
    if added:
        segmentor: Segmentor = AugmentedSegmentor(
            setup,
            criterion=criterion,
            augmentation=Augmentation(settings.augmentation, data.spec.ignore_index),
            augmentation_seed=derived(settings.seed, "augmentation"),
        )
    else:
        segmentor = Segmentor(setup, criterion=criterion)
    return Engine(
        [segmentor],
        settings.engine,
        stages=[Stage("training", settings.engine.iterations)],
        device=make.device,
        out=out,
        hooks=[
            Segmentation(segmentor, settings.segmentor, data, window=window),
            *make.hooks(),
        ],
    )
