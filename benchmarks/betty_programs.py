"""Programs written for Betty, on Betty's engine and on ours: do they come to the same numbers?

    python benchmarks/betty_programs.py            # all of them
    python benchmarks/betty_programs.py maml nas   # some

They are what Betty's own tests cover and its examples and tutorials do, written anew at toy size
from their description, on drawn data, in float64. Each is run three times: on Betty's engine, on
ours as it is, and on ours with its levels derived from ``mlseg.Problem``. Needs nothing beside
``betty-ml``. Prints a number of each run, the largest difference between all that they left behind
(weights, rates, counts, validations), and exits with 1 where it is more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import betty.engine
import torch
from betty.configs import Config, EngineConfig
from betty.envs import Env
from betty.logging.logger_base import get_logger
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from mlseg import Engine, Problem

TOLERANCE = 1e-8
"""Relative. A unit of rounding, 1e-16, over the finite differences' step of 1e-2, times the steps
of a program, which are fewer than 1e4, and its curvature; what differs in deed differs by 1e-4."""

Outcome = dict[str, Tensor]
"""What a run left behind, by name."""


@dataclass(frozen=True)
class On:
    """What a program is built of: the class of its levels and that of its engine."""

    base: type
    engine: type


ON = {
    "Betty": On(ImplicitProblem, betty.engine.Engine),
    "ours": On(ImplicitProblem, Engine),
    "ours, mlseg.Problem": On(Problem, Engine),
}

PROGRAMS: dict[str, Callable[[On], Outcome]] = {}


def program(function: Callable[[On], Outcome]) -> Callable[[On], Outcome]:
    """Enter a program under its function's name."""
    PROGRAMS[function.__name__] = function
    return function


# ------------------------------------------------------------------------------------- parts


def draw(count: int, features: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Points and their class, 0 or 1, by a hyperplane."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(features, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, features, generator=generator)
    y = x @ plane + noise * torch.randn(count, generator=generator) > 0
    return x, y.long()


def batches(count: int, size: int, features: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = draw(count, features, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


class Vector(nn.Module):
    """A vector of parameters."""

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), value))

    def forward(self) -> Tensor:
        return self.w


