"""Contestants that do the same work: whether they agree, how long they take, what they hold."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from spans import CpuClock, CudaClock
from torch import Tensor
from two_levels import Contestant, Task

from mlseg.comparison import memory
from mlseg.errors import UserError

Makers = Mapping[str, Callable[[Task], Contestant]]
Agreement = tuple[str, str, float]
"""Who has to agree with whom, to which relative error in double precision."""


class Group:
    """Contestants over the same work, their times and memory.

    Args:
        title: of the work.
        makers: of the contestants, by name.
        make_task: makes the work in a precision.
        device: where.
        agreement: that is checked first.
    """

    def __init__(
        self,
        title: str,
        makers: Makers,
        make_task: Callable[[torch.dtype], Task],
        device: torch.device,
        agreement: Sequence[Agreement],
    ) -> None:
        self.title, self.device = title, device
        self._makers, self._make_task, self._agreement = makers, make_task, agreement
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.errors: dict[str, float] = {}

    def measure(self, rounds: int) -> None:
        """Check agreement, then time and memory."""
        self._check(self._make_task(torch.float64))
        task = self._make_task(torch.float32)
        contestants = {
            name: make(task) for name, make in self._makers.items() if name not in self.refused
        }
        self.seconds = {name: [] for name in contestants}
        clock = CudaClock(self.device) if self.device.type == "cuda" else CpuClock()
        for number in range(rounds + 1):
            for name in _rotated(list(contestants), number):
                contestants[name].prepare()
                gc.collect()
                clock.mark()
                contestants[name].run()
                clock.mark()
                (reading,) = clock.stretches()
                if self.device.type == "cuda":
                    contestants[name].forget()  # the next one's graphs may not fit beside these
                if number:  # the first round warms up
                    self.seconds[name].append(reading["stream" if "stream" in reading else "cpu"])
        for name, contestant in contestants.items():
            contestant.forget()
            contestant.prepare()
            gc.collect()
            _, self.bytes[name] = memory.peak(contestant.run, self.device)
            contestant.forget()

    def ratios(self, name: str, to: str) -> list[float]:
        """Of times, round by round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]

    def ratio(self, name: str, to: str) -> float:
        """Their median."""
        return statistics.median(self.ratios(name, to))

    def _check(self, task: Task) -> None:
        found = {}
        for name, make in self._makers.items():
            try:
                contestant = make(task)
                contestant.prepare()
                found[name] = [g.detach().clone() for g in contestant.run()]
            except UserError as error:
                self.refused[name] = str(error)
        for name, to, tolerance in self._agreement:
            if name not in found or to not in found:
                continue
            self.errors[name] = difference = _distance(found[name], found[to])
            if not difference < tolerance:
                raise SystemExit(
                    f"{self.title}: {name} and {to} differ by {difference:.1e}, more than "
                    f"{tolerance:.0e}: they don't do the same work"
                )

    def as_dict(self) -> dict[str, Any]:
        """All figures."""
        return {
            "title": self.title,
            "seconds": self.seconds,
            "extra_bytes": self.bytes,
            "refused": self.refused,
            "differences_in_double_precision": self.errors,
        }


def _rotated(names: list[str], by: int) -> list[str]:
    """Each round starts with another, so that nobody always follows the same one."""
    by %= len(names)
    return names[by:] + names[:by]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    difference = torch.nn.utils.get_total_norm([x - y for x, y in zip(a, b, strict=True)])
    return float(difference / torch.nn.utils.get_total_norm(list(b)))


def table(group: Group, references: Sequence[str], divide: int = 1) -> str:
    """A row per contestant: milliseconds, ratios to the references, memory."""
    lines = [
        f"| {group.title} | ms | " + " | ".join(f"of {r}" for r in references) + " | MiB |",
        "|---|---|" + "---|" * len(references) + "---|",
    ]
    for name, seconds in group.seconds.items():
        cells = [f"{1e3 * statistics.median(seconds) / divide:.1f}"]
        for reference in references:
            low, middle, high = statistics.quantiles(group.ratios(name, reference), n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        size = group.bytes[name] / 2**20
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {size:.0f} |")
    lines += [f"\n{name}: {why}" for name, why in group.refused.items()]
    return "\n".join(lines) + "\n"
