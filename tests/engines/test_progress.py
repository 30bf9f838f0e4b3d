"""What a person sees of a run: the time left by stage, a line per step, what figures mean."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.settings import EngineSettings, Stage
from mlseg.multilevel.problem import Problem

CLOCK = {"now": 0.0}


class Takes(Problem):
    """A level whose step takes a time by the clock of the test."""

    seconds = 1.0

    def training_step(self, batch: Any) -> Tensor:
        CLOCK["now"] += self.seconds
        return self.module.weight.sum()


def takes(name: str, seconds: float) -> Takes:
    module = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    problem = Takes(name, module, optimizer, [(torch.zeros(1),)])
    problem.seconds = seconds
    return problem


class Lines:
    """Of the display, as they are read."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def read(self) -> list[str]:
        return self._capsys.readouterr().err.splitlines()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lines:
    CLOCK["now"] = 0.0
    monkeypatch.setattr("mlseg.engines.progress.time.monotonic", lambda: CLOCK["now"])
    return Lines(capsys)


def run(problems: list[Any], stages: list[Stage] | None = None, **options: Any) -> None:
    hooks = options.pop("hooks", ())
    validation = options.pop("validation", None)
    settings = EngineSettings(log_every=1, tensorboard=False, **options)
    Engine(
        problems, settings, stages=stages, device="cpu", hooks=hooks, validation=validation
    ).run()


def test_the_time_left_is_that_of_the_stage_and_no_promise_of_the_next(lines: Lines) -> None:
    fast, slow = takes("fast", 1.0), takes("slow", 60.0)
    run([fast, slow], [Stage("first", 60, [fast]), Stage("second", 10, [slow])], validate_every=0)
    said = lines.read()
    first = [line for line in said if line.startswith("first ")]
    second = [line for line in said if line.startswith("second ")]
    assert [line.split(", ")[1:3] for line in first[:2]] == [
        ["0:50 left of first", "then second"],
        ["0:40 left of first", "then second"],
    ]
    assert first[0].startswith("first 10/70, ")
    assert [line.split(", ")[1] for line in second[:2]] == ["9:00 left", "8:00 left"]


def test_a_step_has_one_line_with_the_fresh_score(lines: Lines) -> None:
    scores = iter(range(1, 100))
    run(
        [takes("level", 15.0)],
        iterations=6,
        validate_every=2,
        validation=lambda: {"score": next(scores)},
    )
    said = lines.read()
    assert [line.split(", ")[0] for line in said] == [f"training {n}/6" for n in range(1, 7)]
    assert [line.split("val score ")[1] for line in said if "val" in line] == [
        "1.0000", "1.0000", "2.0000", "2.0000", "3.0000"
    ]  # fmt: skip
    assert said[1].endswith("val score 1.0000"), "not the one before it"


def test_a_stage_of_open_end_says_what_has_passed(lines: Lines) -> None:
    level = takes("level", 15.0)
    run([level], [Stage("search", 3, [level], open_ended=True)], validate_every=0)
    assert lines.read()[0].startswith("search 1, 0:15 spent, ")


def test_the_size_at_which_validation_counts_is_shown(lines: Lines) -> None:
    class Counted(Hooks):
        counted = "at 64x64"

        def validate(self, engine: Engine) -> dict[str, float]:
            return {"dice": 0.5}

    run([takes("level", 15.0)], iterations=1, validate_every=1, hooks=[Counted()])
    assert lines.read()[-1].endswith("val dice 0.5000 at 64x64")


def test_systems_say_theirs() -> None:
    engine = tiny.build("supervised")
    assert [hook.counted for hook in engine.hooks if hook.counted] == ["at 32x32"]
