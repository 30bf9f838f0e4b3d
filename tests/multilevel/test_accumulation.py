"""Gradients accumulated over batches, and clipped."""

from typing import Any

import pytest
import tiny
import torch
from lines import engine_of, line, points
from torch import Tensor, nn

from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import GRAPHS


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.5), (2, 0.0), (3, 0.5)])
def test_accumulation_and_clipping_are_those_of_a_plain_loop(accumulate: int, clip: float) -> None:
    problem = line(Config(gradient_accumulation=accumulate, gradient_clipping=clip))
    engine = engine_of(problem)
    for _ in range(12):
        engine.iterate()

    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for step in range(12):
        x, y = points()[step % 4]
        (((module(x).squeeze(1) - y) ** 2).mean() / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(problem.module.weight, module.weight)
    assert torch.equal(problem.module.bias, module.bias)


class Terms(nn.Module):
    """Of a sum, whose gradients are one tensor."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.terms = nn.ParameterList(torch.full((2,), 0.1 / count) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return x @ sum(self.terms, torch.zeros(2))


class Weighted(Problem):
    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self(x) - y) ** 2).mean() * self.top.module.bias.exp().mean()


class Judging(Problem):
    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.low(x) - y) ** 2).mean()


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "identity"},
        {"method": "unrolled", "store": "graphs"},
        {"method": "finite_difference", "scheme": "one_sided", "linearise": "before_step"},
    ],
    ids=lambda spec: spec["method"],
)
def test_clipping_writes_once_into_a_gradient_of_two_parameters(spec: dict[str, Any]) -> None:
    """With two terms each has the step of one: their norm is sqrt(2) as large."""
    moved = []
    for count in (1, 2):
        torch.manual_seed(0)
        terms, top = Terms(count), nn.Linear(2, 1)
        low = Weighted(
            "low",
            terms,
            torch.optim.SGD(terms.parameters(), 0.1),
            points(),
            Config(hypergradient=spec, gradient_clipping=1e-3 * count**0.5),
        )
        high = Judging("top", top, torch.optim.SGD(top.parameters(), 0.1), points())
        before = terms.terms[0].detach().clone()
        engine = engine_of(low, high, dependencies={"u2l": {high: [low]}, "l2u": {low: [high]}})
        engine.iterate()
        moved.append(terms.terms[0].detach() - before)
    assert float(moved[0].norm()) == pytest.approx(1e-4, rel=1e-3)
    assert torch.allclose(moved[0], moved[1], rtol=1e-3, atol=0.0)


def test_accumulation_reports_the_loss_of_each_batch_whole() -> None:
    plain, accumulated = line(), line(Config(gradient_accumulation=4))
    for problem in (plain, accumulated):
        engine_of(problem).iterate()
    assert float(plain.metrics["loss"]) == float(accumulated.metrics["loss"])


def test_accumulated_hypergradients_add_up() -> None:
    """An upper level that accumulates two batches has the mean of their gradients."""
    gradients: dict[int, list[list[Tensor]]] = {1: [], 2: []}
    for accumulate, steps in gradients.items():
        spec = {"method": "identity", "scale": "none"}
        engine = programs.small(GRAPHS["two levels"], spec, dropout=0.0)
        for level in engine.problems:
            level.optimizer.param_groups[0]["lr"] = 0.0
        engine.top.gas = accumulate
        tiny.gradients_of(engine.top, steps)
        engine.iterate()
        engine.iterate()
    mean = [(a + b) / 2 for a, b in zip(*gradients[1], strict=True)]
    assert distance(gradients[2][1], mean) < 1e-12
    assert distance(gradients[1][0], gradients[1][1]) > 0.1
