"""What ``docs/how-to-choose.md`` says of methods without measuring them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlseg.hypergradients import names
from mlseg.hypergradients.registry import classes
from mlseg.hypergradients.tables import rewritten
from mlseg.testing import programs
from mlseg.testing.families import HYPERPARAMETERS, Settled, Vector
from mlseg.testing.programs import TWO_LEVELS, Graph, Level

PAGE = (Path(__file__).parent.parent / "docs" / "how-to-choose.md").read_text(encoding="utf-8")


def test_the_pages_tables_are_those_of_the_classes() -> None:
    assert rewritten(PAGE) == PAGE, "run python -m mlseg.hypergradients docs/how-to-choose.md"


def test_every_method_describes_itself() -> None:
    for name, cls in classes().items():
        for part in ("situation", "because", "cost", "memory"):
            assert getattr(cls, part), f"{name} lacks {part}"
        assert f"| `{name}` |" in PAGE


def counts(name: str, steps: int, sources: int, weights: int) -> tuple[float, float]:
    """Evaluations and products (the mixed one included) of a first hop, by the class's formula."""
    cls = classes()[name]
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", cls.cost)
    values = {letter: cls.model_fields[setting].default for letter, setting in cls.symbols.items()}
    values |= {"T": steps, "n": sources, "N": weights}
    evaluations, products = (
        eval(formula, {**values, "E": e, "H": h, "M": h}) for e, h in ((1, 0), (0, 1))
    )
    # The program's levels have a grad_callback.
    return evaluations + steps * ("grad_callback" in cls.cost_note), products


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


@pytest.mark.parametrize("method", names())
def test_costs_are_those_of_the_table(method: str, made: Settled) -> None:
    steps = 3 if classes()[method].best_response.startswith("the last steps") else 1
    sizes = (HYPERPARAMETERS, made.family.size)
    assert counted({"method": method}, made, steps) == counts(method, steps, *sizes)


def test_kept_graphs_spare_the_evaluations(made: Settled) -> None:
    assert counted({"method": "unrolled", "store": "graphs"}, made, 3) == (0, 3)


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
            {"low": lambda nets, _: torch.zeros(()), "top": lambda nets, _: nets["low"]().sum()},
            *TWO_LEVELS,
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