def network(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def built(on: On, problems: list[Any], config: Any, u2l: Any, l2u: Any, **more: Any) -> Any:
    """The engine; ``more`` are methods of an engine of the program's own, and ``env``."""
    env = more.pop("env", None)
    own = type("Own", (on.engine,), more) if more else on.engine
    options: dict[str, Any] = {} if on.engine is betty.engine.Engine else {"quiet": True}
    dependencies = {"u2l": u2l, "l2u": l2u}
    return own(problems=problems, config=config, dependencies=dependencies, env=env, **options)


def left(engine: Any) -> Outcome:
    """What a run left behind in its problems."""
    outcome: Outcome = {"steps": torch.tensor(float(engine.global_step))}
    for problem in engine.problems:
        for name, value in problem.module.named_parameters():
            outcome[f"{problem.name}/{name}"] = value.detach().clone()
        rate = problem.optimizer.param_groups[0]["lr"]
        outcome[f"{problem.name}/rate"] = torch.tensor(float(rate))
        outcome[f"{problem.name}/count"] = torch.tensor(float(problem.count))
    return outcome


# --------------------------------------------------------------------------- Betty's own tests


def penalised_regression(on: On, iterations: int, unroll: int, **config: Any) -> Any:
    """Logistic regression from zero, the penalty of each coefficient learned on other data."""

    class Outer(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.binary_cross_entropy_with_logits(x @ self.inner(), y.to(x))

        def param_callback(self) -> None:
            for p in self.trainable_parameters():
                p.data.clamp_(min=1e-8)

    class Inner(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            (x, y), w = batch, self.module()
            loss = functional.binary_cross_entropy_with_logits(x @ w, y.to(x))
            return loss + 0.5 * (w * self.outer() * w).sum()

        def on_inner_loop_start(self) -> None:
            self.module.w.data.zero_()

    below, above = Vector(20, 0.0), Vector(20, 1.0)
    outer = Outer(
        name="outer",
        module=above,
        optimizer=SGD(above.parameters(), lr=1.0, momentum=0.9),
        train_data_loader=[draw(100, 20, seed=2)],
        config=Config(),
    )
    inner = Inner(
        name="inner",
        module=below,
        optimizer=SGD(below.parameters(), lr=0.1),
        train_data_loader=[draw(100, 20, seed=1)],
        config=Config(unroll_steps=unroll, **config),
    )
    settings = EngineConfig(train_iters=iterations)
    return built(on, [outer, inner], settings, {outer: [inner]}, {inner: [outer]})


@program
def graph(on: On) -> Outcome:
    """Paths, leaves, parents, children, attributes, and who steps when."""
    engine = penalised_regression(on, 20, 10)
    outer, inner = engine.problems
    ((first, second, third),) = outer.paths
    facts = [first is outer, second is inner, third is outer, inner.leaf, not outer.leaf]
    facts += [engine.inner is inner, engine.outer is outer, inner.outer is outer]
    facts += [outer.inner is inner, inner.parents == [outer], outer.children == [inner]]
    counts = []
    for _ in range(10):
        counts += [inner.count, outer.count]
        engine.train_step()
    counts += [inner.count, outer.count]
    outcome = {"facts": torch.tensor(facts), "counts": torch.tensor(counts)}
    # Before there is any graph, a problem takes its relatives by hand.
    engine.set_dependency({"u2l": {}, "l2u": {}})
    outer.add_child(inner)
    inner.add_parent(outer)
    relatives = [outer.children == [inner], inner.parents == [outer]]
    return outcome | {"relatives": torch.tensor(relatives)}


@program
def regression_darts(on: On) -> Outcome:
    """Hyperparameters of a logistic regression, by finite differences."""
    engine = penalised_regression(on, 200, 20)
    engine.run()
    return left(engine)


@program
def regression_cg(on: On) -> Outcome:
    """The same by conjugate gradients."""
    engine = penalised_regression(on, 200, 20, type="cg", cg_iterations=3, cg_alpha=0.1)
    engine.run()
    return left(engine)


@program
def regression_neumann(on: On) -> Outcome:
    """The same by a Neumann series."""
    engine = penalised_regression(on, 200, 20, type="neumann", neumann_iterations=5)
    engine.run()
    return left(engine)


# ------------------------------------------------------------------------------ data reweighting


def reweighting(
    on: On, below: Config, above: Config, optimizer: Any = None, **settings: Any
) -> tuple[Any, list[float]]:
    """A classifier, a net that weighs its examples by their loss, and a validation."""

    class Reweight(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            logits = self.classifier(x)
            accuracy = (logits.argmax(1) == y).double().mean().item()
            return {"loss": functional.cross_entropy(logits, y), "accuracy": accuracy}

    class Classifier(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            loss = functional.cross_entropy(self.module(x), y, reduction="none").unsqueeze(1)
            return (self.reweight(loss.detach()).sigmoid() * loss).mean()

    seen: list[float] = []
    x, y = draw(50, 5, seed=3)

    @torch.no_grad()
    def validation(self: Any) -> dict[str, float]:
        if not hasattr(self, "best"):
            self.best = -1.0
        accuracy = (self.classifier(x).argmax(1) == y).double().mean().item()
        self.best = max(self.best, accuracy)
        seen.extend([self.global_step, accuracy, self.best])
        return {"accuracy": accuracy, "best": self.best}

    net, small = network(5, 6, 2), network(1, 4, 1)
    net_optimizer = (optimizer or (lambda p: SGD(p, lr=0.1, momentum=0.9)))(net.parameters())
    reweight = Reweight(
        name="reweight",
        module=small,
        optimizer=Adam(small.parameters(), lr=1e-2),
        train_data_loader=batches(24, 8, 5, seed=2),
        config=above,
    )
    classifier = Classifier(
        name="classifier",
        module=net,
        optimizer=net_optimizer,
        scheduler=MultiStepLR(net_optimizer, milestones=[15, 25], gamma=0.1),
        train_data_loader=batches(40, 8, 5, seed=1),
        config=below,
    )
    config = EngineConfig(**{"train_iters": 40, "valid_step": 15, **settings})
    levels = [reweight, classifier]
    edges = {reweight: [classifier]}, {classifier: [reweight]}
    return built(on, levels, config, *edges, validation=validation), seen


@program
def learning_to_reweight(on: On) -> Outcome:
    """With a schedule, momentum, and a validation that keeps its best in ``self.best``."""
    engine, seen = reweighting(on, Config(), Config())
    engine.run()
    return left(engine) | {"validations": torch.tensor(seen)}


@program
def reweighting_twice(on: On) -> Outcome:
    """The same, run again for another number of iterations."""
    engine, seen = reweighting(on, Config(), Config())
    engine.run()
    engine.train_iters, engine.valid_step = 7, 3
    engine.run()
    return left(engine) | {"validations": torch.tensor(seen)}


@program
def reweighting_in_little_memory(on: On) -> Outcome:
    """Gradients of several batches added up, clipped; schedules go by batches."""
    below = Config(gradient_accumulation=4, unroll_steps=2, gradient_clipping=0.1)
    engine, _ = reweighting(on, below, Config(gradient_accumulation=2, warmup_steps=1))
    engine.run()
    return left(engine)


@program
def reweighting_by_sama(on: On) -> Outcome:
    """Adam below, and SAMA, which wants to know its last gradient."""
    config = Config(type="sama", sama_adam_alpha=0.1)
    engine, _ = reweighting(on, config, Config(), lambda p: Adam(p, lr=1e-2))
    engine.run()
    return left(engine)


@program
def reweighting_with_records(on: On) -> Outcome:
    """Logged to TensorBoard, in a folder of its own."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            engine, _ = reweighting(on, Config(), Config(), logger_type="tensorboard")
            engine.run()
            engine.logger.close()
            files = [name for _, _, names in os.walk("betty_tensorboard") for name in names]
        finally:
            os.chdir(here)
    return left(engine) | {"event files": torch.tensor(float(len(files)))}


# ------------------------------------------------------------------------- architecture search


class Mixed(nn.Module):
    """Two layers of three operations each, mixed by an architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        for layer, alpha in zip(self.layers, alphas.view(2, 3).softmax(1), strict=True):
            x = alpha[0] * x + alpha[1] * layer(x).tanh() + alpha[2] * layer(x).relu()
        return self.last(x)


@program
def nas(on: On) -> Outcome:
    """DARTS: weights below, architecture above; Adam with weight decay, cosine rate, clipping."""

    class Architecture(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.weights(x, self.module()), y)

        def configure_train_data_loader(self) -> Any:
            return batches(24, 8, 4, seed=2)

        def configure_module(self) -> nn.Module:
            return Vector(6, 1e-3)

        def configure_optimizer(self) -> Any:
            return Adam(self.module.parameters(), 3e-2, betas=(0.5, 0.999), weight_decay=1e-3)

    class Weights(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.module(x, self.architecture()), y)

        def configure_train_data_loader(self) -> Any:
            return batches(24, 8, 4, seed=1)

        def configure_module(self) -> nn.Module:
            return Mixed()

        def configure_optimizer(self) -> Any:
            return SGD(self.module.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)

        def configure_scheduler(self) -> Any:
            return CosineAnnealingLR(self.optimizer, 40, eta_min=1e-3)

    architecture = Architecture(name="architecture", config=Config(retain_graph=True))
    weights = Weights(name="weights", config=Config(gradient_clipping=0.5))
    edges = {architecture: [weights]}, {weights: [architecture]}
    engine = built(on, [architecture, weights], EngineConfig(train_iters=40), *edges)
    engine.run()
    return left(engine)


@program
def saliency_nas(on: On) -> Outcome:
    """Three levels, two paths, warm starts: a second net is trained where the first is attacked."""

    class Outer(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            (x, y), alphas = batch, self.module()
            first = functional.cross_entropy(self.inner1(x, alphas), y)
            return first + functional.cross_entropy(self.inner2(x, alphas), y)

    class Inner2(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            (x, y), alphas = batch, self.outer()
            generator = torch.Generator().manual_seed(self.count)
            attacked = x + 0.01 * torch.randn(x.shape, generator=generator)
            for _ in range(3):
                attacked = attacked.detach().requires_grad_()
                loss = functional.cross_entropy(self.inner1(attacked, alphas), y)
                (slope,) = torch.autograd.grad(loss, [attacked])
                attacked = attacked.detach() + 0.02 * slope.sign()
            saliency = x * (attacked - x).clamp(-0.03, 0.03) * 30.0
            first = functional.cross_entropy(self.inner1(saliency, alphas), y)
            return first + functional.cross_entropy(self.module(saliency, alphas), y)

    class Inner1(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.module(x, self.outer()), y)

    def level(kind: Any, name: str, module: nn.Module, optimizer: Any, seed: int) -> Any:
        return kind(
            name=name,
            module=module,
            optimizer=optimizer(module.parameters()),
            train_data_loader=batches(24, 8, 4, seed=seed),
            config=Config(retain_graph=True),
        )

    outer = level(Outer, "outer", Vector(6, 1e-3), lambda p: Adam(p, 3e-2), 2)
    inner2 = level(Inner2, "inner2", Mixed(), lambda p: SGD(p, 0.1, momentum=0.9), 1)
    inner1 = level(Inner1, "inner1", Mixed(), lambda p: SGD(p, 0.1, momentum=0.9), 1)
    edges = {outer: [inner2, inner1]}, {inner1: [inner2, outer], inner2: [outer]}
    config = EngineConfig(train_iters=10, roll_back=True)
    engine = built(on, [outer, inner2, inner1], config, *edges)
    engine.run()
    return left(engine)


# ------------------------------------------------------------------------- learning by ignoring


@program
def learning_by_ignoring(on: On) -> Outcome:
    """Three levels: pretraining, finetuning held near it, and which examples to ignore."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.zeros(24))

        def forward(self, index: Tensor) -> Tensor:
            return self.raw[index]

    class Pretrain(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y, index = batch
            loss = functional.cross_entropy(self.module(x), y, reduction="none")
            weights = self.reweight(index).sigmoid()
            return loss @ weights / weights.sum().detach().item()

    class Finetune(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            pairs = zip(self.module.parameters(), self.pretrain.parameters(), strict=True)
            near = sum((a - b).pow(2).sum() for a, b in pairs)
            return functional.cross_entropy(self.module(x), y) + 7e-3 * near

    class Reweight(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.finetune(x), y)

    source = batches(24, 8, 4, seed=1)
    indexed = [(x, y, torch.arange(8) + 8 * n) for n, (x, y) in enumerate(source)]
    nets = [network(4, 5, 2), network(4, 5, 2)]
    optimizers = [SGD(net.parameters(), 0.1, momentum=0.9) for net in nets]
    rates = [MultiStepLR(optimizer, [20], 0.1) for optimizer in optimizers]
    weight = Weight()
    pretrain = Pretrain(
        name="pretrain",
        module=nets[0],
        optimizer=optimizers[0],
        scheduler=rates[0],
        train_data_loader=indexed,
        config=Config(unroll_steps=2),
    )
    finetune = Finetune(
        name="finetune",
        module=nets[1],
        optimizer=optimizers[1],
        scheduler=rates[1],
        train_data_loader=batches(16, 8, 4, seed=2),
        config=Config(retain_graph=True),
    )
    reweight = Reweight(
        name="reweight",
        module=weight,
        optimizer=Adam(weight.parameters(), 0.01, betas=(0.5, 0.999)),
        train_data_loader=batches(16, 8, 4, seed=3),
        config=Config(retain_graph=True),
    )
    edges = {reweight: [pretrain]}, {pretrain: [finetune], finetune: [reweight]}
    engine = built(on, [pretrain, finetune, reweight], EngineConfig(train_iters=40), *edges)
    engine.run()
    return left(engine)


# --------------------------------------------------------------------------------- implicit MAML


@program
def maml(on: On) -> Outcome:
    """Tasks from an environment, an engine that steps it, a validation that adapts a copy."""
    steps, tasks = 3, 4

    def near(net: Any, other: Any) -> Any:
        pairs = zip(net.parameters(), other.parameters(), strict=True)
        return 0.25 * sum((a - b).pow(2).sum() for a, b in pairs)

    class Outer(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = functional.cross_entropy(self.inner(x), y)
            return {"loss": loss, "accuracy": 1.0}

        def get_batch(self) -> Any:
            return self.env.batch["test"]

    class Inner(on.base):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.module(x), y) + near(self, self.outer)

        def get_batch(self) -> Any:
            return self.env.batch["train"]

        def on_inner_loop_start(self) -> None:
            self.module.load_state_dict(self.outer.module.state_dict())

    class Tasks(Env):
        def __init__(self) -> None:
            super().__init__()
            self.number, self.batch = 0, {}

        def step(self) -> None:
            self.number += 1
            (x, y), (x2, y2) = draw(6, 4, 2 * self.number), draw(6, 4, 2 * self.number + 1)
            flip = self.number % 2
            self.batch = {"train": (x, y ^ flip), "test": (x2, y2 ^ flip)}

    seen: list[float] = []

    def train_step(self: Any) -> None:
        if self.global_step % steps == 1:
            self.env.step()
        for leaf in self.leaves:
            leaf.step(global_step=self.global_step)

    def validation(self: Any) -> dict[str, float]:
        net = network(4, 5, 2).to(self.device)
        net.load_state_dict(self.outer.module.state_dict())
        optimizer = SGD(net.parameters(), lr=0.1)
        (x, y), (x2, y2) = draw(6, 4, 1000), draw(6, 4, 1001)
        for _ in range(steps):
            optimizer.zero_grad()
            (functional.cross_entropy(net(x), y) + near(net, self.outer)).backward()
            optimizer.step()
        loss = functional.cross_entropy(net(x2), y2).item()
        seen.append(loss)
        return {"loss": loss}

    nets = network(4, 5, 2), network(4, 5, 2)
    outer = Outer(
        name="outer",
        module=nets[0],
        optimizer=Adam(nets[0].parameters(), lr=1e-2),
        config=Config(retain_graph=True, gradient_accumulation=tasks),
    )
    inner = Inner(
        name="inner",
        module=nets[1],
        optimizer=SGD(nets[1].parameters(), lr=0.1),
        config=Config(unroll_steps=steps),
    )
    edges = {outer: [inner]}, {inner: [outer]}
    config = EngineConfig(train_iters=8 * tasks * steps, valid_step=30)
    own = {"train_step": train_step, "validation": validation, "env": Tasks()}
    engine = built(on, [outer, inner], config, *edges, **own)
    engine.run()
    return left(engine) | {"validations": torch.tensor(seen)}


# ------------------------------------------------------------------------------------- comparing


@contextmanager
def as_they_were() -> Iterator[None]:
    """Float64, the same draws, and Betty's console silent; all as before afterwards."""
    former, state, console = torch.get_default_dtype(), torch.get_rng_state(), get_logger()
    level = console.level
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    console.setLevel("WARNING")
    try:
        with warnings.catch_warnings():
            # Betty steps a schedule with every batch, and torch remarks on it.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            yield
    finally:
        console.setLevel(level)
        torch.set_rng_state(state)
        torch.set_default_dtype(former)


def run(name: str, on: On) -> Outcome:
    """What a program leaves behind."""
    with as_they_were():
        return PROGRAMS[name](on)


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any part; infinite where one of the two lacks something."""
    if ours.keys() != theirs.keys() or any(ours[k].shape != theirs[k].shape for k in ours):
        return float("inf")
    pairs = [(ours[k].double(), theirs[k].double()) for k in ours]
    found = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(value if value == value else float("inf") for value in found)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Betty's programs on both engines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROGRAMS))
    names = parser.parse_args(arguments).names or list(PROGRAMS)
    unknown = sorted(set(names) - set(PROGRAMS))
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    agreed = True
    print(f"{'program':30}{'Betty':>18}{'ours':>18}{'mlseg.Problem':>18}  difference")
    for name in names:
        outcomes = [run(name, on) for on in ON.values()]
        numbers = [sum(float(v.double().sum()) for v in found.values()) for found in outcomes]
        worst = max(difference(found, outcomes[0]) for found in outcomes[1:])
        same = worst <= TOLERANCE
        agreed &= same
        shown = "".join(f"{number:18.10f}" for number in numbers)
        print(f"{name:30}{shown}  {worst:.1e} {'same' if same else 'DIFFERENT'}", flush=True)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
