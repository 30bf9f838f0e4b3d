"""LoAd's wiring: data, networks, the three problems, the controller, and the engine around them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import parallel
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.lookahead.commands import Controller
from mlseg.engines.lookahead.controller import Lookahead
from mlseg.engines.lookahead.discriminator_training import DiscriminatorTraining
from mlseg.engines.lookahead.hold_out import HoldOut, hold_out_indices, require_every_class
from mlseg.engines.lookahead.label_maps import LabelMapBatches
from mlseg.engines.lookahead.loop import LOOKAHEAD, LookaheadLoop
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.engines.lookahead.straight_ahead import StraightAhead
from mlseg.engines.segmentation import Segmentation, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.multilevel.problem import Problem
from mlseg.problems.building import Builder
from mlseg.problems.load.convergence import CROSS_ENTROPY, Convergence
from mlseg.problems.load.cycles import CycleMaps
from mlseg.problems.load.levels import (
    AlternatingDiscriminator,
    Discriminator,
    Generator,
    Pretraining,
)
from mlseg.problems.load.networks import Discriminator as DiscriminatorNetwork
from mlseg.problems.load.networks import require_input_size
from mlseg.problems.load.records import LoadRecords
from mlseg.problems.load.settings import LoadSettings
from mlseg.problems.load.start import go_on, load_start, training_state
from mlseg.problems.systems import system
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import (
    Augmentation,
    Samples,
    SegmentationData,
    load_data,
)


@system(
    "load",
    LoadSettings,
    "a segmentor against a discriminator, with lookahead and rollback",
    in_several=True,
)
def build(settings: LoadSettings, out: Path | None) -> Engine:
    """The engine of a config; its run directory is ``out``."""
    data = load_data(settings.data)
    require_validation(data)
    held = hold_out(settings, data)
    spec, levels = data.spec, settings.problems
    make = Builder(settings, spec, out)

    network = make.segmentor()
    start = start_of(settings, network, spec.num_classes, out)
    with seeded(settings.seed, "discriminator"):
        judge = DiscriminatorNetwork(settings.discriminator, spec.channels, spec.num_classes)
    judge.to(memory_format=torch.channels_last)
    size = settings.augmentation.output_size(data.train.image_size)
    require_input_size(settings.discriminator, size)

    buffer = batches = None
    own = settings.fakes
    faked = hold_out_indices(data.train.ids, own.fraction, own.seed)
    shown = data.train if len(faked) == len(data.train) else data.train.subset(faked)
    ahead = settings.control is None and settings.descent_ascent is None
    if ahead:
        buffer = MapBuffer(
            (len(shown) + len(held), *data.train.image_size),
            settings.lookahead.buffer_size,
            None if out is None else out / "buffer",
            settings.buffer_limit_mib,
        )
        if buffer.mapped and parallel.several():
            raise UserError(
                f"buffer_limit_mib: {settings.buffer_limit_mib:g} makes files of the label maps, "
                f"which {parallel.size()} processes don't share; raise it, so that they stay in "
                "memory"
            )
        batches = LabelMapBatches(
            data.train,
            held,
            buffer,
            levels.discriminator.batch_size,
            Augmentation(settings.augmentation, spec.ignore_index),
            make.device,
            derived(settings.seed, "label maps"),
            faked,
        )

    loader = make.loader("pretraining", levels.pretraining, data.train, settings.augmentation)
    epoch = len(loader)
    weighted = settings.pretraining.weighted_epochs * epoch if settings.start is None else 0
    pretraining = Pretraining(
        make.level("pretraining", levels.pretraining, network, loader, more_steps=None),
        ignore_index=spec.ignore_index,
        weighted_steps=weighted,
        mean_pixels=mean_pixels(data.train, size).to(make.device),
    )
    loader = make.loader("generator", levels.generator, data.train, settings.augmentation)
    generator = Generator(
        make.level("generator", levels.generator, network, loader, more_steps=None),
        adversarial=settings.adversarial,
        ignore_index=spec.ignore_index,
    )
    discriminator: Discriminator
    if settings.descent_ascent is None:
        discriminator = Discriminator(
            make.level("discriminator", levels.discriminator, judge, more_steps=None),
            num_classes=spec.num_classes,
            batches=batches,
        )
    else:
        discriminator = alternating(settings, make, data.train, judge)

    training = None
    controller: Controller
    players: list[Problem]
    if settings.control is not None:
        controller, players = StraightAhead(settings.control), [pretraining]
        go_on(pretraining, start)
    elif settings.descent_ascent is not None:
        controller, players = StraightAhead(settings.descent_ascent), [discriminator, generator]
    else:
        assert batches is not None
        controller, players = Lookahead(settings.lookahead), [discriminator, generator]
        training = DiscriminatorTraining(discriminator, batches, settings.discriminator_training)
    stages = [
        Stage(LOOKAHEAD, settings.engine.iterations, players, validate=False, open_ended=True)
    ]
    watching: list[Hooks] = []
    if settings.start is None:
        length = weighted + settings.pretraining.epochs * epoch
        if until := settings.convergence:
            autocast = settings.precision == "bf16"
            everything = HoldOut(data.val, make.device, settings.hold_out.batch_size, autocast)
            watching = [Convergence(pretraining, everything, epoch, length, until)]
            length += until.longest() * epoch
        first = Stage(CROSS_ENTROPY, length, [pretraining], open_ended=bool(watching))
        stages.insert(0, first)

    ids = set(held.ids)
    segmentation = Segmentation(
        generator,
        settings.segmentor,
        data,
        scored=("start", "best"),
        # The model is chosen on the one; the other, like the test split, it has never met.
        parts={
            "val_hold_out": ("val", ids),
            "val_rest": ("val", set(data.val.ids) - ids),
        },
    )
    loop = LookaheadLoop(
        controller,
        players[-1],
        shown,
        HoldOut(held, make.device, settings.hold_out.batch_size, settings.precision == "bf16"),
        buffer,
        training,
        start_state=lambda: {"pretraining": training_state(pretraining)},
        drop_momentum=settings.lookahead.momentum == "drop",
        before=[] if ahead else players[:-1],
    )
    return Engine(
        [pretraining, generator, discriminator],
        settings.engine.for_engine(),
        stages=stages,
        device=make.device,
        out=out,
        hooks=[
            segmentation,
            *watching,
            loop,
            CycleMaps(loop, settings.pictures),
            LoadRecords(segmentation, loop, settings.pictures),
            *make.hooks(),
        ],
    )


def alternating(
    settings: LoadSettings, make: Builder, train: Samples, judge: DiscriminatorNetwork
) -> AlternatingDiscriminator:
    """The discriminator of alternating updates: half of its batch real, half fake."""
    level, spec = settings.problems.discriminator, train.spec
    images = level.model_copy(update={"batch_size": level.batch_size // 2})
    loader = make.loader("discriminator", images, train, settings.augmentation)
    return AlternatingDiscriminator(
        make.level("discriminator", level, judge, loader, more_steps=None),
        num_classes=spec.num_classes,
        ignore_index=spec.ignore_index,
    )


def hold_out(settings: LoadSettings, data: SegmentationData) -> Samples:
    """The validation images that decide.

    Raises:
        UserError: they don't show every class.
    """
    chosen = hold_out_indices(data.val.ids, settings.hold_out.fraction, settings.hold_out.seed)
    held = data.val.subset(chosen)
    require_every_class(held, "hold_out.fraction")
    return held


def start_of(
    settings: LoadSettings, network: nn.Module, num_classes: int, out: Path | None
) -> dict[str, Any]:
    """Load the config's start model, if it names one, into ``network``; returns its checkpoint."""
    if settings.start is None:
        return {}
    path = reachable(settings.start)
    # A run that goes on has it in its own checkpoint.
    resumed = out is not None and (out / "checkpoints" / "last.pt").exists()
    return load_start(network, path, num_classes) if path.exists() or not resumed else {}


def mean_pixels(samples: Samples, size: tuple[int, int]) -> Tensor:
    """(K,) float: pixels of each class in an image, mean over all images.

    Args:
        size: (h, w) of what training sees of an image: all of it, or a window, which on average
            shows its share.
    """
    counts = torch.bincount(samples.masks.flatten(), minlength=256)
    share = math.prod(size) / math.prod(samples.image_size)
    return counts[: samples.spec.num_classes].float() * share / len(samples)
