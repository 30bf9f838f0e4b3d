"""What a sweep leaves: ``table.md``, ``table.csv``, ``cells.csv``, and a picture of each figure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlseg import machine
from mlseg.config import yaml12
from mlseg.files import replacing, write_json, write_text, writing
from mlseg.sweeps.checks import fits
from mlseg.sweeps.frame import Finished, Spread, aggregate, spread
from mlseg.sweeps.grid import Cell, Grid
from mlseg.sweeps.running import finished as is_finished
from mlseg.sweeps.running import results
from mlseg.sweeps.settings import BESIDE_AXES, TableSettings, Where, file_stem
from mlseg.sweeps.showing import NOTHING, digits_of, markdown, plain, show

if TYPE_CHECKING:
    import pandas as pd

HISTORY = "sweep.json"
_DIFFERENCES = (
    "Differences are seed by seed. The interval holds 95 % of the means of seeds drawn with "
    "replacement; p is of Wilcoxon's signed-rank test, two-sided, which with 3, 4 and 5 seeds "
    "can't be below 0.25, 0.125 and 0.0625."
)


@dataclass
class _Made:
    """What is to be written: lines of Markdown, records of the CSV."""

    lines: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)


def write(grid: Grid, finished: Finished) -> str:
    """Write all of it below the grid's ``out``.

    Returns:
        ``table.md``.

    Raises:
        RunError: a file can't be written.
    """
    import pandas as pd
    from PIL import Image

    from mlseg.sweeps import examples, sheets
    from mlseg.sweeps.pictures import draw
    from mlseg.sweeps.sections import run_section

    report, made = grid.settings.report, _Made()
    order = [*grid.axes, *BESIDE_AXES]
    made.lines += _head(grid, finished)
    tables = {n: t for n, t in report.tables.items() if t is not None} or _default(finished)
    for name, table in tables.items():
        _table(finished, name, table, made)
    for section in report.sections.values():
        if section is not None:
            rows = rows_of(finished, section.where)
            blocks = run_section(section.kind, rows, section.options) if rows else []
            for block in blocks:
                made.lines += ["", f"## {block.title}", ""] if block.head else ["", block.title]
                made.lines += markdown(block.head, block.rows) if block.head else []
    if any("minus this" in record["figure"] for record in made.records):
        made.lines += ["", _DIFFERENCES]
    drawn = draw(finished, grid.out)
    for name, picture in itertools.chain(sheets.draw(finished), examples.draw(finished)):
        path = drawn[name] = grid.out / f"{file_stem(name)}.png"
        with writing(path), replacing(path) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")
    for name, path in drawn.items():
        made.lines += ["", f"![{name}]({path.name})"]
    text = "\n".join(made.lines) + "\n"
    write_text(grid.out / "table.csv", _ordered(pd.DataFrame(made.records), order))
    write_text(grid.out / "cells.csv", _ordered(finished.frame, order))
    write_text(grid.out / "table.md", text)
    return text


def _ordered(frame: pd.DataFrame, first: Sequence[str]) -> str:
    there = [name for name in first if name in frame]
    text: str = frame[[*there, *frame.columns.difference(there, sort=False)]].to_csv(index=False)
    return text


def remember(grid: Grid, command: str) -> None:
    """Keep in ``sweep.json`` what was asked for."""
    commands = remembered(grid)
    entry = f"{command}  (at {machine.revision()})"
    if entry not in commands:
        write_json(grid.out / HISTORY, {"grid": str(grid.path), "commands": [*commands, entry]})


def remembered(grid: Grid) -> list[str]:
    """All commands so far."""
    try:
        found: list[str] = json.loads((grid.out / HISTORY).read_text(encoding="utf-8"))["commands"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found


def rows_of(finished: Finished, where: Where) -> dict[str, list[Any]]:
    """Finished runs by the label of their row."""
    rows: dict[str, list[Any]] = {}
    for cell, run in finished.runs.items():
        if fits(where, cell.values):
            rows.setdefault(label(finished.grid, cell), []).append(run)
    return rows


def label(grid: Grid, cell: Cell) -> str:
    """The values of the axes that have more than one."""
    several = [value for axis, value in cell.at if len(grid.axes[axis]) > 1]
    return ", ".join(several or [value for _, value in cell.at])


def _head(grid: Grid, finished: Finished) -> list[str]:
    runs = list(finished.runs.values())
    kinds = {data: found[0] for data, found in finished.provenance.items()}
    if len(set(kinds.values())) > 1:  # several data sets, of which some aren't at hand
        images = ", ".join(f"{data} ({kind} images)" for data, kind in kinds.items())
    else:
        images = f"{', '.join(kinds)}, {next(iter(kinds.values()))} images"
    about = machine.describe()
    del about["revision"], about["threads"]  # of today; the runs' own follow
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in run.results.get("versions", {}).items()) for run in runs}
    )
    about["versions"] = "; ".join(versions)
    devices = sorted({str(run.results.get("device")) for run in runs})
    lines = [f"# {grid.settings.title}: {images}"]
    lines += ["", machine.head(about), f"- runs on: {'; '.join(devices)}"]
    lines += [f"- command: `{command}`" for command in remembered(grid)]
    for axis, values in grid.axes.items():
        for name, value in values.items():
            said = [f"`{key}={yaml12.write_line(v)}`" for key, v in value.overrides.items()]
            for key, taken in value.takes.items():
                dependency = grid.dependencies[taken]
                cell = ", ".join(str(v) for v in dependency.cell.values() if v is not None)
                said.append(f"`{key}` from {cell} ({dependency.file or dependency.result})")
            shown = f"`{value.config}` " if value.config and len(grid.settings.configs) > 1 else ""
            lines.append(f"- {axis} {name}: {shown}{' '.join(said) or 'as configured'}")
    if len(runs) < len(grid.shown):
        lines += ["", f"**{len(runs)} of {len(grid.shown)} cells have finished.**"]
    if finished.missing:
        lines += ["", f"No run has scores on {', '.join(finished.missing)}."]
    beside: dict[str, list[float]] = {}
    for other in grid.closure(grid.shown):
        if not grid.is_shown(other) and is_finished(grid, other):
            beside.setdefault(label(grid, other), []).append(results(grid, other)["seconds"])
    for row, seconds in beside.items():
        lines += ["", f"{row}, which other rows build on, took {show(spread(seconds), 0)} s."]
    return lines


def _default(finished: Finished) -> dict[str, TableSettings]:
    """Rows by the first axis, columns by the second, where a report names no table."""
    axes = list(finished.grid.axes)
    figures = list(finished.figures)
    return {"Scores": TableSettings(rows=axes[:1], columns=[], figures=figures)}


# ------------------------------------------------------------------------------------ a table


def _table(finished: Finished, name: str, table: TableSettings, made: _Made) -> None:
    records, chosen = finished.selected(table)
    if records.empty:
        made.lines += ["", f"## {name}", "", "No cell of it has finished."]
        return
    dimensions = [d for d in finished.dimensions(table.figures) if d not in table.select]
    rest = [d for d in dimensions if d not in (*table.rows, *table.columns)]
    for place, whole in _parts(records, rest):
        part = finished.scored(whole, table.figures)
        several = {
            d: v for d, v in place.items() if d == "metric" or _several(finished, d, records)
        }
        made.lines += ["", f"## {_title(name, several)}", ""]
        made.lines += _grid_of_cells(finished, table, part, made)
        if table.versus is not None:
            made.lines += _versus(finished, table, part, made)
    if chosen:
        told = [{k: v for k, v in c.items() if len(finished.grid.axes[k]) > 1} for c in chosen]
        said = "; ".join(", ".join(f"{k} {v}" for k, v in c.items()) for c in told)
        made.lines += ["", f"Chosen on validation images: {said}."]


def _several(finished: Finished, dimension: str, records: pd.DataFrame) -> bool:
    return dimension == "split" or records[dimension].nunique() > 1


def _title(name: str, place: Mapping[str, str]) -> str:
    words = [plain(value) for value in place.values()]
    return ", ".join([name, *words])


def _parts(
    records: pd.DataFrame, rest: Sequence[str]
) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """A part of the records for each place in the dimensions that a table doesn't show."""
    if not rest:
        yield {}, records
        return
    for place, part in records.groupby(list(rest), sort=False):
        yield dict(zip(rest, map(str, place), strict=True)), part


