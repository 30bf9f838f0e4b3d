"""Small multilevel programs at their levels' minima, and the exact hypergradient there.

Four families of losses, each in three shapes of graph. A level's variables are one vector, so that
the truth can be had from dense Hessians of plain functions (``torch.autograd.functional``) in
float64, with nothing of the library in it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

Vectors = Mapping[str, Tensor]
HYPERPARAMETERS = 4


class Family:
    """Losses of one kind. All draws are in float64, from a seed."""

    size = 6
    examples = 24

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.data = self.draw_data(draw)
        self.start = 0.3 * draw(HYPERPARAMETERS)

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        x, other = draw(self.examples, self.size), draw(self.examples, self.size)
        y = x @ draw(self.size) + 0.5 * draw(self.examples)
        return {"x": x, "y": y, "x_outer": other, "y_outer": draw(self.examples)}

    def penalty(self, w: Tensor, s: Tensor | None) -> Tensor:
        strength = 0.3
        if s is not None:  # each regularises every fourth variable
            strength = 0.1 + functional.softplus(s).repeat(self.size)[: self.size]
        return (strength * w * w).sum()

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Vectors) -> Tensor:
        """A lower level's loss, regularised by ``s``, its targets shifted by ``teacher``."""
        raise AssertionError("abstract")

    def outer(self, w: Tensor, data: Vectors) -> Tensor:
        """The top level's loss."""
        return ((data["x_outer"] @ w - data["y_outer"]) ** 2).mean()


class Quadratic(Family):
    """``w^T A w / 2 - w^T (B s + C teacher + c)``, condition number 10."""

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        n = self.size
        q = torch.linalg.qr(draw(n, n))[0]
        spectrum = torch.logspace(0, 1, n, dtype=torch.float64)
        return {
            **super().draw_data(draw),
            "a": q @ torch.diag(spectrum) @ q.T,
            "b": draw(n, HYPERPARAMETERS),
            "c": draw(n, n),
            "d": draw(n),
        }

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Vectors) -> Tensor:
        force = data["d"]
        force = force if s is None else force + data["b"] @ s
        force = force if teacher is None else force + data["c"] @ teacher
        return 0.5 * w @ data["a"] @ w - w @ force


class Ridge(Family):
    """Least squares with a penalty per coordinate."""

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Vectors) -> Tensor:
        x, target = data["x"], data["y"]
        target = target if teacher is None else target + 0.5 * x @ teacher
        return ((x @ w - target) ** 2).mean() + self.penalty(w, s)


class Logistic(Family):
    """Logistic regression with a penalty per coordinate; a teacher gives soft labels."""

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Vectors) -> Tensor:
        x = data["x"]
        target = (data["y"] > 0).to(w.dtype) if teacher is None else (x @ teacher).sigmoid()
        loss = functional.binary_cross_entropy_with_logits(x @ w, target)
        return loss + self.penalty(w, s)


class Convolutional(Family):
    """Two filters of 3x3, tanh, mean, a linear head, on images of 6x6."""

    size = 2 * 9 + 2 + 2 + 1

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        image, other = draw(self.examples, 1, 6, 6), draw(self.examples, 1, 6, 6)
        target = image.mean((1, 2, 3)) + 0.3 * draw(self.examples)
        return {"x": image, "y": target, "x_outer": other, "y_outer": draw(self.examples)}

    def net(self, w: Tensor, image: Tensor) -> Tensor:
        kernel, bias, head, offset = w.split([18, 2, 2, 1])
        maps = torch.tanh(functional.conv2d(image, kernel.view(2, 1, 3, 3), bias))
        return (maps.mean((2, 3)) @ head) + offset

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Vectors) -> Tensor:
        target = 2.0 + 3.0 * data["y"]
        target = target if teacher is None else target + self.net(teacher, data["x"])
        return ((self.net(w, data["x"]) - target) ** 2).mean() + 2.0 * self.penalty(w, s)

    def outer(self, w: Tensor, data: Vectors) -> Tensor:
        return ((self.net(w, data["x_outer"]) - data["y_outer"]) ** 2).mean()


FAMILIES: dict[str, type[Family]] = {
    "quadratic": Quadratic,
    "ridge": Ridge,
    "logistic": Logistic,
    "convolutional": Convolutional,
}


@dataclass(frozen=True)
class Shape:
    """Which levels a level's loss depends on: the top's hyperparameters, the low one as teacher."""

    regularised: dict[str, bool]
    taught: dict[str, bool]
    l2u: dict[str, list[str]]
    u2l: dict[str, list[str]]


SHAPES = {
    "two levels": Shape({"low": True}, {"low": False}, {"low": ["top"]}, {"top": ["low"]}),
    # top -> middle -> low -> top
    "three levels": Shape(
        {"low": True, "middle": False},
        {"low": False, "middle": True},
        {"low": ["middle"], "middle": ["top"]},
        {"top": ["low"]},
    ),
    # and top -> middle -> top
    "two paths": Shape(
        {"low": True, "middle": True},
        {"low": False, "middle": True},
        {"low": ["middle"], "middle": ["top"]},
        {"top": ["low", "middle"]},
    ),
}


