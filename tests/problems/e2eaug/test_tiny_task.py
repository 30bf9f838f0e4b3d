"""The task ``e2eaug_tiny``: its truth is what the engine's one-step hypergradient comes to."""

import pytest
import tiny
import torch
from torch import Tensor

from mlseg.comparison.tasks.base import IMPLICIT, ONE_STEP, Conditions, load_task
from mlseg.randomness import seed_everything


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truth_and_engine_agree(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        check(dtype)
    finally:
        torch.set_default_dtype(before)


def check(dtype: torch.dtype) -> None:
    task = load_task("e2eaug_tiny")
    seed_everything(0)
    method = {"method": "identity", "linearise": "before_step"}
    settings = task.settings.model_validate({"name": "e2eaug_tiny"})
    program = task(settings, Conditions(method, dtype=dtype))
    program.settle()
    steps: list[list[Tensor]] = []
    tiny.gradients_of(program.upper, steps)
    program.engine.train()
    while not steps:
        program.engine.iterate()
    (gradient,) = steps[0]
    found = program.truth(ONE_STEP)
    assert found is not None
    assert torch.get_default_dtype() == dtype
    error = (gradient.double() - found[0]).norm() / found[0].norm()
    assert error < (1e-9 if dtype == torch.float64 else 1e-1)
    assert program.truth(IMPLICIT) is None
    assert 0.0 <= program.score() <= 1.0
    assert program.objective() > 0.0
