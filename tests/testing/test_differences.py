"""Differences that know their own error: whether they do."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlseg.testing.differences import derivative, gradient, slopes


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noisy(seed: int) -> Callable[[float], Tensor]:
    draw = random.Random(seed)
    return lambda h: number(math.sin(1.0 + h) + 1e-12 * draw.gauss(0.0, 1.0))


FUNCTIONS: dict[str, tuple[Callable[[float], Tensor], float]] = {
    "sine": (lambda h: number(math.sin(1.0 + h)), math.cos(1.0)),
    "steep": (lambda h: number(math.exp(30.0 * h)), 30.0),
    # Its third derivative is that of an optimizer that divides by a small gradient.
    "saturating": (lambda h: number((0.01 + h) / (abs(0.01 + h) + 1e-3)), 1e-3 / 0.011**2),
    "beside a kink": (lambda h: number(abs(h + 0.02) + h), 2.0),
    "in float32": (lambda h: torch.tensor(1.0 + h, dtype=torch.float32).sin(), math.cos(1.0)),
    # Rounding of many operations, in place of one's.
    **{f"noisy {seed}": (noisy(seed), math.cos(1.0)) for seed in range(20)},
}


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_is_below_what_they_say(name: str, step: float) -> None:
    function, true = FUNCTIONS[name]
    found = derivative(function, step)
    assert abs(float(found.value) - true) <= found.error


def test_steps_across_a_kink_are_told() -> None:
    """No entry is right, and none says that it is."""
    assert derivative(lambda h: number(abs(h + 3e-4) + h), 1e-2).relative > 0.1


def test_smooth_functions_are_as_good_as_exact() -> None:
    assert derivative(lambda h: number(math.sin(1.0 + h)), 1e-2).relative < 1e-9


def test_gradients_have_the_points_shape() -> None:
    point = torch.arange(6, dtype=torch.float64).view(2, 3)
    found = gradient(lambda x: (x**3).sum(), point, 1e-2)
    found.check(3 * point**2, within=1e-8)
    ways = [torch.ones(2, 3).double(), point]
    slopes(lambda x: (x**3).sum(), point, ways, 1e-2).check(
        torch.stack([(3 * point**2 * way).sum() for way in ways]), within=1e-8
    )


def test_what_is_wrong_is_told() -> None:
    found = derivative(lambda h: number(math.sin(1.0 + h)), 1e-2)
    with pytest.raises(AssertionError, match=r"1\.0e-06 away"):
        found.check(number(math.cos(1.0) * (1.0 + 1e-6)), within=1e-7)


def test_a_reference_that_is_worse_than_the_bound_proves_nothing() -> None:
    found = derivative(lambda h: number(abs(h + 3e-4) + h), 1e-2)
    with pytest.raises(AssertionError, match="the reference is off by"):
        found.check(found.value, within=0.05)
