"""What ``docs/how-to-choose.md`` says of methods without measuring them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlseg.hypergradients import names
from mlseg.testing import programs
from mlseg.testing.families import HYPERPARAMETERS, Settled, Vector
from mlseg.testing.programs import TWO_LEVELS, Graph, Level

PAGE = (Path(__file__).parent.parent / "docs" / "how-to-choose.md").read_text(encoding="utf-8")


TABLES = ("In short", "What they cost")


def test_every_method_is_in_the_tables() -> None:
    short, costs = (PAGE.split(f"## {title}\n")[1].split("\n## ")[0] for title in TABLES)
    for name in names():
        assert f"`{name}`" in short, name
        assert re.search(rf"^\| `{name}` \|", costs, re.MULTILINE), name


COSTS: dict[str, tuple[int, int]] = {
    "finite_difference": (2, 0),
    "identity": (1, 1),
    "sama": (2, 0),
    "neumann": (1, 10 + 8 + 1),
    "cg": (1, 10 + 1),
    "minres": (1, 10 + 1),
    "nystrom": (1, 10 + 1 + 1),
    "fixed_point": (1, 20 + 1),
    "stochastic": (10 + 1, 10 + 8 + 1),
    "penalty": (10 + 3, 0),
}
"""Evaluations and products (the mixed one included) of the first hop, by default."""


def counted(method: dict[str, Any], made: Settled, steps: int = 1) -> tuple[float, float]:
    """Evaluations and products of the first hop."""
    engine = made.engine(method, steps=steps)
    for _ in range(steps):
        engine.iterate()
    figures = engine.top.metrics
    return figures["hypergradient/low_evaluations"], figures["hypergradient/low_products"]


@pytest.fixture(scope="module")
def made() -> Settled:
    return Settled("convolutional", "two levels")


@pytest.mark.parametrize("method", COSTS)
def test_costs_are_those_of_the_table(method: str, made: Settled) -> None:
    assert counted({"method": method}, made) == COSTS[method]


def test_costs_that_depend_on_steps_and_sizes(made: Settled) -> None:
    weights, hyperparameters = made.family.size, HYPERPARAMETERS
    assert counted({"method": "exact"}, made) == (1, weights + 1)
    assert counted({"method": "unrolled"}, made, 3) == (3, 3)
    assert counted({"method": "unrolled", "store": "graphs"}, made, 3) == (0, 3)
    assert counted({"method": "forward"}, made, 3) == (3, 3 * hyperparameters)
    # The program's levels have a grad_callback.
    assert counted({"method": "evolution"}, made, 3) == (2 * 8 * 3 + 3, 0)


def test_every_methods_cost_is_tested() -> None:
    assert set(names()) == {*COSTS, "exact", "unrolled", "forward", "evolution"}


# --------------------------------------------------------------------- what they agree on


def gradient(made: Settled, method: dict[str, Any], steps: int = 1) -> Tensor:
    engine = made.engine(method, steps=steps)
    for _ in range(steps):
        engine.iterate()
    return engine.top.gradient


def test_they_meet_where_the_page_says(made: Settled) -> None:
    def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
        return float((a - b).norm() / b.norm()) < tolerance

    unrolled = {"method": "unrolled"}
    one = gradient(made, {"method": "identity", "linearise": "before_step"})
    assert same(gradient(made, unrolled), one, 1e-10)
    series = gradient(made, {"method": "neumann", "terms": 4, "step_size": made.rate})
    assert same(gradient(made, unrolled, steps=5), series, 1e-8)
    assert not same(gradient(made, unrolled, steps=4), series, 1e-3)
    damped = gradient(made, {"method": "cg", "damping": 1e6})
    unscaled = gradient(made, {"method": "identity", "scale": "none"})
    assert same(1e6 * damped, unscaled, 1e-4)


# ------------------------------------------------------------------------ detach, no_grad

W, S, RATE = 0.7, 0.2, 0.1


class Holding(Level):
    """``h(w) w exp(s)`` with a part ``h(w) = w`` that training holds constant."""

    hold: str

    def training_step(self, batch: Any) -> Tensor:
        w = self.module.value
        with torch.set_grad_enabled(self.hold == "detach"):
            held = w * 1.0
        if self.hold != "no_grad":
            held = held.detach()
        return (held * w * self.top.module.value.exp()).sum()


class Coupled(Level):
    """``w^2 exp(detach(s)) + w s``."""

    hold: str

    def training_step(self, batch: Any) -> Tensor:
        w, s = self.module.value, self.top.module.value
        return (w**2 * s.detach().exp() + w * s).sum()


def slope(method: dict[str, Any], cls: type[Any] = Holding, hold: str = "detach") -> float:
    """The hypergradient of ``w`` after one step, by ``s``."""
    engine: Any = programs.build(
        Graph(
            {"low": lambda nets, _: None, "top": lambda nets, _: nets["low"]().sum()}, *TWO_LEVELS
        ),
        {"low": Vector(torch.tensor([W]).double()), "top": Vector(torch.tensor([S]).double())},
        {"low": [()], "top": [()]},
        method,
        {"low": programs.sgd(RATE), "top": programs.sgd(0.0)},
        kinds={"low": cls},
    )
    engine.low.hold = hold
    engine.iterate()
    return float(engine.top.gradient)


BEFORE = {"linearise": "before_step"}
TRUE = -RATE * W * math.exp(S)
"""Of the step that training takes, ``w - rate w exp(s)``."""


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        ({"method": "identity", **BEFORE}, 1.0),
        ({"method": "unrolled"}, 1.0),
        ({"method": "forward"}, 1.0),
        ({"method": "evolution", "directions": "orthogonal", "sigma": 1e-3}, 1.0),
        ({"method": "finite_difference", "epsilon": 1e-4, **BEFORE}, 2.0),
        ({"method": "sama", "epsilon": 1e-4, **BEFORE}, 2.0),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_detach_of_own_weights(method: dict[str, Any], factor: float) -> None:
    assert slope(method) == pytest.approx(factor * TRUE, rel=1e-5)


def test_detach_of_own_weights_is_invisible_to_penalty() -> None:
    """The zero of training's gradient ``w exp(s)`` answers by ``-w``, from where ``w`` is now."""
    found = slope({"method": "penalty", "strength": 1e4, "iterations": 500})
    assert found == pytest.approx(-2.0 * (W + TRUE), rel=1e-3)


@pytest.mark.parametrize("method", ["identity", "finite_difference", "unrolled", "cg", "evolution"])
def test_detach_of_the_upper_variables_is_invisible_to_evolution_alone(method: str) -> None:
    settings = {"evolution": {"directions": "orthogonal", "sigma": 1e-3}}.get(method, {})
    held, moving = -1.0, -2.0 * W * math.exp(S) - 1.0
    found = slope({"method": method, **settings}, Coupled)
    if method == "cg":  # over the curvature in place of the rate
        assert found == pytest.approx(held / (2.0 * math.exp(S)), rel=1e-5)
    else:
        expected = moving if method == "evolution" else held
        assert found == pytest.approx(RATE * expected, rel=1e-5)


@pytest.mark.parametrize(("hold", "factor"), [("detach", 1.0), ("no_grad", 2.0), ("both", 1.0)])
def test_forward_over_reverse_takes_no_note_of_no_grad(hold: str, factor: float) -> None:
    method = {"method": "identity", **BEFORE}
    tangents = {**method, "mode": "forward_over_reverse"}
    assert slope(method, hold=hold) == pytest.approx(TRUE)
    assert slope(tangents, hold=hold) == pytest.approx(factor * TRUE)
