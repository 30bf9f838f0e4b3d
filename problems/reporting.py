"""What a system adds to the tables of a sweep: figures and sections, by name.

@FIGURES.register("steps_of_the_game")
def steps(run: FinishedRun) -> float: ...

@SECTIONS.register("cycles")
def cycles(rows: Mapping[str, Sequence[FinishedRun]], **options) -> list[Block]: ...
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlseg.config.registry import Registry


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end.

    Attributes:
        directory: its own.
        seed: of its draws.
        results: ``results.json``.
        config: ``config.yaml``, with every default.
    """

    directory: Path
    seed: int
    results: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A table, or a paragraph.

    Attributes:
        title: of the table; the paragraph, where there is no table.
        head: its columns.
        rows: its cells, as they are shown.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Figure(Protocol):
    """A number of a finished run; None where it has none."""

    def __call__(self, run: FinishedRun) -> float | None: ...


class Section(Protocol):
    """A part of a report.

    Args:
        rows: finished runs by the label of their row; one for each seed.
        options: of the grid.
    """

    def __call__(
        self, rows: Mapping[str, Sequence[FinishedRun]], **options: Any
    ) -> Sequence[Block]: ...


def mean_and_deviation(values: Sequence[float], digits: int, sign: str = "") -> str:
    """``0.584 ± 0.013``, a sample's standard deviation; without it of a single value.

    Args:
        sign: ``+`` shows it in any case.
    """
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


FIGURES: Registry[Figure] = Registry("figure", example="my_package.figures:steps")
SECTIONS: Registry[Section] = Registry(
    "section", packages=["mlseg.sweeps.sections"], example="my_package.sections:cycles"
)
