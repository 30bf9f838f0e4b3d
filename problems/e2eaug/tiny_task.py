"""E2EAug itself, all three levels of it, at a size whose exact hypergradient can be had.

What is measured is the alphas' gradient over both paths, W-A and W-G-A. One step per level and
iteration, as in the system: so its exact hypergradient is that through one step of both lower
levels, which here descend by plain SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mlseg.comparison.tasks.base import (
    ONE_STEP,
    Aim,
    Conditions,
    Program,
    TaskSettings,
    default_dtype,
    task,
)
from mlseg.engines.engine import Engine
from mlseg.engines.segmentation import Segmentation
from mlseg.hypergradients import Method
from mlseg.multilevel.problem import Problem
from mlseg.problems.e2eaug.settings import E2EAugSettings
from mlseg.problems.e2eaug.wiring import build as build_system
from mlseg.segmentation.data import to_float
from mlseg.segmentation.nets import class_probabilities
from mlseg.segmentation.scoring import evaluating, predict_logits, score


class E2EAugTinySettings(TaskSettings):
    """Settings of the task ``e2eaug_tiny``.

    Attributes:
        image_size: of the drawn lesions, in pixels.
        training, validation, test: images.
        channels: of generator, discriminator and segmentor.
        pretrain: iterations of the GAN alone, before anything else.
        warmup: iterations of all levels before accuracy is measured.
        generator_rate, segmentor_rate: of the lower levels' gradient descent.
        lower_steps: 1; the system's levels step in turn.
    """

    image_size: PositiveInt = 32
    training: PositiveInt = 8
    validation: PositiveInt = 8
    test: PositiveInt = 32
    channels: PositiveInt = 4
    pretrain: NonNegativeInt = 20
    warmup: PositiveInt = 2
    generator_rate: PositiveFloat = 1e-2
    segmentor_rate: PositiveFloat = 1e-2
    lower_steps: Literal[1] = 1


class E2EAugTiny(Program):
    """The program."""

    engine: Engine
    exact = ONE_STEP
    score_name = "test Jaccard"
    higher_is_better = True
    provenance = "lesions drawn by mlseg, synthetic: scores compare with nothing outside this table"

    def __init__(self, settings: E2EAugTinySettings, conditions: Conditions) -> None:
        self.settings, self.conditions = settings, conditions
        self.engine = _engine(settings, conditions, conditions.method, conditions.dtype)
        self.data = self.engine.hook(Segmentation).data
        self.upper = self.engine.architecture
        for _ in range(settings.pretrain):
            self.engine.iterate()
        if settings.pretrain:
            self.engine.next_stage()

    def settle(self) -> None:
        """Train the lower levels for ``warmup`` iterations; nothing is solved.

        The alphas stay where they are, or every method would be measured at a point of its own.
        """
        (group,) = self.upper.optimizer.param_groups
        group["lr"] = 0.0
        for _ in range(self.settings.warmup):
            self.engine.iterate()
        group["lr"] = self.conditions.upper_rate
        self._before = copy.deepcopy(self.engine.state_dict())

    def truth(self, aim: Aim) -> list[Tensor] | None:
        """That through one step, by double backward in float64 through the same iteration again.

        Nothing of the library's hypergradients has a part in it: each lower level's parameters are
        replaced by what its step makes of them, as a function of the alphas.
        """
        if aim != ONE_STEP:
            return None
        with default_dtype(torch.float64):
            engine = _engine(self.settings, self.conditions, "identity", torch.float64)
            engine.train()
            engine.load_state_dict(self._before)
            for level in (engine.generator, engine.segmentor):
                _step_differentiably(level)
            upper = engine.architecture
            loss = upper.loss(upper.get_batch())
            return list(torch.autograd.grad(loss, upper.trainable_parameters()))

    @torch.no_grad()
    def objective(self) -> float:
        """The segmentor's loss on all validation data, in evaluation mode."""
        samples, segmentor = self.data.val, self.engine.segmentor.module
        device = self.engine.device
        segmentor.eval()
        image = to_float(samples.images.to(device)).to(self.conditions.dtype)
        loss = self.upper.criterion(segmentor(image), samples.masks.to(device, torch.int64))
        segmentor.train()
        return float(loss)

    def score(self) -> float:
        """Mean Jaccard index on the test split."""
        module, dtype = self.engine.segmentor.module, self.conditions.dtype

        def predict(image: Tensor) -> Tensor:
            return class_probabilities(module, predict_logits(module, image.to(dtype)))

        with evaluating(module):
            return score(predict, self.data.test, self.engine.device).compute()["jaccard"]


