"""Programs off the beaten track, against the truth by plain double backward."""

from typing import Any

import pytest
import torch
from pairs import (
    BEFORE,
    EVOLUTION,
    FORWARD_OVER_REVERSE,
    GRAPHS,
    HIGHER,
    RATE,
    SAMA,
    Low,
    Signs,
    Top,
    close,
    line,
    mlp,
    one_step,
    pair,
    values,
    weighted,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from mlseg.engines.engine import Engine
from mlseg.errors import UserError
from mlseg.testing import programs
from mlseg.testing.programs import Graph, Level

# ----------------------------------------------------------------- what the step stepped along


@pytest.mark.parametrize("method", ["unrolled", "forward", GRAPHS, FORWARD_OVER_REVERSE, EVOLUTION])
def test_the_optimizer_is_differentiated_at_the_changed_gradient(method: Any) -> None:
    """Adam's first step is g / (|g| + eps): its slope tells which gradient was taken."""
    eps = 0.1
    low, top, program = pair(
        method, None, lambda net: torch.optim.Adam(net.parameters(), RATE, eps=eps), Signs
    )
    program.iterate()
    truth = one_step(low, top, low.before, [low.cur_batch], RATE * eps / (0.01 + eps) ** 2)
    assert close(top.gradient, truth, 1e-5)


class Both(Level):
    """Depends on ``a``; ``b`` only decides when it steps."""

    before: list[Tensor]
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module)
        b = sum(p.sum() for p in self.b.trainable_parameters())
        return sum(0.5 * (p**2).sum() for p in self.a.trainable_parameters()) + 0.0 * b

    grad_callback = Top.grad_callback


@pytest.mark.parametrize(
    "method", ["unrolled", "forward", GRAPHS, FORWARD_OVER_REVERSE, EVOLUTION, BEFORE, SAMA]
)
def test_an_upper_that_steps_while_a_lower_accumulates(method: Any) -> None:
    """``a`` has taken one step of two batches and has begun the next one."""
    nets = {"a": mlp(), "b": line()}
    data = programs.batches(1)
    program: Any = programs.build(
        Graph(
            {
                "a": lambda nets, batch: weighted(nets["a"], nets["top"], batch),
                "b": lambda nets, batch: weighted(nets["b"], nets["top"], batch),
                "top": lambda nets, batch: torch.zeros(()),
            },
            {"a": ["top"], "b": ["top"]},
            {"top": ["a", "b"]},
        ),
        {**nets, "top": line()},
        {"a": data, "b": programs.batches(3), "top": programs.batches(2)},
        method,
        programs.sgd(RATE),
        kinds={"a": Low, "b": Low, "top": Both},
        configs={
            "a": {"gradient_accumulation": 2},
            "b": {"hypergradient": "identity", "unroll_steps": 3},
        },
    )
    a, top = program.a, program.top
    start = values(nets["a"])
    for _ in range(3):
        program.iterate()
    assert a.trajectory.is_open
    whole = method not in (BEFORE, SAMA)  # these evaluate the step's last batch
    assert close(top.gradient, one_step(a, top, start, data[:2] if whole else data[1:2]), 1e-5)


class Rates(Low):
    """Steps at 0.5, whatever its optimizer was given."""

    def learning_rates(self) -> list[Tensor]:
        return [torch.tensor(0.5)] * len(self.optimizer.param_groups)


@pytest.mark.parametrize("method", [SAMA, BEFORE, "unrolled", HIGHER])
def test_the_learning_rate_is_that_of_the_step(method: Any) -> None:
    low, top, program = pair(method, low=Rates)
    program.iterate()
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch], 0.5), 1e-5)


# ------------------------------------------------------------------------------------ buffers


def test_every_evaluation_sees_the_same_buffers() -> None:
    """Spectral norm moves on with each forward pass: differences of two passes would see that."""
    net = mlp()
    net[0] = parametrizations.spectral_norm(net[0])
    low, top, program = pair({"method": "finite_difference", "epsilon": 1e-5}, net)
    program.iterate()
    assert close(top.gradient, one_step(low, top, values(net), [low.cur_batch]), 1e-5)


class Running(nn.Module):
    """Its forward pass puts new tensors in the buffers' place."""

    mean: Tensor
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = line()
        self.register_buffer("mean", torch.zeros(3).double())
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.passes = self.passes + 1
        return self.inner(x - self.mean)


@pytest.mark.parametrize("method", ["finite_difference", "identity", "cg", "unrolled", HIGHER])
def test_buffers_that_the_forward_pass_reassigns(method: Any) -> None:
    low, _, program = pair(method, Running())
    program.iterate()
    assert float(low.module.passes) == 1
    assert torch.allclose(low.module.mean, 0.1 * low.cur_batch[0].mean(0), rtol=1e-12)


# ------------------------------------------------------------ which parameters, and where they are


def bias_alone(net: Any) -> torch.optim.Optimizer:
    """An optimizer that doesn't hold the first parameter."""
    return torch.optim.SGD([net.bias], RATE)


