"""Multilevel programs whose levels are plain loss functions of networks and a batch.

A loss is called with the levels' real modules in training, and with other parameters in their place
for the truth (:mod:`mlseg.testing.exact`): written once, it can't differ between the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

Batch = tuple[Tensor, Tensor]
Parameters = dict[str, Tensor]
Optimizers = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
Edges = dict[str, list[str]]

FEATURES, BATCH = 3, 5


class Network:
    """A level's module as it is, or with ``values`` in its parameters' place."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
        self.module, self.values = module, values

    def __call__(self, *inputs: Any) -> Any:
        if self.values is None:
            return self.module(*inputs)
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        return functional_call(self.module, {**buffers, **self.values}, inputs)

    def evaluated(self, *inputs: Any) -> Any:
        """The same in evaluation mode."""
        self.module.eval()
        try:
            return self(*inputs)
        finally:
            self.module.train()

    def parameters(self) -> list[Tensor]:
        """Those that are trained."""
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        return [p if self.values is None else self.values.get(n, p) for n, p in named]


Call = Callable[..., Any]
Nets = Mapping[str, Network]
Loss = Callable[[Nets, Any], Tensor]


@dataclass(frozen=True)
class Graph:
    """A program.

    Attributes:
        losses: by level, lowest first; this is the order in which the levels step.
        l2u, u2l: Betty's dependencies by name.
    """

    losses: Mapping[str, Loss]
    l2u: Edges
    u2l: Edges

    def hops(self, upper: str) -> Edges:
        """For the gradient of ``upper``: the sources of each level that a path of it crosses."""
        found: dict[str, set[str]] = {}
        for path in self._paths(upper):
            for source, level in pairwise(path[:-1]):
                found.setdefault(level, set()).add(source)
        return {
            name: [s for s in self.losses if s in found[name]]
            for name in self.losses
            if name in found
        }

    def _paths(self, upper: str) -> Iterator[list[str]]:
        """Down from ``upper`` by ``u2l``, up again by ``l2u``."""
        begun = [[upper, lower] for lower in self.u2l.get(upper, [])]
        while begun:
            path = begun.pop()
            if path[-1] == upper:
                yield path
            else:
                begun += [[*path, above] for above in self.l2u.get(path[-1], [])]


class Level(Problem):
    """A level of a :class:`Graph`: its loss, and everybody's networks."""

    def __init__(self, *args: Any, rule: Loss, nets: Nets, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule, self.nets = rule, nets

    def training_step(self, batch: Any) -> Any:
        """The graph's loss."""
        return self.rule(self.nets, batch)


@dataclass(frozen=True)
class Step:
    """What a step started from: parameters, the optimizer's state, torch's random state."""

    batch: Any
    values: Parameters
    optimizer: dict[str, Any]
    random: Tensor


class Noted(Level):
    """Keeps what each of its steps started from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes: list[Step] = []

    def training_step(self, batch: Any) -> Any:
        """The loss; a step that is evaluated again is no new one."""
        if not self.replaying:
            state = copy.deepcopy(self.optimizer.state_dict())
            self.notes.append(Step(batch, parameters(self.module), state, torch.get_rng_state()))
        return super().training_step(batch)


class Recorded(Noted):
    """Keeps its gradients as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[list[Tensor]] = []

    @property
    def gradient(self) -> Tensor:
        """(N,) the last one."""
        return torch.cat([g.flatten() for g in self.gradients[-1]])

    def grad_callback(self) -> None:
        """Keep it; zero where a parameter has none."""
        given = self.trainable_parameters()
        self.gradients.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in given]
        )


def sgd(lr: float = 0.05, **settings: Any) -> Optimizers:
    """Gradient descent."""
    return lambda params: torch.optim.SGD(params, **{"lr": lr, **settings})


def build(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    loaders: Mapping[str, Any],
    method: Any = "identity",
    optimizers: Optimizers | Mapping[str, Optimizers] | None = None,
    *,
    kinds: Mapping[str, type[Level]] | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    settings: EngineSettings | None = None,
    **options: Any,
) -> Engine:
    """An engine with a level for each loss of ``graph``.

    Args:
        modules, loaders: by level.
        method: the hypergradient method of all levels.
        optimizers: of all levels or by level; by default gradient descent at a rate of 0.05.
        kinds: the levels' classes, where they aren't :class:`Recorded`.
        configs: further settings of ``Config``, by level.
        settings: the engine's.
        options: further ones of the engine.
    """
    levels: dict[str, Level] = {}
    nets = {name: Network(module) for name, module in modules.items()}
    for name, rule in graph.losses.items():
        make = optimizers if callable(optimizers) else (optimizers or {}).get(name, sgd())
        given = [p for p in modules[name].parameters() if p.requires_grad]
        config = Config(**{"hypergradient": method, **(configs or {}).get(name, {})})
        kind = (kinds or {}).get(name, Recorded)
        module, loader = modules[name], loaders[name]
        levels[name] = kind(name, module, make(given), loader, config, rule=rule, nets=nets)
    return Engine(
        list(levels.values()),
        settings or EngineSettings(iterations=10, tensorboard=False),
        u2l={levels[k]: [levels[v] for v in vs] for k, vs in graph.u2l.items()},
        l2u={levels[k]: [levels[v] for v in vs] for k, vs in graph.l2u.items()},
        **{"device": "cpu", "quiet": True, **options},
    )


