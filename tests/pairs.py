"""Two levels whose one-step hypergradient is at hand in plain functions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import toys
from torch import Tensor, nn
from torch.func import functional_call

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

RATE = 0.1
GRAPHS = {"method": "unrolled", "store": "graphs"}
FORWARD_OVER_REVERSE = {"method": "unrolled", "mode": "forward_over_reverse"}
HIGHER = {"method": "unrolled", "backend": "higher"}
EVOLUTION = {"method": "evolution", "directions": "orthogonal", "sigma": 1e-4}
SAMA = {"method": "sama", "linearise": "before_step", "epsilon": 1e-5}
BEFORE = {"method": "identity", "linearise": "before_step"}


def weighted(net: toys.Call, upper: toys.Call, batch: Any) -> Tensor:
    """The lower loss: squared errors, weighted by the upper network."""
    x, y = batch
    return ((net(x).squeeze(-1) - y) ** 2 * upper(x).squeeze(-1).sigmoid()).mean()


class Low(Problem):
    before: list[Tensor]

    def training_step(self, batch: Any) -> Tensor:
        if not self.replaying:
            self.before = values(self.module)
        return weighted(self.module, self.top.module, batch)


class Top(Problem):
    """Half of the squared norm of the lower level's weights, which thus are the hop's vector."""

    before: list[Tensor]
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        self.before = values(self.module)
        return sum((0.5 * (p**2).sum() for p in self.low.trainable_parameters()), torch.zeros(()))

    def grad_callback(self) -> None:
        self.gradient = flat([p.grad for p in self.trainable_parameters()])


class Signs(Low):
    """Steps along its gradient's signs."""

    def grad_callback(self) -> None:
        for p in self.trainable_parameters():
            p.grad = 0.01 * p.grad.sign()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def line() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 1).double()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), RATE)


def pair(
    method: Any,
    net: nn.Module | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    low: type[Problem] = Low,
    top: type[Problem] = Top,
    loader: Any = None,
    upper: nn.Module | None = None,
    **config: Any,
) -> tuple[Any, Any, Engine]:
    """Two levels; ``config`` is the lower one's."""
    net, upper = net or mlp(), upper or line()
    made = Config(hypergradient=method, **config)
    lower = low("low", net, optimizer(net), loader or toys.batches(1), made)
    higher = top("top", upper, sgd(upper), toys.batches(2))
    return lower, higher, engine([lower], higher)


def engine(lowers: list[Any], top: Any) -> Engine:
    return Engine(
        [*lowers, top],
        EngineSettings(tensorboard=False),
        u2l={top: lowers},
        l2u={low: [top] for low in lowers},
        device="cpu",
        quiet=True,
    )


def one_step(
    low: Any,
    top: Any,
    at: list[Tensor],
    batches: Sequence[Any],
    rate: float = RATE,
    vector: list[Tensor] | None = None,
) -> Tensor:
    """The truth: ``-rate (d2l / ds dw)^T v`` by double backward through plain functions.

    Args:
        at: the lower level's weights where its loss is differentiated.
        batches: over which its loss is the mean.
        vector: ``v``; by default that of :class:`Top`.
    """

    def call(module: nn.Module, tensors: list[Tensor]) -> toys.Call:
        given = dict(zip(dict(module.named_parameters()), tensors, strict=True))
        given |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        return lambda x: functional_call(module, given, (x,))

    trainable = [p.requires_grad for p in low.module.parameters()]
    w = [v.clone().requires_grad_(yes) for v, yes in zip(at, trainable, strict=True)]
    s = [v.clone().requires_grad_() for v in top.before]
    loss = sum(weighted(call(low.module, w), call(top.module, s), b) for b in batches)
    chosen = [p for p in w if p.requires_grad]
    gradient = torch.autograd.grad(loss / len(batches), chosen, create_graph=True)
    vector = vector or [p.detach() for p in low.trainable_parameters()]
    product = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
    return -rate * flat(torch.autograd.grad(product, s))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    """By relative distance, in float64, whose rounding unit is 1e-16.

    1e-7 is for derivatives and solutions (to a residual of 1e-8 or better), 1e-5 for differences:
    over steps of 1e-4 and 1e-5 they err by 1e-8 times a ratio of derivatives, and by 1e-11 for each
    operation.
    """
    assert b.norm() > 1e-5, "a truth of zero proves nothing"
    return toys.distance([a], [b]) < tolerance