def _places(records: pd.DataFrame, dimensions: Sequence[str]) -> list[tuple[str, ...]]:
    """Values of dimensions, in the order of the grid."""
    if not dimensions:
        return [()]
    found = records[list(dimensions)].drop_duplicates().itertuples(index=False)
    return [tuple(map(str, place)) for place in found]


def _grid_of_cells(
    finished: Finished, table: TableSettings, part: pd.DataFrame, made: _Made
) -> list[str]:
    rows, columns = _places(part, table.rows), _places(part, table.columns)
    by = [*table.rows, *table.columns]
    found = {figure: aggregate(part, by, figure) for figure in table.figures}
    head = [*table.rows, "seeds"]
    shown = [(place, figure) for place, figure in itertools.product(columns, table.figures)]
    for place, figure in shown:
        words = [plain(word) for word in place] + [figure] * (len(table.figures) > 1 or not place)
        head.append(", ".join(words))
    body = []
    for row in rows:
        numbers = {
            v[2] for values in found.values() for k, v in values.items() if k[: len(row)] == row
        }
        seeds = (
            f"{min(numbers)} to {max(numbers)}"
            if len(numbers) > 1
            else f"{max(numbers, default=0)}"
        )
        cells = [_shown(finished, figure, found[figure].get((*row, *place)), table, place, part)
                 for place, figure in shown]  # fmt: skip
        body.append([*row, seeds, *cells])
    constant = {
        d: part[d].iloc[0] for d in part.columns if d not in (*by, "seed", *finished.figures)
    }
    for figure, values in found.items():
        for place, (mean, deviation, number) in values.items():
            at = {**constant, **dict(zip(by, place, strict=True))}
            cell = {"figure": figure, "seeds": number, "mean": mean, "std": deviation}
            made.records.append({**at, **cell})
    return markdown(head, body)


