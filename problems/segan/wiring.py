"""How a run of SegAN is put together: data, networks, players, and the engine with its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlseg import parallel
from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.problems.building import Builder
from mlseg.problems.segan.levels import Critic, Segmentor
from mlseg.problems.segan.networks.critic import ClassCritics
from mlseg.problems.segan.networks.segmentor import SegAN
from mlseg.problems.segan.settings import SegANSettings
from mlseg.problems.systems import system
from mlseg.randomness import seeded
from mlseg.segmentation.data import BatchLoader, SegmentationData, load_data


@system(
    "segan",
    SegANSettings,
    "two levels: segmentor against critic, one multi-scale loss",
    in_several=True,
)
def build(settings: SegANSettings, out: Path | None) -> Engine:
    """Data, networks, the two players, and the engine with its stages."""
    data = load_data(settings.data)
    require_validation(data)
    make, levels, spec = Builder(settings, data.spec, out), settings.problems, data.spec
    network = make.segmentor()
    loader = make.loader(
        "segmentor",
        levels.critic,
        data.train,
        settings.augmentation,
        key="problems.critic.batch_size",
    )
    window = check_input(settings, data, network, loader)
    own = settings.critic
    with seeded(settings.seed, "critic"):
        judge = ClassCritics(
            spec.channels,
            1 if spec.num_classes == 2 else spec.num_classes,
            own.classes == "stacked",
            channels=own.channels,
            layers=own.layers,
            global_kernel=own.global_kernel,
            pixel_level=own.pixel_level,
            scalar=own.output == "scalar",
        )
    judge.to(memory_format=torch.channels_last)

    critic = Critic(
        make.level("critic", levels.critic, judge, loader),
        num_classes=spec.num_classes,
        ignore_index=spec.ignore_index,
        reduction=settings.loss.reduction,
        scalar=own.output == "scalar",
        signed=own.masked_range == "signed",
        clamp=own.clamp,
        clamp_norm=own.clamp_norm,
        logistic=settings.logistic,
    )
    # The segmentor's graph is walked twice in the Stackelberg game: directly, and from the critic.
    leads = settings.game == "stackelberg"
    warmup = settings.warmup_epochs * len(loader)
    segmentor = Segmentor(
        make.level("segmentor", levels.segmentor, network, more_steps=warmup, retain_graph=leads),
        dice_weight=settings.loss.dice_weight,
    )
    stages = [Stage("warmup", warmup, [segmentor])] if warmup else []
    u2l: dict[Any, list[Any]] = {segmentor: [critic]} if leads else {}
    game = Stage("game", settings.engine.iterations, [critic], u2l, {critic: [segmentor]})
    return Engine(
        [critic, segmentor],
        settings.engine,
        stages=[*stages, game],
        device=make.device,
        out=out,
        hooks=[
            Segmentation(
                segmentor, settings.segmentor, data, threshold=settings.threshold, window=window
            ),
            *make.hooks(),
        ],
    )


def check_input(
    settings: SegANSettings, data: SegmentationData, network: nn.Module, loader: BatchLoader
) -> tuple[int, int]:
    """Refuse sizes, batches and labels that the game can't be played with.

    Returns:
        (H, W) of what the players see.

    Raises:
        UserError: one line that names the key and the mend.
    """
    size = settings.augmentation.output_size(data.train.image_size)
    if isinstance(network, SegAN) and any(side % 2**network.levels for side in size):
        raise UserError(
            f"segmentor.levels: {network.levels} levels halve the sides as often, which images of "
            f"{size[0]}x{size[1]} pixels can't be; give augmentation.window or data.image_size "
            f"multiples of {2**network.levels}, or lower the levels"
        )
    layers = settings.critic.layers
    if min(size) < 2**layers:
        raise UserError(
            f"critic.layers: {layers} need images of {2**layers} pixels a side, they have "
            f"{min(size)}; lower the layers"
        )
    if loader.batch_size < 2 * parallel.size():
        what = "problems.critic.batch_size" if len(data.train) > 1 else "data.train"
        each = ", in each process" if parallel.several() else ""
        raise UserError(f"{what}: 1 image a batch{each}; BatchNorm's statistics need at least 2")
    labels = set(torch.unique(torch.as_tensor(data.train.masks)).tolist())
    strange = labels - {*range(data.spec.num_classes), data.spec.ignore_index}
    if strange:
        raise UserError(
            f"data: labels {', '.join(map(str, sorted(strange)))} in the training masks are none "
            f"of the {data.spec.num_classes} classes; check data.classes and data.ignore_index"
        )
    return size
