"""What optimizers need of a problem: gradients in the right layout, a state in the right place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import waiting
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

Make = Callable[..., torch.optim.Optimizer]


class Filters(nn.Module):
    """The weight of a convolution, its channels last in memory."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 3, 3, 3, generator=generator)
        self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last))


class Low(Problem):
    def training_step(self, batch: Any) -> Tensor:
        return ((self.module.weight - self.top.module.weight.mean()) ** 2).sum()


class Top(Problem):
    """Its loss takes the weight in a row: the gradient's channels come first."""

    def training_step(self, batch: Any) -> Tensor:
        flat = self.module.weight.flatten()
        ramp = torch.linspace(0.0, 1.0, len(flat), device=flat.device)
        return (ramp * flat).sum() + self.low.module.weight.sum()


def program(make: Make, device: str = "cpu", **config: Any) -> Any:
    modules = Filters(), Filters()
    low, top = (
        cls(name, module, make(module.parameters(), lr=0.1), [0], Config(**config))
        for name, cls, module in zip(("low", "top"), (Low, Top), modules, strict=True)
    )
    return Engine(
        [low, top],
        EngineSettings(tensorboard=False),
        u2l={top: [low]},
        l2u={low: [top]},
        device=device,
        quiet=True,
    )


DEVICES = ["cpu", pytest.param("cuda", marks=waiting.needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", ["weights", "graphs"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers_step_along_the_gradient(cls: Make, store: str, device: str) -> None:
    """On the CPU they take its numbers in the order in which they lie in memory."""
    found = []
    for fused in (False, True):

        def make(*args: Any, fused: bool = fused, **settings: Any) -> torch.optim.Optimizer:
            return cls(*args, **settings, fused=fused)

        spec = {"method": "unrolled", "store": store}
        engine = program(make, device, hypergradient=spec)
        for _ in range(3):
            engine.iterate()
        weight = engine.top.module.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_state_of_another_layout_goes_on_the_same(batches: int) -> None:
    """Moments and accumulated gradients of a device whose weights lie in memory otherwise."""

    def fused(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr, fused=True)

    settings: dict[str, Any] = {"hypergradient": "identity", "gradient_accumulation": batches}
    old, new = program(fused, **settings), program(fused, **settings)
    for problem in new.problems:
        problem.module.weight.data = problem.module.weight.data.contiguous()
    for _ in range(3):
        old.iterate()
    for problem in new.problems:
        problem.load_state_dict(copy.deepcopy(getattr(old, problem.name).state_dict()))
    for _ in range(2):
        old.iterate()
        new.iterate()
    for problem in new.problems:
        weight = problem.module.weight
        assert weight.is_contiguous()
        torch.testing.assert_close(weight, getattr(old, problem.name).module.weight)


@waiting.needs_gpu
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}])
def test_a_state_from_before_goes_to_the_gpu(settings: dict[str, Any]) -> None:
    """Of an optimizer that had stepped before the engine was made."""

    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        made = torch.optim.Adam(parameters, lr, **{**settings, "capturable": False})
        for group in made.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        made.step()
        made.zero_grad()
        made.param_groups[0].update(settings)
        return made

    engine = program(make, "cuda", hypergradient="identity")
    engine.iterate()
    (state,) = engine.top.optimizer.state.values()
    assert float(state["step"]) == 2.0


class Rate(Low):
    def learning_rates(self) -> list[Tensor]:
        return [0.1 * self.top.module.weight.mean().exp()]


RATED: dict[str, Make] = {
    "sgd fused": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, fused=True),
    "adam fused": lambda p, lr: torch.optim.Adam(p, lr, fused=True),
    "rmsprop capturable": lambda p, lr: torch.optim.RMSprop(p, lr, capturable=True),
}


@waiting.needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RATED)
def test_learned_rates_stay_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    engine = program(RATED[name], "cuda", hypergradient="unrolled")
    engine.low.__class__ = Rate
    for problem in engine.problems:
        problem.module.to(dtype)
    # The engine looks at a level's first hypergradient, or second where the optimizer is adaptive.
    for _ in range(2):
        engine.iterate()
    with waiting.forbidden():
        engine.iterate()
    assert isinstance(engine.low.optimizer.param_groups[0]["lr"], Tensor)
