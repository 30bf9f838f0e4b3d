"""Tasks: their exact hypergradients against numerical derivatives and against each other."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mlseg.comparison.tasks import real_data
from mlseg.comparison.tasks.base import (
    IMPLICIT,
    ONE_STEP,
    Aim,
    Conditions,
    Program,
    aim_of,
    all_tasks,
    load_task,
)
from mlseg.comparison.tasks.two_levels import TwoLevels
from mlseg.errors import UserError
from mlseg.randomness import seed_everything
from mlseg.testing.differences import slopes
from mlseg.testing.exact import Truth, flatten, unflatten

SMALL: dict[str, dict[str, Any]] = {
    "quadratic": {"lower": 8, "upper": 3, "condition": 30.0},
    "ridge": {"degree": 1, "training": 40, "validation": 40},
    "logistic": {"training": 60, "validation": 60},
    "data_cleaning": {"training": 20, "validation": 30, "decay": 0.1},
    "reweighting": {"training": 60, "validation": 30, "hidden": 3, "decay": 0.05},
}
"""The tasks of two levels, at a size that takes no time."""


pytestmark = pytest.mark.usefixtures("double")


def build(name: str, method: Any = "identity", **conditions: Any) -> Program:
    task = load_task(name)
    settings = task.settings.model_validate({"name": name, **SMALL.get(name, {})})
    seed_everything(conditions.get("seed", 0))
    return task(settings, Conditions(method, **conditions))


def two_levels(name: str, **conditions: Any) -> TwoLevels:
    program = build(name, **conditions)
    assert isinstance(program, TwoLevels)
    return program


def first_gradient(program: Program) -> list[Tensor]:
    """The upper level's, at its first step."""
    steps: list[list[Tensor]] = []
    tiny.gradients_of(program.upper, steps)
    program.engine.train()
    while not steps:
        program.engine.iterate()
    return steps[0]


def check_slopes(function: Any, point: dict[str, Tensor], truth: list[Tensor]) -> None:
    """``truth`` is the gradient of ``function`` by ``point``, as far as three directions tell.

    Both are in float64, and solve systems of a condition of at most 1e4 that many sums go into: a
    relative error of 1e-10, and of the differences what they say of themselves.
    """
    flat, ways = flatten(point), directions(point)
    found = slopes(lambda values: function(unflatten(values, point)).detach(), flat, ways, 4e-3)
    found.check(torch.stack([flatten_all(truth) @ way for way in ways]), within=1e-7)


