"""No step of E2EAug's levels reads a value from the device."""

from typing import Any

import pytest
from synchronisation import ON_A_GPU, reads_of_three_steps, step_on_the_gpu

CHANGES: dict[str, Any] = {"gan.pretrain": 0, "loss": {"cross_entropy": 1.0, "dice": 1.0}}


LEARNED: dict[str, Any] = {
    **CHANGES,
    "level3": {"synthetic_weight": True, "mask_augmentation": True, "guidance": 0.5},
    "mask_augmentation": {"preset": "paper", "scale": [0.9, 1.1]},
}


@pytest.mark.parametrize("changes", [CHANGES, LEARNED], ids=["paper", "all of level three"])
def test_13_no_step_waits_for_the_device(changes: dict[str, Any], no_reads: list[str]) -> None:
    assert reads_of_three_steps("e2eaug", changes, no_reads) == []


@ON_A_GPU
@pytest.mark.parametrize("changes", [CHANGES, LEARNED], ids=["paper", "all of level three"])
def test_13_no_step_waits_for_the_gpu(changes: dict[str, Any]) -> None:
    step_on_the_gpu("e2eaug", changes)
