"""What a config says about one problem: optimizer, scheduler, hypergradient, clipping."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from mlseg.compiling import check_backend
from mlseg.config import Settings
from mlseg.config.components import Component
from mlseg.config.registry import Registry
from mlseg.errors import UserError
from mlseg.hypergradients import Method, resolve
from mlseg.hypergradients.optimizers import OPTIMIZERS
from mlseg.hypergradients.registry import validated
from mlseg.multilevel.config import Config, SchedulerClock


class OptimizerSettings(Component):
    """An optimizer by name, with its settings."""

    registry = OPTIMIZERS
    given = 1


SCHEDULERS: Registry[Any] = Registry(
    "scheduler",
    base=(Settings, LRScheduler),
    packages=["mlseg.multilevel.settings"],
    example="my_package.optim:Warmup",
)
"""By name: a class derived from torch's ``LRScheduler``, whose signature says its settings; or a
class of settings with a method ``build(optimizer, mode, steps)``."""


class _Scheduler(Settings):
    """What every scheduler has.

    Attributes:
        step: when the rate may change: each iteration, epoch or validation.
    """

    step: SchedulerClock = "iteration"


@SCHEDULERS.register("reduce_on_plateau")
class ReduceOnPlateau(_Scheduler):
    """Multiply the rate by ``factor`` after ``patience`` validations without a better metric.

    Attributes:
        factor: what the rate is multiplied by.
        patience: validations without a better metric that are waited for.
        threshold: relative gain from which on a metric counts as better.
        min_lr: below which the rate doesn't fall.
    """

    name: Literal["reduce_on_plateau"] = "reduce_on_plateau"
    step: Literal["validation"] = "validation"
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    patience: PositiveInt = 10
    threshold: NonNegativeFloat = 1e-4
    min_lr: NonNegativeFloat = 0.0

    def build(
        self, optimizer: torch.optim.Optimizer, mode: Literal["max", "min"], steps: int | None
    ) -> LRScheduler:
        """The torch scheduler; ``mode`` is the engine's."""
        values = self.model_dump(exclude={"name", "step"})
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, **values)


@SCHEDULERS.register("multistep")
class MultiStep(_Scheduler):
    """Multiply the rate by ``factor`` at each of ``milestones``.

    Attributes:
        milestones: numbers of the clock that ``step`` names.
        factor: what the rate is multiplied by.
    """

    name: Literal["multistep"] = "multistep"
    milestones: list[PositiveInt]
    factor: PositiveFloat = 0.1

    def build(self, optimizer: torch.optim.Optimizer, mode: str, steps: int | None) -> LRScheduler:
        """The torch scheduler."""
        return lr_scheduler.MultiStepLR(optimizer, self.milestones, self.factor)


@SCHEDULERS.register("exponential")
class Exponential(_Scheduler):
    """Multiply the rate by ``factor`` every time.

    Attributes:
        factor: what the rate is multiplied by.
    """

    name: Literal["exponential"] = "exponential"
    factor: PositiveFloat

    def build(self, optimizer: torch.optim.Optimizer, mode: str, steps: int | None) -> LRScheduler:
        """The torch scheduler."""
        return lr_scheduler.ExponentialLR(optimizer, self.factor)


@SCHEDULERS.register("linear")
class Linear(_Scheduler):
    """From the full rate to ``end`` times it over ``length`` steps, in a straight line.

    Attributes:
        length: of the decay, by the clock that ``step`` names; null: the whole of
            ``engine.iterations``.
        end: the share of the full rate that is left.
    """

    name: Literal["linear"] = "linear"
    length: PositiveInt | None = None
    end: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    @model_validator(mode="after")
    def _check_length(self) -> "Linear":
        if self.length is None and self.step != "iteration":
            raise ValueError(f"length: how many steps of the clock {self.step!r} the decay takes")
        return self

    def build(self, optimizer: torch.optim.Optimizer, mode: str, steps: int | None) -> LRScheduler:
        """The torch scheduler."""
        length = self.length if self.length is not None else steps
        if length is None:
            raise UserError("length: needed here; the number of steps of the decay")
        return lr_scheduler.LinearLR(optimizer, 1.0, self.end, length)


@SCHEDULERS.register("cosine")
class Cosine(_Scheduler):
    """Half a cosine from the full rate to ``min_lr`` over ``length`` steps.

    Attributes:
        length: of the decay, by the clock that ``step`` names.
        min_lr: the rate at its end.
    """

    name: Literal["cosine"] = "cosine"
    length: PositiveInt
    min_lr: NonNegativeFloat = 0.0

    def build(self, optimizer: torch.optim.Optimizer, mode: str, steps: int | None) -> LRScheduler:
        """The torch scheduler."""
        return lr_scheduler.CosineAnnealingLR(optimizer, self.length, self.min_lr)


class SchedulerSettings(Component):
    """A scheduler by name, with its settings.

    Attributes:
        step: when the rate may change: each iteration, epoch or validation.
    """

    registry = SCHEDULERS
    given = 1

    step: SchedulerClock = "iteration"


def _method(value: Any) -> Any:
    return validated(value) if isinstance(value, (str, dict)) else value


class ProblemSettings(Settings):
    """One problem of a config.

    Attributes:
        optimizer: by name, with that optimizer's settings.
        scheduler: of its learning rate; None keeps it.
        batch_size: examples per step.
        clip: largest gradient norm; 0 for no clipping.
        accumulate: batches whose gradients are added up for one optimizer step.
        unroll_steps: own steps per step of the level above.
        hypergradient: how upper levels' gradients pass through this level: a method's name, or a
            mapping of ``method`` and its settings. A level that no gradient passes doesn't use it.
        compile: its network is compiled by torch.compile, for steps, evaluations and hops; the name
            of one of torch's backends chooses another than its own. It takes minutes at the start,
            and hypergradients without second derivatives: ``finite_difference`` and others that the
            table of methods marks so.
    """

    optimizer: OptimizerSettings
    scheduler: SchedulerSettings | None = None
    batch_size: PositiveInt = 2
    clip: NonNegativeFloat = 0.0
    accumulate: PositiveInt = 1
    unroll_steps: PositiveInt = 1
    hypergradient: Annotated[SerializeAsAny[Method], BeforeValidator(_method)] = Field(
        default_factory=lambda: resolve("finite_difference")
    )
    compile: Annotated[bool | str, AfterValidator(check_backend)] = False

    def config(self, precision: str) -> Config:
        """The problem's ``Config``."""
        return Config(
            hypergradient=self.hypergradient,
            unroll_steps=self.unroll_steps,
            gradient_accumulation=self.accumulate,
            gradient_clipping=self.clip,
            precision=precision,
            scheduler_step=self.scheduler.step if self.scheduler else "iteration",
            compile=self.compile,
        )

    def build(
        self,
        parameters: Iterable[torch.Tensor],
        mode: Literal["max", "min"],
        steps: int | None = None,
    ) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """Optimizer and scheduler over ``parameters``.

        Args:
            mode: the monitored metric's.
            steps: iterations of the run, for a scheduler that goes by them.
        """
        optimizer = self.optimizer.build(parameters)
        if self.scheduler is None:
            return optimizer, None
        return optimizer, self.scheduler.build(optimizer, mode=mode, steps=steps)
