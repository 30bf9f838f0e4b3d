"""No step of SegAN's players reads a value from the device."""

from typing import Any

import pytest
from synchronisation import ON_A_GPU, reads_of_three_steps, step_on_the_gpu

CHANGES: dict[str, dict[str, Any]] = {
    "alternating": {"augmentation": {"window": 24, "hue": 0.1}, "loss.dice_weight": 1.0},
    "stackelberg": {"game": "stackelberg"},
    "scenes": {"data.name": "synthetic_scenes", "problems.critic.unroll_steps": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_13_no_step_waits_for_the_device(name: str, no_reads: list[str]) -> None:
    assert reads_of_three_steps("segan", CHANGES[name], no_reads) == []


@ON_A_GPU
@pytest.mark.parametrize("name", CHANGES)
def test_13_no_step_waits_for_the_gpu(name: str) -> None:
    step_on_the_gpu("segan", CHANGES[name])
