"""What tests of steps that read nothing from the device share."""

from collections.abc import Mapping
from typing import Any

import tiny
import waiting

ON_A_GPU = waiting.needs_gpu


def reads_of_three_steps(system: str, changes: Mapping[str, Any], no_reads: list[str]) -> list[str]:
    """Every reading in the first three iterations, past an epoch; ``no_reads`` is the fixture."""
    engine = tiny.build(system, {"problems.segmentor.clip": 1.0, **changes})
    del no_reads[:]
    for _ in range(3):
        engine.iterate()
    engine._guard.watch(engine.problems, engine.global_step)
    return no_reads


def step_on_the_gpu(system: str, changes: Mapping[str, Any]) -> None:
    """RuntimeError if a step synchronises with the GPU."""
    engine = tiny.build(system, {"device": "cuda", "problems.segmentor.clip": 1.0, **changes})
    for _ in range(4):
        engine.iterate()  # past the first epoch, and past what is only set up once
    with waiting.forbidden():
        for _ in range(4):
            engine.iterate()
            engine._guard.watch(engine.problems, engine.global_step)
