"""How numbers and tables look in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mlseg.sweeps.frame import Spread

NOTHING = "-"


def digits_of(metric: str) -> int:
    """After the point: distances are in pixels, everything else is a part of 1."""
    return 2 if metric.startswith("hd95") else 3


def plain(name: str) -> str:
    """A name as a word."""
    return name.replace("_", " ")


def show(value: Spread | None, digits: int, signed: bool = False, deviation: bool = True) -> str:
    """``0.584 ± 0.013``; without the latter where there is a single value."""
    if value is None:
        return NOTHING
    mean = f"{value[0]:{'+' if signed else ''}.{digits}f}"
    return mean if value[1] is None or not deviation else f"{mean} ± {value[1]:.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return [f"| {' | '.join(row)} |" for row in cells]
