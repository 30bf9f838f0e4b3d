"""What systems build alike: a segmentor, a level's batches, what a level is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mlseg import checkpoint, parallel
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.settings import EngineSettings, LoopSettings
from mlseg.errors import UserError
from mlseg.machine import choose_device
from mlseg.multilevel.config import Config
from mlseg.multilevel.settings import ProblemSettings
from mlseg.randomness import derived, replayed, seeded
from mlseg.segmentation.data import (
    Augmentation,
    AugmentationSettings,
    BatchLoader,
    DatasetSpec,
    DataSettings,
    Samples,
)
from mlseg.segmentation.fine_tuning import Taken, said, start_from
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor, starting


class Setup(NamedTuple):
    """What every level is made of: the arguments of ``Problem``, in their order.

    A level's own constructor takes it first, and then what its loss needs::

        class Generator(Problem):
            def __init__(self, setup: Setup, *, l1: float) -> None:
                super().__init__(*setup)
                self.l1 = l1
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loader: BatchLoader | tuple[BatchLoader, ...] | None = None
    config: Config | None = None
    scheduler: LRScheduler | None = None


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
    def engine(self) -> LoopSettings: ...
    @property
    def init(self) -> str | None: ...


TAKEN: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What segmentors have taken over from another run; see ``Taken``."""


class TakenOver(Hooks):
    """Says what a run's segmentors have taken over by ``init``, at its start and in its results.

    Args:
        problems: of the run.

    Raises:
        UserError: none of them has anything to do with it.
    """

    name = "init"

    def __init__(self, problems: Iterable[Any], goes_on: bool) -> None:
        self.records = {p.name: TAKEN[p.module] for p in problems if p.module in TAKEN}
        if not (self.records or goes_on):
            raise UserError("init: this system makes no segmentor that it could start; drop it")
        self._say()

    def state_dict(self) -> dict[str, Any]:
        """The records: a run that goes on doesn't read the file again."""
        return {"records": self.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.records = {str(k): Taken.of(v).record() for k, v in state["records"].items()}
        self._say()

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """``init``, by the level that holds the segmentor."""
        return {"init": self.records}

    def _say(self) -> None:
        self.notice = "\n".join(map(said, self.records.values())) or None


class StartedFrom(Hooks):
    """Says what weights a run's segmentors have started from, at its start and in its results."""

    name = "started_from"

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}

    def add(self, segmentor: str, found: starting.Started | None) -> None:
        """Keep what there is to say of a segmentor."""
        if found is not None:
            self.records[segmentor] = found.record()
            self.notice = "\n".join(map(starting.said, self.records.values()))

    def state_dict(self) -> dict[str, Any]:
        """The records: a run that goes on doesn't read the files again."""
        return {"records": self.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.records = dict(state["records"])

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """``started_from``, by segmentor."""
        return {"started_from": self.records}


class Builder:
    """Makes the parts of one run, each from a seed of its own name.

    Parts of the same name are the same in every system at the same seed: initial weights, order of
    the batches, augmentation.

    Args:
        settings: the run's.
        spec: of its data.
        out: the run directory, None for a run without one. A run that goes on has its weights, and
            reads none to start from.
    """

    def __init__(
        self, settings: SegmentationRun, spec: DatasetSpec, out: Path | None = None
    ) -> None:
        self.settings = settings
        self.spec = spec
        self.goes_on = out is not None and (out / "checkpoints" / checkpoint.LAST).exists()
        self.started = StartedFrom()
        self.device: torch.device = choose_device(settings.device)
        self._made: set[str] = set()
        self._named: list[SegmentorSettings] = [settings.segmentor]

    def segmentor(
        self, name: str = "segmentor", settings: SegmentorSettings | None = None
    ) -> nn.Module:
        """The config's segmentor, with random weights, those of another run, or published ones.

        Args:
            name: its random weights are those of this name; a warning says where two have one.
            settings: of another network than the config's ``segmentor``; ``init`` isn't for it.

        Raises:
            UserError: what ``init`` or the settings name can't be had, or is another network's; or
                both name weights.
        """
        if name in self._made:
            warnings.warn(
                f"a second segmentor {name!r} starts from the same weights as the first; where it "
                "shouldn't, give it a name of its own: Builder.segmentor(name)",
                stacklevel=2,
            )
        self._made.add(name)
        init = self.settings.init if settings is None else None
        settings = settings or self.settings.segmentor
        self._named.append(settings)
        with seeded(self.settings.seed, name):
            network = build_segmentor(settings, self.spec.channels, self.spec.num_classes)
        if not self.goes_on:
            found = starting.start(network, settings, self.spec.channels, self.spec.classes)
            if found is not None and init is not None:
                raise UserError("init: segmentor names weights to start from too; drop either")
            self.started.add(name, found)
        if init is not None:
            with replayed(None):
                taken = start_from(init, network, settings, self.spec.channels, self.spec.classes)
            TAKEN[network] = taken.record()
        return network

    def lay_out(self, *networks: nn.Module) -> None:
        """Give other networks of convolutions than segmentors the layout that the device likes.

        On CUDA, whose kernels would turn every map to and fro, that is channels last; on the CPU
        they stay as they are.
        """
        if self.device.type == "cuda":
            for network in networks:
                network.to(memory_format=torch.channels_last)

    def loader(
        self,
        name: str,
        level: ProblemSettings,
        samples: Samples,
        augmentation: AugmentationSettings | None = None,
        key: str = "",
    ) -> BatchLoader:
        """Batches of ``samples`` for the level ``name``.

        Args:
            key: of the batch size, for messages; ``problems.<name>.batch_size`` without it.
        """
        size = min(level.batch_size, len(samples))
        parallel.require_equal_parts(size, key or f"problems.{name}.batch_size")
        chosen = augmentation if augmentation is not None else AugmentationSettings.off()
        return BatchLoader(
            samples,
            level.batch_size,
            self.device,
            seed=derived(self.settings.seed, name),
            augmentation=Augmentation(chosen, self.spec.ignore_index),
        )

    def level(
        self,
        name: str,
        settings: ProblemSettings,
        module: nn.Module,
        loader: BatchLoader | tuple[BatchLoader, ...] | None = None,
        more_steps: int | None = 0,
        **changes: Any,
    ) -> Setup:
        """The level ``name`` with the optimizer, scheduler and hypergradient of its settings.

        Args:
            more_steps: that it takes beyond ``engine.iterations``, in stages before the last; None:
                how many steps it takes isn't known.
            changes: to its ``Config``, which checks them.
        """
        engine = self.settings.engine
        steps = None if more_steps is None else engine.iterations + more_steps
        mode = engine.mode if isinstance(engine, EngineSettings) else "max"
        optimizer, scheduler = settings.build(module.parameters(), mode, steps)
        config = replace(settings.config(self.settings.precision), **changes)
        return Setup(name, module, optimizer, loader, config, scheduler)

    def hooks(self) -> list[Hooks]:
        """What the engine is to be given for what was made here, after it has been made."""
        begun = any(n.said("weights") or n.said("encoder_weights") for n in self._named)
        return [self.started] if begun else []