def parameters(module: nn.Module) -> Parameters:
    """Copies of a module's parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# --------------------------------- small networks with all that upsets a hypergradient


class Net(nn.Module):
    """(B, 3) features to (B,) numbers, through BatchNorm, a smooth nonlinearity and dropout."""

    def __init__(self, seed: int, dropout: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(FEATURES, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(4, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.5, generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x))))).squeeze(1)


def fit(name: str, *uppers: str) -> Loss:
    """Squared error of the network ``name``, each example weighted by the networks ``uppers``."""

    def loss(nets: Nets, batch: Batch) -> Tensor:
        x, y = batch
        error = (nets[name](x) - y) ** 2
        for upper in uppers:
            error = error * functional.softplus(nets[upper](x))
        return error.mean()

    return loss


def imitate(name: str, *uppers: str) -> Loss:
    """Squared difference between ``name`` and the sum of ``uppers``, on which it thus depends."""

    def loss(nets: Nets, batch: Batch) -> Tensor:
        x, y = batch
        target = sum((nets[upper](x) for upper in uppers), start=y)
        return ((nets[name](x) - target) ** 2).mean()

    return loss


TWO_LEVELS: tuple[Edges, Edges] = ({"low": ["top"]}, {"top": ["low"]})
LONG_PATH: tuple[Edges, Edges] = ({"low": ["middle"], "middle": ["top"]}, {"top": ["low"]})
# E2EAug's: the top reaches the middle directly and through the low one.
TWO_PATHS: tuple[Edges, Edges] = (LONG_PATH[0], {"top": ["low", "middle"]})

GRAPHS = {
    "two levels": Graph({"low": fit("low", "top"), "top": fit("low")}, *TWO_LEVELS),
    "chain of three": Graph(
        {
            "low": fit("low", "middle"),
            "middle": imitate("low", "middle", "top"),
            "top": imitate("low", "middle"),
        },
        {"low": ["middle"], "middle": ["top"]},
        {"middle": ["low"], "top": ["middle"]},
    ),
    "long path": Graph(
        {"low": fit("low", "top"), "middle": imitate("middle", "low"), "top": fit("middle")},
        *LONG_PATH,
    ),
    "two paths": Graph(
        {"low": fit("low", "top"), "middle": imitate("middle", "low", "top"), "top": fit("middle")},
        *TWO_PATHS,
    ),
    # The same with two levels in the middle, four paths in all.
    "two segmentors": Graph(
        {
            "low": fit("low", "top"),
            "left": imitate("left", "low", "top"),
            "right": imitate("right", "low", "top"),
            "top": imitate("left", "right"),
        },
        {"low": ["left", "right"], "left": ["top"], "right": ["top"]},
        {"top": ["low", "left", "right"]},
    ),
}


def batches(seed: int, count: int = 7, size: int = BATCH) -> list[Batch]:
    """The same ``count`` batches of ``size`` examples for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(size, FEATURES), draw(size)) for _ in range(count)]


def small(
    graph: Graph,
    method: Any = "identity",
    optimizers: Any = None,
    dropout: float = 0.3,
    *,
    loader: Callable[[int], Any] = batches,
    unroll: Mapping[str, int] | None = None,
    **options: Any,
) -> Engine:
    """:func:`build` with a :class:`Net` per level.

    Args:
        loader: makes a level's batches from a seed.
        unroll: ``unroll_steps`` by level, where they aren't 1.
    """
    torch.manual_seed(3)
    modules = {name: Net(seed, dropout) for seed, name in enumerate(graph.losses)}
    loaders = {name: loader(seed) for seed, name in enumerate(graph.losses)}
    configs = {name: {"unroll_steps": steps} for name, steps in (unroll or {}).items()}
    return build(graph, modules, loaders, method, optimizers, configs=configs, **options)
