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

from mlseg.engines.settings import EngineSettings
from mlseg.hypergradients import Hop, resolve
from mlseg.hypergradients.implicit import Hessian, Implicit, System
from mlseg.segmentation.nets.unet import UNet
from mlseg.testing import programs
from mlseg.testing.families import Vector
from mlseg.testing.programs import Graph, Level, Loss, Nets, Network

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


STILL = torch.optim.SGD, {"lr": 0.0}
"""An optimizer whose step leaves the weights where they are."""


def class_weights(nets: Nets, batch: Batch) -> Tensor:
    """Cross-entropy with weighted classes, of which the upper level has the logarithms."""
    image, target = batch
    return cross_entropy(nets["segmentor"](image), target * nets["upper"]().exp()[:, None, None])


def perturbation(nets: Nets, batch: Batch) -> Tensor:
    """Cross-entropy on images to which the upper level adds the same one."""
    image, target = batch
    return cross_entropy(nets["segmentor"](image + nets["upper"]()), target)


def outer(nets: Nets, batch: Batch) -> Tensor:
    """The segmentor's loss on other images."""
    return cross_entropy(nets["segmentor"](batch[0]), batch[1])


ENTRIES: dict[str, Loss] = {"class weights": class_weights, "image": perturbation}


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
        self.graph = Graph(
            {"segmentor": ENTRIES[entry], "upper": outer},
            {"segmentor": ["upper"]},
            {"upper": ["segmentor"]},
        )
        self._network = UNet(3, CLASSES, size.channels, size.levels).to(device, dtype)
        entered = (3, size.pixels, size.pixels) if entry == "image" else (CLASSES,)
        self._upper = Vector(torch.zeros(entered)).to(device, dtype)
        shape = (size.batch, 3, size.pixels, size.pixels)

        def draw() -> Batch:
            classes = torch.randint(CLASSES, (size.batch, size.pixels, size.pixels))
            target = nn.functional.one_hot(classes, CLASSES).movedim(-1, 1)
            return torch.randn(shape).to(device, dtype), target.to(device, dtype)

        self.train = [draw() for _ in range(steps)]
        self.val = draw()
        network = self.network()
        loss = self.outer(network)
        self.vector = list(torch.autograd.grad(loss, list(network.parameters())))
        """The upper loss's gradient by the segmentor's weights at the starting point."""

    def network(self) -> UNet:
        """A segmentor at the starting point."""
        return copy.deepcopy(self._network)

    def upper(self) -> Vector:
        """The upper level's module at the starting point."""
        return copy.deepcopy(self._upper)

    def inner(self, network: nn.Module, upper: nn.Module, batch: Batch) -> Tensor:
        """The loss that the upper level has a hand in."""
        nets = {"segmentor": Network(network), "upper": Network(upper)}
        return self.graph.losses["segmentor"](nets, batch)

    def outer(self, network: nn.Module) -> Tensor:
        """The upper loss."""
        return outer({"segmentor": Network(network)}, self.val)

    def put_back(self, network: nn.Module) -> None:
        """Bring a segmentor back to the starting point, in place."""
        with torch.no_grad():
            for now, start in zip(
                network.state_dict().values(), self._network.state_dict().values(), strict=True
            ):
                now.copy_(start)


@dataclass
class Contestant:
    """See the module.

    Attributes:
        run: the work, which gives the outer gradient.
        prepare: back to the start of the work; nothing where it changes no weights.
        forget: free what the last run has left behind for the next.
    """

    run: Callable[[], list[Tensor]]
    prepare: Callable[[], None] = lambda: None
    forget: Callable[[], None] = lambda: None


# ------------------------------------------------------------------- the levels as problems


class Upper(Level):
    """The upper level; its gradient is what everybody is after."""

    gradient: list[Any]

    def grad_callback(self) -> None:
        """Keep the gradient."""
        self.gradient = [p.grad for p in self.trainable_parameters()]


class BettyLevel(betty.problems.ImplicitProblem):
    """A level as a user of Betty alone would write it."""

    rule: Loss
    nets: Nets
    training_step = Level.training_step


