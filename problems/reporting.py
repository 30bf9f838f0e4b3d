"""What a system adds to what people look at: to a sweep's tables and sheets, to a run's page.

@FIGURES.register("steps_of_the_game")
def steps(run: FinishedRun) -> float: ...

@SECTIONS.register("cycles")
def cycles(rows: Mapping[str, Sequence[FinishedRun]], **options) -> list[Block]: ...

@PAGES.register("lengths")
def lengths(run: RecordedRun) -> list[Piece]: ...
@ILLUSTRATIONS.register("pairs")
def pairs(run: FinishedRun, data: SegmentationData, count: int) -> list[tuple[str, list]]: ...
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlseg.config.registry import Registry
from mlseg.segmentation.data import SegmentationData
from mlseg.segmentation.pictures import Picture as Pixels


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


@dataclass(frozen=True)
class Series:
    """A figure over steps, both of one length; nothing in it is NaN or infinite."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes:
        lines: by the words of the legend.
        x, y: words at the axes.
        marks: places on the x axis, with what is there.
    """

    title: str
    lines: Mapping[str, Series]
    x: str = "step"
    y: str = ""
    marks: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture that the run has written.

    Attributes:
        path: of a PNG or JPEG in the run's directory.
        words: what is to be seen, for who can't see it.
    """

    title: str
    path: Path
    words: str


Piece = Block | Chart | Picture


@dataclass(frozen=True)
class RecordedRun:
    """A run as its directory holds it, come to its end or not; somebody else's perhaps.

    Attributes:
        directory: its own.
        results: ``results.json``; empty where there is none.
        config: ``config.yaml``, with every default.
        events: ``events.jsonl``.
        curves: ``metrics.jsonl``, by problem and figure.
    """

    directory: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Mapping[str, Series]]


class PageSection(Protocol):
    """A part of a run's page; nothing where the run isn't of its kind.

    What the run has written may have any content: an exception becomes a line of the page.
    """

    def __call__(self, run: RecordedRun) -> Sequence[Piece]: ...


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


class Illustration(Protocol):
    """Rows of pictures that a run can show, each with its words.

    Args:
        run: whose.
        data: that it was trained on.
        count: pictures of a row, (H, W, 3) uint8 of the images' size.

    Returns:
        Nothing where the run has nothing of the kind.
    """

    def __call__(
        self, run: FinishedRun, data: SegmentationData, count: int
    ) -> Sequence[tuple[str, Sequence[Pixels]]]: ...


def mean_and_deviation(values: Sequence[float], digits: int, sign: str = "") -> str:
    """``0.584 ± 0.013``, a sample's standard deviation; without it of a single value.

    Args:
        sign: ``+`` shows it in any case.
    """
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


FIGURES: Registry[Figure] = Registry(
    "figure", packages=["mlseg.sweeps.sections"], example="my_package.figures:steps"
)
SECTIONS: Registry[Section] = Registry(
    "section", packages=["mlseg.sweeps.sections"], example="my_package.sections:cycles"
)
PAGES: Registry[PageSection] = Registry("section of a page", example="my_package.sections:lengths")
"""Every one is asked for its part of every page."""
ILLUSTRATIONS: Registry[Illustration] = Registry(
    "illustration", example="my_package.pictures:pairs"
)
