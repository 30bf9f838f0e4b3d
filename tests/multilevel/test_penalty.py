"""The upper level by a penalty: F2SA and BOME."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from mlseg import checkpoint
from mlseg.multilevel.penalty import PenaltyProblem, PenaltySettings
from mlseg.testing import programs
from mlseg.testing.families import Settled
from mlseg.testing.programs import Graph, Recorded


class Top(PenaltyProblem, Recorded):
    lower = "low"


def engine(made: Settled, settings: PenaltySettings, lower_rate: float, rate: float) -> Any:
    """The ridge program from its lower level's minimum."""
    found: Any = made.engine(
        "identity",
        graph=Graph(made.graph.losses, made.graph.l2u, {}),
        optimizers={"low": programs.sgd(lower_rate), "top": programs.sgd(rate)},
        kinds={"top": Top},
    )
    found.top.penalty = settings
    return found


@pytest.fixture(scope="module")
def made() -> Settled:
    return Settled("ridge", "two levels")


def error(made: Settled, strength: float) -> float:
    settings = PenaltySettings(strength=strength, steps=300, rate=made.rate)
    found = engine(made, settings, 1e-12, 0.0)
    found.iterate()
    return float((found.top.gradient - made.exact()).norm() / made.exact().norm())


def test_the_gradient_is_the_hypergradient_up_to_one_over_the_strength(made: Settled) -> None:
    errors = [error(made, strength) for strength in (1e2, 1e3, 1e4)]
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(10.0, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        PenaltySettings(strength=20.0, growth=0.5, steps=5),
        PenaltySettings(barrier=1.0, steps=5),
    ],
    ids=["f2sa", "bome"],
)
def test_the_outer_loss_goes_where_exact_hypergradients_lead(
    made: Settled, settings: PenaltySettings
) -> None:
    """Neither level starts at its minimum; the lower one trains beside the upper one."""
    found = engine(made, settings, made.rate, 0.05)
    exact = made.engine("exact")
    for group in exact.top.optimizer.param_groups:
        group["lr"] = 0.05
    first = 0.0
    for _ in range(300):
        found.iterate()
        exact.iterate()
        first = first or float(exact.top.metrics["loss"])
    best = float(exact.top.metrics["loss"])
    reached = float(made.family.outer(found.low.module.value.detach(), made.family.data))
    assert reached < first - 0.8 * (first - best)


def test_resumed_bit_by_bit(made: Settled, tmp_path: Path) -> None:
    def make() -> Any:
        return engine(made, PenaltySettings(growth=0.1), made.rate, 0.1)

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
