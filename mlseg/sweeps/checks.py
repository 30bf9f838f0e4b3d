"""What a grid's report may not say; above all, nothing is chosen on test data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlseg.config import Tree
from mlseg.config.explaining import quoted
from mlseg.errors import UserError
from mlseg.problems.reporting import FIGURES, ILLUSTRATIONS, SECTIONS
from mlseg.sweeps.settings import BESIDE_AXES, GridSettings, TableSettings, Where, file_stem


def refuse_test_data(
    tree: Tree, path: tuple[str | int, ...], figure: str | None, what: str
) -> None:
    """Raise UserError for a path that leads to a score on anything but validation images."""
    parts = (figure or "").split(".")
    if parts[0] == "scores" and not (len(parts) > 2 and re.fullmatch(r"val(_\w+)?", parts[2])):
        raise tree.error(
            path,
            f"{what} would be chosen on test data, by {quoted(figure)}; take a score on validation "
            "images, as in scores.best.val.jaccard",
        )


def check_report(tree: Tree, settings: GridSettings, axes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for a report that names what there isn't, or chooses by test data."""
    report = settings.report
    figures = {name: value for name, value in report.figures.items() if value is not None}
    dimensions: dict[str, Any] = {**axes, **dict.fromkeys(BESIDE_AXES)}
    for name, figure in figures.items():
        for key in ("of", "minus"):
            for wanted in re.findall(r"{(.*?)}", getattr(figure, key) or ""):
                here = ("report", "figures", name, key)
                check_name(tree, wanted, BESIDE_AXES, "placeholder", here)
        if figure.by is not None:
            try:
                FIGURES.get(figure.by)
            except UserError as error:
                raise tree.error(("report", "figures", name, "by"), str(error)) from None
    for name, table in report.tables.items():
        if table is not None:
            _check_table(tree, name, table, figures, dimensions, axes)
    for name, picture in report.pictures.items():
        if picture is None:
            continue
        at = ("report", "pictures", name)
        check_name(tree, picture.figure, figures, "figure", (*at, "figure"))
        check_name(tree, picture.x, dimensions, "axis", (*at, "x"))
        if picture.series is not None:
            check_name(tree, picture.series, dimensions, "axis", (*at, "series"))
        check_where(tree, (*at, "where"), picture.where, dimensions)
    for name, sheet in report.sheets.items():
        if sheet is None:
            continue
        place = ("report", "sheets", name)
        check_name(tree, sheet.rows, axes, "axis", (*place, "rows"))
        check_where(tree, (*place, "where"), sheet.where, axes)
        for value, kind in sheet.besides.items():
            spot = (*place, "besides", value)
            check_name(tree, value, axes[sheet.rows], f"value of {sheet.rows}", spot)
            try:
                ILLUSTRATIONS.get(kind)
            except UserError as error:
                raise tree.error(spot, str(error)) from None
    for name, example in report.examples.items():
        if example is not None:
            check_where(tree, ("report", "examples", name, "where"), example.where, axes)
    files: dict[str, str] = {}
    for kind, named in (
        ("pictures", report.pictures),
        ("sheets", report.sheets),
        ("examples", report.examples),
    ):
        for name, drawn in named.items():
            if drawn is None:
                continue
            other = files.setdefault(file_stem(name), f"report.{kind}.{name}")
            if other != f"report.{kind}.{name}":
                text = f"would be {file_stem(name)}.png, and so is {other}; rename one of them"
                raise tree.error(("report", kind, name), text)
    for name, section in report.sections.items():
        if section is None:
            continue
        try:
            SECTIONS.get(section.kind)
        except UserError as error:
            raise tree.error(("report", "sections", name, "kind"), str(error)) from None
        check_where(tree, ("report", "sections", name, "where"), section.where, dimensions)


def _check_table(
    tree: Tree,
    name: str,
    table: TableSettings,
    figures: Mapping[str, Any],
    dimensions: Mapping[str, Any],
    axes: Mapping[str, Mapping[str, Any]],
) -> None:
    at = ("report", "tables", name)
    used: list[str] = []
    for key in ("rows", "columns"):
        for position, axis in enumerate(getattr(table, key)):
            check_name(tree, axis, dimensions, "axis", (*at, key, position))
            if axis in used:
                raise tree.error((*at, key, position), f"{axis} comes twice")
            used.append(axis)
    for key in ("figures", "differences"):
        for position, figure in enumerate(getattr(table, key) or []):
            check_name(tree, figure, figures, "figure", (*at, key, position))
    check_where(tree, (*at, "where"), table.where, dimensions)
    if table.versus is not None:
        check_where(tree, (*at, "versus"), dict(table.versus), axes)
    for axis, figure in table.select.items():
        here = (*at, "select", axis)
        check_name(tree, axis, axes, "axis", here)
        check_name(tree, figure, figures, "figure", here)
        if axis in used:
            raise tree.error(here, f"{axis} is among its rows or columns; it can't be chosen too")
        chosen = figures[figure]
        if chosen.of is None:
            raise tree.error(here, f"{figure} is no path in results.json; choose by a score on val")
        for part in (chosen.of, chosen.minus):
            refuse_test_data(tree, here, part, axis)


def check_where(
    tree: Tree, path: tuple[str | int, ...], where: Where, axes: Mapping[str, Any]
) -> None:
    """Raise UserError for an axis or value that there isn't."""
    for axis, values in where.items():
        check_name(tree, axis, axes, "axis", (*path, axis))
        for value in [values] if isinstance(values, str) else values:
            if axes[axis] is not None:
                check_name(tree, value, axes[axis], f"value of {axis}", (*path, axis))


def check_name(
    place: Tree | str,
    name: str,
    known: Iterable[str],
    kind: str,
    path: tuple[str | int, ...] = (),
) -> None:
    """Raise UserError for a name that isn't known, with the nearest.

    Args:
        place: what sets it: a config (at ``path``), or an option of the command.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
    text = f"no {kind} {name!r}; {hint}"
    raise UserError(f"{place}: {text}") if isinstance(place, str) else place.error(path, text)


def fits(where: Where, values: Mapping[str, str]) -> bool:
    """Whether a cell's values are among those named."""
    return all(
        values[axis] in ([wanted] if isinstance(wanted, str) else wanted)
        for axis, wanted in where.items()
        if axis in values
    )


def value_at(values: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
