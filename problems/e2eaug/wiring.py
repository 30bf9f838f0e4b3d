"""How a run of E2EAug is put together: data, networks, levels, and the engine with its stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.segmentation import Segmentation, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.multilevel.problem import Problem
from mlseg.problems.building import Builder
from mlseg.problems.e2eaug import records
from mlseg.problems.e2eaug.guidance import GuidedGenerator
from mlseg.problems.e2eaug.learned_masks import LearnedMasks
from mlseg.problems.e2eaug.levels import Architecture, Discriminator, Generator, Segmentor
from mlseg.problems.e2eaug.masks import Augmented, Masks, label_channels
from mlseg.problems.e2eaug.networks.architecture import Architecture as ArchitectureModule
from mlseg.problems.e2eaug.networks.discriminator import PairCritic
from mlseg.problems.e2eaug.networks.generator import MaskToImage
from mlseg.problems.e2eaug.networks.perceptual import (
    SMALLEST_SIDE,
    PerceptualFeatures,
    load_weights,
)
from mlseg.problems.e2eaug.settings import E2EAugSettings
from mlseg.problems.systems import system
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import Augmentation, SegmentationData, load_data
from mlseg.segmentation.losses import build_loss


@system(
    "e2eaug",
    E2EAugSettings,
    "three levels: mask-to-image GAN, segmentor, its architecture",
    in_several=True,
)
def build(settings: E2EAugSettings, out: Path | None) -> Engine:
    """Data, networks, the four problems, and the engine with its stages."""
    data = load_data(settings.data)
    require_validation(data)
    make, levels, spec = Builder(settings, data.spec, out), settings.problems, data.spec
    maker, critic, alphas = networks(settings, data)
    make.lay_out(maker, critic)
    features = perceptual_features(settings, data, out)
    if features is not None:
        make.lay_out(features.to(make.device))
    criterion = build_loss(settings.loss, spec.ignore_index)

    loader = make.loader("generator", levels.generator, data.train, settings.gan.augmentation)
    level3 = settings.level3
    guided = partial(
        GuidedGenerator, guidance=level3.guidance, guidance_steps=level3.guidance_steps
    )
    kind = guided if level3.guidance else Generator
    generator = kind(
        make.level("generator", levels.generator, maker, loader),
        l1=settings.gan.l1,
        num_classes=spec.num_classes,
        adversarial=settings.gan.adversarial,
        feature_matching=settings.gan.feature_matching,
        perceptual=features,
        perceptual_weight=settings.gan.perceptual_weight,
    )
    discriminator = Discriminator(
        make.level("discriminator", levels.discriminator, critic),
        adversarial=settings.gan.adversarial,
    )
    loader = make.loader("segmentor", levels.segmentor, data.train, settings.augmentation)
    masks: Masks | None = None if alphas is None else alphas.masks
    if masks is None:
        augmentation = Augmentation(settings.mask_augmentation, spec.ignore_index)
        masks = Augmented(augmentation, spec.num_classes)
    segmentor = Segmentor(
        make.level("segmentor", levels.segmentor, make.segmentor(), loader),
        criterion=criterion,
        synthetic_weight=settings.synthetic_weight,
        masks=masks,
        mask_seed=derived(settings.seed, "masks"),
        frozen_generator=settings.gan.frozen,
        learns_weight=level3.synthetic_weight,
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
    if features is not None:
        hooks.append(records.PerceptualRecord(features))
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
        hooks=[
            *hooks,
            records.ExportedGenerator(generator, settings.generator.name, data),
            *make.hooks(),
        ],
    )


def networks(
    settings: E2EAugSettings, data: SegmentationData
) -> tuple[MaskToImage, PairCritic, ArchitectureModule | None]:
    """Generator, discriminator and, if the generator has cells, their alphas; each from its seed.

    Raises:
        UserError: the images are too small for them.
    """
    size, spec, seed = data.train.image_size, data.spec, settings.seed
    channels = label_channels(spec.num_classes)
    with seeded(seed, "generator"):
        generator: MaskToImage = settings.generator.build(channels, spec.channels, size)
    with seeded(seed, "discriminator"):
        discriminator: PairCritic = settings.discriminator.build(channels + spec.channels)
    if min(size) < discriminator.smallest_side:
        limit = discriminator.limit
        raise UserError(
            f"discriminator.{limit}: {getattr(discriminator, limit)} need images of "
            f"{discriminator.smallest_side} pixels, data.image_size is {min(size)}; lower the "
            f"{limit}"
        )
    if not generator.num_cells:
        return generator, discriminator, None
    wanted = settings.architecture
    spread = wanted.spread if wanted.mode == "random" else 1e-3
    level3, masks = settings.level3, None
    if level3.mask_augmentation:
        masks = LearnedMasks(
            settings.mask_augmentation,
            spec.num_classes,
            spec.ignore_index,
            level3.mask_temperature,
        )
    with seeded(seed if wanted.draw is None else wanted.draw, "architecture"):
        alphas = ArchitectureModule(
            generator.num_cells,
            spread,
            wanted.selection,
            candidates=generator.candidates,
            synthetic_weight=settings.synthetic_weight if level3.synthetic_weight else None,
            masks=masks,
        )
    if wanted.choice is not None:
        alphas.choose(wanted.choice)
    return generator, discriminator, alphas


def perceptual_features(
    settings: E2EAugSettings, data: SegmentationData, out: Path | None
) -> PerceptualFeatures | None:
    """The network of the perceptual loss; a resumed run has the weights that it has kept.

    Raises:
        UserError: the images are too small for it, or the file isn't what it should be.
    """
    wanted, size = settings.gan.perceptual, data.train.image_size
    if wanted == "none":
        return None
    if min(size) < SMALLEST_SIDE:
        raise UserError(
            f"gan.perceptual: VGG-19 needs images of {SMALLEST_SIDE} pixels, data.image_size is "
            f"{min(size)}; set it to none"
        )
    with seeded(settings.seed, "perceptual"):
        features = PerceptualFeatures()
    kept = None if out is None else records.perceptual_path(out)
    if kept is not None and kept.exists():
        with checkpoint.taking(f"gan.perceptual: {kept}"):
            checkpoint.load_module(features, checkpoint.load(kept)["module"])
    elif wanted != "random":
        load_weights(features, wanted, "gan.perceptual")
    return features


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
