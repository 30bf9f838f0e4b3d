"""A two-level program over a U-Net, and everybody's ways to its outer gradient.

The lower level trains a segmentor with a loss that an upper level has a hand in: by the weights of
the classes, which enter last, or by a perturbation of the images, which enters first. The upper
loss is the segmentor's plain cross-entropy on other images. Images and masks are random numbers:
how long a pass takes doesn't depend on them.

A *contestant* is one library's or method's way to do a fixed piece of work. ``prepare`` puts it
back to where the work starts and isn't measured; ``run`` does the work and gives the outer
gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import betty.configs
import betty.engine
import betty.problems
import higher
import torch
import torchopt
from betty.hypergradient import jvp_fn_mapping
from torch import Tensor, nn

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.hypergradients import Hop, resolve
from mlseg.hypergradients.implicit import Hessian, Implicit
from mlseg.nets.unet import UNet
from mlseg.problems import Config, Problem

Batch = tuple[Tensor, Tensor]
"""(B, 3, H, W) images and (B, K, H, W) one-hot masks."""

CLASSES = 2


@dataclass(frozen=True)
class Size:
    """Of the U-Net and what it is trained on."""

    channels: int
    levels: int
    pixels: int
    batch: int


SIZES = {"tiny": Size(2, 1, 8, 2), "small": Size(8, 3, 64, 8), "large": Size(64, 4, 128, 8)}
"""The first only shows that a script works."""

INNER: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    # With a small epsilon the derivative of the first steps is next to none but where a gradient is
    # tiny, and rounding errors are all that there is to compare.
    "adam": (torch.optim.Adam, {"lr": 1e-3, "eps": 1e-3}),
}


class ClassWeights(nn.Module):
    """The logarithms of the classes' weights in the loss."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(CLASSES))

    def loss(self, network: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Weighted cross-entropy."""
        image, target = batch
        return cross_entropy(network(image), target * self.logs.exp()[:, None, None])


class Perturbation(nn.Module):
    """What is added to every image."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, pixels, pixels))

    def loss(self, network: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Cross-entropy on the perturbed images."""
        image, target = batch
        return cross_entropy(network(image + self.shift), target)


ENTRIES: dict[str, type[ClassWeights | Perturbation]] = {
    "class weights": ClassWeights,
    "image": Perturbation,
}


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels, of one-hot or weighted targets."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


class Task:
    """Networks at their starting point, and batches.

    Args:
        size: of the segmentor and its images.
        entry: where the upper level enters, a key of ``ENTRIES``.
        steps: inner steps, with a batch each.
    """

    def __init__(
        self,
        size: Size,
        entry: str,
        steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.steps, self.device = steps, device
        self._network = UNet(3, CLASSES, size.channels, size.levels).to(device, dtype)
        self._upper = ENTRIES[entry](size.pixels).to(device, dtype)
        shape = (size.batch, 3, size.pixels, size.pixels)

        def draw() -> Batch:
            classes = torch.randint(CLASSES, (size.batch, size.pixels, size.pixels))
            target = nn.functional.one_hot(classes, CLASSES).movedim(-1, 1)
            return torch.randn(shape).to(device, dtype), target.to(device, dtype)

        self.train = [draw() for _ in range(steps)]
        self.val = draw()
        network = self.network()
        loss = cross_entropy(network(self.val[0]), self.val[1])
        self.vector = list(torch.autograd.grad(loss, list(network.parameters())))
        """The upper loss's gradient by the segmentor's weights at the starting point."""

    def network(self) -> UNet:
        """A segmentor at the starting point."""
        return copy.deepcopy(self._network)

    def upper(self) -> ClassWeights | Perturbation:
        """The upper level's module at the starting point."""
        return copy.deepcopy(self._upper)

    def put_back(self, network: nn.Module) -> None:
        """Bring a segmentor back to the starting point, in place."""
        with torch.no_grad():
            for now, start in zip(
                network.state_dict().values(), self._network.state_dict().values(), strict=True
            ):
                now.copy_(start)


class Contestant:
    """See the module."""

    def prepare(self) -> None:
        """Back to the start of the work; nothing where it changes no weights."""

    def run(self) -> list[Tensor]:
        """The work, which gives the outer gradient."""
        raise AssertionError("each contestant has its own")

    def forget(self) -> None:
        """Free what the last run has left behind for the next."""


# ------------------------------------------------------------------- the levels as problems


class Segmentor(Problem):
    """The lower level."""

    def training_step(self, batch: Batch) -> Tensor:
        """The loss that the upper level has a hand in."""
        return self.upper.module.loss(self.module, batch)


class Upper(Problem):
    """The upper level; its gradient is what everybody is after."""

    gradient: list[Tensor]

    def training_step(self, batch: Batch) -> Tensor:
        """The segmentor's loss on other images."""
        return cross_entropy(self.segmentor.module(batch[0]), batch[1])

    def grad_callback(self) -> None:
        """Keep the gradient."""
        self.gradient = [p.grad for p in self.trainable_parameters()]


class BettySegmentor(betty.problems.ImplicitProblem):
    """The lower level as a user of Betty alone would write it."""

    training_step = Segmentor.training_step


class BettyUpper(betty.problems.ImplicitProblem):
    """The upper level likewise."""

    training_step = Upper.training_step


def _problems(task: Task, spec: Mapping[str, Any], inner: str) -> tuple[Segmentor, Upper]:
    cls, settings = INNER[inner]
    network, module = task.network(), task.upper()
    lower = Segmentor(
        "segmentor",
        network,
        cls(network.parameters(), **settings),
        task.train,
        Config(hypergradient=spec, unroll_steps=task.steps),
    )
    upper = Upper("upper", module, torch.optim.SGD(module.parameters(), lr=0.0), [task.val])
    Engine(
        [lower, upper],
        EngineSettings(iterations=1, validate_every=0, tensorboard=False),
        u2l={upper: [lower]},
        l2u={lower: [upper]},
        device=str(task.device),
        quiet=True,
    )
    return lower, upper


def _after_a_step(task: Task, spec: Mapping[str, Any]) -> tuple[Segmentor, Upper]:
    """A step on the first batch, which a hop then evaluates again, at the starting point."""
    lower, upper = _problems(task, spec, "sgd")
    lower.one_step_descent()
    task.put_back(lower.module)
    return lower, upper


def _bettys_problems(task: Task, **settings: Any) -> tuple[BettySegmentor, BettyUpper]:
    network, module = task.network(), task.upper()
    cls, options = INNER["sgd"]
    lower = BettySegmentor(
        "segmentor",
        betty.configs.Config(**settings),
        network,
        cls(network.parameters(), **options),
        train_data_loader=task.train,
    )
    upper = BettyUpper(
        "upper",
        betty.configs.Config(),
        module,
        torch.optim.SGD(module.parameters(), lr=0.0),
        train_data_loader=[task.val],
    )
    betty.engine.Engine(
        config=betty.configs.EngineConfig(
            train_iters=1, strategy="gpu" if task.device.type == "cuda" else "cpu"
        ),
        problems=[lower, upper],
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    return lower, upper


# ------------------------------------------------------------------------------ one hop


class OurHop(Contestant):
    """A method of mlseg carries the vector over the hop from the segmentor to the upper level.

    Args:
        products: how many Hessian-vector products it has to take; None: unchecked.
    """

    def __init__(self, task: Task, spec: Mapping[str, Any], products: int | None = None) -> None:
        self.lower, self.upper = _after_a_step(task, spec)
        self.method, self.vector, self.products = resolve(spec), task.vector, products

    def run(self) -> list[Tensor]:
        """One hop."""
        hop = Hop(self.lower, [self.upper])
        (gradient,), _ = self.method(self.vector, hop)
        if self.products is not None:
            _check_products(hop, self.products)
        return gradient


class BettysHop(Contestant):
    """One of Betty's methods does the same."""

    def __init__(self, task: Task, name: str, **settings: Any) -> None:
        self.lower, self.upper = _bettys_problems(task, type=name, **settings)
        self.method, self.vector = jvp_fn_mapping[name], task.vector
        self.lower.cur_batch = task.train[0]

    def run(self) -> list[Tensor]:
        """One hop."""
        return list(self.method(self.vector, self.lower, self.upper, False))


class HandWrittenHop(Contestant):
    """The mixed second derivative in two calls of autograd."""

    def __init__(self, task: Task) -> None:
        self.network, self.upper = task.network(), task.upper()
        self.batch, self.vector = task.train[0], task.vector

    def run(self) -> list[Tensor]:
        """Double backward."""
        weights, inputs = list(self.network.parameters()), list(self.upper.parameters())
        loss = self.upper.loss(self.network, self.batch)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        found = torch.autograd.grad(gradient, inputs, grad_outputs=self.vector)
        return [g.neg() for g in found]


# ------------------------------------------------------------- Hessian-vector products alone


class BareProducts(Contestant):
    """Hessian-vector products from one graph, by nothing but autograd."""

    def __init__(self, task: Task, count: int) -> None:
        self.count, self.vector = count, task.vector
        self.network, self.upper = task.network(), task.upper()
        self.weights = list(self.network.parameters())
        loss = self.upper.loss(self.network, task.train[0])
        self.gradient = torch.autograd.grad(loss, self.weights, create_graph=True)

    def run(self) -> list[Tensor]:
        """The same product again and again."""
        for _ in range(self.count):
            found = torch.autograd.grad(
                self.gradient, self.weights, grad_outputs=self.vector, retain_graph=True
            )
        return list(found)


class Solve(Contestant):
    """The iteration of an implicit method of mlseg, on a graph that is there already."""

    def __init__(self, task: Task, spec: Mapping[str, Any], products: int) -> None:
        lower, upper = _after_a_step(task, spec)
        self.hop = Hop(lower, [upper])
        method = resolve(spec)
        assert isinstance(method, Implicit)
        self.method, self.products = method, products
        with self.hop.evaluation(whole=True) as loss:
            self.hessian = Hessian(loss(), self.hop, method.damping)
        self.vector = self.hessian.restrict(task.vector)

    def prepare(self) -> None:
        """Count anew."""
        self.hop.products = 0

    def run(self) -> list[Tensor]:
        """Solve."""
        solution, _ = self.method.solve(self.hessian, self.vector)
        _check_products(self.hop, self.products)
        return [solution]


def _check_products(hop: Hop, wanted: int) -> None:
    if hop.products != wanted:
        raise SystemExit(f"{hop.products} Hessian-vector products, not {wanted}: more damping")


# ------------------------------------------------------------------------ inner loops


class OurUnrolling(Contestant):
    """Steps of the segmentor with their recording, and the upper level's gradient."""

    def __init__(self, task: Task, inner: str, spec: Mapping[str, Any]) -> None:
        self.task = task
        self.lower, self.upper = _problems(task, spec, inner)

    def prepare(self) -> None:
        """The starting weights, a new optimizer's state."""
        self.task.put_back(self.lower.module)
        self.lower.optimizer.state.clear()

    def run(self) -> list[Tensor]:
        """Training steps as they are, then the outer gradient as it is."""
        for _ in range(self.task.steps):
            self.lower.one_step_descent()
        self.upper.one_step_descent()
        return self.upper.gradient

    def forget(self) -> None:
        """The recorded steps, whose storage is used again."""
        self.lower.optimizer.state.clear()
        self.lower.connect()


class HigherUnrolling(Contestant):
    """The same with ``higher``'s differentiable optimizers."""

    def __init__(self, task: Task, inner: str) -> None:
        cls, settings = INNER[inner]
        self.task, self.network, self.upper = task, task.network(), task.upper()
        self.optimizer = cls(self.network.parameters(), **settings)

    def _settings(self, step: int) -> dict[str, list[float]] | None:
        """Adam's epsilon, which ``higher`` adds before the correction of the bias, torch after."""
        group = self.optimizer.param_groups[0]
        if "betas" not in group:
            return None
        return {"eps": [group["eps"] * (1.0 - group["betas"][1] ** step) ** 0.5]}

    def run(self) -> list[Tensor]:
        """An inner loop, then backward."""
        with higher.innerloop_ctx(self.network, self.optimizer) as (network, optimizer):
            for number, batch in enumerate(self.task.train, 1):
                optimizer.step(self.upper.loss(network, batch), override=self._settings(number))
            image, target = self.task.val
            loss = cross_entropy(network(image), target)
            return list(torch.autograd.grad(loss, list(self.upper.parameters())))


class TorchOptUnrolling(Contestant):
    """The same with TorchOpt's."""

    def __init__(self, task: Task, inner: str) -> None:
        settings = INNER[inner][1]
        cls = {"sgd": torchopt.MetaSGD, "adam": torchopt.MetaAdam}[inner]
        self.task, self.network, self.upper = task, task.network(), task.upper()
        self.optimizer = cls(self.network, **settings)
        self._start = torchopt.extract_state_dict(self.network, by="reference")
        self._state = torchopt.extract_state_dict(self.optimizer, by="reference")

    def prepare(self) -> None:
        """The starting weights, a new optimizer's state."""
        torchopt.recover_state_dict(self.network, self._start)
        torchopt.recover_state_dict(self.optimizer, self._state)

    def run(self) -> list[Tensor]:
        """An inner loop, then backward."""
        for batch in self.task.train:
            self.optimizer.step(self.upper.loss(self.network, batch))
        image, target = self.task.val
        loss = cross_entropy(self.network(image), target)
        return list(torch.autograd.grad(loss, list(self.upper.parameters())))

    def forget(self) -> None:
        """The last run's graph, which the network's weights hold."""
        self.prepare()
