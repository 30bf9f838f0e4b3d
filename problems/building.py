"""What systems build alike: a segmentor, a level's batches, a level."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from mlseg.machine import choose_device
from mlseg.multilevel.problem import Problem
from mlseg.multilevel.settings import ProblemSettings
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import (
    Augmentation,
    AugmentationSettings,
    BatchLoader,
    DatasetSpec,
    DataSettings,
    Samples,
)
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor

P = TypeVar("P", bound=Problem)


class SegmentationRun(Protocol):
    """What the config of every system that trains a segmentor has."""

    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def data(self) -> DataSettings: ...
    @property
    def segmentor(self) -> SegmentorSettings: ...
    @property
    def engine(self) -> Any: ...


class Builder:
    """Makes the parts of one run, each from a seed of its own name.

    Parts of the same name are the same in every system at the same seed: initial weights, order of
    the batches, augmentation.

    Args:
        settings: the run's.
        spec: of its data.
    """

    def __init__(self, settings: SegmentationRun, spec: DatasetSpec) -> None:
        self.settings = settings
        self.spec = spec
        self.device: torch.device = choose_device(settings.device)

    def segmentor(self) -> nn.Module:
        """The config's segmentor, with random weights."""
        with seeded(self.settings.seed, "segmentor"):
            network = build_segmentor(
                self.settings.segmentor, self.spec.channels, self.spec.num_classes
            )
        # The layout that CPUs and tensor cores like.
        return network.to(memory_format=torch.channels_last)

    def loader(
        self,
        name: str,
        level: ProblemSettings,
        samples: Samples,
        augmentation: AugmentationSettings | None = None,
    ) -> BatchLoader:
        """Batches of ``samples`` for the level ``name``."""
        chosen = augmentation if augmentation is not None else AugmentationSettings.off()
        return BatchLoader(
            samples,
            level.batch_size,
            self.device,
            seed=derived(self.settings.seed, name),
            augmentation=Augmentation(chosen, self.spec.ignore_index),
        )

    def problem(
        self,
        cls: type[P],
        name: str,
        level: ProblemSettings,
        module: nn.Module,
        loader: BatchLoader | None = None,
        more_steps: int = 0,
        **config: Any,
    ) -> P:
        """The level ``name`` with the optimizer, scheduler and hypergradient of its settings.

        Args:
            more_steps: that it takes beyond ``engine.iterations``, in stages before the last.
            config: changes to its ``Config``.
        """
        engine = self.settings.engine
        steps = engine.iterations + more_steps
        optimizer, scheduler = level.build(module.parameters(), engine.mode, steps)
        made = level.config(self.settings.precision)
        for key, value in config.items():
            setattr(made, key, value)
        return cls(name, module, optimizer, loader, made, scheduler)
