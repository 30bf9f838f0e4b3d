"""No step of a problem reads a value from the device: fault 13 of Betty's list."""

from typing import Any

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
