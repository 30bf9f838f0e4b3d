"""A level to unroll: a network with all that upsets unrolling, and its optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlseg.testing import programs
from mlseg.testing.differences import Derivative, gradient
from mlseg.testing.exact import Taken
from mlseg.testing.families import Vector
from mlseg.testing.programs import FEATURES, Call, Graph, Network, Noted, Optimizers, Recorded, sgd

WEIGHTS = 4


class Net(nn.Module):
    """BatchNorm, dropout, two layers with the same weights, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.again = nn.Linear(FEATURES, FEATURES)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(FEATURES, 1)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        hidden = torch.tanh(self.again(self.dropout(hidden)))
        return self.last(self.frozen(hidden)).squeeze(1)


class PlainNet(nn.Sequential):
    """What TorchOpt takes as well: (B, 3) to (B,), each parameter used once and trained."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1), nn.Flatten(0)
        )


def lower_loss(predict: Call, scales: Tensor, batch: Any) -> Tensor:
    """``scales`` are the logarithms of the weights of residuals, and of a learning rate."""
    x, y, group = batch
    return (scales.exp()[group] * (predict(x) - y) ** 2).mean()


def upper_loss(predict: Call, batch: Any) -> Tensor:
    x, y, _ = batch
    return ((predict(x) - y) ** 2).mean()


GRAPH = Graph(
    {
        "low": lambda nets, batch: lower_loss(nets["low"], nets["top"](), batch),
        "top": lambda nets, batch: upper_loss(nets["low"].evaluated, batch),
    },
    *programs.TWO_LEVELS,
)


class WithRate(Noted):
    def learning_rates(self) -> list[Tensor]:
        return [0.05 * self.top.module.value[-1].exp() for _ in self.optimizer.param_groups]


def batches(seed: int, count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group = torch.arange(8) % WEIGHTS
    return [(draw(8, FEATURES), 2.0 * draw(8), group) for _ in range(count)]


def program(
    method: Any,
    optimizer: Optimizers,
    unroll: int = 3,
    with_rate: bool = False,
    plain: bool = False,
    device: str = "cpu",
    **config: Any,
) -> Any:
    torch.manual_seed(4)
    net = PlainNet() if plain else Net()
    draw = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return programs.build(
        GRAPH,
        {"low": net, "top": Vector(0.3 * draw)},
        {"low": batches(0, 5), "top": batches(1, 3)},
        method,
        {"low": optimizer, "top": sgd(0.01)},
        kinds={"low": WithRate if with_rate else Noted, "top": Recorded},
        configs={"low": {"unroll_steps": unroll, **config}, "top": {"hypergradient": "identity"}},
        device=device,
    )


def reference(engine: Any, steps: int, accumulate: int = 1, clip: float = 0.0) -> Tensor:
    """Through the last ``steps`` steps, at the values that the top level had before its own."""
    taken = Taken(GRAPH, {"low": engine.low, "top": engine.top}, "top")
    return taken.unrolled(steps, accumulate, clip)["value"]


def by_difference(engine: Any, make: Callable[[Any], Any]) -> Derivative:
    """The outer loss's slope over whole first windows, taken anew, by differences.

    At the buffers and on the batch of ``engine``: a hypergradient doesn't count how BatchNorm's
    running statistics came about.
    """

    def loss(shift: Tensor) -> Tensor:
        again = make({"method": "identity"})
        with torch.no_grad():
            again.top.module.value += shift
        run(again, 1)
        low = Network(engine.low.module, programs.parameters(again.low.module))
        return upper_loss(low.evaluated, engine.top.cur_batch)

    return gradient(loss, torch.zeros(WEIGHTS), 1e-3)


def run(engine: Any, uppers: int) -> Tensor:
    """The ``uppers``-th gradient of the top level."""
    torch.manual_seed(uppers)  # programs that are compared see the same draws
    while len(engine.top.gradients) < uppers:
        engine.iterate()
    return engine.top.gradient


EPS = 1e-3
"""Of the optimizers that divide by a gradient's size.

A bias before BatchNorm has a gradient of nothing but rounding, some u = 1e-16 of the terms that
cancel in it, and what comes of ``g / (|g| + eps)`` then differs from one processor's kernels to
another's by ``u / eps``: 1e-6 at Adagrad's default of 1e-10, 1e-8 at Adam's, and a difference over
a step of 1e-5 sees that 1e5 times larger. At 1e-3 it is 1e-13."""

OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd(weight_decay=1e-2),
    "sgd momentum": sgd(momentum=0.9),
    "sgd nesterov": sgd(momentum=0.9, nesterov=True),
    "sgd dampening": sgd(momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.9), eps=EPS, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, eps=EPS, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05, eps=EPS, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, eps=EPS),
}
NOT_BY_TORCH: dict[str, Optimizers] = {
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.05, (0.5, 0.2), EPS, amsgrad=True),
    "rmsprop centred": lambda p: torch.optim.RMSprop(p, 0.05, 0.9, EPS, centered=True),
}
