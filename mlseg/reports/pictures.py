"""Pictures that a run has written, within its page."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from PIL import Image as Pictures

from mlseg.errors import UserError, one_line
from mlseg.files import require_file
from mlseg.problems.reporting import Picture
from mlseg.reports.parts import Image, Part, Text

_WIDTH = 1000
"""Pixels of a picture on the page at most."""
_PIXELS = 2**26
_MOST_BYTES = 2**26


def embedded(piece: Picture, directory: Path) -> Part:
    """Read, checked to lie in the run's directory, and written again smaller, as JPEG."""
    try:
        path = Path(os.path.realpath(piece.path))
        if not path.is_relative_to(os.path.realpath(directory)):
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


def last_validation(directory: Path) -> Part | None:
    """The latest sheet of sample pictures, if there is one."""
    found = sorted((directory / "samples").glob("validation_*.png"))
    if not found:
        return None
    words = "validation images with truth, prediction and probabilities; names and scores above"
    title = f"Validation at step {found[-1].stem.rpartition('_')[2].lstrip('0') or 0}"
    return embedded(Picture(title, found[-1], words), directory)
