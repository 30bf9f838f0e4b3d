"""The loop: stages, validation, best checkpoint, early stopping, records, the NaN guard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.settings import EngineSettings, Stage
from mlseg.errors import RunError, UserError
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs


class Count(Problem):
    """Its weight grows by one at each step."""

    def training_step(self, batch: Any) -> Any:
        return {"loss": -self.module.weight.sum(), "batch": batch[0]}


def count(name: str = "count") -> Count:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    return Count(name, module, torch.optim.SGD(module.parameters(), 1.0), [(torch.zeros(()),)])


def scores(values: list[float], name: str = "score") -> Any:
    """A validation that gives ``values`` in turn."""
    iterator: Iterator[float] = iter(values)
    return lambda: {"loss": torch.tensor(0.0), name: torch.tensor(next(iterator))}


def engine(
    problems: list[Problem] | None = None, out: Path | None = None, **options: Any
) -> Engine:
    keys = EngineSettings.model_fields
    settings = {"iterations": 6, "validate_every": 1, "tensorboard": False}
    settings |= {k: options.pop(k) for k in list(options) if k in keys}
    return Engine(
        problems or [count()],
        EngineSettings.model_validate(settings),
        out=out,
        device="cpu",
        quiet=True,
        **options,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def events(out: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in lines(out / "events.jsonl")]


# --------------------------------------------------------------- validation and the best


@pytest.mark.parametrize(("mode", "best"), [("max", 3), ("min", 5)])
def test_the_best_checkpoint_by_the_named_metric(tmp_path: Path, mode: str, best: int) -> None:
    values = [0.5, 0.4, 0.9, 0.9, 0.1, 0.1]
    made = engine(out=tmp_path, metric="score", mode=mode, validation=scores(values))
    made.run()
    assert made.best == {"metric": "score", "value": pytest.approx(values[best - 1]), "step": best}
    saved = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert saved["problems"]["count"]["module"]["weight"].item() == best
    assert saved["engine"]["global_step"] == best
    last = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert last["problems"]["count"]["module"]["weight"].item() == 6


def test_without_a_name_the_first_figure_is_the_metric() -> None:
    made = engine(validation=lambda: {"first": 1.0, "second": 2.0})
    made.run()
    assert made.best is not None
    assert made.best["metric"] == "first"


def test_a_metric_that_validation_lacks_is_named() -> None:
    made = engine(metric="jacard", validation=scores([1.0]))
    with pytest.raises(RunError, match=r"gives no 'jacard', only loss, score"):
        made.run()


def test_early_stopping(tmp_path: Path) -> None:
    """Two validations without a new best: equal is no better."""
    values = [0.1, 0.2, 0.2, 0.1, 0.9, 0.9]
    made = engine(out=tmp_path, metric="score", patience=2, validation=scores(values))
    made.run()
    assert made.stopped_early
    assert made.global_step == 4
    assert events(tmp_path) == [
        ("stage_start", 0),
        ("validation", 1),
        ("new_best", 1),
        ("validation", 2),
        ("new_best", 2),
        ("validation", 3),
        ("validation", 4),
        ("early_stop", 4),
        ("finished", 4),
    ]
    # Resuming it changes nothing.
    again = engine(out=tmp_path, metric="score", patience=2, validation=scores([]))
    again.resume(tmp_path)
    again.run()
    assert again.global_step == 4


def test_validation_is_in_evaluation_mode_without_gradients() -> None:
    seen = []

    def validation() -> dict[str, float]:
        seen.append((made.count.module.training, torch.is_grad_enabled()))
        return {"score": 1.0}

    made = engine(iterations=2, validation=validation)
    made.run()
    assert seen == [(False, False)] * 2
    assert made.count.module.training


def test_a_validation_method_of_a_subclass() -> None:
    class Own(Engine):
        def validation(self) -> dict[str, Tensor]:
            return {"weight": self.count.module.weight.sum()}

    made = Own([count()], EngineSettings(iterations=4, validate_every=2), device="cpu", quiet=True)
    made.run()
    assert made.best == {"metric": "weight", "value": 4.0, "step": 4}


def test_a_rate_that_a_plateau_lowers_is_an_event(tmp_path: Path) -> None:
    problem = count()
    config = Config(scheduler_step="validation")
    problem = Count(
        "count",
        problem.module,
        problem.optimizer,
        [(torch.zeros(()),)],
        config,
        torch.optim.lr_scheduler.ReduceLROnPlateau(problem.optimizer, "max", patience=1),
    )
    values = [0.5, 0.6, 0.6, 0.6, 0.7, 0.7]
    engine([problem], tmp_path, metric="score", validation=scores(values)).run()
    (change,) = [e for e in lines(tmp_path / "events.jsonl") if e["event"] == "rate_change"]
    assert change == {"event": "rate_change", "step": 4, "problem": "count", "rate": 0.1}


# ----------------------------------------------------------------------------- records


def test_a_line_per_problem_and_logged_step(tmp_path: Path) -> None:
    made = engine([count("a"), count("b")], tmp_path, iterations=5, log_every=2, validate_every=0)
    made.run()
    found = [
        (line["step"], line["problem"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")
    ]
    assert found == [(s, p, -float(s - 1)) for s in (2, 4, 5) for p in ("a", "b")]
    assert {"batch", "learning_rate"} <= lines(tmp_path / "metrics.jsonl")[0].keys()


def test_saved_where_and_when_it_is_asked_for(tmp_path: Path) -> None:
    made = engine(out=tmp_path, iterations=7, validate_every=0, checkpoint_every=3)
    saved = []
    former = made.save

    def save(name: str = "last") -> None:
        saved.append((name, made.global_step))
        former(name)

    made.save = save  # type: ignore[method-assign]
    made.run()
    assert saved == [("last", 3), ("last", 6), ("last", 7)]


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    tiny.build("supervised", {"engine.iterations": 1}, tmp_path).run()
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert set(state["problems"]) == {"segmentor"}
    for problem in state["problems"].values():
        assert {"module", "optimizer", "count", "loaders"} <= problem.keys()
    assert {"torch", "numpy", "python"} <= state["random_state"].keys()
    assert {"settings", "num_classes", "image_size", "classes"} <= state["segmentor"].keys()


# ------------------------------------------------------------------------------ stages


def test_stages_run_in_turn_each_with_its_own_problems(tmp_path: Path) -> None:
    a, b = count("a"), count("b")
    ended = []

    class Ends(Hooks):
        def stage_end(self, engine: Engine, stage: Stage) -> None:
            ended.append((stage.name, a.module.weight.item()))

    stages = [Stage("first", 2, [a]), Stage("second", 3, [b])]
    made = engine(
        [a, b], tmp_path, stages=stages, validation=lambda: {"score": 1.0}, hooks=[Ends()]
    )
    assert made.total_iterations == 5
    made.run()
    assert (a.module.weight.item(), b.module.weight.item()) == (2.0, 3.0)
    assert ended == [("first", 2.0)]
    # Only the last stage is validated.
    assert events(tmp_path) == [
        ("stage_start", 0),
        ("stage_end", 2),
        ("stage_start", 2),
        ("validation", 3),
        ("new_best", 3),
        ("validation", 4),
        ("validation", 5),
        ("finished", 5),
    ]


def test_a_stage_that_the_config_no_longer_has_is_named(tmp_path: Path) -> None:
    engine(out=tmp_path).run()
    other = engine(stages=[Stage("search", 3)])
    with pytest.raises(UserError, match=r"in stage 'training', this run has search"):
        other.resume(tmp_path)


def test_iterations_may_be_given_to_run() -> None:
    made = engine(iterations=100)
    made.run(3)
    assert made.global_step == 3


def test_the_graph_is_given_once() -> None:
    with pytest.raises(ValueError, match="either as dependencies or as u2l and l2u"):
        Engine([count()], dependencies={"u2l": {}, "l2u": {}}, u2l={}, device="cpu")
    only = count()
    with pytest.raises(ValueError, match="each has a graph of its own"):
        Engine([only], u2l={only: []}, stages=[Stage("training", 3)], device="cpu")


def test_a_device_that_is_not_there_is_a_user_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="device: cuda is not available"):
        Engine([count()], device="cuda")


# ----------------------------------------------------------------------------- NaN guard


class Breaks(Count):
    """Its loss, or its gradient alone, is NaN from a given step on."""

    at: int
    what: str

    def training_step(self, batch: Any) -> Tensor:
        loss = -self.module.weight.sum()
        if self.count < self.at:
            return loss
        if self.what == "loss":
            return loss * float("nan")
        # sqrt has an infinite slope at zero: the loss is finite, its gradient NaN.
        return loss + (0 * self.module.weight).abs().sqrt().sum()


def breaking(what: str, at: int, out: Path, **options: Any) -> Engine:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    problem = Breaks("second", module, torch.optim.SGD(module.parameters(), 1.0), [()])
    problem.at, problem.what = at, what
    return engine([count("first"), problem], out, **options)


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, what: str, log_every: int
) -> None:
    options = {"iterations": 9, "validate_every": 3, "log_every": log_every}
    weight = {"score": 1.0}
    made = breaking(what, 5, tmp_path, validation=lambda: weight, **options)
    with pytest.raises(RunError) as caught:
        made.run()
    text = str(caught.value)
    assert "'second'" in text
    assert str(tmp_path / "checkpoints" / "last.pt") in text
    assert "\n" not in text
    # A NaN loss is named with its own step, however late it is read; a NaN gradient shows in the
    # loss of the next step.
    assert f"at step {5 if what == 'loss' else 6}" in text
    for name in ("last", "best"):
        state = checkpoint.load(tmp_path / "checkpoints" / f"{name}.pt")
        assert state["engine"]["global_step"] <= 3
        for problem in state["problems"].values():
            assert problem["module"]["weight"].isfinite().all()


def test_nan_weights_are_never_saved_although_every_loss_was_finite(tmp_path: Path) -> None:
    made = breaking("gradient", 3, tmp_path, iterations=3, validation=lambda: {"score": 1.0})
    with pytest.raises(RunError, match=r"a parameter of problem 'second' is not finite at step 3"):
        made.run()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["engine"]["global_step"] == 2


class Spoils(Count):
    """Something of its state becomes infinite at the third step, and no loss shows it."""

    def training_step(self, batch: Any) -> Tensor:
        if self.count == 3:
            if self.spoilt == "buffer":
                self.module.average.fill_(float("inf"))
            else:
                self.optimizer.state[self.module.weight][self.spoilt].fill_(float("inf"))
        return super().training_step(batch)


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        ("buffer", "a buffer of problem 'spoils' is not finite at step 3 (average)"),
        (
            "square_avg",
            "optimizer state of problem 'spoils' is not finite at step 3 (square_avg of",
        ),
    ],
)
def test_nothing_infinite_is_saved(tmp_path: Path, spoilt: str, told: str) -> None:
    """Neither buffers nor the optimizer's state; the last good checkpoint stays."""
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("average", torch.zeros(1))
    module.register_buffer("mask", torch.tensor([0.0, -float("inf")]))  # as it is meant to be
    optimizer = torch.optim.RMSprop(module.parameters(), 0.0)
    problem = Spoils("spoils", module, optimizer, [(torch.zeros(()),)])
    problem.spoilt = spoilt
    with pytest.raises(RunError) as caught:
        engine([problem], tmp_path, iterations=4, checkpoint_every=1).run()
    last = tmp_path / "checkpoints" / "last.pt"
    assert told in str(caught.value)
    assert f"the last good checkpoint is {last}" in str(caught.value)
    assert checkpoint.load(last)["engine"]["global_step"] == 2


