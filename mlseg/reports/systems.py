"""What systems add to a page, by the registry of their sections."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image as Pictures

from mlseg.errors import UserError, one_line
from mlseg.files import require_file
from mlseg.problems.reporting import PAGES, Block, Chart, Picture, Piece
from mlseg.reports.charts import line_chart
from mlseg.reports.parts import Cell, Drawing, Fold, Grid, Image, Part, Section, Table, Text
from mlseg.reports.reading import Run

_WIDTH = 1000
"""Pixels of a picture on the page at most."""
_PIXELS = 2**26
_MOST_BYTES = 2**26
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
        return _picture(piece, directory)
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


def _picture(piece: Picture, directory: Path) -> Part:
    """Read, checked to lie in the run's directory, and written again smaller, as JPEG."""
    try:
        path = piece.path.resolve()
        if not path.is_relative_to(directory.resolve()):
            raise UserError("not in the run's directory")
        require_file(path, _MOST_BYTES)
        with Pictures.open(path, formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > _PIXELS:
                raise UserError("too large")
            picture = opened.convert("RGB")
        if picture.width > _WIDTH:
            height = max(1, round(picture.height * _WIDTH / picture.width))
            picture = picture.resize((_WIDTH, height), Pictures.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError) as error:
        return Text(f"{piece.title}: the picture can't be shown ({one_line(error)})")
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Image(piece.title, uri, piece.words, wide=True)
