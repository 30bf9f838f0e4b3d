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
import waiting
from programs import FAMILIES, SHAPES, Program

from mlseg.hypergradients import names

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


WAITS = ("exact",)
"""Methods that read from the device: an eigendecomposition says on the host whether it failed."""


@cache
def program(family: str, shape: str) -> Program:
    return Program(FAMILIES[family](), SHAPES[shape])


def found(
    made: Program,
    method: dict[str, Any],
    dtype: torch.dtype,
    expected: Expected,
    device: str = "cpu",
) -> Any:
    """The top level's gradient, on the CPU; its loss has no direct part."""
    stands_for = {LONG: made.long(), RATE: made.stable_rate()}
    method = {k: stands_for.get(v, v) for k, v in method.items()}
    steps = int(stands_for.get(expected.steps, expected.steps))
    engine = made.engine(method, dtype, made.stable_rate(), steps, device)
    for _ in range(steps):
        engine.iterate()
    return engine.top.gradient.cpu()


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def test_every_method_is_here() -> None:
    assert set(EXPECTED) == set(names())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", EXPECTED)
def test_accuracy(method: str, family: str, shape: str, dtype: str) -> None:
    check(method, family, shape, dtype, "cpu")


@waiting.needs_gpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", ["quadratic", "logistic"])
@pytest.mark.parametrize("method", EXPECTED)
def test_accuracy_on_a_gpu(method: str, family: str, dtype: str) -> None:
    check(method, family, "two paths", dtype, "cuda")


def check(method: str, family: str, shape: str, dtype: str, device: str) -> None:
    made, expected = program(family, shape), EXPECTED[method]
    single = dtype == "float32"
    settings = {**expected.settings, **(expected.single_settings if single else {})}
    spec = {"method": method, **settings}
    value = found(made, spec, getattr(torch, dtype), expected, device)
    truth = made.exact() if expected.truth == "minimisers" else made.one_step(made.stable_rate())
    assert error(value, truth) < (expected.single if single else expected.double)


@waiting.needs_gpu
@pytest.mark.parametrize("method", [name for name in EXPECTED if name not in WAITS])
def test_no_hop_waits_for_the_gpu(method: str) -> None:
    """Nor does a batch that comes from the host."""
    made = program("convolutional", "two paths")
    engine = made.engine({"method": method}, torch.float64, made.stable_rate(), 2, "cuda")
    for _ in range(4):
        engine.iterate()
    with waiting.forbidden():
        for _ in range(4):
            engine.iterate()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_truths_differ(family: str, shape: str) -> None:
    """An implicit method that did no more than one step would not pass."""
    made = program(family, shape)
    assert error(made.one_step(made.stable_rate()), made.exact()) > 0.2