@pytest.mark.parametrize("log_every", [1, 7])
def test_a_hypergradient_that_is_not_finite_is_named_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """Not the loss of the level below, which shows it in the step after."""
    made: Any = programs.small(
        programs.GRAPHS["two levels"],
        {"method": "identity", "linearise": "before_step", "scale": "optimizer"},
        lambda params: torch.optim.SGD(params, 0.01),
        settings=EngineSettings(
            iterations=8, validate_every=0, log_every=log_every, tensorboard=False
        ),
        out=tmp_path,
    )
    upper, method = made.problems[-1], type(made.problems[0].method)
    former = method.__call__

    def call(self: Any, vector: Any, hop: Any) -> Any:
        carried, report = former(self, vector, hop)
        factor = float("nan") if upper.count == 3 else 1.0
        return [[t * factor for t in part] for part in carried], report

    monkeypatch.setattr(method, "__call__", call)
    with pytest.raises(RunError) as caught:
        made.run()
    assert f"the hypergradient of problem '{upper.name}' is not finite at step 3 (and then" in str(
        caught.value
    )


def test_nan_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="'second' is not finite at step 1; no checkpoint has been"):
        breaking("loss", 1, tmp_path, validate_every=0).run()
    assert not (tmp_path / "checkpoints").exists()


