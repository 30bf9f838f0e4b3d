"""What an engine is told: how long, on what device, in which stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import betty.configs
import torch
from betty.logging import logger_mapping
from betty.problems import Problem as BettyProblem
from pydantic import NonNegativeInt, PositiveInt

from mlseg.config import Settings
from mlseg.errors import UserError

Dependencies = Mapping[BettyProblem, Sequence[BettyProblem]]


class LoopSettings(Settings):
    """How long to train, and what to keep.

    Attributes:
        iterations: of the last stage; a stage before it (pre-training) has its own count.
        validate_every: iterations between validations; 0 for none but the last.
        checkpoint_every: iterations between saves of ``last.pt``; None: ``validate_every``.
        log_every: iterations between written figures; this is when host and device synchronise.
        scoring: size at which final scores are counted: ``native``, that of each mask's file, or
            ``trained``, that of the network's images. Validation is always at the latter.
        tensorboard: whether to write curves for TensorBoard.
    """

    iterations: PositiveInt = 5000
    validate_every: NonNegativeInt = 100
    checkpoint_every: PositiveInt | None = None
    log_every: PositiveInt = 10
    scoring: Literal["native", "trained"] = "native"
    tensorboard: bool = True


class EngineSettings(LoopSettings):
    """How long to train, how often to look, which weights to choose, what to keep.

    Attributes:
        metric: the validation figure that chooses ``best.pt``; None: the data set's headline one.
        mode: whether more or less of it is better.
        patience: validations without a new best after which training stops; None: never.
        samples: pictures to write at each validation; 0 for none.
    """

    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    patience: PositiveInt | None = None
    samples: NonNegativeInt = 4


@dataclass
class Stage:
    """A stretch of training with its own graph of levels.

    Attributes:
        name: shown and recorded.
        iterations: its length.
        problems: those that step; None for all of the engine's.
        u2l, l2u: Betty's dependencies, upper to lower and lower to upper.
        validate: whether it is validated, if it is the last one; no other stage is.
        open_ended: a hook ends it, normally long before ``iterations``.
    """

    name: str
    iterations: int
    problems: Sequence[BettyProblem] | None = None
    u2l: Dependencies = field(default_factory=dict)
    l2u: Dependencies = field(default_factory=dict)
    validate: bool = True
    open_ended: bool = False


class Graph(NamedTuple):
    """Which problem depends on which."""

    u2l: Dependencies
    l2u: Dependencies


def both_ways(dependencies: Mapping[str, Dependencies]) -> Graph:
    """Betty's dict of dependencies; UserError if it isn't of ``u2l`` and ``l2u``."""
    if not isinstance(dependencies, Mapping) or set(dependencies) != {"u2l", "l2u"}:
        found = ", ".join(map(repr, dependencies)) if isinstance(dependencies, Mapping) else ""
        raise UserError(
            f"dependencies: a dict of 'u2l' and 'l2u' is needed; it has {found or 'neither'}"
        )
    return Graph(dependencies["u2l"], dependencies["l2u"])


def all_stages(
    settings: EngineSettings,
    stages: Sequence[Stage] | None,
    dependencies: Mapping[str, Dependencies] | None,
    u2l: Dependencies | None,
    l2u: Dependencies | None,
) -> list[Stage]:
    """An engine's stages by the arguments of that name; one over the graph where none are given.

    Raises:
        ValueError: the graph is given twice.
    """
    if dependencies is not None:
        if u2l is not None or l2u is not None:
            raise ValueError("give the graph either as dependencies or as u2l and l2u")
        u2l, l2u = both_ways(dependencies)
    if stages and (u2l or l2u):
        raise ValueError("with stages each has a graph of its own: Stage(..., u2l=, l2u=)")
    return list(stages or [Stage("training", settings.iterations, None, u2l or {}, l2u or {})])


def as_settings(
    config: EngineSettings | betty.configs.EngineConfig | None,
) -> EngineSettings:
    """Betty's ``EngineConfig`` in terms of ours; UserError for what this engine doesn't do."""
    if config is None or isinstance(config, EngineSettings):
        return config or EngineSettings()
    if config.strategy not in ("default", "cpu", "gpu"):
        raise UserError(
            f"strategy {config.strategy!r}: choose default, cpu or gpu, or run it on Betty's "
            "engine; several processes train here under torchrun, with mlseg.EngineSettings"
        )
    if config.logger_type not in logger_mapping:
        raise UserError(
            f"logger_type {config.logger_type!r}; choose one of {', '.join(logger_mapping)}"
        )
    if config.early_stopping_mode not in ("min", "max"):
        raise UserError(f"early_stopping_mode {config.early_stopping_mode!r}; choose min or max")
    least = {"train_iters": 0, "valid_step": 1, "early_stopping_tolerance": 1}
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < bound:
            raise UserError(f"{name} {value!r}: a whole number, at least {bound}")
    early = config.early_stopping
    return EngineSettings(
        iterations=max(config.train_iters, 1),
        validate_every=config.valid_step,
        patience=config.early_stopping_tolerance if early else None,
        metric=config.early_stopping_metric if early else None,
        mode="min" if config.early_stopping_mode == "min" else "max",
    )


def as_bettys(settings: EngineSettings) -> betty.configs.EngineConfig:
    """As much of our settings as Betty's engine has a word for."""
    return betty.configs.EngineConfig(
        train_iters=settings.iterations, valid_step=settings.validate_every or settings.iterations
    )


def wanted_device(
    device: str | torch.device, config: EngineSettings | betty.configs.EngineConfig | None
) -> str | torch.device:
    """The device that is asked for: by name, else by the strategy of Betty's config.

    Raises:
        UserError: the strategy asks for a GPU, and there is none.
    """
    strategy = getattr(config, "strategy", "default")
    if str(device) != "auto" or strategy not in ("cpu", "gpu"):
        return device
    if strategy == "gpu" and not torch.cuda.is_available():
        raise UserError("strategy 'gpu': CUDA is not available here; choose default or cpu")
    return "cpu" if strategy == "cpu" else "cuda"
