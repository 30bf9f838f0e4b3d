"""The upper level by a penalty: F2SA and BOME."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from programs import FAMILIES, SHAPES, Level, Program
from torch import Tensor

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.multilevel.config import Config
from mlseg.multilevel.penalty import PenaltyProblem, PenaltySettings


class Top(PenaltyProblem, Level):
    lower = "low"


def engine(made: Program, settings: PenaltySettings, lower_rate: float, rate: float) -> Any:
    """The ridge program from its lower level's minimum."""
    data = {k: v.double() for k, v in made.family.data.items()}
    problems: list[Any] = []
    for name, cls, lr in (("low", Level, lower_rate), ("top", Top, rate)):
        module = _variables(made.minima[name])
        optimizer = torch.optim.SGD(module.parameters(), lr)
        problems.append(cls(name, module, optimizer, [({**data},)], Config()))
        problems[-1].rule = made._rule(name)
    low, top = problems
    top.penalty = settings
    return Engine(
        [low, top], EngineSettings(tensorboard=False), l2u={low: [top]}, device="cpu", quiet=True
    )


def _variables(value: Tensor) -> Any:
    from programs import Variables

    return Variables(value)


@pytest.fixture(scope="module")
def made() -> Program:
    return Program(FAMILIES["ridge"](), SHAPES["two levels"])


def error(made: Program, strength: float) -> float:
    settings = PenaltySettings(strength=strength, steps=300, rate=made.stable_rate())
    found = engine(made, settings, 1e-12, 0.0)
    found.iterate()
    return float((found.top.gradient - made.exact()).norm() / made.exact().norm())


def test_the_gradient_is_the_hypergradient_up_to_one_over_the_strength(made: Program) -> None:
    errors = [error(made, strength) for strength in (1e2, 1e3, 1e4)]
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(10.0, rel=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        PenaltySettings(strength=20.0, growth=0.5, steps=5),
        PenaltySettings(barrier=1.0, steps=5),
    ],
    ids=["f2sa", "bome"],
)
def test_the_outer_loss_goes_where_exact_hypergradients_lead(
    made: Program, settings: PenaltySettings
) -> None:
    """Neither level starts at its minimum; the lower one trains beside the upper one."""
    found = engine(made, settings, made.stable_rate(), 0.05)
    exact = made.engine("exact", torch.float64, made.stable_rate(), 1)
    for group in exact.top.optimizer.param_groups:
        group["lr"] = 0.05
    first = None
    for _ in range(300):
        found.iterate()
        exact.iterate()
        first = first or float(exact.top.metrics["loss"])
    best = float(exact.top.metrics["loss"])
    reached = float(made.family.outer(found.low.module.value.detach(), made.family.data))
    assert reached < first - 0.8 * (first - best)


def test_resumed_bit_by_bit(made: Program, tmp_path: Path) -> None:
    def make() -> Any:
        return engine(made, PenaltySettings(growth=0.1), made.stable_rate(), 0.1)

    through, broken, resumed = make(), make(), make()
    for _ in range(6):
        through.iterate()
    for _ in range(3):
        broken.iterate()
    checkpoint.save(tmp_path / "state.pt", broken.state_dict())
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    for _ in range(3):
        resumed.iterate()
    assert tiny.same(tiny.weights(through), tiny.weights(resumed))
