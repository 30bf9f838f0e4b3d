"""Methods ask of a level what the protocol says, and no more: here of one that is no Problem."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlseg.hypergradients import Hop, Level, Stepping, Trajectory, names, resolve
from mlseg.hypergradients.level import Again, Interface
from mlseg.hypergradients.registry import classes
from mlseg.multilevel.problem import Problem

RATE = 0.1


class Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Bare:
    """``l(w, s) = sum(c (w - s)^2) / 2`` for ``w`` of two numbers, after a step of descent.

    Its minimiser is ``s``; one step moves ``w`` by ``RATE c`` per unit of ``s``.
    """

    name, count, unroll_steps, precision = "bare", 1, 1, "fp32"
    interface: Interface | None = None
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def __init__(self, method: Any) -> None:
        self.module, self.upper = Vector(0.3, -0.4), Vector(1.0, 2.0)
        self.hop_memory: dict[str, dict[str, Tensor]] = {}
        self.trajectory = Trajectory(method.keeps(self))
        optimizer = self.stepping.optimizer
        if self.trajectory.keeps.steps:
            self.trajectory.begin(self.trainable_parameters(), optimizer)
            self.trajectory.see(None, None)
        self.last_loss().backward(inputs=[self.module.value])
        if self.trajectory.is_open:
            self.trajectory.end(self.trainable_parameters(), False)
        optimizer.step()

    @property
    def stepping(self) -> Stepping:
        optimizer = torch.optim.SGD(self.module.parameters(), RATE)
        return Stepping(optimizer, 0.0, 1, frozenset(), False, lambda: None)

    @property
    def again(self) -> Any:
        return self

    @contextmanager
    def untraced(self) -> Iterator[None]:
        yield

    def rewind(self, random_state: Any = None) -> None:
        raise AssertionError("there is no interface")

    def last_loss(self) -> Tensor:
        return 0.5 * (self.curvature * (self.module.value - self.upper.value) ** 2).sum()

    def loss(self, batch: Any, random_state: Any, apart: bool = False) -> Tensor:
        return self.last_loss()

    def fresh_loss(self) -> Tensor:
        return self.last_loss()

    def modules(self) -> list[nn.Module]:
        return [self.module, self.upper]

    def trainable_parameters(self) -> list[Tensor]:
        return [self.module.value]

    meta_trainable_parameters = trainable_parameters

    def sources(self) -> list[Any]:
        return [Source(self.upper)]


class Source:
    name = "upper"

    def __init__(self, module: Vector) -> None:
        self.module = module

    def trainable_parameters(self) -> list[Tensor]:
        return [self.module.value]


LONG: dict[str, dict[str, Any]] = {
    "cg": {},
    "minres": {},
    "exact": {},
    "neumann": {"terms": 200},
    "fixed_point": {"iterations": 400},
    "stochastic": {"iterations": 400},
    "nystrom": {"damping": 1e-6},
    "penalty": {"iterations": 400},
    "evolution": {"directions": "orthogonal", "pairs": 2},
    "kfac": {"rescale": False},
}


@pytest.mark.parametrize("method", names())
def test_every_method_on_a_level_that_is_no_problem(method: str) -> None:
    """Quadratic: differences and penalties are exact but for rounding, Nyström for its damping."""
    made = resolve({"method": method, **LONG.get(method, classes()[method].converged)})
    level = Bare(made)
    made.check(level)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ((gradient,),), _ = made([v], Hop(level, level.sources()))
    one_step = made.best_response in (
        "one step of the optimizer",
        "the last steps, as they were taken",
    )
    # A level without layers has its learning rate for kfac's inverse.
    one_step = one_step or method == "kfac"
    truth = RATE * level.curvature * v if one_step else v
    torch.testing.assert_close(gradient, truth, rtol=1e-4 if made.converged else 1e-5, atol=0.0)


def test_a_problem_has_all_that_the_protocols_name() -> None:
    problem = Problem("low", nn.Linear(1, 1))
    for protocol, thing in ((Level, problem), (Again, problem.again)):
        members = {m for m in vars(protocol) if not m.startswith("_")}
        members |= set(protocol.__annotations__)
        assert len(members) >= 6
        assert {m for m in members if not hasattr(thing, m)} == set()
