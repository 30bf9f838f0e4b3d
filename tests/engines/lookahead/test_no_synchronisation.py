"""No step of LoAd's stage reads a value from the device: fault 13 of Betty's list."""

from typing import Any

import tiny
from transitions import loop


def test_13_no_adversarial_step_waits_for_the_device(no_reads: list[str]) -> None:
    engine: Any = tiny.build("load")
    engine.train()
    engine.enter_stage(1)
    lookahead = loop(engine)
    lookahead.buffer.open("g0", 0)
    lookahead.training.begin()
    engine.generator.step_normal()  # makes the optimizer's state
    lookahead.snapshots["start"].take()
    del no_reads[:]
    engine.generator.step_normal()
    lookahead.snapshots["start"].take()
    lookahead.snapshots["start"].restore()
    assert no_reads == []
    del no_reads[:]
    lookahead.hold_out.miou(engine.generator.module)
    assert set(no_reads) <= {"mlseg.engines.lookahead.hold_out: __float__"}, (
        "what has been transferred"
    )


def test_alternating_steps_dont_wait_either(no_reads: list[str]) -> None:
    engine: Any = tiny.build("load", {"descent_ascent": 3})
    engine.train()
    engine.enter_stage(1)
    for _ in range(2):  # the first makes the optimizers' states
        del no_reads[:]
        engine.discriminator.step_normal()
        engine.generator.step_normal()
    assert no_reads == []
