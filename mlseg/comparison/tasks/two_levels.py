"""Two levels given by two losses; their exact derivatives by plain automatic differentiation."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.func import functional_call

from mlseg.comparison.tasks.base import Aim, Conditions, Program, TaskSettings
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem

Call = Callable[..., Tensor]
"""A network: the problem itself, or a function of it with other parameters in place."""
Data = tuple[Tensor, ...]
T = TypeVar("T")

_KEPT: dict[Any, Any] = {}


class TwoLevelSettings(TaskSettings):
    """What the settings of a two-level task have.

    Attributes:
        rate: of the lower level's gradient descent; None for one over the largest eigenvalue of
            its loss's Hessian at the initial point.
    """

    rate: PositiveFloat | None = None


class Lower(Problem):
    """The lower level; the upper one is its attribute ``upper``."""

    program: TwoLevels

    def training_step(self, batch: Any) -> Tensor:
        """The lower loss."""
        return self.program.inner(self, self.upper, batch)


class Upper(Problem):
    """The upper level; the lower one is its attribute ``lower``."""

    program: TwoLevels

    def training_step(self, batch: Any) -> Tensor:
        """The upper loss."""
        return self.program.outer(self.lower, self, batch)


class Tensors(nn.Module):
    """A level whose variables are one vector; calling it gives the vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())

    def forward(self) -> Tensor:
        """(N,) variables."""
        return self.values