class Variables(nn.Module):
    """A vector."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())


class Level(Problem):
    """A level of a :class:`Program`."""

    rule: Callable[[Vectors, Vectors], Tensor]
    gradient: Tensor

    def training_step(self, batch: Any) -> Tensor:
        variables = {p.name: p.module.value for p in self._everyone()}
        return self.rule(variables, batch[0])

    def grad_callback(self) -> None:
        self.gradient = self.module.value.grad.clone()


@dataclass
class Program:
    """A family in a shape, its levels' losses as functions of all variables, and their minima."""

    family: Family
    shape: Shape
    minima: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.minima["top"] = self.family.start
        generator = torch.Generator().manual_seed(1)
        for name in self.lowers:
            w = 0.5 * torch.randn(self.family.size, generator=generator, dtype=torch.float64)
            self.minima[name] = self._minimise(name, w)

    @property
    def lowers(self) -> list[str]:
        return list(self.shape.regularised)

    @property
    def last(self) -> str:
        """The level that the outer loss is of."""
        return self.lowers[-1]

    def loss(self, name: str, variables: Vectors, data: Vectors) -> Tensor:
        if name == "top":
            return self.family.outer(variables[self.last], data)
        s = variables["top"] if self.shape.regularised[name] else None
        teacher = variables["low"] if self.shape.taught[name] else None
        return self.family.fit(variables[name], s, teacher, data)

    def curvature(self, name: str) -> Tensor:
        """(n, n) Hessian of a level's loss by its own variables, at the minima."""
        return hessian(lambda w: self._replaced(name, {name: w}), self.minima[name])

    def mixed(self, name: str, source: str) -> Tensor:
        """(m, n) second derivative of a level's loss by a source's and its own variables."""

        def slope(s: Tensor) -> Tensor:
            w = self.minima[name].clone().requires_grad_()
            loss = self._replaced(name, {name: w, source: s})
            return torch.autograd.grad(loss, w, create_graph=True)[0]

        return jacobian(slope, self.minima[source]).T

    def hypergradient(self, inverse: Callable[[str, Tensor], Tensor]) -> Tensor:
        """``dL/ds`` with a level's response to ``v`` given by ``inverse(level, v)``."""
        w = self.minima[self.last].clone().requires_grad_()
        (v,) = torch.autograd.grad(self._replaced("top", {self.last: w}), w)
        total = torch.zeros_like(self.minima["top"])
        for name in reversed(self.lowers):
            x = inverse(name, v)
            if self.shape.regularised[name]:
                total = total - self.mixed(name, "top") @ x
            if self.shape.taught[name]:
                v = -self.mixed(name, "low") @ x
        return total

    def exact(self) -> Tensor:
        """By dense solves."""
        return self.hypergradient(lambda name, v: torch.linalg.solve(self.curvature(name), v))

    def one_step(self, rate: float) -> Tensor:
        """Through one step of descent from the minima."""
        return self.hypergradient(lambda name, v: rate * v)

    def engine(
        self,
        method: Mapping[str, Any],
        dtype: torch.dtype,
        rate: float,
        steps: int,
        device: str = "cpu",
    ) -> Engine:
        """The levels at their minima; the top steps (by nothing) after ``steps`` of the last."""
        data = {k: v.to(dtype) for k, v in self.family.data.items()}
        made: dict[str, Level] = {}
        for name in [*self.lowers, "top"]:
            module = Variables(self.minima[name].to(dtype))
            config = Config(hypergradient=method, unroll_steps=steps if name == self.last else 1)
            optimizer = torch.optim.SGD(module.parameters(), 0.0 if name == "top" else rate)
            made[name] = Level(name, module, optimizer, [({**data},)], config)
            made[name].rule = self._rule(name)
        return Engine(
            list(made.values()),
            EngineSettings(tensorboard=False),
            u2l={made[k]: [made[v] for v in vs] for k, vs in self.shape.u2l.items()},
            l2u={made[k]: [made[v] for v in vs] for k, vs in self.shape.l2u.items()},
            device=device,
            quiet=True,
        )

    def stable_rate(self) -> float:
        """``1 / lambda_max`` over the levels' Hessians."""
        largest = max(torch.linalg.eigvalsh(self.curvature(n)).max() for n in self.lowers)
        return float(1.0 / largest)

    def long(self) -> int:
        """Steps or terms, at that rate, after which an error has shrunk to 1e-7 everywhere."""
        spectra = [torch.linalg.eigvalsh(self.curvature(name)) for name in self.lowers]
        lowest = min(spectrum[0] for spectrum in spectra)
        return int(16.2 / (self.stable_rate() * float(lowest))) + 1

    def _rule(self, name: str) -> Callable[[Vectors, Vectors], Tensor]:
        return lambda variables, data: self.loss(name, variables, data)

    def _replaced(self, name: str, values: Vectors) -> Tensor:
        return self.loss(name, {**self.minima, **values}, self.family.data)

    def _minimise(self, name: str, w: Tensor) -> Tensor:
        """Newton's method, damped until the Hessian is positive definite."""
        for _ in range(200):
            self.minima[name] = w
            at = w.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._replaced(name, {name: at}), at)
            if gradient.norm() < 1e-13:
                break
            curvature = self.curvature(name)
            lowest = torch.linalg.eigvalsh(curvature)[0]
            damped = curvature + max(0.0, 0.1 - float(lowest)) * torch.eye(len(w)).to(w)
            w = w - torch.linalg.solve(damped, gradient)
        assert torch.linalg.eigvalsh(self.curvature(name))[0] > 1e-2, "no minimum"
        return w
