"""Every registered method, in every shape of graph, against dense solves and double backward.

The levels are at their minima, so that steps of descent leave them there: the implicit methods
are compared with the derivative of the minimisers, and so is unrolling over many steps. Methods of
one step are compared with the derivative of one step.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from programs import FAMILIES, SHAPES, Program

from mlseg.hypergradients import names
from mlseg.hypergradients.registry import classes

RATE = "rate"
"""Stands for the program's stable step size."""
LONG = "long"
"""Stands for as many steps or terms as the program needs to converge."""


@dataclass(frozen=True)
class Expected:
    """A method's settings, what it should give, and its relative error in float64 and float32."""

    truth: str
    double: float
    single: float
    settings: dict[str, Any] = field(default_factory=dict)
    single_settings: dict[str, Any] = field(default_factory=dict)
    steps: str | int = 1


EXPECTED = {
    "exact": Expected("minimisers", 1e-10, 1e-4),
    "cg": Expected("minimisers", 1e-8, 1e-4, {"iterations": 60}),
    "minres": Expected("minimisers", 1e-8, 1e-4, {"iterations": 60}),
    "neumann": Expected("minimisers", 1e-6, 1e-4, {"terms": LONG}),
    # Woodbury's identity divides by the damping twice; its bias is damping / lambda_min.
    "nystrom": Expected("minimisers", 1e-4, 3e-2, {"rank": 64, "damping": 1e-5}, {"damping": 1e-3}),
    "fixed_point": Expected("minimisers", 1e-6, 1e-4, {"iterations": LONG}),
    # The data are one batch here, so that there is nothing stochastic left.
    "stochastic": Expected("minimisers", 1e-6, 1e-4, {"iterations": LONG, "step_size": RATE}),
    # A bias in 1 / strength, rounding in proportion to it.
    "penalty": Expected(
        "minimisers", 1e-4, 5e-2, {"strength": 1e5, "iterations": LONG}, {"strength": 300.0}
    ),
    "unrolled": Expected("minimisers", 1e-6, 1e-4, {"steps": LONG}, steps=LONG),
    "forward": Expected("minimisers", 1e-6, 1e-4, {"steps": LONG}, steps=LONG),
    "identity": Expected("one step", 1e-10, 1e-4),
    "finite_difference": Expected("one step", 1e-6, 5e-3, {"epsilon": 1e-4}, {"epsilon": 1e-2}),
    "sama": Expected("one step", 1e-6, 5e-3, {"epsilon": 1e-4}, {"epsilon": 1e-2}),
    # With as many orthogonal pairs as the sources have numbers it is a central difference.
    "evolution": Expected(
        "one step",
        1e-5,
        3e-2,
        {"pairs": 64, "directions": "orthogonal", "sigma": 1e-3},
        {"sigma": 0.05},
    ),
}


def expectation(method: str) -> Expected:
    """A method's entry, or else what its class says of it."""
    if method in EXPECTED:
        return EXPECTED[method]
    cls = classes()[method]
    one_step = cls.best_response == "one step of the optimizer"
    steps = LONG if cls.best_response.startswith("the last steps") else 1
    truth = "one step" if one_step else "minimisers"
    return Expected(truth, 1e-4, 3e-2, dict(cls.converged), steps=steps)


@cache
def program(family: str, shape: str) -> Program:
    return Program(FAMILIES[family](), SHAPES[shape])


def found(made: Program, method: dict[str, Any], dtype: torch.dtype, expected: Expected) -> Any:
    """The top level's gradient; its loss has no direct part."""
    stands_for = {LONG: made.long(), RATE: made.stable_rate()}
    method = {k: stands_for.get(v, v) for k, v in method.items()}
    steps = int(stands_for.get(expected.steps, expected.steps))
    engine = made.engine(method, dtype, made.stable_rate(), steps)
    for _ in range(steps):
        engine.iterate()
    return engine.top.gradient


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", names())
def test_accuracy(method: str, family: str, shape: str, dtype: str) -> None:
    made, expected = program(family, shape), expectation(method)
    single = dtype == "float32"
    settings = {**expected.settings, **(expected.single_settings if single else {})}
    value = found(made, {"method": method, **settings}, getattr(torch, dtype), expected)
    truth = made.exact() if expected.truth == "minimisers" else made.one_step(made.stable_rate())
    assert error(value, truth) < (expected.single if single else expected.double)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_truths_differ(family: str, shape: str) -> None:
    """An implicit method that did no more than one step would not pass."""
    made = program(family, shape)
    assert error(made.one_step(made.stable_rate()), made.exact()) > 0.2
