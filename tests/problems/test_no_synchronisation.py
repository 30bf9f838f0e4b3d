"""No step of a problem reads a value from the device: fault 13 of Betty's list."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import waiting
from torch import Tensor

READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
ON_THE_HOST = ("torch.optim", "torch.utils.data", "mlseg.data", "mlseg.randomness")
"""Modules that read tensors which lie on the host wherever training runs."""


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every reading of a tensor's value from Python, by the module that does it."""
    found: list[str] = []

    def forbid(name: str) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith(ON_THE_HOST):
                found.append(f"{caller}: {name}")
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, read)

    for name in READS:
        forbid(name)
    return found


LOSS = {"loss": {"cross_entropy": 1.0, "dice": 1.0}}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "e2eaug": ("e2eaug", {"gan.pretrain": 0, **LOSS}),
    "supervised": ("supervised", LOSS),
    "segan": ("segan", {"augmentation": {"window": 24, "hue": 0.1}, "loss.dice_weight": 1.0}),
    "stackelberg": ("segan", {"game": "stackelberg"}),
    "scenes": ("segan", {"data.name": "synthetic_scenes", "problems.critic.unroll_steps": 2}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_13_no_step_waits_for_the_device(name: str, no_reads: list[str]) -> None:
    system, changes = SYSTEMS[name]
    engine = tiny.build(system, {"problems.segmentor.clip": 1.0, **changes})
    del no_reads[:]
    for _ in range(3):  # past an epoch of SegAN's
        engine.iterate()
    engine._watch()
    assert no_reads == []


def test_13_the_watch_on_reads_works(no_reads: list[str]) -> None:
    assert torch.ones(()).item() == 1.0
    assert no_reads == [f"{__name__}: item"]


@waiting.needs_gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_13_no_step_waits_for_the_gpu(name: str) -> None:
    system, changes = SYSTEMS[name]
    engine = tiny.build(system, {"device": "cuda", "problems.segmentor.clip": 1.0, **changes})
    for _ in range(4):
        engine.iterate()  # past the first epoch, and past what is only set up once
    with waiting.forbidden():
        for _ in range(4):
            engine.iterate()
            engine._watch()


def test_13_no_adversarial_step_waits_for_the_device(no_reads: list[str]) -> None:
    engine: Any = tiny.build("load")
    engine.train()
    engine.enter_stage(1)
    engine.buffer.open("g0", 0)
    engine.discriminator_training.begin()
    engine.generator.step_normal()  # makes the optimizer's state
    engine.snapshots["start"].take()
    del no_reads[:]
    engine.generator.step_normal()
    engine.snapshots["start"].take()
    engine.snapshots["start"].restore()
    assert no_reads == []
    del no_reads[:]
    engine.hold_out.miou(engine.generator.module)
    assert set(no_reads) <= {"mlseg.engines.hold_out: __float__"}, "what has been transferred"
