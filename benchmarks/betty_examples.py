"""Betty's larger examples; see ``betty_programs.py``."""

from __future__ import annotations

from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.envs import Env
from betty_parts import On, Outcome, Vector, batches, built, draw, left, network, program
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

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

    Base: Any = on.base

    class Architecture(Base):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.weights(x, self.module()), y)

        def configure_train_data_loader(self) -> Any:
            return batches(24, 8, 4, seed=2)

        def configure_module(self) -> nn.Module:
            return Vector(6, 1e-3)

        def configure_optimizer(self) -> Any:
            return Adam(self.module.parameters(), 3e-2, betas=(0.5, 0.999), weight_decay=1e-3)

    class Weights(Base):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.module(x, self.architecture()), y)

        def configure_train_data_loader(self) -> Any:
            data = TensorDataset(*draw(24, 4, seed=1))
            return DataLoader(data, batch_size=8, shuffle=True)

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

    Base: Any = on.base

    class Outer(Base):
        def training_step(self, batch: Any) -> Tensor:
            (x, y), alphas = batch, self.module()
            first = functional.cross_entropy(self.inner1(x, alphas), y)
            return first + functional.cross_entropy(self.inner2(x, alphas), y)

    class Inner2(Base):
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

    class Inner1(Base):
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

    Base: Any = on.base

    class Pretrain(Base):
        def training_step(self, batch: Any) -> Tensor:
            x, y, index = batch
            loss = functional.cross_entropy(self.module(x), y, reduction="none")
            weights = self.reweight(index).sigmoid()
            return loss @ weights / weights.sum().detach().item()

    class Finetune(Base):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            pairs = zip(self.module.parameters(), self.pretrain.parameters(), strict=True)
            near = sum((a - b).pow(2).sum() for a, b in pairs)
            return functional.cross_entropy(self.module(x), y) + 7e-3 * near

    class Reweight(Base):
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

    Base: Any = on.base

    class Outer(Base):
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = functional.cross_entropy(self.inner(x), y)
            return {"loss": loss, "accuracy": 1.0}

        def get_batch(self) -> Any:
            return self.env.batch["test"]

    class Inner(Base):
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
            self.number = 0
            self.batch: dict[str, tuple[Tensor, Tensor]] = {}

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
