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
    """A level whose variables are one tensor; calling it gives the tensor."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        return self.value


class Ridge:
    """Least squares with a penalty per coordinate; the base of the other families.

    A lower level's loss is ``fit(w, s, teacher, data)``: regularised by the hyperparameters ``s``,
    its targets shifted by the variables ``teacher`` of another level. All data are float64.
    """

    size, examples = 6, 24

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
        strength: Any = 0.3
        if s is not None:  # each regularises every fourth variable
            strength = 0.1 + functional.softplus(s).repeat(self.size)[: self.size]
        return (strength * w * w).sum()

    def net(self, w: Tensor, x: Tensor) -> Tensor:
        return x @ w

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        target = data["y"] if teacher is None else data["y"] + 0.5 * self.net(teacher, data["x"])
        return ((self.net(w, data["x"]) - target) ** 2).mean() + self.penalty(w, s)

    def outer(self, w: Tensor, data: Data) -> Tensor:
        """The top level's loss."""
        return ((self.net(w, data["x_outer"]) - data["y_outer"]) ** 2).mean()


class Quadratic(Ridge):
    """``w^T A w / 2 - w^T (B s + C teacher + d)``, condition number 10."""

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        n = self.size
        q = torch.linalg.qr(draw(n, n))[0]
        a = q @ torch.diag(torch.logspace(0, 1, n, dtype=torch.float64)) @ q.T
        given = super().draw_data(draw)
        return {**given, "a": a, "b": draw(n, HYPERPARAMETERS), "c": draw(n, n), "d": draw(n)}

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        force = data["d"] if s is None else data["d"] + data["b"] @ s
        force = force if teacher is None else force + data["c"] @ teacher
        return 0.5 * w @ data["a"] @ w - w @ force


class Logistic(Ridge):
    """Logistic regression with a penalty per coordinate; a teacher gives soft labels."""

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        x = data["x"]
        target = (data["y"] > 0).to(w.dtype) if teacher is None else (x @ teacher).sigmoid()
        loss = functional.binary_cross_entropy_with_logits(x @ w, target)
        return loss + self.penalty(w, s)


class Convolutional(Ridge):
    """Two filters of 3x3, tanh, mean, a linear head, on images of 6x6."""

    size = 2 * 9 + 2 + 2 + 1

    def draw_data(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        image, other = draw(self.examples, 1, 6, 6), draw(self.examples, 1, 6, 6)
        target = image.mean((1, 2, 3)) + 0.3 * draw(self.examples)
        return {"x": image, "y": target, "x_outer": other, "y_outer": draw(self.examples)}

    def net(self, w: Tensor, x: Tensor) -> Tensor:
        kernel, bias, head, offset = w.split([18, 2, 2, 1])
        maps = torch.tanh(functional.conv2d(x, kernel.view(2, 1, 3, 3), bias))
        return (maps.mean((2, 3)) @ head) + offset

    def fit(self, w: Tensor, s: Tensor | None, teacher: Tensor | None, data: Data) -> Tensor:
        target = 2.0 + 3.0 * data["y"]
        target = target if teacher is None else target + self.net(teacher, data["x"])
        return ((self.net(w, data["x"]) - target) ** 2).mean() + 2.0 * self.penalty(w, s)


FAMILIES: dict[str, type[Ridge]] = {
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
        lowest, highest: eigenvalues of the lower levels' Hessians there.
        rate: at which descent is stable, ``1 / highest``.
    """

    def __init__(self, family: str, shape: str) -> None:
        self.family, (l2u, u2l) = FAMILIES[family](), SHAPES[shape]
        losses: dict[str, Loss] = dict.fromkeys((*l2u, "top"), self._outer)
        for name, sources in Graph(losses, l2u, u2l).hops("top").items():
            losses[name] = self._inner(name, sources)
        self.graph, self.lowers = Graph(losses, l2u, u2l), list(l2u)
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
        self.rate = 1.0 / self.highest

    def _inner(self, name: str, sources: list[str]) -> Loss:
        def loss(nets: Nets, batch: tuple[Data]) -> Tensor:
            s = nets["top"]() if "top" in sources else None
            teacher = nets["low"]() if "low" in sources else None
            return self.family.fit(nets[name](), s, teacher, batch[0])

        return loss

    def _outer(self, nets: Nets, batch: tuple[Data]) -> Tensor:
        return self.family.outer(nets[self.lowers[-1]](), batch[0])

    def exact(self, damping: float = 0.0) -> Tensor:
        """The top level's hypergradient through the minimisers, of damped Hessians if wanted."""
        return self.truth.implicit("top", damping)["value"]

    def one_step(self) -> Tensor:
        """The same through one step of descent from the minima."""
        return self.truth.descent("top", self.rate)["value"]

    def engine(
        self, method: Any, dtype: torch.dtype = torch.float64, steps: int = 1, **more: Any
    ) -> Engine:
        """The levels at their minima; the top steps (by nothing) after ``steps`` of the last.

        Args:
            more: arguments of :func:`~mlseg.testing.programs.build`.
        """
        data = {k: v.to(dtype) for k, v in self.family.data.items()}
        values = {name: v["value"].to(dtype) for name, v in self.truth.values.items()}
        given = {
            "graph": self.graph,
            "modules": {name: Vector(value) for name, value in values.items()},
            "loaders": {name: [({**data},)] for name in values},
            "optimizers": {
                name: programs.sgd(0.0 if name == "top" else self.rate) for name in values
            },
            "configs": {self.lowers[-1]: {"unroll_steps": steps}},
        }
        return programs.build(method=method, **{**given, **more})

    def long(self) -> int:
        """Steps or terms, at that rate, after which an error has shrunk to 1e-7 everywhere."""
        return int(16.2 * self.highest / self.lowest) + 1
