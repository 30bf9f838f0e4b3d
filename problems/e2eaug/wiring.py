"""How a run of E2EAug is put together: data, networks, levels, and the engine with its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.segmentation import Segmentation, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.multilevel.problem import Problem
from mlseg.problems.building import Builder
from mlseg.problems.e2eaug import records
from mlseg.problems.e2eaug.levels import (
    Architecture,
    Discriminator,
    Generator,
    Segmentor,
    label_channels,
)
from mlseg.problems.e2eaug.networks.architecture import Architecture as ArchitectureModule
from mlseg.problems.e2eaug.networks.patchgan import PatchGAN
from mlseg.problems.e2eaug.networks.pix2pix import SearchableGenerator
from mlseg.problems.e2eaug.settings import E2EAugSettings
from mlseg.problems.systems import system
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import Augmentation, SegmentationData, load_data
from mlseg.segmentation.losses import build_loss


@system("e2eaug", E2EAugSettings, "three levels: mask-to-image GAN, segmentor, its architecture")
def build(settings: E2EAugSettings, out: Path | None) -> Engine:
    """Data, networks, the four problems, and the engine with its stages."""
    data = load_data(settings.data)
    require_validation(data)
    make, levels, spec = Builder(settings, data.spec, out), settings.problems, data.spec
    maker, critic, alphas = networks(settings, data)
    criterion = build_loss(settings.loss, spec.ignore_index)

    loader = make.loader("generator", levels.generator, data.train, settings.gan.augmentation)
    generator = Generator(
        make.level("generator", levels.generator, maker, loader),
        l1=settings.gan.l1,
        num_classes=spec.num_classes,
    )
    discriminator = Discriminator(make.level("discriminator", levels.discriminator, critic))
    loader = make.loader("segmentor", levels.segmentor, data.train, settings.augmentation)
    segmentor = Segmentor(
        make.level("segmentor", levels.segmentor, make.segmentor(), loader),
        criterion=criterion,
        num_classes=spec.num_classes,
        synthetic_weight=settings.synthetic_weight,
        mask_augmentation=Augmentation(settings.mask_augmentation, spec.ignore_index),
        mask_seed=derived(settings.seed, "masks"),
        frozen_generator=settings.gan.frozen,
    )
    problems: list[Problem] = [generator, discriminator, segmentor]
    architecture = None
    if alphas is not None:
        loader = make.loader("architecture", levels.architecture, data.val)
        architecture = Architecture(
            make.level("architecture", levels.architecture, alphas, loader), criterion=criterion
        )
        problems.append(architecture)

    hooks: list[Hooks] = [
        Segmentation(segmentor, settings.segmentor, data),
        records.Pretraining(settings, generator, discriminator, architecture, out),
        records.SyntheticPictures(data, generator, segmentor),
    ]
    if architecture is not None:
        hooks.append(records.ArchitectureRecord(generator, architecture))
    return Engine(
        problems,
        settings.engine,
        stages=_stages(
            settings, len(data.train), generator, discriminator, segmentor, architecture
        ),
        device=make.device,
        out=out,
        hooks=[*hooks, records.ExportedGenerator(generator), *make.hooks()],
    )


def networks(
    settings: E2EAugSettings, data: SegmentationData
) -> tuple[SearchableGenerator, PatchGAN, ArchitectureModule | None]:
    """Generator, discriminator and, if the generator has cells, their alphas; each from its seed.

    Raises:
        UserError: the images are too small for them.
    """
    size, spec, seed = data.train.image_size, data.spec, settings.seed
    channels = label_channels(spec.num_classes)
    with seeded(seed, "generator"):
        generator = SearchableGenerator(
            channels, spec.channels, size, **settings.generator.model_dump()
        )
    with seeded(seed, "discriminator"):
        discriminator = PatchGAN(channels + spec.channels, **settings.discriminator.model_dump())
    if min(size) < discriminator.smallest_side:
        raise UserError(
            f"discriminator.layers: {discriminator.layers} need images of "
            f"{discriminator.smallest_side} pixels, data.image_size is {min(size)}; lower the "
            "layers"
        )
    if not generator.num_cells:
        return generator, discriminator, None
    spread = settings.architecture.spread if settings.architecture.mode == "random" else 1e-3
    with seeded(seed, "architecture"):
        alphas = ArchitectureModule(generator.num_cells, spread, settings.architecture.selection)
    return generator, discriminator, alphas


def _stages(
    settings: E2EAugSettings,
    images: int,
    generator: Problem,
    discriminator: Problem,
    segmentor: Problem,
    architecture: Problem | None,
) -> list[Stage]:
    """Pre-training of the GAN, then the levels that the settings leave in play."""
    stages = []
    players = [generator, discriminator]
    if settings.gan.pretrain and settings.gan.pretrained is None and settings.synthetic_weight:
        length = settings.gan.pretraining(images, settings.problems.generator.batch_size)
        stages.append(Stage(records.PRETRAINING, length, players))
    length = settings.engine.iterations
    if settings.gan.frozen or not settings.synthetic_weight:
        return [*stages, Stage("training", length, [segmentor])]
    l2u: dict[Any, list[Any]] = {generator: [segmentor]}
    if settings.architecture.mode != "learned" or architecture is None:
        return [*stages, Stage("training", length, [*players, segmentor], {}, l2u)]
    l2u[segmentor] = [architecture]
    u2l: dict[Any, list[Any]] = {architecture: [generator, segmentor]}
    return [*stages, Stage("search", length, [*players, segmentor, architecture], u2l, l2u)]
