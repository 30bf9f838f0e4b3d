"""Two levels that can be anything, and the truth of one step by double backward."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.hypergradients import Interface
from mlseg.testing import exact, programs
from mlseg.testing.exact import Truth
from mlseg.testing.programs import Call, Graph, Level, Nets

RATE = 0.1
GRAPHS = {"method": "unrolled", "store": "graphs"}
FORWARD_OVER_REVERSE = {"method": "unrolled", "mode": "forward_over_reverse"}
HIGHER = {"method": "unrolled", "backend": "higher"}
EVOLUTION = {"method": "evolution", "directions": "orthogonal", "sigma": 1e-4}
SAMA = {"method": "sama", "linearise": "before_step", "epsilon": 1e-5}
BEFORE = {"method": "identity", "linearise": "before_step"}


def weighted(net: Call, upper: Call, batch: Any) -> Tensor:
    """The lower loss: squared errors, weighted by the upper network."""
    x, y = batch
    return ((net(x).squeeze(-1) - y) ** 2 * upper(x).squeeze(-1).sigmoid()).mean()


def half_square(nets: Nets, batch: Any) -> Tensor:
    """Of the lower level's weights, which thus are the hop's vector."""
    return sum((0.5 * (p**2).sum() for p in nets["low"].parameters()), torch.zeros(()))


LOSSES = {"low": lambda nets, batch: weighted(nets["low"], nets["top"], batch), "top": half_square}
GRAPH = Graph(LOSSES, *programs.TWO_LEVELS)


class Low(Level):
    """The lower level; a ``grad_callback`` would change what some methods do."""

    before: list[Tensor]

    def training_step(self, batch: Any) -> Any:
        if not self.replaying:
            self.before = values(self.module)
        return super().training_step(batch)


class Top(Low):
    gradient: Tensor

    def grad_callback(self) -> None:
        self.gradient = flat([p.grad for p in self.trainable_parameters()])


class Signs(Low):
    """Steps along its gradient's signs."""

    def grad_callback(self) -> None:
        for p in self.trainable_parameters():
            assert p.grad is not None
            p.grad = 0.01 * p.grad.sign()


def flat(tensors: Iterable[Any]) -> Tensor:
    return exact.flatten([t.detach() for t in tensors])


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
    low: type[Level] = Low,
    top: type[Level] = Top,
    loader: Any = None,
    upper: nn.Module | None = None,
    **config: Any,
) -> tuple[Any, Any, Engine]:
    """Two levels; ``config`` is the lower one's."""
    modules = {"low": net or mlp(), "top": upper or line()}
    made = programs.build(
        GRAPH,
        modules,
        {"low": loader or programs.batches(1), "top": programs.batches(2)},
        method,
        {"low": lambda _: optimizer(modules["low"]), "top": programs.sgd(RATE)},
        kinds={"low": low, "top": top},
        configs={"low": config},
    )
    return made.low, made.top, made


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
        vector: ``v``; by default that of :func:`half_square`.
    """
    vector = vector or [p.detach() for p in low.trainable_parameters()]

    def mean(nets: Nets, _: Any) -> Tensor:
        losses = (weighted(nets["low"], nets["top"], b) for b in batches)
        return sum(losses, torch.zeros(())) / len(batches)

    def along(nets: Nets, _: Any) -> Tensor:
        pairs = zip(nets["low"].parameters(), vector, strict=True)
        return sum(((w * v).sum() for w, v in pairs), torch.zeros(()))

    named = zip(low.module.named_parameters(), at, strict=True)
    below = {name: value for (name, p), value in named if p.requires_grad}
    above = dict(zip(dict(top.module.named_parameters()), top.before, strict=True))
    point = Truth(
        Graph({"low": mean, "top": along}, *programs.TWO_LEVELS),
        {"low": low.module, "top": top.module},
        {"low": below, "top": above},
        {"low": None, "top": None},
    )
    return flat(point.descent("top", rate).values())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    """By relative distance, in float64, whose rounding unit is 1e-16.

    1e-7 is for derivatives and solutions (to a residual of 1e-8 or better), 1e-5 for differences:
    over steps of 1e-4 and 1e-5 they err by 1e-8 times a ratio of derivatives, and by 1e-11 for each
    operation.
    """
    assert b.norm() > 1e-5, "a truth of zero proves nothing"
    return exact.distance(a, b) < tolerance


class Between(Low):
    """Reaches the upper level through one tensor, and may say so."""

    declares = False

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        z = self.top.module(x)
        if self.declares and self.is_differentiated and not self.replaying:
            self.interface = Interface(
                [z], lambda tensors: self.part(tensors, x, y), self.random_state(), None
            )
        return self.part([z], x, y)

    def part(self, tensors: Any, x: Tensor, y: Tensor) -> Tensor:
        return ((self.module(x + tensors[0]).squeeze(1) - y) ** 2).mean()


class Declared(Between):
    declares = True
