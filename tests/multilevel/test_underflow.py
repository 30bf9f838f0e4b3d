"""Weights without a gradient of their own end at 0, by no number that slows a processor down."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel import underflow
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, 1e-3, (0.5, 0.999), weight_decay=0.01),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-3, (0.5, 0.999), weight_decay=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, weight_decay=0.01),
}


def stepped(make: Make, clear: bool, steps: int) -> tuple[Tensor, int]:
    """Weights of which every other has a gradient, and how many subnormal numbers there were."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(0.02 * torch.randn(200, generator=generator))
    optimizer, found = make([p]), 0
    for _ in range(steps):
        p.grad = 1e-3 * torch.randn(200, generator=generator)
        p.grad[::2] = 0.0
        optimizer.step()
        if clear:
            underflow.clear(optimizer)
        for tensor in (p.detach(), *optimizer.state[p].values()):
            found += int(((tensor != 0.0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).sum())
    return p.detach(), found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_with_a_gradient_are_as_torch_has_them(name: str) -> None:
    alone, subnormal = stepped(OPTIMIZERS[name], False, 600)
    cleared, left = stepped(OPTIMIZERS[name], True, 600)
    assert torch.equal(alone[1::2], cleared[1::2])
    assert (cleared[::2] == 0.0).sum() > 20
    assert left < subnormal / 10


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, 0.0),
        ({"weight_decay": 1e-30}, 0.0),
        ({"weight_decay": 0.0}, 1e-20),
        ({"eps": 0.0}, 1e-20),
    ],
)
def test_what_is_left_alone(settings: Mapping[str, float], left: float) -> None:
    """No decay; no eps, where a moment of 0 would be divided by; a weight that isn't small."""
    p = nn.Parameter(torch.tensor([1e-17, 1e-20]))
    given: dict[str, Any] = {"lr": 1e-30, "weight_decay": 1e-3, **settings}
    optimizer = torch.optim.Adam([p], **given)
    for _ in range(underflow.EVERY):
        p.grad = torch.full_like(p, 1e-15)
        optimizer.step()
        underflow.clear(optimizer)
    assert torch.equal(p, torch.tensor([1e-17, left]))


def test_of_another_device_nothing_is_read() -> None:
    p = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.Adam([p], weight_decay=0.01)
    moments = {key: torch.empty(3, device="meta") for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[p] = {"step": torch.tensor(float(underflow.EVERY)), **moments}
    underflow.clear(optimizer)  # a reading would be an error


class Level(Problem):
    """Half of its weights have no gradient."""

    def training_step(self, batch: Any) -> Tensor:
        return (self.module.weight[0] ** 2).sum()


def test_a_level_clears_its_own_and_a_step_taken_again_does_the_same() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[0.1, 0.2], [1e-20, -1e-20]])
    optimizer = torch.optim.Adam(module.parameters(), 1e-22, weight_decay=0.01)
    level = Level("level", module, optimizer, [0], Config(hypergradient="identity"))
    engine = Engine([level], EngineSettings(tensorboard=False), quiet=True)
    for _ in range(underflow.EVERY - 1):
        engine.iterate()
    weight = module.weight
    assert weight.all()
    before, moments = weight.detach().clone(), level.optimizer.state[weight]
    copies = {k: v.clone() for k, v in moments.items()}
    (after,) = level.again.step_of_optimizer([weight], [2.0 * before], [copies], [{"index": 0}])
    again = weight.detach().clone()
    weight.data.copy_(before)
    engine.iterate()
    assert weight.detach()[1].tolist() == again[1].tolist() == [0.0, 0.0]
    assert torch.equal(after["exp_avg"][1], torch.zeros(2))
    assert torch.equal(moments["exp_avg"][1], torch.zeros(2))
