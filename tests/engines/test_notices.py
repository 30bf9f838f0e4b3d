"""What an engine says once of programs that train, and yet can't mean what they do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scaled import Lower, Upper, error, program
from torch import nn

from mlseg import EngineSettings
from mlseg.dry_run import timed_dry_run
from mlseg.hypergradients.registry import classes

ONCE = EngineSettings(iterations=3, log_every=1, tensorboard=False)


class Alone(Lower):
    """Doesn't depend on the upper level."""

    def training_step(self, batch: Any) -> Any:
        return error(self(batch[0]), batch[1])


class Blind(Upper):
    """Doesn't depend on the lower level."""

    def training_step(self, batch: Any) -> Any:
        return self.module.weight.sum() ** 2


class Forgetting(Upper):
    def training_step(self, batch: Any) -> Any:
        return self.module.weight.sum() + 0.0 * super().training_step(batch)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize("method", ["finite_difference", "identity", "cg", "unrolled"])
@pytest.mark.parametrize(
    ("levels", "why"),
    [
        ({"lower": Alone}, "what 'lower' steps along doesn't depend on the parameters of 'upper'"),
        ({"upper": Blind}, "its loss doesn't depend on the parameters of 'lower'"),
        ({"upper": Forgetting}, "its loss doesn't depend on the parameters of 'lower'"),
    ],
)
def test_a_hypergradient_that_is_zero(
    method: str, levels: Any, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(method, settings=ONCE, out=tmp_path, quiet=False, **levels).run()
    (event,) = events(tmp_path, "hypergradient_zero")
    assert (event["step"], event["problem"], event["level"]) == (1, "upper", "lower")
    assert why in event["text"]
    assert capsys.readouterr().err.count(f"step 1: {event['text']}") == 1
    with pytest.warns(UserWarning, match="through 'lower' is exactly zero"):
        program(method, **levels).iterate()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("lower", [Lower, Alone])
def test_adaptive_optimizers_are_looked_at_from_their_second_step(
    optimizer: Any, lower: Any, tmp_path: Path
) -> None:
    """The derivative of a first step along the gradient's sign is zero up to rounding."""
    program("sama", settings=ONCE, out=tmp_path, lower=lower, optimizer=optimizer).run()
    found = events(tmp_path, "hypergradient_zero")
    assert [event["step"] for event in found] == ([2] if lower is Alone else [])


def test_the_timed_dry_run_says_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    timed_dry_run(program("identity", lower=Alone, quiet=False))
    assert capsys.readouterr().err.count("through 'lower' is exactly zero") == 1


def test_a_zero_vector_makes_no_step_of_1e18() -> None:
    engine = program("finite_difference", upper=Blind)
    with pytest.warns(UserWarning, match="exactly zero"):
        engine.iterate()
    assert float(engine.upper.metrics["hypergradient/lower_step"]) < 1.0
    assert engine.upper.gradients == [2.0 * float(engine.upper.module.weight)]


def indefinite() -> nn.Module:
    """Two layers at the saddle between their signs, all but zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.01)
    return net


SOLVERS: dict[str, dict[str, Any]] = {
    "cg": {},
    "kfac": {},
    "minres": {"iterations": 1},
    "neumann": {"step_size": 10.0},
    "nystrom": {"rank": 1, "damping": 1e-6},
    "fixed_point": {"iterations": 2},
    "stochastic": {"iterations": 1, "step_size": 1e-6},
    "penalty": {"iterations": 1, "step_size": 1e-6},
}
"""Every solver with a residual, with settings that don't solve."""


def test_they_are_all_here() -> None:
    assert {*SOLVERS, "exact"} == {
        name for name, cls in classes().items() if "``residual``" in (cls.__doc__ or "")
    }


class Square(Lower):
    def training_step(self, batch: Any) -> Any:
        return error(self(batch[0]), batch[1], 2) * self.upper.module.weight.exp().sum()


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_that_ends_unsolved_says_so_once(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"method": method, **SOLVERS[method]}
    program(
        spec, indefinite(), lower=Square, settings=ONCE, out=tmp_path, quiet=False, rate=1e-6
    ).run()
    (event,) = events(tmp_path, "hypergradient_unsolved")
    assert (event["problem"], event["level"]) == ("upper", "lower")
    figures = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in figures if line["problem"] == "upper")
    assert event["residual"] == first["hypergradient/lower_residual"]
    assert event["text"].endswith(f"try {classes()[method].when_unsolved}")
    assert event["text"] in capsys.readouterr().err


def test_one_that_has_solved_says_nothing(tmp_path: Path) -> None:
    program({"method": "minres", "iterations": 20}, lower=Square, settings=ONCE, out=tmp_path).run()
    assert not events(tmp_path, "hypergradient_unsolved")


@pytest.mark.parametrize("evaluates", [False, True])
def test_an_upper_level_that_moves_statistics(evaluates: bool, tmp_path: Path) -> None:
    class Looking(Upper):
        def training_step(self, batch: Any) -> Any:
            self.lower.module.train(not evaluates)
            loss = super().training_step(batch)
            self.lower.module.train()
            return loss

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    program("identity", net, upper=Looking, settings=ONCE, out=tmp_path).run()
    found = events(tmp_path, "buffers_moved")
    assert [(e["step"], e["level"]) for e in found] == ([] if evaluates else [(1, "lower")])