def _problems(
    task: Task,
    spec: Mapping[str, Any],
    inner: tuple[type[torch.optim.Optimizer], dict[str, Any]],
) -> list[Any]:
    cls, settings = inner
    return programs.build(
        task.graph,
        {"segmentor": task.network(), "upper": task.upper()},
        {"segmentor": task.train, "upper": [task.val]},
        spec,
        {"segmentor": lambda params: cls(params, **settings), "upper": programs.sgd(0.0)},
        kinds={"segmentor": Level, "upper": Upper},
        configs={"segmentor": {"unroll_steps": task.steps}},
        settings=EngineSettings(iterations=1, validate_every=0, tensorboard=False),
        device=str(task.device),
    ).problems


def _after_a_step(task: Task, spec: Mapping[str, Any]) -> list[Any]:
    """A step on the first batch, which a hop then evaluates again, at the starting point."""
    lower, upper = _problems(task, spec, INNER["sgd"])
    lower.one_step_descent()
    task.put_back(lower.module)
    return [lower, upper]


def _bettys_problems(task: Task, rate: float, **settings: Any) -> list[BettyLevel]:
    modules = {"segmentor": task.network(), "upper": task.upper()}
    nets = {name: Network(module) for name, module in modules.items()}
    cls, options = INNER["sgd"]
    levels = []
    for name, loader in (("segmentor", task.train), ("upper", [task.val])):
        config = betty.configs.Config(**(settings if name == "segmentor" else {}))
        given = {**options, "lr": rate if name == "segmentor" else 0.0}
        optimizer = cls(modules[name].parameters(), **given)
        levels.append(BettyLevel(name, config, modules[name], optimizer, train_data_loader=loader))
        levels[-1].rule, levels[-1].nets = task.graph.losses[name], nets
    lower, upper = levels
    betty.engine.Engine(
        config=betty.configs.EngineConfig(
            train_iters=1, strategy="gpu" if task.device.type == "cuda" else "cpu"
        ),
        problems=levels,
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    return levels


# ------------------------------------------------------------------------------ one hop


def our_hop(task: Task, spec: Mapping[str, Any], products: int | None = None) -> Contestant:
    """A method of mlseg carries the vector over the hop from the segmentor to the upper level.

    Args:
        products: how many Hessian-vector products it has to take; None: unchecked.
    """
    lower, upper = _after_a_step(task, spec)
    method = resolve(spec)

    def run() -> list[Tensor]:
        hop = Hop(lower, [upper])
        (gradient,), _ = method(task.vector, hop)
        if products is not None:
            _check_products(hop, products)
        return gradient

    return Contestant(run)


def bettys_hop(task: Task, name: str, **settings: Any) -> Contestant:
    """One of Betty's methods does the same."""
    lower, upper = _bettys_problems(task, INNER["sgd"][1]["lr"], type=name, **settings)
    lower.cur_batch = task.train[0]
    method = jvp_fn_mapping[name]
    return Contestant(lambda: list(method(task.vector, lower, upper, False)))


def our_step_and_hop(task: Task, spec: Mapping[str, Any]) -> Contestant:
    """A training step of the segmentor, and the hop over it, which evaluates its batch again.

    The step's rate is zero, so that the hop sees the same weights in every round, and a method that
    goes back to those before the step the same as one that doesn't.
    """
    lower, upper = _problems(task, spec, STILL)
    method = resolve(spec)

    def run() -> list[Tensor]:
        lower.one_step_descent(task.train[0])
        (gradient,), _ = method(task.vector, Hop(lower, [upper]))
        return gradient

    return Contestant(run)


def bettys_step_and_hop(task: Task, name: str, **settings: Any) -> Contestant:
    """The same with one of Betty's methods."""
    lower, upper = _bettys_problems(task, 0.0, type=name, **settings)
    method = jvp_fn_mapping[name]

    def run() -> list[Tensor]:
        lower.one_step_descent()
        lower.cur_batch = task.train[0]
        return list(method(task.vector, lower, upper, False))

    return Contestant(run)


def hop_by_hand(task: Task) -> Contestant:
    """The mixed second derivative in two calls of autograd."""
    network, upper = task.network(), task.upper()
    weights, inputs = list(network.parameters()), list(upper.parameters())

    def run() -> list[Tensor]:
        loss = task.inner(network, upper, task.train[0])
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        return [g.neg() for g in torch.autograd.grad(gradient, inputs, grad_outputs=task.vector)]

    return Contestant(run)


# ------------------------------------------------------------- Hessian-vector products alone


def bare_products(task: Task, count: int) -> Contestant:
    """The same Hessian-vector product again and again, from one graph, by nothing but autograd."""
    network, upper = task.network(), task.upper()
    weights = list(network.parameters())
    loss = task.inner(network, upper, task.train[0])
    gradient = torch.autograd.grad(loss, weights, create_graph=True)

    def run() -> list[Tensor]:
        for _ in range(count):
            found = torch.autograd.grad(
                gradient, weights, grad_outputs=task.vector, retain_graph=True
            )
        return list(found)

    return Contestant(run)


def solve(task: Task, spec: Mapping[str, Any], products: int) -> Contestant:
    """The iteration of an implicit method of mlseg, on a graph that is there already."""
    lower, upper = _after_a_step(task, spec)
    hop, method = Hop(lower, [upper]), resolve(spec)
    assert isinstance(method, Implicit)
    hop.second_order = method.formulas()
    with hop.evaluation(whole=True) as loss:
        hessian = Hessian(loss(), hop)
    system, vector = System(hessian, method.damping), hessian.restrict(task.vector)

    def run() -> list[Tensor]:
        solution, _ = method.solve(system, vector)
        _check_products(hop, products)
        return [solution]

    def prepare() -> None:
        hop.products = 0

    return Contestant(run, prepare)


def _check_products(hop: Hop, wanted: int) -> None:
    if hop.products != wanted:
        raise SystemExit(f"{hop.products} Hessian-vector products, not {wanted}: more damping")


# ------------------------------------------------------------------------ inner loops


def our_unrolling(task: Task, inner: str, spec: Mapping[str, Any]) -> Contestant:
    """Training steps of the segmentor as they are, then the upper level's gradient as it is."""
    lower, upper = _problems(task, spec, INNER[inner])

    def run() -> list[Tensor]:
        for _ in range(task.steps):
            lower.one_step_descent()
        upper.one_step_descent()
        return upper.gradient

    def prepare() -> None:
        task.put_back(lower.module)
        lower.optimizer.state.clear()

    def forget() -> None:
        """The recorded steps, whose storage is used again."""
        lower.optimizer.state.clear()
        lower.connect()

    return Contestant(run, prepare, forget)


def higher_unrolling(task: Task, inner: str) -> Contestant:
    """The same with ``higher``'s differentiable optimizers."""
    network, upper = task.network(), task.upper()
    cls, settings = INNER[inner]
    optimizer = cls(network.parameters(), **settings)

    def adjusted(step: int) -> dict[str, list[float]] | None:
        """Adam's epsilon, which ``higher`` adds before the correction of the bias, torch after."""
        group = optimizer.param_groups[0]
        if "betas" not in group:
            return None
        return {"eps": [group["eps"] * (1.0 - group["betas"][1] ** step) ** 0.5]}

    def run() -> list[Tensor]:
        with higher.innerloop_ctx(network, optimizer) as (moving, differentiable):
            for number, batch in enumerate(task.train, 1):
                loss = task.inner(moving, upper, batch)
                differentiable.step(loss, override=adjusted(number))
            return list(torch.autograd.grad(task.outer(moving), list(upper.parameters())))

    return Contestant(run)


def torchopt_unrolling(task: Task, inner: str) -> Contestant:
    """The same with TorchOpt's."""
    network, upper = task.network(), task.upper()
    cls = {"sgd": torchopt.MetaSGD, "adam": torchopt.MetaAdam}[inner]
    optimizer = cls(network, **INNER[inner][1])
    start, state = (torchopt.extract_state_dict(x, by="reference") for x in (network, optimizer))

    def run() -> list[Tensor]:
        for batch in task.train:
            optimizer.step(task.inner(network, upper, batch))
        return list(torch.autograd.grad(task.outer(network), list(upper.parameters())))

    def put_back() -> None:
        """To the start; the last run's graph, which the network's weights hold, is freed."""
        torchopt.recover_state_dict(network, start)
        torchopt.recover_state_dict(optimizer, state)

    return Contestant(run, put_back, put_back)
