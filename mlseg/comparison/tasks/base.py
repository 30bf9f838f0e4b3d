"""What a task is, and the table of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from mlseg.config import Settings
from mlseg.config.registry import Entry, Registry, find_entry
from mlseg.engines.engine import Engine
from mlseg.hypergradients import Method, resolve
from mlseg.hypergradients.one_step import OneStep
from mlseg.multilevel.problem import Problem


class TaskSettings(Settings):
    """What every task's settings have.

    Attributes:
        name: registered name, or dotted path ``package.module:build``.
        lower_steps: steps of the lower level per step of the upper one, in training; a method that
            looks back over more steps than that is measured after as many.
    """

    name: str
    lower_steps: PositiveInt = 1


@dataclass(frozen=True)
class Conditions:
    """Under which a task's program is built.

    Attributes:
        method: the hypergradient method of every lower level: a name, a mapping of ``method`` and
            its settings, or a ``Method``.
        dtype: of all parameters and data; it is torch's default while the program is in use.
        device: where it runs.
        seed: of initial values, of the split of training and validation data, of noise.
        lower_steps: steps of the lower level per step of the upper one.
        upper_rate: learning rate of the upper level.
        upper_optimizer: ``adam`` (with an epsilon far below any hypergradient, so that their scale
            plays no part) or ``sgd``.
    """

    method: str | Mapping[str, Any] | Method
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0
    lower_steps: int = 1
    upper_rate: float = 1e-2
    upper_optimizer: Literal["adam", "sgd"] = "adam"

    def optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The upper level's."""
        if self.upper_optimizer == "sgd":
            return torch.optim.SGD(parameters, self.upper_rate)
        return torch.optim.Adam(parameters, self.upper_rate, eps=1e-16)


@dataclass(frozen=True)
class Aim:
    """Which derivative of the upper loss a method approximates.

    Attributes:
        steps: that through so many last steps of the lower level; None for the implicit one, which
            takes the lower level for solved.
    """

    steps: int | None = None

    def __str__(self) -> str:
        if self.steps is None:
            return "implicit"
        return "1 step" if self.steps == 1 else f"{self.steps} steps"


IMPLICIT, ONE_STEP = Aim(), Aim(1)


def aim_of(method: str | Mapping[str, Any] | Method, lower_steps: int) -> Aim:
    """What a method approximates, by its own word or by its settings.

    A class may say so by an attribute ``aim``: ``implicit``, ``one_step`` or ``unrolled``.
    Otherwise, a method with a setting ``steps`` looks back over so many steps (None: all
    ``lower_steps``), a :class:`~mlseg.hypergradients.one_step.OneStep` over one (unless it leaves
    out the ``scale`` of a step), and all others solve for the implicit derivative.
    """
    resolved = resolve(method)
    fields = type(resolved).model_fields
    said = getattr(type(resolved), "aim", None)
    if said == "implicit":
        return IMPLICIT
    if said == "unrolled" or (said is None and "steps" in fields):
        return Aim(getattr(resolved, "steps", None) or lower_steps)
    one_step = isinstance(resolved, OneStep) and getattr(resolved, "scale", None) != "none"
    return ONE_STEP if said == "one_step" or one_step else IMPLICIT


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Run the body, or the decorated function, with ``dtype`` as torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Program(ABC):
    """A task's engine with what a comparison wants to know of it.

    Attributes:
        engine: not yet run; each of its iterations is one step of the leaves.
        upper: the problem whose hypergradient is measured.
        exact: what counts as the exact hypergradient of this task.
        score_name: of the figure on data that nothing has learned from.
        score_note: what it is measured on, for reports.
        higher_is_better: of that score.
        provenance: of its data, for reports.
    """

    engine: Engine
    upper: Problem
    exact: Aim = IMPLICIT
    score_name: str = "score"
    score_note: str = "on test data, which play no part in any choice"
    higher_is_better: bool = False
    provenance: str = ""

    def settle(self) -> None:  # noqa: B027, most have something to do, not all
        """Bring the lower levels to the point where accuracy is measured.

        The engine then runs on from there to the upper level's first step.
        """

    @abstractmethod
    def truth(self, aim: Aim) -> list[Tensor] | None:
        """The derivative ``aim`` of the upper loss where the upper level took its last step.

        Called after that step. In float64 whatever the program's dtype, one tensor per parameter
        of ``upper``, and by other means than the library's hypergradients where that can be; None
        if the task has no such reference.
        """

    @abstractmethod
    def objective(self) -> float:
        """The upper level's loss on all its data: what it minimises, and what tuning looks at."""

    @abstractmethod
    def score(self) -> float:
        """The figure ``score_name`` as things stand."""

    def residual(self) -> float:
        """Norm of the lower loss's gradient where accuracy is measured; NaN when not known."""
        return math.nan


@dataclass(frozen=True)
class Task(Entry):
    """A task: its settings class and the function that builds its program."""

    def __call__(self, settings: Any, conditions: Conditions) -> Program:
        """Build it."""
        return self.build(settings, conditions)


TASKS: Registry[Task] = Registry(
    "task", packages=["mlseg.comparison.tasks"], example="my_package.tasks:build"
)


def task(
    name: str, settings: type[TaskSettings], summary: str
) -> Callable[[Callable[[Any, Conditions], Program]], Task]:
    """Decorator that registers ``build(settings, conditions)`` as a task.

    Args:
        name: under which configs name it.
        settings: class of its settings.
        summary: one line for ``--help``.
    """

    def enter(build: Callable[[Any, Conditions], Program]) -> Task:
        return TASKS.register(name)(Task(name, summary, settings, build))

    return enter


def load_task(name: str) -> Task:
    """Find a task by registered name or by dotted path ``package.module:attribute``.

    Raises:
        UserError: there is none of that name, or the path leads to something else.
    """
    return find_entry(TASKS, Task, TaskSettings, name)


def all_tasks() -> Sequence[Task]:
    """Every registered task, by name."""
    return list(TASKS.all().values())
