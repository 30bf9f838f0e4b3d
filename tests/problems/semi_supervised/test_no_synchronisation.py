"""No step of either network reads a value from the device."""

from typing import Any

import pytest
from synchronisation import ON_A_GPU, reads_of_three_steps, step_on_the_gpu

# The ramps are whole from the first step on, images that mislead included.
WHOLE = {"weight": 1.0, "epochs": 1000, "begin": 0, "end": 1}
DCT: dict[str, Any] = {
    "method": "dct",
    "partner": {"name": "unet", "channels": 4, "levels": 2},
    "adversarial": WHOLE,
}
CHANGES: dict[str, dict[str, Any]] = {
    "ctbct": {"augmentation": {"rotate": 20.0}},
    "ctbct on scenes": {"data.name": "synthetic_scenes", "consistency": WHOLE},
    "dct": DCT,
    "dct on scenes": {**DCT, "data.name": "synthetic_scenes"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_step_waits_for_the_device(name: str, no_reads: list[str]) -> None:
    assert reads_of_three_steps("semi_supervised", CHANGES[name], no_reads) == []


@ON_A_GPU
@pytest.mark.parametrize("name", CHANGES)
def test_no_step_waits_for_the_gpu(name: str) -> None:
    step_on_the_gpu("semi_supervised", CHANGES[name])
