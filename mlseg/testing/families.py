"""Losses of several kinds with their levels at the minima, and the hypergradients there.

A level's variables are one vector, so that dense Hessians are cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.engines.engine import Engine
from mlseg.testing import programs
from mlseg.testing.exact import Truth
from mlseg.testing.programs import Edges, Graph, Loss, Nets

HYPERPARAMETERS = 4
Data = Mapping[str, Tensor]


class Vector(nn.Module):
    """A level whose variables are one vector; calling it gives the vector."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        """(N,) variables."""
        return self.value


class Family:
    """Losses of one kind. All draws are in float64, from a seed."""

    size = 6
    examples = 24

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.data = self.draw_data(draw)
        # Which hyperparameter regularises which variable.
        self.groups = torch.arange(self.size) % HYPERPARAMETERS
        self.start = 0.3 * draw(HYPERPARAMETERS)

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Of both levels."""
        x, other = draw(self.examples, self.size), draw(self.examples, self.size)
        y = x @ draw(self.size) + 0.5 * draw(self.examples)
        return {"x": x, "y": y, "x_outer": other, "y_outer": draw(self.examples)}

    def penalty(self, w: Tensor, s: Tensor | None) -> Tensor:
        """A squared norm, weighted by the hyperparameters."""
        strength = 0.3 if s is None else 0.1 + functional.softplus(s)[self.groups]
        return (strength * w * w).sum()

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        """A lower level's loss, regularised by ``s``, its targets shifted by ``teacher``."""
        raise AssertionError("each family has its own")

    def outer(self, w: Tensor, data: Data) -> Tensor:
        """The top level's loss."""
        return ((data["x_outer"] @ w - data["y_outer"]) ** 2).mean()


class Quadratic(Family):
    """``w^T A w / 2 - w^T (B s + C teacher + c)``, condition number 10."""

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The outer loss's, the matrices and the vector."""
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

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        """See the class."""
        force = data["d"]
        force = force if s is None else force + data["b"] @ s
        force = force if teacher is None else force + data["c"] @ teacher
        return 0.5 * w @ data["a"] @ w - w @ force


class Ridge(Family):
    """Least squares with a penalty per coordinate."""

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        """The targets are the data's and half of what the teacher predicts."""
        x, target = data["x"], data["y"]
        target = target if teacher is None else target + 0.5 * x @ teacher
        return ((x @ w - target) ** 2).mean() + self.penalty(w, s)


class Logistic(Family):
    """Logistic regression with a penalty per coordinate; a teacher gives soft labels."""

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        """See the class."""
        x = data["x"]
        target = (data["y"] > 0).to(w.dtype) if teacher is None else (x @ teacher).sigmoid()
        loss = functional.binary_cross_entropy_with_logits(x @ w, target)
        return loss + self.penalty(w, s)


class Convolutional(Family):
    """Two filters of 3x3, tanh, mean, a linear head, on images of 6x6."""

    size = 2 * 9 + 2 + 2 + 1

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        """(24, 1, 6, 6) images and their mean brightness, with noise."""
        image, other = draw(self.examples, 1, 6, 6), draw(self.examples, 1, 6, 6)
        target = image.mean((1, 2, 3)) + 0.3 * draw(self.examples)
        return {"x": image, "y": target, "x_outer": other, "y_outer": draw(self.examples)}

    def net(self, w: Tensor, image: Tensor) -> Tensor:
        """(B, 1, H, W) images to (B,) numbers."""
        kernel, bias, head, offset = w.split([18, 2, 2, 1])
        maps = torch.tanh(functional.conv2d(image, kernel.view(2, 1, 3, 3), bias))
        return (maps.mean((2, 3)) @ head) + offset

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        """Least squares; the teacher's numbers are added to the data's."""
        target = 2.0 + 3.0 * data["y"]
        target = target if teacher is None else target + self.net(teacher, data["x"])
        return ((self.net(w, data["x"]) - target) ** 2).mean() + 2.0 * self.penalty(w, s)

    def outer(self, w: Tensor, data: Data) -> Tensor:
        """Least squares."""
        return ((self.net(w, data["x_outer"]) - data["y_outer"]) ** 2).mean()


