"""Levels by name: apart from attributes, checked once, as on Betty where they are Betty's."""

from typing import Any

import betty.configs
import betty.engine
import betty.problems
import pytest
import torch
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import UserError
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem


class Lower:
    """A level's loss, weighed by the upper level of whatever name."""

    def training_step(self: Any, batch: Any) -> Tensor:
        return ((self.module(batch[0]) - 1.0) ** 2).mean() * self.other().weight.exp().sum()


class Upper:
    def training_step(self: Any, batch: Any) -> Tensor:
        return (self.other()(batch[0]) ** 2).mean()


def made(kind: type, base: type, name: str, other: str, attributes: Any = None) -> Any:
    """A problem that finds the other level by ``getattr``, as Betty's do."""
    torch.manual_seed(len(name))
    module = nn.Linear(4, 1) if kind is Lower else nn.Linear(1, 1)
    values = {"other": lambda self: getattr(self, other).module, **(attributes or {})}
    cls: Any = type(kind.__name__, (kind, base), values)
    config: Any = Config() if base is Problem else betty.configs.Config()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    data = [(torch.full((3, 4), 0.5 if kind is Lower else 2.0),)]
    return (
        cls(name, config, module, optimizer, train_data_loader=data)
        if (base is not Problem)
        else cls(name, module, optimizer, data, config)
    )


def engine_of(lower: str, upper: str, base: type = Problem, attributes: Any = None) -> Engine:
    low = made(Lower, base, lower, upper, attributes)
    top = made(Upper, base, upper, lower)
    return Engine(
        [low, top],
        EngineSettings(iterations=3, tensorboard=False),
        l2u={low: [top]},
        u2l={top: [low]},
        device="cpu",
        quiet=True,
    )


TAKEN = ["loss", "method", "hooks", "best", "stage", "settings", "optimizer", "validation"]
TAKEN += ["recorder", "levels", "scheduler", "param_callback", "not a name", "lambda", "logger"]


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("place", ["lower", "upper"])
def test_a_taken_name_is_refused_in_one_line(name: str, place: str) -> None:
    names = {"lower": "low", "upper": "top", place: name}
    with pytest.raises(UserError) as caught:
        engine_of(names["lower"], names["upper"])
    line = str(caught.value)
    assert repr(name) in line
    assert line.endswith("rename it")
    assert "\n" not in line


def test_a_doubled_name_is_refused() -> None:
    with pytest.raises(UserError, match="two levels are named 'same'; rename one"):
        engine_of("same", "same")


def test_levels_are_found_by_name_in_either_way() -> None:
    engine = engine_of("weights", "rates")
    assert list(engine.levels) == ["weights", "rates"]
    low, top = engine.levels.values()
    assert engine.weights is low
    assert low.rates is low.levels["rates"] is top.levels["rates"] is top
    assert low.levels["weights"] is low
    engine.run()
    with pytest.raises(AttributeError, match="no attribute or level 'nothing'"):
        _ = low.nothing
    assert "rates" not in vars(low)


def test_an_attribute_of_ones_own_is_not_overwritten() -> None:
    with pytest.raises(UserError, match="problem 'low' has an attribute of its own of that name"):
        engine_of("low", "teacher", attributes={"teacher": nn.Linear(1, 1)})


def test_a_placeholder_gives_way_as_on_betty() -> None:
    engine = engine_of("low", "teacher", attributes={"teacher": None})
    engine.run()
    assert engine.low.teacher is engine.levels["teacher"]


PLAIN = ["loss", "method", "meta", "best", "stage", "settings", "recorder", "validation"]


@pytest.mark.parametrize("name", [*PLAIN, "not a name"])
def test_plain_problems_have_the_names_that_betty_lets_them(name: str) -> None:
    """And train to the same weights as there, but for ``validation``, which Betty would call."""
    engine = engine_of(name, "top", betty.problems.ImplicitProblem)
    engine.run()
    assert engine.levels[name].count == 3
    low = made(Lower, betty.problems.ImplicitProblem, name, "top")
    top = made(Upper, betty.problems.ImplicitProblem, "top", name)
    config = betty.configs.EngineConfig(train_iters=3, valid_step=10, strategy="cpu")
    dependencies = {"l2u": {low: [top]}, "u2l": {top: [low]}}
    betty.engine.Engine([low, top], config, dependencies).run()
    for ours, theirs in ((engine.levels[name], low), (engine.levels["top"], top)):
        for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["optimizer", "config", "problems"])
def test_plain_problems_names_that_betty_refuses_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"named '{name}': Betty has an attribute of that name"):
        engine_of(name, "top", betty.problems.ImplicitProblem)


def test_on_bettys_own_engine_levels_are_known_as_well() -> None:
    low, top = made(Lower, Problem, "low", "top"), made(Upper, Problem, "top", "low")
    dependencies = {"l2u": {low: [top]}, "u2l": {top: [low]}}
    config = betty.configs.EngineConfig(train_iters=2, strategy="cpu")
    betty.engine.Engine([low, top], config, dependencies).run()
    assert low.levels == {"low": low, "top": top}
