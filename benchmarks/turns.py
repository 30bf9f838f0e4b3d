"""Operations timed in turns, so that whatever else the machine does hurts all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from torch.utils.benchmark import Timer


def take_turns(
    operations: Mapping[str, Callable[[], object]], repeats: int, threads: int
) -> dict[str, float]:
    """Median seconds of each operation; a device is waited for before a clock is read.

    Args:
        operations: by name. Each runs three times in a turn, of which the last is timed.
        repeats: turns.
        threads: of torch, while an operation runs.
    """
    timers = {
        name: Timer("operation()", globals={"operation": operation}, num_threads=threads)
        for name, operation in operations.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name] += timer.timeit(1).times
    return {name: statistics.median(values) for name, values in times.items()}
