"""Several steps of the segmentor for each of the architecture, by unrolled differentiation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check
from torch import Tensor

from mlseg.config import load
from mlseg.problems.systems import parse_run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[3] / "configs"
KEY = "problems.segmentor.hypergradient"
ONE_STEP = {"method": "identity", "scale": "optimizer", "linearise": "before_step"}
SGD = {"name": "sgd", "lr": 0.01}


def alphas(method: dict[str, Any], optimizer: dict[str, Any]) -> list[Tensor]:
    """The gradients of the alphas in three iterations."""
    changes = {"gan.pretrain": 0, KEY: method, "problems.segmentor.optimizer": optimizer}
    engine = tiny.build("e2eaug", changes)
    for problem in (engine.generator, engine.segmentor, engine.architecture):
        problem.set_train_data_loader(tiny.Doubled(problem.train_data_loader[0]))
    found: list[list[Tensor]] = []
    tiny.gradients_of(engine.architecture, found)
    for _ in range(3):
        engine.iterate()
    return [gradient for (gradient,) in found]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("optimizer", [SGD, {**SGD, "weight_decay": 0.01}])
def test_one_step_is_that_of_identity(optimizer: dict[str, Any]) -> None:
    """In float64, step after step, both paths together."""
    unrolled = {"method": "unrolled", "steps": 1, "store": "weights"}
    for mine, its in zip(alphas(unrolled, optimizer), alphas(ONE_STEP, optimizer), strict=True):
        assert its.norm() > 0
        assert (mine - its).norm() <= 1e-9 * its.norm()


@pytest.mark.parametrize(("name", "steps"), [("isic", 5), ("isic_small", 2)])
def test_the_configs(name: str, steps: int) -> None:
    run: Any = parse_run(load(CONFIGS / f"e2eaug_{name}_unrolled.yaml"))[0]
    plain: Any = parse_run(load(CONFIGS / f"e2eaug_{name}.yaml"))[0]
    level = run.problems.segmentor
    assert level.unroll_steps == steps
    assert level.hypergradient.steps in (None, steps)
    assert level.hypergradient.store == "weights"
    assert level.optimizer == plain.problems.segmentor.optimizer
    assert run.problems.generator == plain.problems.generator
    assert run.engine == plain.engine


def test_the_architecture_waits_for_the_segmentor() -> None:
    changes = {KEY: {"method": "unrolled"}, "problems.segmentor.unroll_steps": 2}
    engine = tiny.build("e2eaug", {"gan.pretrain": 0, **changes})
    seen: list[list[Tensor]] = []
    tiny.gradients_of(engine.architecture, seen)
    for _ in range(4):
        engine.iterate()
    assert engine.segmentor.count == engine.generator.count == 4
    assert len(seen) == 2
    assert float(engine.architecture.metrics["hypergradient/segmentor_steps"]) == 2
    devices = {w.device for step in engine.segmentor.trajectory.steps for w in step.weights}
    assert devices == {torch.device(engine.device)}


def unrolling() -> dict[str, Any]:
    return {
        KEY: {"method": "unrolled"},
        "problems.segmentor.unroll_steps": 2,
        "engine.checkpoint_every": 1,
    }


def test_on_real_images(real: Callable[[str], Path], tmp_path: Path) -> None:
    data = {"name": "isic2018", "root": str(real("isic2018")), "image_size": 32}
    changes = {**unrolling(), "data": {**data, "train": 4, "val": 2, "test": 2}}
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [5], "saved")


def test_resumed_between_two_of_its_steps(tmp_path: Path) -> None:
    changes = unrolling()
    check(lambda out: tiny.build("e2eaug", changes, out), tmp_path, [4, 6], "killed")