def _shown(
    finished: Finished,
    name: str,
    value: Spread | None,
    table: TableSettings,
    place: Sequence[str],
    part: pd.DataFrame,
) -> str:
    figure = finished.figures[name]
    metric = dict(zip(table.columns, place, strict=True)).get("metric")
    digits = figure.digits
    if digits is None:
        digits = digits_of(metric or finished.metrics[0])
    return show(value, digits, figure.signed, figure.spread)


def _versus(finished: Finished, table: TableSettings, part: pd.DataFrame, made: _Made) -> list[str]:
    assert table.versus is not None
    figures = table.differences or table.figures
    found = finished.differences(part, table.versus, figures)
    name = ", ".join(f"{a} {v}" if _is_number(v) else v for a, v in table.versus.items())
    if found.empty:
        return []
    dimensions = [
        d for d in finished.dimensions(figures) if found[d].nunique() > 1 or d in table.rows
    ]
    heads = [(figure, ("mean", "above 0", "95 %", "p")) for figure in figures]
    head = [*dimensions, "seeds", *(f"{f}" if h == "mean" else h for f, hs in heads for h in hs)]
    body = []
    for place, group in found.groupby(dimensions, sort=False):
        by_figure = {record["figure"]: record for record in group.to_dict("records")}
        cells = []
        for figure in figures:
            record = by_figure.get(figure)
            cells += [NOTHING] * 4 if record is None else _difference(finished, figure, record)
        number = max(int(record["seeds"]) for record in by_figure.values())
        named = place if isinstance(place, tuple) else (place,)
        body.append([*map(str, named), str(number), *cells])
    made.records += [
        {**record, "figure": f"{name} minus this: {record['figure']}"}
        for record in found.to_dict("records")
    ]
    return ["", f"{name} minus each row:", "", *markdown(head, body)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _difference(finished: Finished, figure: str, record: Mapping[str, Any]) -> list[str]:
    own = finished.figures[figure].digits
    digits = digits_of(str(record.get("metric", finished.metrics[0]))) if own is None else own
    number = int(record["seeds"])
    if number == 1:
        return [
            show((record["mean"], None, 1), digits, True),
            str(record["above"]),
            NOTHING,
            NOTHING,
        ]
    low, high = (f"{record[key]:+.{digits}f}" for key in ("low", "high"))
    mean = show((record["mean"], record["std"], number), digits, True)
    return [mean, f"{record['above']} of {number}", f"{low} to {high}", f"{record['p']:.3g}"]
