"""No step of E2EAug's levels reads a value from the device."""

from typing import Any

from synchronisation import ON_A_GPU, reads_of_three_steps, step_on_the_gpu

CHANGES: dict[str, Any] = {"gan.pretrain": 0, "loss": {"cross_entropy": 1.0, "dice": 1.0}}


def test_13_no_step_waits_for_the_device(no_reads: list[str]) -> None:
    assert reads_of_three_steps("e2eaug", CHANGES, no_reads) == []


@ON_A_GPU
def test_13_no_step_waits_for_the_gpu() -> None:
    step_on_the_gpu("e2eaug", CHANGES)
