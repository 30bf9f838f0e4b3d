"""An engine with a config of Betty's does what Betty's engine does with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import betty.configs
import pytest
import torch
from betty.envs import Env
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import RunError, UserError
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem


class Fall:
    """Its weight falls by a tenth of itself at each step."""

    def training_step(self: Any, batch: Any) -> Tensor:
        return 0.5 * (self.module.weight**2).sum() + 0.0 * batch[0].sum()


def fall(base: type = ImplicitProblem, config: Any = None) -> Any:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    cls = type("Fall", (Fall, base), {})
    return cls(
        name="fall",
        config=config or betty.configs.Config(),
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), 0.1),
        train_data_loader=[(torch.zeros(1),)],
    )


def engine(
    config: Any = None, kind: type = Engine, problem: Any = None, own: Any = None, **options: Any
) -> Any:
    """An engine of a subclass with the attributes ``own``, if there are any."""
    cls = type("Own", (kind,), own) if own else kind
    options = {"quiet": True, **options}
    return cls([problem or fall()], config, {"u2l": {}, "l2u": {}}, **options)


def config(iterations: int = 4, **changes: Any) -> betty.configs.EngineConfig:
    return betty.configs.EngineConfig(train_iters=iterations, **changes)


# ------------------------------------------------------------------------------- how long


def test_each_run_trains_for_as_many_iterations_as_the_engine_says() -> None:
    made = engine(config(4))
    made.run()
    made.run()
    assert made.global_step == 8
    made.train_iters = 9
    made.run()
    assert (made.global_step, made.fall.count) == (17, 17)
    none = engine(config(0))
    none.run()
    assert none.global_step == 0


def test_without_a_config_a_program_of_bettys_has_bettys_defaults() -> None:
    made, defaults = engine(), betty.configs.EngineConfig()
    assert (made.train_iters, made.valid_step) == (defaults.train_iters, defaults.valid_step)
    ours = engine(problem=fall(Problem, Config()))
    assert ours.settings == EngineSettings()


def test_a_run_that_goes_on_ends_where_it_would_have(tmp_path: Path) -> None:
    through = engine(config(7), problem=fall(Problem), out=tmp_path / "through")
    through.run()
    out = tmp_path / "out"
    first = engine(config(7, valid_step=3), problem=fall(Problem), out=out)
    first.train_step = lambda: _until(first, 4)
    with pytest.raises(RuntimeError, match="stop"):
        first.run()
    again = engine(config(7), problem=fall(Problem), out=out)
    again.resume(out)
    again.run()
    assert again.global_step == 7
    assert torch.equal(again.fall.module.weight, through.fall.module.weight)
    finished = engine(config(7), problem=fall(Problem), out=out)
    finished.resume(out)
    finished.run()
    assert finished.global_step == 7, "what is over isn't begun anew"
    finished.run()
    assert finished.global_step == 14


def _until(made: Engine, step: int) -> None:
    if made.global_step > step:
        raise RuntimeError("stop")
    Engine.train_step(made)


# ----------------------------------------------------------------------------- validation


@pytest.mark.parametrize(("every", "expected"), [(500, []), (2, [2, 4]), (5, [5])])
def test_validations_come_when_valid_step_says(every: int, expected: list[int]) -> None:
    seen: list[int] = []
    made: Any = engine(
        config(5, valid_step=every), validation=lambda: seen.append(made.global_step)
    )
    made.run()
    assert seen == expected
    made.valid_step, seen[:] = 1, []
    made.run()
    assert seen == [6, 7, 8, 9, 10]


def test_a_validation_may_take_gradients() -> None:
    def adapt(self: Any) -> dict[str, Tensor]:
        net = nn.Linear(1, 1)
        loss = net(torch.ones(1)).sum()
        loss.backward()
        return {"loss": loss}

    engine(config(2, valid_step=1), own={"validation": adapt}).run()
    ours = engine(EngineSettings(iterations=1), own={"validation": adapt})
    with pytest.raises(RunError, match=r"put what does under torch\.enable_grad"):
        ours.run()


def test_nan_in_a_validation_is_a_figure_like_any_other(tmp_path: Path) -> None:
    made = engine(config(4, valid_step=2), validation=lambda: {"x": float("nan")}, out=tmp_path)
    made.run()
    assert made.global_step == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["x"] for line in lines if line["problem"] == "validation"] == [None, None]


def test_nothing_is_chosen_where_nobody_says_what_is_better(tmp_path: Path) -> None:
    values = iter([0.5, 0.9])
    validation = lambda: {"accuracy": next(values)}  # noqa: E731
    made = engine(config(2, valid_step=1), validation=validation, out=tmp_path)
    made.run()
    assert made.best is None
    assert not (tmp_path / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize(
    ("mode", "values", "steps"), [("min", [3, 2, 2, 2, 0], 4), ("max", [1, 2, 0, float("nan")], 4)]
)
def test_early_stopping_works(mode: str, values: list[float], steps: int) -> None:
    """Betty's own looks for an attribute that it doesn't have."""
    scores = iter(values)
    settings = config(9, valid_step=1, early_stopping=True, early_stopping_tolerance=2)
    settings.early_stopping_mode = mode
    made = engine(settings, validation=lambda: {"loss": next(scores)})
    made.run()
    assert made.global_step == steps
    assert made.stopped_early


def test_early_stopping_of_ones_own() -> None:
    made = engine(config(9, valid_step=1), validation=lambda: {"loss": 1.0})
    seen: list[Any] = []

    def third(values: Any) -> bool:
        seen.append(values)
        return len(seen) == 3

    made.early_stopping = third
    made.run()
    assert (made.global_step, seen) == (3, [{"loss": 1.0}] * 3)


def test_the_logger_that_is_asked_for_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(2, valid_step=1, logger_type="tensorboard")
    made = engine(settings, validation=lambda: {"score": 1.0})
    made.run()
    made.logger.close()
    assert len(list(tmp_path.glob("betty_tensorboard/*/events*"))) == 1


@pytest.mark.parametrize("figures", [{}, None, {"text": "x"}, {1: 2.0}, {"all": [1.0, 2.0]}])
def test_a_validation_may_return_what_it_likes(figures: Any, tmp_path: Path) -> None:
    engine(config(1, valid_step=1), validation=lambda: figures, out=tmp_path).run()


def test_figures_of_any_name_are_recorded(tmp_path: Path) -> None:
    figures = {"step": 5.0, "problem": 6.0, "event": 7.0, "kind": 8.0}
    engine(config(1, valid_step=1), validation=lambda: figures, out=tmp_path).run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line == {
        "step": 1, "problem": "validation", "step_": 5.0, "problem_": 6.0, "event": 7.0, "kind": 8.0
    }  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    (event,) = [e for e in events if e["event"] == "validation"]
    assert (event["step"], event["step_"], event["event_"]) == (1, 5.0, 7.0)


# ------------------------------------------------------------------------ names of one's own


STATE = ["best", "seconds", "finished", "stopped_early", "logged", "stage_step", "stage_index"]
STATE += ["last_validation", "validations_without_best"]
PARTS = ["settings", "hooks", "stages", "stage", "recorder", "metric", "total_iterations"]


@pytest.mark.parametrize("name", [*STATE, *PARTS, "meta", "results_so_far"])
def test_an_engine_keeps_what_it_likes(name: str, tmp_path: Path) -> None:
    def validation(self: Any) -> dict[str, float]:
        if name not in PARTS and not hasattr(self, name):
            setattr(self, name, -1.0)
        setattr(self, name, max(getattr(self, name), 0.5) if name not in PARTS else 0.5)
        return {"loss": 0.5}

    settings = config(3, valid_step=1, early_stopping=True)
    made = engine(settings, own={"validation": validation}, out=tmp_path)
    made.run()
    assert getattr(made, name) == 0.5
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["engine"]
    assert saved["best"] == {"metric": "loss", "value": 0.5, "step": 1}
    assert (saved["global_step"], saved["finished"], saved["stage"]) == (3, True, "training")


METHODS = ["save", "validate", "results", "work", "resume", "state_dict", "levels", "hook", "_log"]


@pytest.mark.parametrize("name", METHODS)
def test_what_the_engine_calls_is_not_overridden(name: str) -> None:
    with pytest.raises(UserError, match=f"Own: '{name}' is a method of mlseg's Engine already; "):
        engine(config(), own={name: lambda self: None})
    made = engine(config(), own={"validation": lambda self: setattr(self, name, 1)})
    with pytest.raises(UserError, match=f"Own: '{name}' is a name of mlseg's Engine already; "):
        made.validation()


@pytest.mark.parametrize("name", ["train_step", "do_validation", "cleanup", "train", "eval"])
def test_what_betty_calls_may_be_overridden(name: str) -> None:
    calls = []
    made = engine(
        config(1, valid_step=1),
        own={name: lambda self: calls.append(1), "validation": lambda self: {}},
    )
    made.run()
    assert calls


# ----------------------------------------------------------------------- device, environment


def test_the_device_is_bettys_string() -> None:
    made = engine(config(strategy="cpu"))
    assert made.device == made.fall.device == "cpu"
    assert engine(config(), device="cpu").device == "cpu"


def test_an_environment_knows_and_is_known(tmp_path: Path) -> None:
    env = Env()
    made = engine(config(), env=env, problem=fall(Problem), out=tmp_path)
    assert (made.fall.env, made.env, env.fall, env.device) == (env, env, made.fall, "cpu")
    made.run()
    with pytest.raises(UserError, match="env has no state_dict and load_state_dict"):
        engine(config(), env=Env(), problem=fall(Problem), out=tmp_path).resume(tmp_path)


class Counts(Env):
    """An environment with a state."""

    number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def test_an_environments_state_is_kept(tmp_path: Path) -> None:
    env = Counts()
    made = engine(config(), env=env, problem=fall(Problem), out=tmp_path)
    env.number = 7
    made.run()
    again = engine(config(), env=Counts(), problem=fall(Problem), out=tmp_path)
    again.resume(tmp_path)
    assert again.env.number == 7


def test_plain_problems_are_not_taken_up_again(tmp_path: Path) -> None:
    """They keep no place in their data: it would be another run."""
    engine(config(), out=tmp_path).run()
    with pytest.raises(UserError, match="'fall' is plain Betty's, which keeps no place"):
        engine(config(), out=tmp_path).resume(tmp_path)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "strategy": (lambda: config(strategy="fsdp"), "strategy 'fsdp': choose default, cpu or gpu"),
    "no strategy": (lambda: config(strategy="none"), "strategy 'none'"),
    "logger": (lambda: config(logger_type="csv"), "logger_type 'csv'; choose one of tensorboard"),
    "mode": (lambda: config(early_stopping_mode="less"), "early_stopping_mode 'less'; choose min"),
    "valid_step": (lambda: config(valid_step=0), "valid_step 0: a whole number, at least 1"),
    "train_iters": (lambda: config(-1), "train_iters -1: a whole number, at least 0"),
    "half": (lambda: config(1.5), "train_iters 1.5: a whole number"),  # type: ignore[arg-type]
    "tolerance": (lambda: config(early_stopping_tolerance=0), "early_stopping_tolerance 0: a"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_the_engine_does_not_do_is_said(case: str) -> None:
    made, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as caught:
        engine(made())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UserError, match="strategy 'gpu': CUDA is not available here"):
        engine(config(strategy="gpu"))
