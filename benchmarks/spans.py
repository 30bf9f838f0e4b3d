"""Nested stretches of a program, and what each of them took: time or peak memory.

spans = Spans(CpuClock())
with spans("iteration"):
    with spans("data"): ...
spans.end_of_round()
spans.exclusive["iteration"]["wall"]     # seconds per round, without those of "data"
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch

Reading = dict[str, float]


class Meter(Protocol):
    """What is measured between two boundaries of spans."""

    combine: str
    """``sum`` for what adds up over stretches, ``max`` for peaks."""

    def mark(self) -> None:
        """A boundary is here."""

    def stretches(self) -> list[Reading]:
        """Figures of the stretches between the marks made since the last call."""


class Spans:
    """Assigns the stretches between boundaries to the innermost open span, round by round.

    Attributes:
        exclusive: span, unit -> one figure per round, without the spans within it.
        inclusive: the same, with them.
        order: the spans as they were first opened.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._open: list[str] = []
        self._owners: list[tuple[str, ...]] = []  # of each stretch, outermost first
        self.order: list[str] = []
        self.exclusive: dict[str, dict[str, list[float]]] = {}
        self.inclusive: dict[str, dict[str, list[float]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The body is a part of span ``name``."""
        if name not in self.order:
            self.order.append(name)
        self._boundary()
        self._open.append(name)
        try:
            yield
        finally:
            self._boundary()
            self._open.pop()

    def _boundary(self) -> None:
        self._meter.mark()
        self._owners.append(tuple(self._open))

    def end_of_round(self) -> Reading:
        """Close the books of a round; what the whole of it took."""
        # The first mark ends nothing.
        owners, stretches = self._owners[1:], self._meter.stretches()
        assert not self._open
        assert len(owners) == len(stretches)
        exclusive: dict[str, Reading] = {}
        inclusive: dict[str, Reading] = {}
        total: Reading = {}
        for owner, reading in zip(owners, stretches, strict=True):
            self._add(exclusive.setdefault(owner[-1], {}), reading)
            for name in set(owner):
                self._add(inclusive.setdefault(name, {}), reading)
            self._add(total, reading)
        for found, kept in ((exclusive, self.exclusive), (inclusive, self.inclusive)):
            for name, reading in found.items():
                for unit, value in reading.items():
                    kept.setdefault(name, {}).setdefault(unit, []).append(value)
        self._owners = []
        return total

    def _add(self, into: Reading, reading: Reading) -> None:
        for unit, value in reading.items():
            if self._meter.combine == "sum":
                into[unit] = into.get(unit, 0.0) + value
            else:
                into[unit] = max(into.get(unit, 0.0), value)


class CpuClock:
    """Wall clock and this process's CPU time (all threads), seconds."""

    combine = "sum"

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Read both."""
        self._marks.append((time.perf_counter(), time.process_time()))

    def stretches(self) -> list[Reading]:
        """Seconds between marks."""
        marks, self._marks = self._marks, []
        return [{"wall": b[0] - a[0], "cpu": b[1] - a[1]} for a, b in pairwise(marks)]


class CudaClock:
    """Time in the stream, and the host's wall clock beside it, seconds.

    Marks are events; nothing waits for the device before :meth:`stretches`. Where the host is the
    slower one (small networks), a stretch in the stream includes waiting for it.
    """

    combine = "sum"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[torch.cuda.Event, float]] = []

    def mark(self) -> None:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((event, time.perf_counter()))

    def stretches(self) -> list[Reading]:
        """Wait for the device; seconds between marks."""
        torch.cuda.synchronize(self._device)
        marks, self._marks = self._marks, []
        return [
            {"stream": a[0].elapsed_time(b[0]) / 1e3, "wall": b[1] - a[1]}
            for a, b in pairwise(marks)
        ]


class CudaMemory:
    """Most bytes that torch's allocator had handed out between two marks."""

    combine = "max"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: list[float] = []

    def mark(self) -> None:
        """Read the peak and start anew. Allocation is the host's affair: no need to wait."""
        self._peaks.append(float(torch.cuda.max_memory_allocated(self._device)))
        torch.cuda.reset_peak_memory_stats(self._device)

    def stretches(self) -> list[Reading]:
        """Bytes."""
        peaks, self._peaks = self._peaks, []
        return [{"peak": peak} for peak in peaks[1:]]


class CpuMemory:
    """Highest resident memory of this process between two marks, as the Linux kernel counts it.

    Raises:
        OSError: the kernel doesn't offer the count (any other system).
    """

    combine = "max"

    def __init__(self) -> None:
        self._status = Path(f"/proc/{os.getpid()}/status")
        self._reset = Path(f"/proc/{os.getpid()}/clear_refs")
        self._peaks: list[float] = []

    def mark(self) -> None:
        """Read the high-water mark and set it back to the present."""
        found = re.search(r"VmHWM:\s*(\d+) kB", self._status.read_text(encoding="ascii"))
        assert found is not None
        self._peaks.append(1024.0 * int(found[1]))
        self._reset.write_text("5", encoding="ascii")

    def stretches(self) -> list[Reading]:
        """Bytes."""
        peaks, self._peaks = self._peaks, []
        return [{"peak": peak} for peak in peaks[1:]]
