"""Small multilevel programs with every ingredient that upsets a hypergradient, and their truth.

A program is a set of levels, each a small network in float64 with dropout and BatchNorm, whose loss
is a plain function of all networks and a batch: the problems call it with the real modules, the
oracle with ``torch.func.functional_call`` and the parameters of its own one-step updates.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import updates
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

Batch = tuple[Tensor, Tensor]
Call = Callable[[Tensor], Tensor]
Loss = Callable[[Mapping[str, Call], Batch], Tensor]
Parameters = dict[str, Tensor]

FEATURES = 3
BATCH = 5


class Net(nn.Module):
    """(B, 3) features to (B,) numbers, through BatchNorm, a smooth nonlinearity and dropout."""

    def __init__(self, seed: int, dropout: float) -> None:
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

    def loss(nets: Mapping[str, Call], batch: Batch) -> Tensor:
        x, y = batch
        error = (nets[name](x) - y) ** 2
        for upper in uppers:
            error = error * functional.softplus(nets[upper](x))
        return error.mean()

    return loss


def imitate(name: str, *uppers: str) -> Loss:
    """Squared difference between ``name`` and the sum of ``uppers``, on which it thus depends."""

    def loss(nets: Mapping[str, Call], batch: Batch) -> Tensor:
        x, y = batch
        target = sum((nets[upper](x) for upper in uppers), start=y)
        return ((nets[name](x) - target) ** 2).mean()

    return loss


@dataclass(frozen=True)
class Graph:
    """A program.

    Attributes:
        losses: by level, lowest first; this is the order in which the levels step.
        l2u, u2l: Betty's dependencies by name.
        hops: for the gradient of ``upper``, the sources of each level that it passes.
    """

    losses: dict[str, Loss]
    l2u: dict[str, list[str]]
    u2l: dict[str, list[str]]
    hops: dict[str, dict[str, list[str]]]


GRAPHS = {
    "two levels": Graph(
        {"low": fit("low", "top"), "top": fit("low")},
        {"low": ["top"]},
        {"top": ["low"]},
        {"top": {"low": ["top"]}},
    ),
    "chain of three": Graph(
        {
            "low": fit("low", "middle"),
            "middle": imitate("low", "middle", "top"),
            "top": imitate("low", "middle"),
        },
        {"low": ["middle"], "middle": ["top"]},
        {"middle": ["low"], "top": ["middle"]},
        {"middle": {"low": ["middle"]}, "top": {"middle": ["top"]}},
    ),
    "long path": Graph(
        {"low": fit("low", "top"), "middle": imitate("middle", "low"), "top": fit("middle")},
        {"low": ["middle"], "middle": ["top"]},
        {"top": ["low"]},
        {"top": {"middle": ["low"], "low": ["top"]}},
    ),
    # E2EAug's: the top reaches the middle directly and through the low one.
    "two paths": Graph(
        {
            "low": fit("low", "top"),
            "middle": imitate("middle", "low", "top"),
            "top": fit("middle"),
        },
        {"low": ["middle"], "middle": ["top"]},
        {"top": ["low", "middle"]},
        {"top": {"middle": ["low", "top"], "low": ["top"]}},
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
        {"top": {"left": ["low", "top"], "right": ["low", "top"], "low": ["top"]}},
    ),
}


class Level(Problem):
    """A level of a :class:`Graph`; keeps what the oracle needs of its last step."""

    rule: Loss
    nets: dict[str, Call]
    random_state_seen: Tensor
    before: Parameters
    gradient: list[Tensor]
    optimizer_before: dict[str, Any]

    def training_step(self, batch: Batch) -> Tensor:
        if not self.replaying:
            self.random_state_seen = torch.get_rng_state()
            self.before = parameters(self.module)
            self.optimizer_before = copy.deepcopy(self.optimizer.state_dict())
        return self.rule(self.nets, batch)

    def grad_callback(self) -> None:
        self.gradient = [p.grad.clone() for p in self.trainable_parameters()]


def parameters(module: nn.Module) -> Parameters:
    """Copies of a module's parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def batches(seed: int, count: int = 7) -> list[Batch]:
    """The same ``count`` batches for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(BATCH, FEATURES), draw(BATCH)) for _ in range(count)]


Optimizers = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def sgd(lr: float = 0.05) -> Optimizers:
    """Plain gradient descent."""
    return lambda params: torch.optim.SGD(params, lr)


def program(
    graph: Graph,
    hypergradient: str | Mapping[str, Any] = "identity",
    optimizer: Optimizers | None = None,
    dropout: float = 0.3,
    *,
    settings: EngineSettings | None = None,
    loader: Callable[[int], Any] = batches,
    unroll: Mapping[str, int] | None = None,
    **options: Any,
) -> Engine:
    """An engine with one :class:`Level` per level of ``graph``, all with the same method.

    Args:
        loader: makes a level's batches from a seed.
        unroll: ``unroll_steps`` by level, where they aren't 1.
        options: further ones of the engine.
    """
    torch.manual_seed(3)
    levels: dict[str, Level] = {}
    for seed, (name, rule) in enumerate(graph.losses.items()):
        module = Net(seed, dropout)
        made = (optimizer or sgd())(list(module.parameters()))
        config = Config(hypergradient=hypergradient, unroll_steps=(unroll or {}).get(name, 1))
        levels[name] = Level(name, module, made, loader(seed), config)
        levels[name].rule = rule
    for level in levels.values():
        level.nets = {name: other.module for name, other in levels.items()}
    return Engine(
        list(levels.values()),
        settings or EngineSettings(iterations=10, tensorboard=False),
        u2l={levels[k]: [levels[v] for v in vs] for k, vs in graph.u2l.items()},
        l2u={levels[k]: [levels[v] for v in vs] for k, vs in graph.l2u.items()},
        device="cpu",
        quiet=True,
        **options,
    )


# ---------------------------------------------------------------------------- the truth


@dataclass
class Oracle:
    """Full double backward through the one-step updates of every level below ``upper``.

    Args:
        levels: as they are after one iteration of the engine.
        point: where the lower losses' gradients are differentiated, "before" or "after" the step.
        update: of all levels.
    """

    graph: Graph
    levels: Mapping[str, Level]
    point: str = "before"
    update: updates.Update = updates.sgd
    upper: str = ""
    updated: dict[str, Parameters] = field(default_factory=dict)

    def __call__(self, upper: str) -> list[Tensor]:
        """The gradient of ``upper``'s loss by its parameters, direct and through its lowers."""
        hops = self.graph.hops[upper]
        # The step of ``upper`` came last: its loss and its lowers' saw it as it was before.
        top = {n: p.clone().requires_grad_() for n, p in self.levels[upper].before.items()}
        self.upper = upper
        self.updated = {}
        for name in self.graph.losses:
            if name in hops:
                self.updated[name] = self._step(name, hops[name], upper, top)
        nets = {upper: top, **{n: self.updated[n] for n in hops if self._is_first(n, upper)}}
        loss = self._evaluate(upper, nets)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in top.values()]
        grads = torch.autograd.grad(loss, list(top.values()), allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, top.values(), strict=True)
        ]

    def _is_first(self, name: str, upper: str) -> bool:
        """Whether a path of ``upper`` starts with ``name``."""
        return upper in self.graph.l2u.get(name, [])

    def _step(self, name: str, sources: Sequence[str], upper: str, top: Parameters) -> Parameters:
        """The level after its step as a function of ``sources``; equal to what it really is."""
        level = self.levels[name]
        present = parameters(level.module)
        place = level.before if self.point == "before" else present
        point = {n: p.clone().requires_grad_() for n, p in place.items()}
        others = {s: top if s == upper else self.updated[s] for s in sources}
        if upper not in others:
            others[upper] = {n: p.detach() for n, p in top.items()}
        loss = self._evaluate(name, {**others, name: point})
        grads = torch.autograd.grad(loss, list(point.values()), create_graph=True)
        result = {}
        for index, (key, g) in enumerate(zip(point, grads, strict=True)):
            # What was stepped along, whatever hypergradient it had in it.
            used = g + (level.gradient[index] - g).detach()
            after = self.update(
                level.optimizer, level.optimizer_before, index, level.before[key], used
            )
            assert torch.allclose(after, present[key], rtol=1e-12, atol=1e-14), (name, key)
            result[key] = after
        return result

    def _evaluate(self, name: str, connected: Mapping[str, Parameters]) -> Tensor:
        """The level's loss on its last batch and random draw, with other parameters."""
        level = self.levels[name]
        order = list(self.graph.losses)

        def call(other: str) -> Call:
            module = self.levels[other].module
            # What lies above ``upper`` had not stepped yet.
            later = order.index(other) > order.index(self.upper)
            given = connected.get(other) or (
                self.levels[other].before if later else parameters(module)
            )
            buffers = {n: b.clone() for n, b in module.named_buffers()}
            return lambda x: functional_call(module, {**given, **buffers}, (x,))

        present = torch.get_rng_state()
        torch.set_rng_state(level.random_state_seen)
        try:
            return level.rule({other: call(other) for other in self.levels}, level.cur_batch)
        finally:
            torch.set_rng_state(present)


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of ``b``."""
    difference = torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])
    return float(difference.norm() / torch.cat([y.flatten() for y in b]).norm())
