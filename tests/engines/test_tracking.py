"""A run's figures in an experiment tracker, by stand-ins that have the libraries' functions."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commanding import one_line, train

from mlseg import run


class Library(ModuleType):
    """Keeps what it is told; may fail from a call on."""

    def __init__(self, name: str, failing: str = "") -> None:
        super().__init__(name)
        self.failing, self.opened = failing, 0
        self.begun: list[dict[str, Any]] = []
        self.figures: list[tuple[int, dict[str, float]]] = []
        self.parameters: dict[str, str] = {}

    def _called(self, name: str) -> None:
        if name == self.failing:
            raise RuntimeError("no server")

    def init(self, **given: Any) -> Any:
        self._called("open")
        self.begun.append(given)
        self.opened += 1
        return SimpleNamespace(id="x7", name=given["name"])

    def log(self, figures: dict[str, float], step: int) -> None:
        self._called("log")
        self.figures.append((step, figures))

    def finish(self) -> None:
        self._called("close")
        self.opened -= 1

    set_experiment = log_params = None

    def use_as_mlflow(self) -> None:
        def start_run(**given: Any) -> Any:
            self.init(name=given)
            return SimpleNamespace(info=SimpleNamespace(run_id="x7"))

        self.set_experiment = lambda project: None
        self.start_run, self.end_run = start_run, self.finish
        self.log_params, self.log_metrics = self.parameters.update, self.log


def library(monkeypatch: pytest.MonkeyPatch, name: str, failing: str = "") -> Library:
    made = Library(name, failing)
    if name == "mlflow":
        made.use_as_mlflow()
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_every_written_figure_and_a_resumed_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = library(monkeypatch, name)
    out = train(tmp_path, f"log.tracker={name}", "engine.log_every=1")
    written: dict[int, dict[str, float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step, problem = values.pop("step"), values.pop("problem")
        written.setdefault(step, {}).update({f"{problem}/{k}": v for k, v in values.items()})
    heard: dict[int, dict[str, float]] = {}
    for step, figures in told.figures:
        heard.setdefault(step, {}).update(figures)
    assert heard == written
    assert told.opened == 0
    if name == "mlflow":
        assert told.parameters["segmentor.name"] == '"unet"'
    else:
        assert told.begun[0]["config"]["log"] == {"tracker": name, "project": "mlseg"}
    steps = max(written)
    assert run.main(["--resume", str(out), f"engine.iterations={steps + 2}"]) == 0
    again = str(told.begun[1])
    assert "x7" in again or name == "trackio"
    assert max(step for step, _ in told.figures) == steps + 2


@pytest.mark.parametrize("failing", ["open", "log", "close"])
def test_a_tracker_that_fails_is_said_and_the_run_goes_on(
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = library(monkeypatch, "wandb", failing)
    out = train(tmp_path, "log.tracker=wandb", "engine.log_every=1")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    said = [event["reason"] for event in events if event["event"] == "tracker_failed"]
    assert said == (["no server"] if failing == "log" else [])
    assert "wandb failed (no server)" in capsys.readouterr().err
    assert len(told.figures) > 0 or failing != "close"
    assert (out / "results.json").is_file()


def test_a_tracker_that_is_not_installed_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(AssertionError):
        train(tmp_path, "log.tracker=wandb")
    assert "uv pip install '.[wandb]'" in one_line(capsys)
