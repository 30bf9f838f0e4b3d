"""What Betty's own tests cover, and its tutorials on weighing data; see ``betty_programs.py``."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty_parts import On, Outcome, Vector, batches, built, draw, left, network, program
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR

# --------------------------------------------------------------------------- Betty's own tests


def penalised_regression(on: On, iterations: int, unroll: int, **config: Any) -> Any:
    """Logistic regression from zero, the penalty of each coefficient learned on other data."""

    Base: Any = on.base

    class Outer(Base):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.binary_cross_entropy_with_logits(x @ self.inner(), y.to(x))

        def param_callback(self) -> None:
            for p in self.trainable_parameters():
                p.data.clamp_(min=1e-8)

    class Inner(Base):
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
    on: On,
    below: Config,
    above: Config,
    optimizer: Any = None,
    net: nn.Module | None = None,
    **settings: Any,
) -> tuple[Any, list[float]]:
    """A classifier, a net that weighs its examples by their loss, and a validation."""

    Base: Any = on.base

    class Reweight(Base):
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            logits = self.classifier(x)
            accuracy = (logits.argmax(1) == y).double().mean().item()
            return {"loss": functional.cross_entropy(logits, y), "accuracy": accuracy}

    class Classifier(Base):
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

    net, small = net or network(5, 6, 2), network(1, 4, 1)
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
def dropout(on: On) -> Outcome:
    """Dropout and batch normalisation below."""
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))
    engine, _ = reweighting(on, Config(), Config(), net=net)
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
