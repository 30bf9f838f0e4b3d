"""What a page is made of; the template shows each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from mlseg.reports.charts import short

_LONGEST = 2000
"""Characters of a value that is shown as it is."""


@dataclass(frozen=True)
class Cell:
    """Of a table.

    Attributes:
        text: shown.
        value: by which the column is sorted; the text, where there is none.
        link: to a place on the page.
    """

    text: str
    value: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Text:
    """A paragraph; a loud one is a warning."""

    words: str
    loud: bool = False
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Pre:
    """Text as it stands."""

    words: str
    kind: str = field(default="pre", init=False)


@dataclass(frozen=True)
class Headline:
    """A number that is read first, and what it is."""

    number: str
    words: str
    small: str = ""
    kind: str = field(default="headline", init=False)


@dataclass(frozen=True)
class Drawing:
    """A chart, ready."""

    title: str
    markup: Markup
    kind: str = field(default="drawing", init=False)


@dataclass(frozen=True)
class Image:
    """A picture within the page.

    Attributes:
        uri: a data URI.
        words: what is to be seen, for who can't see it.
        anchor: its place on the page.
    """

    title: str
    uri: str
    words: str
    anchor: str = ""
    wide: bool = False
    kind: str = field(default="image", init=False)


@dataclass(frozen=True)
class Grid:
    """Charts or pictures side by side, as many as fit."""

    parts: Sequence[Drawing | Image]
    kind: str = field(default="grid", init=False)


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when asked for."""

    title: str
    parts: Sequence[Part]
    kind: str = field(default="fold", init=False)


Part = Table | Text | Pre | Headline | Drawing | Image | Grid | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


def cell(value: float | str | None, digits: int = 4) -> Cell:
    """A number rounded, and sorted by its whole value; nothing as a dash."""
    if value is None:
        return Cell("-")
    if isinstance(value, str):
        return Cell(value)
    whole = float(value).is_integer() and abs(value) < 1e15
    return Cell(f"{value:.0f}" if whole and digits == 0 else f"{value:.{digits}f}", float(value))


def words(value: object) -> Cell:
    """Any plain value."""
    if isinstance(value, float):
        return Cell(short(value), value)
    return Cell((value if isinstance(value, str) else repr(value))[:_LONGEST])


def span_cell(pair: tuple[float, float] | None, sign: str = "") -> Cell:
    """An interval, sorted by its lower end."""
    if pair is None:
        return cell(None)
    low, high = pair
    return Cell(f"{low:{sign}.3f} to {high:{sign}.3f}", low)
