"""How a run of CTBCT or DCT is put together: two streams of images, two networks, the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation, require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.building import Builder
from mlseg.problems.semi_supervised.levels import CoTraining, CrossTeaching, Peer
from mlseg.problems.semi_supervised.settings import RampSettings, SemiSupervisedSettings
from mlseg.problems.systems import system
from mlseg.segmentation.data import load_data
from mlseg.segmentation.losses import build_loss


@system(
    "semi_supervised",
    SemiSupervisedSettings,
    "two networks that teach each other on images without masks: CTBCT, DCT",
    in_several=True,
)
def build(settings: SemiSupervisedSettings, out: Path | None) -> Engine:
    """Data, networks, the two problems, the engine."""
    data = load_data(settings.data)
    require_validation(data)
    assert data.unlabelled is not None, "the settings ask for some"
    window = settings.augmentation.output_size(data.train.image_size)
    make, levels, spec = Builder(settings, data.spec, out), settings.problems, data.spec
    iterations = settings.engine.iterations

    def weight(ramp: RampSettings | None) -> Any:
        return lambda steps: ramp.after(steps, iterations) if ramp is not None else 0.0

    ramps = [ramp for ramp in (settings.consistency, settings.adversarial) if ramp is not None]
    teaches = any(ramp.weight for ramp in ramps)
    common: dict[str, Any] = {
        "criterion": build_loss(settings.loss, spec.ignore_index),
        "ignore_index": spec.ignore_index,
        "consistency": weight(settings.consistency) if teaches else None,
    }

    def peer(name: str, level: ProblemSettings, module: Any, loaders: Any) -> Peer:
        setup = make.level(name, level, module, loaders)
        leads = name == "segmentor"
        if settings.method == "ctbct":
            return CrossTeaching(setup, leads=leads, **common)
        own = settings.adversarial
        return CoTraining(
            setup,
            adversarial=weight(own),
            epsilon=0.0 if own is None else 2.0 * own.epsilon,  # images are in [-1, 1]
            leads=leads,
            **common,
        )

    loaders = [make.loader("segmentor", levels.segmentor, data.train, settings.augmentation)]
    if teaches:
        size = settings.unlabelled_batch_size or levels.segmentor.batch_size
        others = levels.segmentor.model_copy(update={"batch_size": size})
        key = "unlabelled_batch_size"
        loaders.append(
            make.loader("unlabelled", others, data.unlabelled, settings.augmentation, key)
        )
    segmentor = peer("segmentor", levels.segmentor, make.segmentor(), tuple(loaders))
    second = None
    if settings.method == "dct":
        second = make.loader("partner", levels.partner, data.train, settings.augmentation)
    try:
        network = make.segmentor("partner", settings.partner)
    except UserError as error:
        own = str(error).removeprefix("segmentor.")  # the key of the network as it is known there
        raise UserError(f"partner.{own}" if own != str(error) else f"partner: {own}") from error
    partner = peer("partner", levels.partner, network, second)
    return Engine(
        [segmentor, partner],
        settings.engine,
        stages=[Stage("training", iterations)],
        device=make.device,
        out=out,
        hooks=[
            Segmentation(segmentor, settings.segmentor, data, window=window),
            *make.hooks(),
        ],
    )
