"""bfloat16 in steps, float32 in hypergradients; 14 of the list of Betty's faults."""

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mlseg.hypergradients import names
from mlseg.multilevel.config import Config
from mlseg.testing import programs
from mlseg.testing.exact import distance
from mlseg.testing.programs import GRAPHS, Recorded

LOWERS = ("low", "middle")


class Precise(Recorded):
    """Notes the type that its first layer computes in, in the step and in a hypergradient."""

    types: list[tuple[bool, torch.dtype]]
    along: Sequence[Tensor] | None = None
    """What to step along in place of the gradient."""

    def training_step(self, batch: Any) -> Tensor:
        self.types.append((self.replaying, self.module.first(batch[0]).dtype))
        return super().training_step(batch)

    def grad_callback(self) -> None:
        if self.along is not None:
            for p, g in zip(self.trainable_parameters(), self.along, strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
        super().grad_callback()


def stepped(method: str, lowers: str, along: dict[str, list[Tensor]] | None = None) -> Any:
    """All levels after a step in bf16, the lower ones in the precision ``lowers``."""
    engine: Any = programs.small(GRAPHS["two paths"], {"method": method}, dropout=0.0)
    for level in engine.problems:
        level.module.float()
        level.__class__ = Precise
        level.types = []
        level.precision = lowers if level.name in LOWERS else "bf16"
        level.along = along[level.name] if along and level.name in LOWERS else None
        level.set_train_data_loader(
            [tuple(t.float() for t in batch) for batch in level.train_data_loader[0]]
        )
    engine.iterate()
    return engine


@pytest.mark.parametrize("method", names())
def test_14_bf16_steps_and_fp32_hypergradients_on_the_cpu(method: str) -> None:
    engine = stepped(method, "bf16")
    assert engine.low.types[0] == (False, torch.bfloat16)
    assert len(engine.low.types) > 1
    assert set(engine.low.types[1:]) == {(True, torch.float32)}
    assert all(p.dtype == torch.float32 for p in engine.low.module.parameters())
    # The same from lower levels in fp32 that step along the gradients of those in bf16: what a
    # hypergradient gets (weights, batches, the vector of the upper level) is then the same bit by
    # bit, and bfloat16's rounding, 4e-3 times whatever a solver magnifies it by, in none of it.
    # What is left is float32's own, 6e-8 an operation where their order differs; hypergradients
    # that were evaluated in bf16 would be apart by 1e-3 to 1.
    reference = stepped(
        method, "fp32", {name: getattr(engine, name).gradients[-1] for name in LOWERS}
    )
    assert reference.low.types[0] == (False, torch.float32)
    for name in LOWERS:
        both = (programs.parameters(getattr(e, name).module) for e in (engine, reference))
        assert tiny.same(*both), name
    assert distance(engine.top.gradient, reference.top.gradient) < 1e-5


def test_14_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="'fp16': choose fp32 or bf16"):
        Config(precision="fp16")
