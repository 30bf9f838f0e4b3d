"""Systems by name and by path, and what a config says about one problem."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_files import write_image
from torch import nn

from mlseg import problems, run
from mlseg.engines.engine import Engine
from mlseg.errors import UserError
from mlseg.hypergradients import FiniteDifference
from mlseg.multilevel.settings import ProblemSettings
from mlseg.problems.systems import SYSTEMS, load_system

GAMES = '''
from mlseg import Engine, Problem
from mlseg.problems.systems import RunSettings


class Settings(RunSettings):
    rounds: int = 3


def build(settings: Settings, out) -> Engine:
    """A game of one's own."""
    raise NotImplementedError


def untyped(settings, out):
    """Without a settings class."""
'''


def test_registered_systems_are_found_by_themselves() -> None:
    folders = {path.parent.name for path in Path(problems.__file__).parent.glob("*/__init__.py")}
    assert {"supervised", *folders} <= set(SYSTEMS.names())
    assert load_system("supervised").name == "supervised"


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no system 'supervisd'; did you mean 'supervised'\?"):
        load_system("supervisd")


@pytest.fixture
def games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_games.py").write_text(GAMES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "my_games", raising=False)


@pytest.mark.usefixtures("games")
def test_a_system_of_ones_own_by_path() -> None:
    found = load_system("my_games:build")
    assert found.summary == "A game of one's own."
    settings = found.settings.model_validate({"system": "my_games:build", "rounds": 5})
    assert settings.model_dump()["rounds"] == 5


@pytest.mark.usefixtures("games")
@pytest.mark.parametrize("path", ["my_games:biuld", "no_games:build", "my_games:untyped", ":build"])
def test_a_wrong_path_is_one_line(path: str) -> None:
    with pytest.raises(UserError) as caught:
        load_system(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


OPTIMIZERS: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "adam": ({"betas": [0.5, 0.99], "eps": 1e-6}, torch.optim.Adam),
    "adamw": ({"weight_decay": 0.1}, torch.optim.AdamW),
    "rmsprop": ({"momentum": 0.9, "alpha": 0.9}, torch.optim.RMSprop),
    "adagrad": ({"lr_decay": 0.1}, torch.optim.Adagrad),
}
SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "reduce_on_plateau": ({"factor": 0.5, "patience": 2}, "ReduceLROnPlateau"),
    "multistep": ({"milestones": [2, 4]}, "MultiStepLR"),
    "exponential": ({"factor": 0.9, "step": "epoch"}, "ExponentialLR"),
    "linear": ({"length": 4}, "LinearLR"),
    "cosine": ({"length": 4, "min_lr": 1e-6}, "CosineAnnealingLR"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_get_their_settings(name: str) -> None:
    values, cls = OPTIMIZERS[name]
    settings = ProblemSettings.model_validate({"optimizer": {"name": name, "lr": 0.5, **values}})
    made, scheduler = settings.build(nn.Linear(2, 1).parameters(), "max")
    assert type(made) is cls
    assert scheduler is None
    for key, value in {"lr": 0.5, **values}.items():
        assert made.defaults[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_step_when_they_should(name: str) -> None:
    values, cls = SCHEDULERS[name]
    settings = ProblemSettings.model_validate(
        {"optimizer": {"name": "sgd", "lr": 1.0}, "scheduler": {"name": name, **values}}
    )
    _, scheduler = settings.build(nn.Linear(2, 1).parameters(), "min")
    assert type(scheduler).__name__ == cls
    default = "validation" if name == "reduce_on_plateau" else "iteration"
    assert settings.config("fp32").scheduler_step == values.get("step", default)
    assert getattr(scheduler, "mode", "min") == "min"


def test_a_linear_decay_takes_the_runs_length_unless_it_has_its_own() -> None:
    for length, expected in ((None, 10), (4, 4)):
        values = {"name": "linear", "length": length}
        settings = ProblemSettings.model_validate(
            {"optimizer": {"name": "sgd", "lr": 1.0}, "scheduler": values}
        )
        optimizer, scheduler = settings.build(nn.Linear(2, 1).parameters(), "max", 10)
        assert scheduler is not None
        for _ in range(2):
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - 2 / expected)
    with pytest.raises(UserError, match="scheduler 'linear': length: needed here"):
        ProblemSettings.model_validate(
            {"optimizer": {"name": "sgd", "lr": 1.0}, "scheduler": {"name": "linear"}}
        ).build(nn.Linear(2, 1).parameters(), "max")


def test_a_problems_settings_reach_its_config() -> None:
    settings = ProblemSettings.model_validate(
        {
            "optimizer": {"name": "sgd", "lr": 1.0},
            "clip": 2.0,
            "accumulate": 3,
            "unroll_steps": 4,
            "hypergradient": {"method": "finite_difference", "epsilon": 0.5},
        }
    )
    config = settings.config("bf16")
    assert config.hypergradient == FiniteDifference(epsilon=0.5)
    assert (config.gradient_clipping, config.gradient_accumulation) == (2.0, 3)
    assert (config.unroll_steps, config.precision) == (4, "bf16")


FAILING = """
import sys
{head}

from mlseg import Engine
from mlseg.problems.systems import RunSettings


def build(settings: {settings}, out) -> Engine:
    {body}
"""


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"head": "sys.exit(0)"}, "can't import 'failing'"),
        ({"head": "1 / 0"}, "division by zero"),
        ({"settings": "'Nowhere'"}, "its annotations can't be read (name 'Nowhere'"),
        ({"body": "1 / 0"}, "failing.py:10: ZeroDivisionError: division by zero"),
        ({"body": "sys.exit(0)"}, "failing.py:10: SystemExit: 0"),
        ({"body": "raise KeyError"}, "failing.py:10: KeyError"),
        ({"body": "return settings"}, "gives a RunSettings, not an mlseg.Engine"),
    ],
)
def test_a_system_that_fails_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, str],
    told: str,
) -> None:
    text = {"head": "", "settings": "RunSettings", "body": "pass", **parts}
    (tmp_path / "failing.py").write_text(FAILING.format(**text))
    (tmp_path / "config.yaml").write_text("system: failing:build\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    try:
        assert run.main(["config.yaml", "--out", "run"]) == 2
    finally:
        sys.modules.pop("failing", None)
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_run_that_a_system_ends_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sys.exit(0) in the midst of training is no success."""
    monkeypatch.setattr(Engine, "train_step", lambda engine: sys.exit(0))
    config = tiny.write_config(tmp_path / "tiny.yaml")
    assert run.main([str(config), "--out", str(tmp_path / "run")]) == 1
    assert "failed: the process was ended from within" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["supervised", "e2eaug", "segan", "semi_supervised", "load"])
def test_masks_of_one_class_are_refused_before_any_work(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "data", tmp_path / "run"
    for number in range(20):
        for part, value in (("images", 10 * number), ("masks", 0)):
            write_image(folder / part / f"p{number}.png", np.full((32, 32), value, np.uint8))
    data = {"name": "folder", "root": str(folder), "image_size": 32, "train": 6, "val": 4}
    if system == "semi_supervised":
        data["unlabelled"] = 2
    config = tiny.write_config(tmp_path / "c.yaml", system, {"data": data})
    assert run.main([str(config), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0, said
    assert f"folder in {folder}: the masks of all 6 training images hold class 0" in said
    assert not out.exists()
