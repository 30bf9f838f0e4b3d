"""A level that fits a line to points, and an engine for a few of them."""

from collections.abc import Callable
from typing import Any

import betty.configs
import torch
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.problem import Problem

Batches = list[tuple[Tensor, Tensor]]


class Line(Problem):
    """A line fitted to points; returns its loss with figures."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        error = self(x).squeeze(1) - y
        return {"loss": (error**2).mean(), "worst": error.abs().max(), "rows": len(x)}


def points(count: int = 4, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(3, 2, generator=generator), torch.randn(3, generator=generator))
        for _ in range(count)
    ]


def line(
    config: betty.configs.Config | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
) -> Line:
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    made = optimizer(module) if optimizer else torch.optim.SGD(module.parameters(), 0.1)
    return Line(
        "line",
        module,
        made,
        points() if loader is None else loader,
        config,
        scheduler(made) if scheduler else None,
    )


def engine_of(*problems: Problem, **options: Any) -> Engine:
    options = {"device": "cpu", "quiet": True, **options}
    settings = options.pop("settings", EngineSettings(iterations=4, tensorboard=False))
    return Engine(list(problems), settings, **options)