@pytest.mark.parametrize(
    "method", [{"method": "penalty", "strength": 1e4, "iterations": 200, "step_size": 0.5}, "exact"]
)
def test_a_first_parameter_that_the_optimizer_does_not_hold(method: Any) -> None:
    """The bias alone responds: ``- d2l/ds db v_b / (d2l/db2)``, and d2l/db2 is twice the weight."""
    low, top, program = pair(method, line(), bias_alone)
    low.module.weight.data *= 0.5
    program.iterate()
    s = top.before
    curvature = 2.0 * float((low.cur_batch[0] @ s[0].T + s[1]).sigmoid().mean())
    vector = [torch.zeros(1, 3), low.module.bias.detach()]
    truth = one_step(low, top, values(low.module), [low.cur_batch], 1.0 / curvature, vector)
    assert close(top.gradient, truth, 1e-3)


@pytest.mark.parametrize("method", ["identity", "finite_difference"])
def test_scale_none_lets_only_what_is_stepped_respond(method: str) -> None:
    spec = {"method": method, "scale": "none"} | (
        {"epsilon": 1e-5} if method == "finite_difference" else {}
    )
    low, top, program = pair(spec, line(), bias_alone)
    program.iterate()
    vector = [torch.zeros(1, 3), low.module.bias.detach()]
    truth = one_step(low, top, values(low.module), [low.cur_batch], 1.0, vector)
    assert close(top.gradient, truth, 1e-5)


class ThroughTop(Low):
    """Reads its own weights through a network of the upper problem, tied to its own."""

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module) if not self.replaying else self.before
        return weighted(self.top.module.tied, self.top.module.weights, batch)


class WeightsAndTied(nn.Module):
    def __init__(self, tied: Any) -> None:
        super().__init__()
        self.weights, self.tied = line(), line()
        self.tied.weight, self.tied.bias = tied.weight, tied.bias


class OfWeights(Top):
    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        self.before = values(self.module.weights)
        return loss

    def trainable_parameters(self) -> list[Tensor]:
        return list(self.module.weights.parameters())


TIED = [GRAPHS, FORWARD_OVER_REVERSE, HIGHER]


@pytest.mark.parametrize("method", ["unrolled", "forward", *TIED])
def test_weights_tied_across_problems(method: Any) -> None:
    net = line()
    net.weight.data *= -1.0
    upper = WeightsAndTied(net)
    low, top, program = pair(method, net, low=ThroughTop, top=OfWeights, upper=upper)
    top.optimizer.param_groups[0]["params"] = list(upper.weights.parameters())
    program.iterate()
    top.module = upper.weights  # what the truth differentiates by
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]))


class Aside(Low):
    """Reads half of its weights through a network that is in no problem's module."""

    def training_step(self, batch: Any) -> Tensor:
        x, _ = batch
        self.before = values(self.module) if not self.replaying else self.before
        out = functional.linear(x, self.module.weight, self.aside[0])
        return weighted(lambda _: out, self.top.module, batch)


def beside(method: Any) -> tuple[Any, Any, Engine]:
    low, top, program = pair(method, line(), low=Aside)
    low.aside = [low.module.bias]  # a list: no module knows of it
    return low, top, program


@pytest.mark.parametrize("method", TIED)
def test_weights_that_nothing_can_stand_in_for_are_refused(method: Any) -> None:
    """Half of the gradient would be lost in silence."""
    _, _, program = beside(method)
    with pytest.raises(UserError, match="outside the problems' modules"):
        program.iterate()


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_double_backward_finds_weights_anywhere(method: str) -> None:
    low, top, program = beside(method)
    program.iterate()
    assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]))


THREE: dict[str, dict[str, Any]] = {
    "unrolled": {"steps": 3},
    "forward": {"steps": 3},
    "evolution": {"steps": 3, **EVOLUTION},
}


class Square(nn.Module):
    """Two matrices of one shape, and a vector of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(3, 3).double()) for _ in range(2))
        self.c = nn.Parameter(torch.randn(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a @ self.b).sum(1) + self.c.prod()


@pytest.mark.parametrize("method", [*THREE, "sama", "penalty", "stochastic", "cg"])
@pytest.mark.parametrize("change", ["freeze", "thaw", "swap"])
def test_freezing_in_mid_run(method: str, change: str) -> None:
    """Steps in another space are forgotten: the next hop is that of one step alone."""
    net = Square()
    net.a.requires_grad_(change == "freeze")
    spec: dict[str, Any] = {"method": method, **THREE.get(method, {})}
    spec |= {"warm_start": True} if method in ("penalty", "cg") else {}
    low, top, program = pair(spec, net)
    program.iterate()
    program.iterate()
    net.a.requires_grad_(change != "freeze")
    net.b.requires_grad_(change != "swap")
    program.iterate()
    assert top.gradient.isfinite().all()
    if method in THREE:
        assert close(top.gradient, one_step(low, top, low.before, [low.cur_batch]), 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_higher_with_a_frozen_parameter_in_the_optimizer(momentum: float) -> None:
    found = []
    for method in (HIGHER, "unrolled"):
        net = mlp()
        net[0].requires_grad_(False)
        _, top, program = pair(
            method,
            net,
            lambda net: torch.optim.SGD(net.parameters(), RATE, momentum=momentum),
            unroll_steps=2,
        )
        for _ in range(4):
            program.iterate()
        found.append(top.gradient)
    one, other = found
    assert close(one, other, 1e-12)