def _step_differentiably(level: Problem) -> None:
    """Put a step of descent, with its graph, in the place of a level's parameters."""
    batch = level.get_batch()
    named = dict(level.module.named_parameters())
    gradients = torch.autograd.grad(level.loss(batch), list(named.values()), create_graph=True)
    rate = level.optimizer.param_groups[0]["lr"]
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        path, _, last = name.rpartition(".")
        owner = level.module.get_submodule(path)
        del owner._parameters[last]
        setattr(owner, last, p - rate * gradient)


class _Batches:
    """A loader's batches with images in another dtype; all else is the loader's own."""

    def __init__(self, loader: Any, dtype: torch.dtype) -> None:
        self.loader, self.dtype = loader, dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((image.to(self.dtype), mask) for image, mask in self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The loader's."""
        self.loader.load_state_dict(state)


def _engine(
    settings: E2EAugTinySettings,
    conditions: Conditions,
    method: str | Any,
    dtype: torch.dtype,
) -> Engine:
    """The system in ``dtype``, its initial values drawn in float32."""
    with default_dtype(torch.float32):
        engine = build_system(_config(settings, conditions, method), None)
    engine.recorder.progress.quiet = True
    for problem in engine.problems:
        problem.module.to(dtype)
        if problem.train_data_loader:
            problem.set_train_data_loader(_Batches(problem.train_data_loader[0], dtype))
    # What it draws depends on torch's default; the same masks are wanted in either dtype.
    masks = engine.segmentor.masks
    masks.draw = default_dtype(torch.float32)(masks.draw)
    return engine


def _config(
    settings: E2EAugTinySettings, conditions: Conditions, method: str | Method | Any
) -> E2EAugSettings:
    channels = settings.channels

    def lower(rate: float) -> dict[str, Any]:
        return {
            "optimizer": {"name": "sgd", "lr": rate},
            "scheduler": None,
            "hypergradient": method,
        }

    upper = {"name": conditions.upper_optimizer, "lr": conditions.upper_rate}
    if conditions.upper_optimizer == "adam":
        upper["eps"] = 1e-16
    return E2EAugSettings.model_validate(
        {
            "system": "e2eaug",
            "seed": conditions.seed,
            "device": conditions.device,
            "data": {
                "name": "synthetic_lesions",
                "image_size": settings.image_size,
                "train": settings.training,
                "val": settings.validation,
                "test": settings.test,
            },
            "segmentor": {"name": "unet", "channels": channels, "levels": 2},
            # Dropout draws differently in float32 and float64: the two could not be compared.
            "generator": {"channels": channels, "levels": 3, "dropout": 0.0},
            "discriminator": {"channels": channels, "layers": 2},
            "gan": {"pretrain": settings.pretrain, "pretrain_lr": settings.generator_rate},
            "problems": {
                "generator": lower(settings.generator_rate),
                "discriminator": lower(settings.generator_rate),
                "segmentor": lower(settings.segmentor_rate),
                "architecture": {"optimizer": upper, "batch_size": settings.validation},
            },
            "engine": {"samples": 0, "tensorboard": False, "validate_every": 0},
        }
    )


@task("e2eaug_tiny", E2EAugTinySettings, "E2EAug's three levels at toy size; one-step derivative")
def build(settings: E2EAugTinySettings, conditions: Conditions) -> E2EAugTiny:
    """The program."""
    return E2EAugTiny(settings, conditions)