def flatten_all(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def directions(point: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(flatten(point).shape, generator=generator) for _ in range(3)]


def test_every_task_of_the_library_is_tested() -> None:
    own = [task for task in all_tasks() if task.build.__module__.startswith("mlseg.comparison.")]
    assert {task.name for task in own} == {*SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_implicit(name: str) -> None:
    """The slope of the upper loss at the lower level's solution, solved anew for each value."""
    program = two_levels(name)
    program.settle()
    top = program.start.values["upper"]

    def upper_loss(values: dict[str, Tensor]) -> Tensor:
        program.start = program.start.moved({"upper": values})
        return program.start.loss("upper", {"lower": program.solution()})

    truth = program.truth(IMPLICIT)
    assert truth is not None
    assert program.residual() < 1e-8
    check_slopes(upper_loss, top, truth)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_unrolled(name: str, steps: int) -> None:
    """The slope of the upper loss after the last steps, taken with other upper values."""
    program = two_levels(name, lower_steps=3)
    start, top = program.start, program.start.values["upper"]

    def after(point: Truth, count: int) -> Truth:
        for _ in range(count):
            low = point.values["lower"]
            slope = unflatten(point.slope("lower"), low)
            point = point.moved({"lower": {n: w - program.rate * slope[n] for n, w in low.items()}})
        return point

    start = after(start, 3 - steps)

    def upper_loss(values: dict[str, Tensor]) -> Tensor:
        return after(start.moved({"upper": values}), steps).loss("upper", {})

    first_gradient(program)  # the truth is asked for after the step
    truth = program.truth(Aim(steps))
    assert truth is not None
    check_slopes(upper_loss, top, truth)


@pytest.mark.parametrize("name", ["quadratic", "ridge", "logistic"])
def test_closed_forms_agree_with_the_dense_solve(name: str) -> None:
    program = two_levels(name)
    program.settle()
    own, dense = program.implicit(), TwoLevels.implicit(program)
    torch.testing.assert_close(flatten(own), flatten(dense), rtol=1e-9, atol=1e-12)
    if name != "logistic":
        solved = TwoLevels.solution(program)
        torch.testing.assert_close(flatten(solved), flatten(program.solution()))


@pytest.mark.parametrize("name", SMALL)
def test_the_engine_takes_the_steps_that_the_truth_goes_through(name: str) -> None:
    """The library's one-step hypergradient is the truth's, so both look at the same point."""
    method = {"method": "identity", "linearise": "before_step"}
    program = build(name, method, lower_steps=2)
    program.settle()
    gradient = torch.cat([g.flatten() for g in first_gradient(program)])
    truth = program.truth(ONE_STEP)
    assert truth is not None
    torch.testing.assert_close(gradient, torch.cat([t.flatten() for t in truth]))


@pytest.mark.parametrize("name", SMALL)
def test_training_brings_the_upper_loss_down(name: str) -> None:
    program = two_levels(name, lower_steps=5, upper_rate=0.05)
    program.settle()
    before = program.objective()
    program.engine.train()
    for _ in range(40 * 5):
        program.engine.iterate()
    assert program.objective() < before
    assert program.score() >= 0.0


def test_the_condition_number_is_as_set() -> None:
    program: Any = build("quadratic")
    eigenvalues = torch.linalg.eigvalsh(program.a)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(30.0)
    assert float(eigenvalues[-1]) == pytest.approx(1.0)


def test_a_saddle_has_a_hypergradient_too() -> None:
    task = load_task("quadratic")
    values = {"name": "quadratic", "lower": 8, "upper": 3, "negative": 3}
    program: Any = task(task.settings.model_validate(values), Conditions("identity"))
    assert int((torch.linalg.eigvalsh(program.a) < 0).sum()) == 3
    program.settle()
    assert program.residual() < 1e-10
    dense = TwoLevels.implicit(program)
    torch.testing.assert_close(program.truth(IMPLICIT)[0], dense["value"])


def test_the_excess_is_zero_at_the_minimum() -> None:
    program: Any = build("quadratic")
    assert program.score() > 1e-3
    top = program.upper.module.value
    optimizer = torch.optim.LBFGS([top], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = torch.linalg.solve(program.a, program.b @ top + program.c)
        loss = 0.5 * ((w - program.t) ** 2).sum() + 0.5 * program.regularisation * (top**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert program.score() == pytest.approx(0.0, abs=1e-8)


class TestData:
    def test_no_seed_learns_from_what_another_is_tested_on(self) -> None:
        first, second = (real_data.load("breast_cancer", seed, 100, 100) for seed in (0, 1))
        # Standardised by other training data: compare what doesn't depend on it.
        assert torch.equal(first.test[1], second.test[1])
        assert not torch.equal(first.training[1], second.training[1])
        own = {tuple(row) for row in first.training[0].tolist()}
        others = {tuple(row) for row in torch.cat([first.validation[0], first.test[0]]).tolist()}
        assert not own & others

    def test_features_are_standardised_by_training_data(self) -> None:
        x, _ = real_data.load("diabetes", 0, 150, 100, degree=2).training
        assert x.shape == (150, 65)
        torch.testing.assert_close(x.mean(0), torch.zeros(65), rtol=0.0, atol=1e-12)
        torch.testing.assert_close(x.std(0), torch.ones(65))

    def test_too_few_examples(self) -> None:
        with pytest.raises(UserError, match=r"diabetes has 442 examples.*to 354 or less"):
            real_data.load("diabetes", 0, 300, 100)

    def test_labels_are_corrupted_as_told(self) -> None:
        program: Any = build("data_cleaning")
        _, y = program.training
        clean = real_data.load("digits", 0, 20, 30).training[1]
        assert torch.equal(y != clean, program.is_wrong)
        assert int(program.is_wrong.sum()) == 10

    def test_classes_are_imbalanced_as_told(self) -> None:
        task = load_task("reweighting")
        values = {"name": "reweighting", "training": 800, "imbalance": 10.0, "corrupted": 0.0}
        program: Any = task(task.settings.model_validate(values), Conditions("identity"))
        counts = torch.bincount(program.training[1], minlength=10)
        assert 7.0 < float(counts[0] / counts[9]) < 13.0


class TestAim:
    @pytest.mark.parametrize(
        ("method", "aim"),
        [
            ("identity", ONE_STEP),
            ("finite_difference", ONE_STEP),
            ("sama", ONE_STEP),
            ("unrolled", Aim(5)),
            ({"method": "unrolled", "steps": 7}, Aim(7)),
            ({"method": "forward", "steps": 2}, Aim(2)),
            ("evolution", Aim(5)),
            ("cg", IMPLICIT),
            ("fixed_point", IMPLICIT),
            ("penalty", IMPLICIT),
            ("exact", IMPLICIT),
        ],
    )
    def test_methods(self, method: Any, aim: Aim) -> None:
        assert aim_of(method, 5) == aim

    def test_words(self) -> None:
        assert str(ONE_STEP) == "1 step"
        assert str(Aim(7)) == "7 steps"
        assert str(IMPLICIT) == "implicit"

    def test_without_scale_no_step_is_meant(self) -> None:
        assert aim_of({"method": "identity", "scale": "none"}, 5) == IMPLICIT


class TestTable:
    def test_an_unknown_task(self) -> None:
        with pytest.raises(UserError, match="no task 'quadratik'; did you mean 'quadratic'"):
            load_task("quadratik")

    def test_a_dotted_path(self) -> None:
        path = "mlseg.comparison.tasks.quadratic:build"
        assert load_task(path) is load_task("quadratic")

    def test_a_path_to_something_else(self) -> None:
        with pytest.raises(UserError, match="must be a function whose first parameter"):
            load_task("math:sqrt")
