"""Hooks on parameters are a part of the gradient that a level steps along."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaled import S, Upper, X, Y, error, gradient, linear, program
from torch import Tensor

from mlseg.errors import UserError

RATE, STEPS = 0.01, 3
MASK = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)


def masked_in_place(g: Tensor) -> None:
    g *= MASK


HOOKS: dict[str, Callable[[Tensor], Any]] = {
    "mask": lambda g: g * MASK,
    "mask in place": masked_in_place,
    "scale": lambda g: 0.5 * g,
    "clip": lambda g: g / (1.0 + g.norm()),
    "log": lambda g: None,
}
UNROLLED: list[Any] = [
    "unrolled",
    {"method": "unrolled", "mode": "forward_over_reverse"},
    {"method": "unrolled", "store": "graphs"},
    {"method": "unrolled", "backend": "higher"},
    {"method": "unrolled", "optimizer_state": "fresh"},
    "forward",
    {"method": "evolution", "directions": "orthogonal", "pairs": 1, "sigma": 1e-4},
]
ONE_STEP: list[Any] = [
    {"method": "identity", "linearise": "before_step"},
    {"method": "identity", "linearise": "before_step", "mode": "forward_over_reverse"},
    {"method": "finite_difference", "linearise": "before_step", "epsilon": 1e-4},
    {"method": "sama", "linearise": "before_step", "epsilon": 1e-4},
    "unrolled",
]


def truth(hook: Callable[[Tensor], Any], steps: int) -> float:
    """By plain double backward through the steps."""
    w, s = linear().weight, torch.tensor(S, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (g,) = torch.autograd.grad(error(X @ w.T, Y) * s.exp(), w, create_graph=True)
        copy = g.clone()
        changed = hook(copy)
        w = w - RATE * (copy if changed is None else changed)
    (found,) = torch.autograd.grad(error(X @ w.T, Y + 1.0, 2), s)
    return float(found)


def hooked(hook: Callable[[Tensor], Any]) -> Any:
    net = linear()
    net.weight.register_hook(hook)
    return net


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("method", UNROLLED, ids=str)
def test_through_several_steps(method: Any, hook: str) -> None:
    found = gradient(method, hooked(HOOKS[hook]), steps=STEPS, rate=RATE)
    # A difference over 1e-4 is off by its square, and by rounding, 1e-16 over it.
    assert found == pytest.approx(truth(HOOKS[hook], STEPS), rel=1e-6)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("method", ONE_STEP, ids=str)
def test_through_one_step(method: Any, hook: str) -> None:
    found = gradient(method, hooked(HOOKS[hook]), rate=RATE)
    assert found == pytest.approx(truth(HOOKS[hook], 1), rel=1e-5)


@pytest.mark.parametrize("method", UNROLLED, ids=str)
def test_training_itself_keeps_masked_weights(method: Any) -> None:
    net = hooked(HOOKS["mask"])
    before = linear().weight
    engine = program(method, net, steps=STEPS, rate=RATE)
    engine.run()
    assert torch.equal((net.weight - before) * (1.0 - MASK), torch.zeros_like(before))
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("method", ["cg", "exact", "neumann", "penalty", "stochastic"])
def test_refused_where_they_change_a_gradient_that_is_solved_with(method: str) -> None:
    with pytest.raises(UserError, match="'lower': hooks .* change .* method " + method):
        gradient(method, hooked(HOOKS["scale"]))
    plain = gradient(method, linear())
    assert gradient(method, hooked(HOOKS["log"])) == plain


def test_those_of_the_upper_level_see_its_whole_gradient() -> None:
    seen: list[float] = []

    class Both(Upper):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch) + self.module.weight.sum()

    engine = program("identity", upper=Both)
    engine.upper.module.weight.register_hook(lambda g: seen.append(float(g)))
    engine.upper.module.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2.0))
    engine.iterate()
    assert len(seen) == 1
    assert seen[0] == pytest.approx(gradient("identity") + 1.0)
    assert engine.upper.gradients == [2.0 * seen[0]]


@pytest.mark.parametrize("method", ["finite_difference", *UNROLLED, "cg"], ids=str)
def test_others_are_refused(method: Any) -> None:
    net = linear()
    net.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UserError, match=r"'lower': .* post-accumulate-grad hooks"):
        program(method, net)
    net = linear()
    net.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(UserError, match="'lower': Linear has a backward hook"):
        program(method, net)
