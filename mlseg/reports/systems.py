"""What systems add to a page, by the registry of their sections."""

from __future__ import annotations

from pathlib import Path

from mlseg.errors import one_line
from mlseg.problems.reporting import PAGES, Block, Chart, Picture, Piece
from mlseg.reports.charts import line_chart
from mlseg.reports.parts import Cell, Drawing, Fold, Grid, Image, Part, Section, Table, Text
from mlseg.reports.pictures import embedded
from mlseg.reports.reading import Run

_PICTURES = 12


def sections(run: Run) -> list[Section]:
    """Of every registered section that has something to say of this run."""
    found = []
    left = _PICTURES
    for name, section in PAGES.all().items():
        try:
            pieces = list(section(run.recorded))
        except Exception as error:  # noqa: BLE001, the run's files may hold anything
            pieces = [Block(f"{name}: can't be shown ({type(error).__name__}: {one_line(error)})")]
        parts: list[Part] = []
        drawn: list[Drawing | Image] = []
        for piece in pieces:
            if isinstance(piece, Picture):
                left -= 1
                if left < 0:
                    continue
            shown = _part(piece, run.recorded.directory)
            if isinstance(shown, Drawing):
                drawn.append(shown)
            else:
                parts.append(shown)
        if drawn:
            grid = Grid(drawn)
            parts.append(grid if len(drawn) <= 6 else Fold(f"{len(drawn)} charts", [grid]))
        if parts:
            found.append(Section(name.replace(".", ": ").replace("_", " "), parts))
    return found


def _part(piece: Piece, directory: Path) -> Part:
    if isinstance(piece, Chart):
        return Drawing(piece.title, line_chart(piece))
    if isinstance(piece, Picture):
        return embedded(piece, directory)
    if not piece.head:
        return Text(piece.title)
    rows = [[_cell(text) for text in row] for row in piece.rows]
    return Table(piece.title, list(piece.head), rows, sortable=len(rows) > 3)


def _cell(text: str) -> Cell:
    """Sorted as a number where it begins with one."""
    try:
        return Cell(text, float(text.split()[0].rstrip("%")))
    except (ValueError, IndexError):
        return Cell(text)
