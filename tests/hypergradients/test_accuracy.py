"""One-step methods, over every hop of every shape of graph, against full double backward."""

from collections.abc import Sequence
from typing import Any

import betty.configs
import betty.engine
import betty.problems
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs, updates
from mlseg.testing.exact import Taken, distance
from mlseg.testing.programs import GRAPHS, Graph, Recorded

EXPECTED = {"identity": 1e-9, "finite_difference": 1e-5}
"""Relative error in float64: of some hundred operations with a rounding unit of 1e-16; the finite
difference's is epsilon^2 = 1e-8 times a third derivative over a first, and rounding over epsilon,
1e-12 for each operation."""
STEP: dict[str, dict[str, Any]] = {"identity": {}, "finite_difference": {"epsilon": 1e-4}}
UPPERS = [(graph, upper) for graph, made in GRAPHS.items() for upper in made.u2l]


def levels_after(engine: Any, iterations: int) -> dict[str, Recorded]:
    for _ in range(iterations):
        engine.iterate()
    return {level.name: level for level in engine.problems}


@pytest.mark.parametrize("point", ["before", "after"])
@pytest.mark.parametrize("method", EXPECTED)
@pytest.mark.parametrize(("graph", "upper"), UPPERS)
def test_one_step_of_descent(graph: str, upper: str, method: str, point: str) -> None:
    spec = {"method": method, "linearise": f"{point}_step", **STEP[method]}
    engine = programs.small(GRAPHS[graph], spec)
    levels = levels_after(engine, 2)
    true = Taken(GRAPHS[graph], levels, upper).one_step(point)
    assert distance(levels[upper].gradient, true) < EXPECTED[method]


@pytest.mark.parametrize(("graph", "upper"), UPPERS)
def test_the_truth_is_not_the_direct_gradient(graph: str, upper: str) -> None:
    """The hypergradient is a part of the gradient that the tests above could not overlook."""
    levels = levels_after(programs.small(GRAPHS[graph]), 2)
    direct = Taken(Graph(GRAPHS[graph].losses, {}, {}), levels, upper).one_step()
    assert distance(direct, Taken(GRAPHS[graph], levels, upper).one_step()) > 1e-3


# ------------------------------------------------------------------------ optimizers' scale


OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rmsprop": (updates.rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 1e-3}),
    "rmsprop centred": (updates.rmsprop, torch.optim.RMSprop, {"centered": True}),
    "adam": (updates.adam, torch.optim.Adam, {"betas": (0.5, 0.999), "weight_decay": 1e-3}),
    "adam amsgrad": (updates.adam, torch.optim.Adam, {"betas": (0.5, 0.2), "amsgrad": True}),
    "adamw": (updates.adam, torch.optim.AdamW, {"weight_decay": 1e-2}),
    "adagrad": (updates.adagrad, torch.optim.Adagrad, {"lr_decay": 0.1}),
    "sgd momentum": (updates.sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
    "sgd nesterov": (updates.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd dampening": (updates.sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.4}),
    "sgd ascent": (updates.sgd, torch.optim.SGD, {"maximize": True}),
}


@pytest.mark.parametrize(
    ("name", "steps"),
    # SGD doesn't dampen its first step, and its state doesn't tell which was the first.
    [(n, steps) for n in OPTIMIZERS for steps in (1, 3) if (n, steps) != ("sgd dampening", 1)],
)
def test_the_optimizers_own_step(name: str, steps: int) -> None:
    """``scale: optimizer`` is double backward through its update, second moments held fixed."""
    update, cls, settings = OPTIMIZERS[name]
    spec = {"method": "identity", "linearise": "before_step", "scale": "optimizer"}
    engine = programs.small(
        GRAPHS["two paths"],
        spec,
        lambda params: cls(params, lr=0.02, **settings),
    )
    levels = levels_after(engine, steps)
    true = Taken(GRAPHS["two paths"], levels, "top").one_step(update=update)
    assert distance(levels["top"].gradient, true) < 1e-9


def test_each_parameter_group_has_its_own_rate() -> None:
    def two_groups(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        half = len(params) // 2
        groups: list[dict[str, Any]] = [
            {"params": params[:half]},
            {"params": params[half:], "lr": 0.2},
        ]
        return torch.optim.SGD(groups, 0.01)

    def update(optimizer: Any, before: dict[str, Any], i: int, p: Tensor, g: Tensor) -> Tensor:
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        return p - optimizer.param_groups[int(i >= sizes[0])]["lr"] * g

    spec = {"method": "identity", "linearise": "before_step"}
    graph = GRAPHS["two paths"]
    engine = programs.small(graph, spec, two_groups)
    levels = levels_after(engine, 2)
    assert (
        distance(levels["top"].gradient, Taken(graph, levels, "top").one_step(update=update)) < 1e-9
    )


def test_an_unknown_optimizer_is_named() -> None:
    spec = {"method": "identity", "scale": "optimizer"}
    with pytest.raises(UserError, match="not Adadelta; set the hypergradient's scale to"):
        programs.small(GRAPHS["two levels"], spec, lambda p: torch.optim.Adadelta(p))


def test_without_scale_a_hop_lacks_the_learning_rate() -> None:
    """Path by path: one factor 1/eta for each level that the path crosses."""
    gradients = {}
    for scale in ("none", "learning_rate"):
        spec = {"method": "identity", "scale": scale}
        engine = programs.small(GRAPHS["long path"], spec)
        levels = levels_after(engine, 1)
        gradients[scale] = levels["top"].gradient
    rate = 0.05
    scaled = rate**2 * gradients["none"]
    assert distance(scaled, gradients["learning_rate"]) < 1e-9


# ------------------------------------------------------------------------- Betty's convention


class Weight(nn.Module):
    """One weight per feature, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w


class PlainLow(betty.problems.ImplicitProblem):
    """Ridge regression with a penalty per feature; nothing random, no buffers: all darts allows."""

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        penalty = (functional.softplus(self.top()) * self.module() ** 2).sum()
        return ((x @ self.module() - y) ** 2).mean() + penalty


class PlainTop(betty.problems.ImplicitProblem):
    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return functional.mse_loss(x @ self.low(), y)

    def grad_callback(self) -> None:
        self.gradient = [p.grad.clone() for p in self.trainable_parameters()]


def _betty_gradient(method: str, **settings: Any) -> list[Tensor]:
    """The first outer gradient, from plain Betty's problems and engine."""
    made: dict[str, Any] = {}
    for seed, (name, cls) in enumerate({"low": PlainLow, "top": PlainTop}.items()):
        module = Weight(seed)
        config = betty.configs.Config(type=method, **settings)
        made[name] = cls(
            name,
            config,
            module,
            torch.optim.SGD(module.parameters(), 0.1),
            train_data_loader=programs.batches(seed),
        )
    low, top = made.values()
    dependencies = {"u2l": {top: [low]}, "l2u": {low: [top]}}
    config = betty.configs.EngineConfig(train_iters=1, strategy="cpu")
    betty.engine.Engine([low, top], config, dependencies).run()
    return made["top"].gradient


@pytest.mark.parametrize("method", EXPECTED)
def test_scale_none_is_bettys_darts(method: str) -> None:
    class Low(PlainLow, Problem):
        pass

    class Top(PlainTop, Problem):
        pass

    spec = {"method": method, "scale": "none"}
    low, top = (
        cls(name, module, torch.optim.SGD(module.parameters(), 0.1), programs.batches(seed), config)
        for seed, (name, cls, module, config) in enumerate(
            [
                ("low", Low, Weight(0), Config(hypergradient=spec)),
                ("top", Top, Weight(1), Config()),
            ]
        )
    )
    engine = Engine(
        [low, top], EngineSettings(), u2l={top: [low]}, l2u={low: [top]}, device="cpu", quiet=True
    )
    engine.iterate()
    assert distance(top.gradient, _betty_gradient("darts", darts_alpha=1e-4)) < 1e-6
