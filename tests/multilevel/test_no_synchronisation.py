"""No step of a problem reads a value from the device: fault 13 of Betty's list."""

from typing import Any

import tiny
import torch
from synchronisation import ON_A_GPU, reads_of_three_steps, step_on_the_gpu

CHANGES: dict[str, Any] = {"loss": {"cross_entropy": 1.0, "dice": 1.0}}


def test_13_no_step_waits_for_the_device(no_reads: list[str]) -> None:
    assert reads_of_three_steps("supervised", CHANGES, no_reads) == []


@ON_A_GPU
def test_13_no_step_waits_for_the_gpu() -> None:
    step_on_the_gpu("supervised", CHANGES)


def test_13_the_watch_on_reads_works(no_reads: list[str]) -> None:
    assert torch.ones(()).item() == 1.0
    assert no_reads == [f"{__name__}: item"]


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
    assert set(no_reads) <= {"mlseg.engines.lookahead.hold_out: __float__"}, (
        "what has been transferred"
    )
