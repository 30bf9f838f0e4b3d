"""Two levels given by two losses; their exact derivatives by plain automatic differentiation."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from mlseg.comparison.tasks.base import Aim, Conditions, Program, TaskSettings
from mlseg.engines.settings import EngineSettings
from mlseg.testing import programs
from mlseg.testing.exact import Truth, flatten, unflatten
from mlseg.testing.programs import Call, Graph, Parameters, parameters

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


class TwoLevels(Program):
    """A lower level under plain gradient descent on all its data, below an upper one.

    Derive from it and write :meth:`inner` and :meth:`outer`. Both are called with the problems'
    networks in training, and for the exact derivatives with the same networks at other parameters,
    in float64.

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
        modules = {"lower": lower, "upper": upper}
        graph = Graph(
            {
                "lower": lambda nets, batch: self.inner(nets["lower"], nets["upper"], batch),
                "upper": lambda nets, batch: self.outer(nets["lower"], nets["upper"], batch),
            },
            {"lower": ["upper"]},
            {"upper": ["lower"]},
        )
        self.start = Truth(
            graph,
            copy.deepcopy(modules),
            {name: parameters(module) for name, module in modules.items()},
            {"lower": training, "upper": validation},
        )
        """Here the steps begin that a derivative goes through."""
        self.rate = settings.rate or self._kept("rate", self._safe_rate)
        dtype = conditions.dtype
        self.engine = programs.build(
            graph,
            {name: module.to(dtype) for name, module in modules.items()},
            {"lower": [as_dtype(training, dtype)], "upper": [as_dtype(validation, dtype)]},
            conditions.method,
            {"lower": programs.sgd(self.rate), "upper": conditions.optimizer},
            kinds=dict.fromkeys(modules, programs.Level),
            configs={"lower": {"unroll_steps": conditions.lower_steps}},
            settings=EngineSettings(validate_every=0, tensorboard=False),
            device=conditions.device,
        )
        self.lower, self.upper = self.engine.problems

    @abstractmethod
    def inner(self, low: Call, top: Call, batch: Any) -> Tensor:
        """The lower level's loss on a batch of its data."""

    @abstractmethod
    def outer(self, low: Call, top: Call, batch: Any) -> Tensor:
        """The upper level's loss on a batch of its data."""

    # ------------------------------------------------------------- where to measure

    def settle(self) -> None:
        """Put the lower level where its loss is smallest, to float64's precision."""
        solution = self._kept("solution", self.solution)
        with torch.no_grad():
            for name, p in self.lower.module.named_parameters():
                p.copy_(solution[name])
        self.start = self.start.moved(self._values())

    def solution(self) -> Parameters:
        """The lower level's minimum for the upper level's present variables."""
        return self.present().minimum("lower")

    def _safe_rate(self) -> float:
        return float(1.0 / torch.linalg.eigvalsh(self.start.hessian("lower")).abs().max())

    def _kept(self, what: str, compute: Callable[[], T]) -> T:
        """What depends on data and upper variables alone; a comparison builds the same often."""
        at = flatten(self.start.values["upper"]).numpy().tobytes()
        key = (type(self), self.settings, self.conditions.seed, what, at)
        if key not in _KEPT:
            if len(_KEPT) >= 64:
                _KEPT.clear()
            _KEPT[key] = compute()
        found: T = _KEPT[key]
        return found

    def residual(self) -> float:
        """Norm of the lower loss's gradient."""
        return float(self.present().slope("lower").norm())

    # ------------------------------------------------------------------- the truth

    def at(self, low: Parameters) -> Truth:
        """Both levels in float64: the upper as it took its step, if it has."""
        return self.start.moved({"lower": low})

    def present(self) -> Truth:
        """The lower level as it is."""
        return self.at(_double(self.lower.module))

    def truth(self, aim: Aim) -> list[Tensor]:
        """By dense solve with the Hessian, or by double backward through the steps taken."""
        found = self.implicit() if aim.steps is None else self.unrolled(aim.steps)
        return [found[name] for name in self.start.values["upper"]]

    def implicit(self) -> Parameters:
        """``d_s F - (d_s d_w f) (d_w d_w f)^-1 d_w F`` by a dense solve in float64."""
        return self.present().implicit("upper")

    def unrolled(self, steps: int) -> Parameters:
        """Double backward through the last ``steps`` of the steps taken since :meth:`settle`."""
        low = self.start.values["lower"]
        for _ in range(self.conditions.lower_steps - steps):
            slope = unflatten(self.at(low).slope("lower"), low)
            low = {name: w - self.rate * slope[name] for name, w in low.items()}
        return self.at(low).descent("upper", self.rate, steps)

    # ------------------------------------------------------------------- figures

    @torch.no_grad()
    def objective(self) -> float:
        """The upper loss on all validation data, at the lower level as it is."""
        return float(self.start.loss("upper", self._values()))

    def _values(self) -> dict[str, Parameters]:
        return {p.name: _double(p.module) for p in (self.lower, self.upper)}


def as_dtype(data: Data, dtype: torch.dtype) -> Data:
    """``data`` with its floating-point tensors in ``dtype``."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in data)


def _double(module: nn.Module) -> Parameters:
    return {name: p.to("cpu", torch.float64) for name, p in parameters(module).items()}