FAMILIES: dict[str, type[Family]] = {
    "quadratic": Quadratic,
    "ridge": Ridge,
    "logistic": Logistic,
    "convolutional": Convolutional,
}
SHAPES: dict[str, tuple[Edges, Edges]] = {
    "two levels": programs.TWO_LEVELS,
    "long path": programs.LONG_PATH,
    "two paths": programs.TWO_PATHS,
}
"""From ``low`` up: a level is regularised by the top or taught by the level below it, or both."""


class Settled:
    """A family in a shape, its levels at their minima.

    Attributes:
        family: of the losses.
        graph: of the levels, ``low`` and perhaps ``middle`` below ``top``.
        truth: the program at the minima, with the exact derivatives there.
    """

    def __init__(self, family: str, shape: str) -> None:
        self.family = FAMILIES[family]()
        l2u, u2l = SHAPES[shape]
        hops = Graph(dict.fromkeys((*l2u, "top"), _none), l2u, u2l).hops("top")
        losses = {name: self._fit(name, sources) for name, sources in hops.items()}
        self.lowers, last = list(hops), list(hops)[-1]
        losses["top"] = lambda nets, batch: self.family.outer(nets[last](), batch[0])
        self.graph = Graph(losses, l2u, u2l)
        generator = torch.Generator().manual_seed(1)
        values = {"top": {"value": self.family.start}}
        for name in self.lowers:
            w = 0.5 * torch.randn(self.family.size, generator=generator, dtype=torch.float64)
            values[name] = {"value": w}
        modules = {name: Vector(v["value"]) for name, v in values.items()}
        batches = dict.fromkeys(values, (self.family.data,))
        self.truth = Truth(self.graph, modules, values, batches)
        for name in self.lowers:
            values[name] = self.truth.minimum(name)
        spectra = [torch.linalg.eigvalsh(self.truth.hessian(name)) for name in self.lowers]
        self.lowest = min(float(spectrum[0]) for spectrum in spectra)
        self.highest = max(float(spectrum[-1]) for spectrum in spectra)
        assert self.lowest > 1e-2, "no minimum"

    def exact(self) -> Tensor:
        """The top level's hypergradient through the minimisers."""
        return self.truth.implicit("top")["value"]

    def one_step(self, rate: float) -> Tensor:
        """The same through one step of descent from the minima."""
        return self.truth.descent("top", rate)["value"]

    def engine(
        self, method: Any, dtype: torch.dtype, rate: float, steps: int, **more: Any
    ) -> Engine:
        """The levels at their minima; the top steps (by nothing) after ``steps`` of the last.

        Args:
            rate: of the levels below.
            more: arguments of :func:`~mlseg.testing.programs.build`.
        """
        values = {name: v["value"].to(dtype) for name, v in self.truth.values.items()}
        data = {k: v.to(dtype) for k, v in self.family.data.items()}
        optimizers = {name: programs.sgd(rate) for name in self.lowers}
        given = {
            "graph": self.graph,
            "optimizers": {**optimizers, "top": programs.sgd(0.0)},
            "configs": {self.lowers[-1]: {"unroll_steps": steps}},
            **more,
        }
        modules = {name: Vector(value) for name, value in values.items()}
        loaders = {name: [({**data},)] for name in values}
        return programs.build(modules=modules, loaders=loaders, method=method, **given)

    def stable_rate(self) -> float:
        """``1 / lambda_max`` over the levels' Hessians."""
        return 1.0 / self.highest

    def long(self) -> int:
        """Steps or terms, at that rate, after which an error has shrunk to 1e-7 everywhere."""
        return int(16.2 * self.highest / self.lowest) + 1

    def _fit(self, name: str, sources: list[str]) -> Loss:
        def loss(nets: Nets, batch: tuple[Data]) -> Tensor:
            s = nets["top"]() if "top" in sources else None
            teachers = [nets[source]() for source in sources if source != "top"]
            return self.family.fit(nets[name](), s, *(teachers or [None]), batch[0])

        return loss


def _none(nets: Nets, batch: Any) -> Tensor:
    return torch.zeros(())
