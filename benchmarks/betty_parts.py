"""What the programs of ``betty_programs.py`` are built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import betty.engine
import torch
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from mlseg import Engine, Problem

Outcome = dict[str, Tensor]
"""What a run left behind, by name."""


@dataclass(frozen=True)
class On:
    """What a program is built of: the class of its levels and that of its engine."""

    base: type
    engine: type


ON = {
    "Betty": On(ImplicitProblem, betty.engine.Engine),
    "ours": On(ImplicitProblem, Engine),
    "ours, mlseg.Problem": On(Problem, Engine),
}

PROGRAMS: dict[str, Callable[[On], Outcome]] = {}


def program(function: Callable[[On], Outcome]) -> Callable[[On], Outcome]:
    """Enter a program under its function's name."""
    PROGRAMS[function.__name__] = function
    return function


def draw(count: int, features: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Points and their class, 0 or 1, by a hyperplane."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(features, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, features, generator=generator)
    y = x @ plane + noise * torch.randn(count, generator=generator) > 0
    return x, y.long()


def batches(count: int, size: int, features: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = draw(count, features, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


class Vector(nn.Module):
    """A vector of parameters."""

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), value))

    def forward(self) -> Tensor:
        return self.w


def network(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def built(on: On, problems: list[Any], config: Any, u2l: Any, l2u: Any, **more: Any) -> Any:
    """The engine; ``more`` are methods of an engine of the program's own, and ``env``."""
    env = more.pop("env", None)
    own = type("Own", (on.engine,), more) if more else on.engine
    options: dict[str, Any] = {} if on.engine is betty.engine.Engine else {"quiet": True}
    dependencies = {"u2l": u2l, "l2u": l2u}
    return own(problems=problems, config=config, dependencies=dependencies, env=env, **options)


def left(engine: Any) -> Outcome:
    """What a run left behind in its problems."""
    outcome: Outcome = {"steps": torch.tensor(float(engine.global_step))}
    for problem in engine.problems:
        for name, value in problem.module.named_parameters():
            outcome[f"{problem.name}/{name}"] = value.detach().clone()
        rate = problem.optimizer.param_groups[0]["lr"]
        outcome[f"{problem.name}/rate"] = torch.tensor(float(rate))
        outcome[f"{problem.name}/count"] = torch.tensor(float(problem.count))
    return outcome
