"""Figures of a hop that cost no synchronisation with the device."""

from __future__ import annotations

import time

import torch


class Seconds:
    """A stretch of time on a device, readable as a float once it is over.

    On CUDA the stretch lies between two events in the stream, and reading it waits for the second;
    elsewhere it is the process's wall clock.

    Args:
        device: where the work runs. The stretch starts now.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._events: list[torch.cuda.Event] | None = None
        if torch.device(device).type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = self._end = time.perf_counter()

    def stop(self) -> None:
        """The stretch ends now."""
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def __float__(self) -> float:
        if self._events is None:
            return self._end - self._start
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3
