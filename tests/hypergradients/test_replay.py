"""A hypergradient sees the step as it was, and leaves everything as it is."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from mlseg import randomness
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.hypergradients import Interface, names, resolve
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import GRAPHS

pytestmark = pytest.mark.slow


def snapshot(engine: Any) -> dict[str, Any]:
    """All that training depends on: weights, buffers, optimizers, random streams."""
    return {
        "weights": tiny.weights(engine),
        "optimizers": {
            p.name: {str(k): dict(v) for k, v in p.optimizer.state_dict()["state"].items()}
            for p in engine.problems
        },
        "random": randomness.capture(),
    }


def around_backward(problem: Any, check: Callable[[], None]) -> None:
    """Call ``check`` before and after the problem's gradient is taken, at each of its steps."""
    former = problem.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        check()
        result = former(*args, **kwargs)
        check()
        return result

    problem.backward = backward


POINTS = [
    (method, point)
    for method in names()
    for point in (
        ("before_step", "after_step")
        if "linearise" in type(resolve(method)).model_fields
        else (None,)
    )
]
"""Methods, and the weights at which they may be asked to linearise."""


@pytest.mark.parametrize(("method", "point"), POINTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_no_trace_is_left(graph: str, method: str, point: str | None) -> None:
    """Weights and buffers bit for bit, optimizers and random streams untouched (betty.md 8, 9)."""
    spec: dict[str, Any] = {"method": method}
    takes = type(resolve(method)).model_fields
    if point is not None:
        spec["linearise"] = point
    if "limit" in takes:
        spec["limit"] = 5000
    engine = programs.small(
        GRAPHS[graph], spec, lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.9)
    )
    seen: list[dict[str, Any]] = []
    for name in GRAPHS[graph].u2l:
        around_backward(getattr(engine, name), lambda: seen.append(snapshot(engine)))
    engine.iterate()
    engine.iterate()
    assert len(seen) == 4 * len(GRAPHS[graph].u2l)
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert tiny.same(before, after)
    assert not any(p.module.training is False or p.replaying for p in engine.problems)


class Noisy(Problem):
    """A loss that draws from every global generator there is."""

    drawn: list[list[float]]

    def training_step(self, batch: Any) -> Tensor:
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
        self.drawn.append(noise)
        return ((self.module.weight - sum(noise)) ** 2 * self.top.module.weight.exp()).sum()


class Top(Problem):
    def training_step(self, batch: Any) -> Tensor:
        return (self.low.module.weight**2).sum()


class Tensors(Problem):
    """Depends on the upper level through one tensor only, and says so."""

    declares = True

    def training_step(self, batch: Any) -> Tensor:
        factor = self.top.module.weight.exp() + torch.rand(())
        if self.declares and self.is_differentiated and not self.replaying:
            self.interface = Interface([factor], self.part, self.random_state(), self.rest)
        return self.part([factor]) + self.rest()

    def rest(self) -> Tensor:
        return (self.module.weight**2).sum() + torch.rand(()) * self.module.weight.sum()

    def part(self, tensors: Any) -> Tensor:
        noise = torch.rand(1, 2)
        return ((self.module.weight - noise) ** 2 * tensors[0]).sum()


class Whole(Tensors):
    """The same without saying so: the whole step is evaluated again, with the same draw."""

    declares = False


def pair(low: type[Problem], method: str) -> tuple[Any, Any, Engine]:
    torch.manual_seed(0)
    problems = []
    for name, cls in (("low", low), ("top", Top)):
        module = nn.Linear(2, 1, bias=False).double()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        problems.append(cls(name, module, optimizer, [()], Config(hypergradient=method)))
    lower, upper = problems
    engine = Engine(
        problems,
        EngineSettings(),
        u2l={upper: [lower]},
        l2u={lower: [upper]},
        device="cpu",
        quiet=True,
    )
    return lower, upper, engine


@pytest.mark.parametrize("method", [name for name in names() if name != "stochastic"])
def test_the_draw_is_replayed(method: str) -> None:
    """From torch's, numpy's and Python's generators; the next step draws anew."""
    low, _, engine = pair(Noisy, method)
    low.drawn = []
    engine.iterate()
    evaluations = len(low.drawn)
    assert evaluations > 1
    assert low.drawn == [low.drawn[0]] * evaluations
    engine.iterate()
    assert low.drawn[evaluations] != low.drawn[0]
    # The first step was evaluated once more, to see whether it repeats itself.
    assert low.drawn[evaluations:] == [low.drawn[evaluations]] * (evaluations - 1)


@pytest.mark.parametrize("method", names())
def test_an_interface_gives_the_same_gradient(method: str) -> None:
    """The factorised hop, which evaluates only what depends on the upper level."""
    gradients = []
    for cls in (Tensors, Whole):
        _, top, engine = pair(cls, method)
        steps: list[list[Tensor]] = []
        tiny.gradients_of(top, steps)
        engine.iterate()
        gradients.append(steps[0])
    # The same derivatives of the same numbers, in float64; differences over steps of 1e-2 and less
    # and penalties' differences times 100 see its rounding unit of 1e-16 that much larger.
    assert distance(*gradients) < 1e-9
    assert gradients[0][0].norm() > 1e-3


def test_gradients_arrive_although_the_lower_is_frozen_in_part() -> None:
    """Frozen parameters stay out of every vector, and stay what they are."""
    engine = programs.small(GRAPHS["two paths"], "identity")
    middle = engine.middle
    middle.module.first.requires_grad_(False)
    frozen = middle.module.first.weight.clone()
    engine.iterate()
    assert len(middle.gradients[-1]) == 4
    assert torch.equal(middle.module.first.weight, frozen)
    assert all(g.norm() > 0 for g in engine.top.gradients[-1][-2:])