class Infinite(Count):
    def training_step(self, batch: Any) -> Tensor:
        return self.module.weight.sum() + float("inf")


def infinite() -> Infinite:
    module = nn.Linear(1, 1)
    return Infinite("big", module, torch.optim.SGD(module.parameters(), 1.0), [()])


def test_infinity_counts_as_nan() -> None:
    with pytest.raises(RunError, match="'big' is not finite at step 1"):
        engine([infinite()], validate_every=0, log_every=1).run()


def test_a_nan_in_a_stage_ends_before_the_next() -> None:
    """Although nothing was to be logged there."""
    ended: list[str] = []
    first = infinite()

    class Ends(Hooks):
        def stage_end(self, engine: Engine, stage: Stage) -> None:
            ended.append(stage.name)

    stages = [Stage("first", 2, [first]), Stage("second", 2, [first])]
    with pytest.raises(RunError, match="'big' is not finite at step 1"):
        engine([first], stages=stages, hooks=[Ends()], validate_every=0, log_every=100).run()
    assert not ended


def test_a_nan_metric_ends_the_run(tmp_path: Path) -> None:
    made = engine(out=tmp_path, metric="score", validation=scores([0.5, float("nan")]))
    with pytest.raises(RunError, match="validation score is NaN at step 2; the last good"):
        made.run()
