"""Every registered method, in every shape of graph, against dense solves and double backward.

The levels are at their minima, so that steps of descent leave them there: the implicit methods
are compared with the derivative of the minimisers, and so is unrolling over many steps. Methods of
one step are compared with the derivative of one step, Nyström's with the damped inverse that it is.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import waiting

from mlseg.hypergradients import names
from mlseg.hypergradients.registry import classes
from mlseg.testing.families import FAMILIES, SHAPES, Settled

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
    # Woodbury's identity divides a difference by the damping: u (lambda_max)^2 / damping.
    "nystrom": Expected("damped", 1e-8, 1e-4, {"rank": 64, "damping": 1e-2}),
    "fixed_point": Expected("minimisers", 1e-6, 1e-4, {"iterations": LONG}),
    # The data are one batch here, so that there is nothing stochastic left.
    "stochastic": Expected("minimisers", 1e-6, 1e-4, {"iterations": LONG, "step_size": RATE}),
    # A bias in 1 / strength, times 10 for the logistic family; rounding of u * strength.
    "penalty": Expected(
        "minimisers", 1e-4, 5e-2, {"strength": 1e6, "iterations": LONG}, {"strength": 1e3}
    ),
    "unrolled": Expected("minimisers", 1e-6, 1e-4, {"steps": LONG}, steps=LONG),
    "forward": Expected("minimisers", 1e-6, 1e-4, {"steps": LONG}, steps=LONG),
    "identity": Expected("one step", 1e-10, 1e-4),
    # These levels have no layers: the inverse is the learning rate. Layers: see test_kfac.py.
    "kfac": Expected("one step", 1e-10, 1e-4, {"rescale": False}),
    # Differences err by epsilon^2 times a third derivative over a first, of order 1 to 10 (none in
    # the quadratic families), and by u / epsilon for each operation.
    "finite_difference": Expected("one step", 1e-6, 5e-3, {"epsilon": 1e-4}, {"epsilon": 1e-2}),
    "sama": Expected("one step", 1e-6, 5e-3, {"epsilon": 1e-4}, {"epsilon": 1e-2}),
    # With as many orthogonal pairs as the sources have numbers it is a central difference.
    "evolution": Expected(
        "one step",
        1e-5,
        1e-2,
        {"pairs": 64, "directions": "orthogonal", "sigma": 3e-4},
        {"sigma": 0.02},
    ),
}
"""Errors: what a method leaves out, and what rounding makes of a Hessian's condition.

The rounding unit u is 1e-16 in float64 and 6e-8 in float32. The Hessians have eigenvalues of at
most 10 and conditions of at most 65: u * 65 is 1e-14 and 4e-6, for each of the solutions that the
two hops multiply, and an iteration that stops at its tolerance adds that. What takes LONG steps or
terms is off by 1e-7 besides (``Settled.long``). All bounds leave room for a factor of ten.
"""


def expectation(method: str) -> Expected:
    """A method's entry, or else what its class says of it."""
    if method in EXPECTED:
        return EXPECTED[method]
    cls = classes()[method]
    one_step = cls.best_response == "one step of the optimizer"
    steps = LONG if cls.best_response.startswith("the last steps") else 1
    truth = "one step" if one_step else "minimisers"
    return Expected(truth, 1e-4, 3e-2, dict(cls.converged), steps=steps)


WAITS = ("exact",)
"""Methods that read from the device: an eigendecomposition says on the host whether it failed."""


@cache
def program(family: str, shape: str) -> Settled:
    return Settled(family, shape)


def found(
    made: Settled,
    method: dict[str, Any],
    dtype: torch.dtype,
    expected: Expected,
    device: str = "cpu",
) -> Any:
    """The top level's gradient, on the CPU; its loss has no direct part."""
    stands_for: dict[Any, Any] = {LONG: made.long(), RATE: made.rate}
    method = {k: stands_for.get(v, v) for k, v in method.items()}
    steps = int(stands_for.get(expected.steps, expected.steps))
    engine = made.engine(method, dtype, steps, device=device)
    for _ in range(steps):
        engine.iterate()
    return engine.top.gradient.cpu()


def truth_of(made: Settled, truth: str, settings: dict[str, Any]) -> torch.Tensor:
    if truth == "one step":
        return made.one_step()
    return made.exact(settings["damping"] if truth == "damped" else 0.0)


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "shape",
    # Two paths hold a long one.
    [pytest.param(s, marks=pytest.mark.slow if s == "long path" else ()) for s in SHAPES],
)
@pytest.mark.parametrize(
    "family",
    # A thousand steps, where the others take a hundred.
    [pytest.param(f, marks=pytest.mark.slow if f == "convolutional" else ()) for f in FAMILIES],
)
@pytest.mark.parametrize("method", names())
def test_accuracy(method: str, family: str, shape: str, dtype: str) -> None:
    # Forward differentiation takes a tangent for each number above.
    long = family == "convolutional" and (dtype == "float32" or method == "forward")
    if long and shape != "two levels":
        pytest.skip("the other families have been in this shape")
    check(method, family, shape, dtype, "cpu")


@waiting.needs_gpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", ["quadratic", "logistic"])
@pytest.mark.parametrize("method", names())
def test_accuracy_on_a_gpu(method: str, family: str, dtype: str) -> None:
    check(method, family, "two paths", dtype, "cuda")


def check(method: str, family: str, shape: str, dtype: str, device: str) -> None:
    made, expected = program(family, shape), expectation(method)
    single = dtype == "float32"
    settings = {**expected.settings, **(expected.single_settings if single else {})}
    spec = {"method": method, **settings}
    value = found(made, spec, getattr(torch, dtype), expected, device)
    truth = truth_of(made, expected.truth, settings)
    assert error(value, truth) < (expected.single if single else expected.double)


@waiting.needs_gpu
@pytest.mark.parametrize("method", [name for name in EXPECTED if name not in WAITS])
def test_no_hop_waits_for_the_gpu(method: str) -> None:
    """Nor does a batch that comes from the host."""
    made = program("convolutional", "two paths")
    engine = made.engine({"method": method}, torch.float64, 2, device="cuda")
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
    assert error(made.one_step(), made.exact()) > 0.2
