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
