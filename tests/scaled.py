"""Two levels with one number above: the lower loss is a mean error times ``exp(s)``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import Config, Engine, EngineSettings, Problem

S = 0.3


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, Y = points(6, 4), points(6, seed=1)


def error(predicted: Tensor, y: Tensor, power: int = 4) -> Tensor:
    return ((predicted.squeeze(-1) - y) ** power).mean()


class Lower(Problem):
    def training_step(self, batch: Any) -> Any:
        return error(self(batch[0]), batch[1]) * self.upper.module.weight.exp().sum()


class Upper(Problem):
    gradients: list[float]

    def training_step(self, batch: Any) -> Any:
        return error(self.lower(batch[0]), batch[1] + 1.0, 2)

    def grad_callback(self) -> None:
        self.gradients.append(float(self.module.weight.grad.detach()))


def linear(seed: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 1, bias=False).double()


def program(
    method: Any,
    net: nn.Module | None = None,
    *,
    lower: type[Problem] = Lower,
    upper: type[Problem] = Upper,
    loader: Iterable[Any] | None = None,
    steps: int = 1,
    rate: float = 0.01,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    settings: EngineSettings | None = None,
    out: Any = None,
    quiet: bool = True,
    **config: Any,
) -> Any:
    """An engine with levels ``lower`` and ``upper``; the upper one's rate is 0."""
    net = linear() if net is None else net
    above = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(above.weight, S)
    parameters = list(net.parameters())
    low = lower(
        "lower",
        net,
        optimizer(parameters, lr=rate),
        [(X, Y)] if loader is None else loader,
        Config(hypergradient=method, unroll_steps=steps, **config),
    )
    top: Any = upper("upper", above, torch.optim.SGD(above.parameters(), lr=0.0), [(X, Y)])
    top.gradients = []
    return Engine(
        [low, top],
        settings or EngineSettings(iterations=steps, tensorboard=False),
        l2u={low: [top]},
        u2l={top: [low]},
        device="cpu",
        quiet=quiet,
        out=out,
    )


def gradient(method: Any, net: nn.Module | None = None, **arguments: Any) -> float:
    """The upper level's first gradient."""
    engine = program(method, net, **arguments)
    while not engine.upper.gradients:
        engine.iterate()
    return engine.upper.gradients[0]
