"""bfloat16 in steps, float32 in hypergradients; 14 of the list of Betty's faults."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mlseg.hypergradients import names
from mlseg.multilevel.config import Config
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import GRAPHS

DAMPED = ("exact", "cg", "minres", "neumann", "nystrom", "stochastic")


class Precise(programs.Recorded):
    """Notes the type that its first layer computes in, in the step and in a hypergradient."""

    types: list[tuple[bool, torch.dtype]]

    def training_step(self, batch: Any) -> Tensor:
        self.types.append((self.replaying, self.module.first(batch[0]).dtype))
        return super().training_step(batch)


@pytest.mark.parametrize("method", names())
def test_14_bf16_steps_and_fp32_hypergradients_on_the_cpu(method: str) -> None:
    graph = GRAPHS["two paths"]
    gradients = {}
    for precision in ("fp32", "bf16"):
        # The step's own difference would be magnified by an inverse Hessian.
        damping = {"damping": 10.0} if method in DAMPED else {}
        engine = programs.small(graph, {"method": method, **damping}, dropout=0.0)
        for level in engine.problems:
            level.module.float()
            level.__class__ = Precise
            level.types = []
            level.precision = precision
            level.train_data_loader[0] = [
                tuple(t.float() for t in batch) for batch in level.train_data_loader[0]
            ]
            level.set_train_data_loader(level.train_data_loader[0])
        engine.iterate()
        low = torch.bfloat16 if precision == "bf16" else torch.float32
        assert engine.low.types[0] == (False, low)
        assert len(engine.low.types) > 1
        assert set(engine.low.types[1:]) == {(True, torch.float32)}
        assert all(p.dtype == torch.float32 for p in engine.low.module.parameters())
        gradients[precision] = engine.top.gradient
    assert distance(gradients["bf16"], gradients["fp32"]) < 0.1


def test_14_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="'fp16': choose fp32 or bf16"):
        Config(precision="fp16")