class TwoLevels(Program):
    """A lower level under plain gradient descent on all its data, below an upper one.

    Derive from it and write :meth:`inner` and :meth:`outer`. Both are called with the problems in
    training, and for the exact derivatives with the same networks as functions of float64 tensors.

    Args:
        settings: the task's.
        conditions: those of the comparison.
        lower, upper: the levels' modules, in float64.
        training, validation: the data of the two levels, floating-point tensors in float64.
    """

    def __init__(
        self,
        settings: TwoLevelSettings,
        conditions: Conditions,
        lower: nn.Module,
        upper: nn.Module,
        training: Data,
        validation: Data,
    ) -> None:
        self.settings, self.conditions = settings, conditions
        self.training, self.validation = training, validation
        self.modules = copy.deepcopy(lower), copy.deepcopy(upper)
        start, top = parameters(lower), parameters(upper)
        if settings.rate is not None:
            self.rate = settings.rate
        else:
            self.rate = self._kept("rate", top, lambda: self._safe_rate(start, top))
        dtype = conditions.dtype
        lower.to(dtype)
        upper.to(dtype)
        self.lower = Lower(
            "lower",
            lower,
            torch.optim.SGD(lower.parameters(), self.rate),
            [as_dtype(training, dtype)],
            Config(hypergradient=conditions.method, unroll_steps=conditions.lower_steps),
        )
        self.upper = Upper(
            "upper",
            upper,
            conditions.optimizer(list(upper.parameters())),
            [as_dtype(validation, dtype)],
        )
        self.lower.program = self.upper.program = self
        self.engine = Engine(
            [self.lower, self.upper],
            EngineSettings(validate_every=0, tensorboard=False),
            u2l={self.upper: [self.lower]},
            l2u={self.lower: [self.upper]},
            device=conditions.device,
            quiet=True,
        )
        self._mark()

    @abstractmethod
    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """The lower level's loss on a batch of its data."""

    @abstractmethod
    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """The upper level's loss on a batch of its data."""

    # ------------------------------------------------------------- where to measure

    def settle(self) -> None:
        """Put the lower level where its loss is smallest, to float64's precision."""
        solution = self._kept("solution", self._top, self.solution)
        with torch.no_grad():
            for name, p in self.lower.module.named_parameters():
                p.copy_(solution[name])
        self._mark()

    def _safe_rate(self, low: Mapping[str, Tensor], top: Mapping[str, Tensor]) -> float:
        return float(1.0 / torch.linalg.eigvalsh(self.hessian(low, top)).abs().max())

    def _kept(self, what: str, top: Mapping[str, Tensor], compute: Callable[[], T]) -> T:
        """What depends on data and upper variables alone; a comparison builds the same often."""
        at = flatten(top).numpy().tobytes()
        key = (type(self), self.settings, self.conditions.seed, what, at)
        if key not in _KEPT:
            if len(_KEPT) >= 64:
                _KEPT.clear()
            _KEPT[key] = compute()
        found: T = _KEPT[key]
        return found

    def solution(self) -> dict[str, Tensor]:
        """The lower level's minimum for the upper level's present variables.

        By L-BFGS and then Newton's method, as long as its steps bring the gradient down.
        """
        low, top = self.points()
        names = list(low)
        leaves = [low[name].clone().requires_grad_() for name in names]
        optimizer = torch.optim.LBFGS(
            leaves,
            max_iter=500,
            history_size=50,
            tolerance_grad=1e-10,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._inner(dict(zip(names, leaves, strict=True)), top)
            loss.backward(inputs=leaves)
            return loss

        optimizer.step(closure)
        point = {name: leaf.detach() for name, leaf in zip(names, leaves, strict=True)}
        gradient = self.gradient(point, top)
        for _ in range(20):
            step = torch.linalg.solve(self.hessian(point, top), gradient)
            moved = unflatten(flatten(point) - step, point)
            found = self.gradient(moved, top)
            if not found.norm() < gradient.norm():
                break
            point, gradient = moved, found
        return point

    def residual(self) -> float:
        """Norm of the lower loss's gradient."""
        return float(self.gradient(*self.points()).norm())

    # ------------------------------------------------------------------- the truth

    def truth(self, aim: Aim) -> list[Tensor]:
        """By dense solve with the Hessian, or by double backward through the steps taken."""
        top = self._top
        found = self.implicit() if aim.steps is None else self.unrolled(aim.steps)
        return [found[name] for name in top]

    def implicit(self) -> dict[str, Tensor]:
        """``d_s F - (d_s d_w f) (d_w d_w f)^-1 d_w F`` by a dense solve in float64."""
        low, top = self.points()
        vector = flatten(_gradients(lambda w: self._outer(w, top), low))
        solved = unflatten(torch.linalg.solve(self.hessian(low, top), vector), low)
        direct = _gradients(lambda s: self._outer(low, s), top)

        def along(s: Mapping[str, Tensor]) -> Tensor:
            gradient = torch.func.grad(lambda w: self._inner(w, s))(low)
            return sum(((gradient[n] * solved[n]).sum() for n in low), start=torch.zeros(()))

        mixed = _gradients(along, top)
        return {name: direct[name] - mixed[name] for name in top}

    def unrolled(self, steps: int) -> dict[str, Tensor]:
        """Double backward through the last ``steps`` of the steps taken since :meth:`settle`."""
        top = {name: value.clone().requires_grad_() for name, value in self._top.items()}
        low = self._start
        with torch.no_grad():
            for _ in range(self.conditions.lower_steps - steps):
                low = self._descend(low, self._top)
        low = {name: value.clone().requires_grad_() for name, value in low.items()}
        for _ in range(steps):
            low = self._descend(low, top, create_graph=True)
        gradients = torch.autograd.grad(
            self._outer(low, top), list(top.values()), materialize_grads=True
        )
        return dict(zip(top, gradients, strict=True))

    def _descend(
        self, low: Mapping[str, Tensor], top: Mapping[str, Tensor], create_graph: bool = False
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            point = {
                n: w if w.requires_grad else w.clone().requires_grad_() for n, w in low.items()
            }
            gradients = torch.autograd.grad(
                self._inner(point, top), list(point.values()), create_graph=create_graph
            )
        return {name: point[name] - self.rate * g for name, g in zip(point, gradients, strict=True)}

    # ------------------------------------------------------------------- figures

    @torch.no_grad()
    def objective(self) -> float:
        """The upper loss on all validation data, at the lower level as it is."""
        low, top = (_double(p.module) for p in (self.lower, self.upper))
        return float(self._outer(low, top))

    # ---------------------------------------------------------------------- parts

    def points(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both levels' variables in float64: the upper's as it took its step, if it has."""
        return _double(self.lower.module), self._top

    def hessian(self, low: Mapping[str, Tensor], top: Mapping[str, Tensor]) -> Tensor:
        """(N, N) of the lower loss by the lower variables, in the order of :func:`flatten`."""

        def loss(flat: Tensor) -> Tensor:
            return self._inner(unflatten(flat, low), top)

        return torch.func.hessian(loss)(flatten(low))

    def gradient(self, low: Mapping[str, Tensor], top: Mapping[str, Tensor]) -> Tensor:
        """(N,) of the lower loss by the lower variables."""
        return flatten(_gradients(lambda w: self._inner(w, top), low))

    def _mark(self) -> None:
        """Note both levels' variables: here the steps begin that a derivative goes through."""
        self._start, self._top = _double(self.lower.module), _double(self.upper.module)

    def _inner(self, low: Mapping[str, Tensor], top: Mapping[str, Tensor]) -> Tensor:
        return self.inner(self._call(0, low), self._call(1, top), self.training)

    def _outer(self, low: Mapping[str, Tensor], top: Mapping[str, Tensor]) -> Tensor:
        return self.outer(self._call(0, low), self._call(1, top), self.validation)

    def _call(self, index: int, values: Mapping[str, Tensor]) -> Call:
        return lambda *inputs: functional_call(self.modules[index], dict(values), inputs)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def flatten(point: Mapping[str, Tensor]) -> Tensor:
    """All tensors in one vector."""
    return torch.cat([value.flatten() for value in point.values()])


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: p.view_as(like[name]) for name, p in zip(like, parts, strict=True)}


def as_dtype(data: Data, dtype: torch.dtype) -> Data:
    """``data`` with its floating-point tensors in ``dtype``."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in data)


def _double(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.to("cpu", torch.float64) for name, p in parameters(module).items()}


def _gradients(
    function: Callable[[Mapping[str, Tensor]], Tensor], point: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in point.items()}
    with torch.enable_grad():
        value = function(leaves)
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
