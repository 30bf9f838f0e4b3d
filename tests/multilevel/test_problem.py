"""What Betty 0.2.1 breaks, one test each; the numbers are those of its list of faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import betty.configs
import pytest
import tiny
import torch
from lines import Line, engine_of, line, points
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.errors import RunError
from mlseg.hypergradients import names
from mlseg.multilevel.config import Config
from mlseg.multilevel.problem import Problem
from mlseg.testing import programs
from mlseg.testing.programs import GRAPHS

# ----------------------------------------------------------- 1: the optimizer that was given


def test_1_the_optimizer_is_the_object_that_was_given() -> None:
    def two_rates(module: nn.Module) -> torch.optim.Optimizer:
        weight, bias = module.parameters()
        groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "lr": 0.0}]
        made = torch.optim.AdamW(groups, lr=0.1)
        state = {"step": torch.tensor(5.0), "exp_avg": torch.ones(1, 2)}
        made.state[weight] = {**state, "exp_avg_sq": torch.ones(1, 2)}
        return made

    problem = line(optimizer=two_rates)
    given, bias = problem.optimizer, problem.module.bias.clone()
    engine = engine_of(problem)
    engine.iterate()
    assert problem.optimizer is given
    assert given.state[problem.module.weight]["step"] == 6
    assert torch.equal(problem.module.bias, bias)


# --------------------------------------------------------------------------- 2: schedulers


def test_2_schedulers_that_betty_cannot_rebuild() -> None:
    def sequence(optimizer: Any) -> Any:
        parts = [
            lr_scheduler.ConstantLR(optimizer, 0.5, 2),
            lr_scheduler.ExponentialLR(optimizer, 0.1),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [2])

    def cycle(optimizer: Any) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)

    for make in (sequence, cycle):
        problem = line(scheduler=make)
        scheduler = problem.scheduler
        engine = engine_of(problem)
        rates = []
        for _ in range(4):
            rates.append(problem.optimizer.param_groups[0]["lr"])
            engine.iterate()
        # The same schedule stepped by hand.
        expected_problem = line(scheduler=make)
        expected = []
        for _ in range(4):
            expected.append(expected_problem.optimizer.param_groups[0]["lr"])
            expected_problem.optimizer.step()
            expected_problem.scheduler.step()
        assert problem.scheduler is scheduler
        assert rates == expected
        assert len(set(rates)) > 1


@pytest.mark.parametrize(
    ("clock", "rates"),
    [
        ("iteration", [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        # Two batches are an epoch; it is over when the next one begins.
        ("epoch", [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        # Validated after iterations 3 and 6.
        ("validation", [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]),
    ],
)
def test_2_when_a_scheduler_steps(clock: Any, rates: list[float]) -> None:
    problem = line(
        Config(scheduler_step=clock),
        optimizer=lambda module: torch.optim.SGD(module.parameters(), 1.0),
        scheduler=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
        loader=points(2),
    )
    seen: list[float] = []
    problem.param_callback = lambda: seen.append(problem.optimizer.param_groups[0]["lr"])
    settings = EngineSettings(iterations=6, validate_every=3, tensorboard=False)
    engine_of(problem, settings=settings, validation=lambda: {"score": 1.0}).run()
    assert seen == rates


def test_2_a_plateau_goes_by_the_monitored_metric() -> None:
    scores = iter([0.1, 0.2, 0.2, 0.2, 0.2])
    problem = line(
        Config(scheduler_step="validation"),
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=1),
    )
    settings = EngineSettings(iterations=5, validate_every=1, metric="score", tensorboard=False)
    engine = engine_of(
        problem, settings=settings, validation=lambda: {"other": 1.0, "score": next(scores)}
    )
    engine.run()
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_2_a_plateau_without_a_metric_is_one_clear_line() -> None:
    problem = line(scheduler=lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(RunError, match=r"'line'.*set its step to 'validation'"):
        engine_of(problem).iterate()


def test_2_accumulated_batches_are_one_step_of_the_scheduler() -> None:
    problem = line(
        Config(gradient_accumulation=2),
        scheduler=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    engine = engine_of(problem)
    for _ in range(4):
        engine.iterate()
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


# ------------------------------------------------------------------- 11: dicts at all levels


class DictLow(Problem):
    def training_step(self, batch: Any) -> dict[str, Any]:
        loss = (self.module.weight**2 * self.middle.module.weight.exp()).sum()
        return {"loss": loss, "size": self.module.weight.norm(), "note": "not a number"}


class DictMiddle(Problem):
    def training_step(self, batch: Any) -> dict[str, Any]:
        shift = self.low.module.weight - self.top.module.weight
        # One forward pass that both the direct and the hypergradient go back through (12).
        loss = (self.module(shift) ** 2).sum()
        return {"loss": loss, "shift": shift.norm()}


class DictTop(Problem):
    def training_step(self, batch: Any) -> dict[str, Any]:
        loss = (self.middle.module(self.module.weight) ** 2).sum()
        return {"loss": loss, "twice": 2 * loss}


def three(method: str, config: Callable[[str], betty.configs.Config] | None = None) -> Engine:
    torch.manual_seed(0)
    problems: list[Problem] = []
    for name, cls in (("low", DictLow), ("middle", DictMiddle), ("top", DictTop)):
        module = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        made = config(name) if config else Config(hypergradient=method)
        problems.append(cls(name, module, optimizer, [()], made))
    low, middle, top = problems
    return engine_of(
        low, middle, top, u2l={middle: [low], top: [middle]}, l2u={low: [middle], middle: [top]}
    )


@pytest.mark.parametrize(
    ("method", "ours"),
    [*((name, True) for name in names()), *((name, False) for name in ("darts", "cg", "neumann"))],
)
def test_11_and_12_dicts_at_every_level_and_two_backwards_in_the_middle(
    method: str, ours: bool
) -> None:
    """Betty's own methods too; ``retain_graph`` is nobody's business."""

    def config(name: str) -> betty.configs.Config:
        if ours:
            return Config(hypergradient=method)
        # Betty's cg and neumann can't serve a level that has lowers itself (its fault 5).
        return betty.configs.Config(type=method if name == "low" else "darts")

    engine = three(method, config)
    before = tiny.weights(engine)
    engine.iterate()
    engine.iterate()
    assert set(engine.low.metrics) == {"loss", "size", "note"}
    assert not engine.low.metrics["size"].requires_grad
    assert float(engine.top.metrics["twice"]) == 2 * float(engine.top.metrics["loss"])
    for name, value in tiny.weights(engine).items():
        assert value.isfinite().all()
        assert not torch.equal(value, before[name])


def test_11_a_step_without_a_loss_is_named() -> None:
    class Empty(Problem):
        def training_step(self, batch: Any) -> dict[str, float]:
            return {"accuracy": 1.0}

    module = nn.Linear(1, 1)
    problem = Empty("empty", module, torch.optim.SGD(module.parameters(), 0.1), [()])
    with pytest.raises(TypeError, match="'empty': training_step must return the loss"):
        engine_of(problem).iterate()


# ------------------------------------------------------------------ 16: what simply crashed


def test_16_a_problem_without_config() -> None:
    engine = engine_of(line(None))
    engine.iterate()
    assert isinstance(engine.line.config, Config)


def test_16_a_new_loader_takes_over_at_once() -> None:
    problem = line(loader=points(3))
    engine = engine_of(problem)
    engine.iterate()
    problem.set_train_data_loader([(torch.zeros(1, 2), torch.full((1,), 7.0))])
    engine.iterate()
    assert problem.cur_batch[1].tolist() == [7.0]


# --------------------------------------------------------------- 17: nothing where it is run


def test_17_a_run_without_directory_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine_of(line(), settings=EngineSettings(iterations=2), validation=lambda: {"s": 1.0}).run()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- 18: stepping twice


class Counted(programs.Recorded):
    steps: int = 0

    def training_step(self, batch: Any) -> Tensor:
        self.steps += not self.replaying
        return super().training_step(batch)


def test_18_lowers_step_once_unless_asked_to_be_rolled_back() -> None:
    for roll_back, expected in ((False, 3), (True, 6)):
        engine = programs.small(GRAPHS["two levels"])
        for level in engine.problems:
            level.__class__ = Counted
            level.configure_roll_back(roll_back)
        for _ in range(3):
            engine.iterate()
        assert engine.low.steps == expected
    assert betty.configs.EngineConfig().roll_back is False


# ------------------------------------------------------------------------------ unrolling


def test_each_level_steps_when_its_lowers_have_unrolled() -> None:
    steps = {}
    engine = programs.small(GRAPHS["chain of three"])
    engine.low._unroll_steps, engine.middle._unroll_steps = 2, 3
    for _ in range(12):
        engine.iterate()
    steps = {p.name: p.count for p in engine.problems}
    assert steps == {"low": 12, "middle": 6, "top": 2}


def test_a_loader_of_torch_works_as_it_is() -> None:
    x, y = points(1)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    problem = line(loader=loader)
    engine = engine_of(problem)
    for _ in range(5):
        engine.iterate()
    assert problem.epoch_counter == [2]


def test_parameters_without_an_optimizer_are_an_error_at_once() -> None:
    problem = Line("line", nn.Linear(2, 1), None, points())
    with pytest.raises(ValueError, match="'line' has parameters but no optimizer"):
        engine_of(problem)


def test_bettys_order_of_arguments_is_refused_with_the_mend() -> None:
    with pytest.raises(TypeError, match="pass config by keyword"):
        Problem("line", Config())  # a module is expected here


def test_a_batch_may_be_a_tensor_or_a_mapping() -> None:
    """Betty takes a tensor for a sequence, and hands out its rows."""

    class Mean(Problem):
        def training_step(self, batch: Any) -> Tensor:
            self.seen = batch
            return self.module.weight.sum()

    x = torch.ones(3, 2)
    for batch in (x, {"x": x, "ids": ["a", "b"]}, [x, "a"]):
        module = nn.Linear(2, 1)
        problem = Mean("mean", module, torch.optim.SGD(module.parameters(), 0.1), [batch])
        engine_of(problem).iterate()
        expected = tuple(batch) if isinstance(batch, list) else batch
        assert type(problem.seen) is type(expected)
        assert tiny.same(problem.seen, expected)
