"""What a page says of a run since it ended: choices of ``calibrate``, scores by ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlseg.reports.figures import plain
from mlseg.reports.parts import Cell, Part, Section, Table, Text, cell, span_cell
from mlseg.reports.reading import LATER, Run, at, mapping, number, numbers

_ROWS = 200


def since(run: Run) -> Section | None:
    """Tables of both, the newest first; None where there is neither."""
    parts: list[Part] = []
    own = run.evaluation.get(LATER)
    entries = [mapping(entry) for entry in own] if isinstance(own, list) else []
    rows = [_scored(entry) for entry in entries[::-1][:_ROWS] if entry]
    if rows:
        head = ["data", "images", "metric", "score", "95 % over images", "weights"]
        head += ["k", "threshold", "averaged", "counted at", "date"]
        caption = "Scored by evaluate since training ended"
        parts.append(Table(caption, head, rows, sortable=len(rows) > 1))
    rows = [_chosen(choice) for choice in run.choices[::-1][:_ROWS]]
    if rows:
        head = ["k", "threshold", "metric", "score", "before", "images", "counted at", "runs"]
        parts.append(Table("Chosen by calibrate on validation images", head, rows))
        parts.append(
            Text(
                "predict, evaluate and mlseg.load take a choice for exactly the weights that it "
                "was made for; the scores above are those of training, without it."
            )
        )
    return Section("Since training", parts) if parts else None


def _scored(entry: Mapping[str, Any]) -> list[Cell]:
    metric = str(entry.get("metric"))
    span = numbers(at(entry, "intervals", metric))
    step = number(entry.get("step"))
    root = entry.get("root")
    data = str(entry.get("data")) + (f", {root}" if isinstance(root, str) else "")
    return [
        Cell(data[:200]),
        cell(number(entry.get("images")), 0),
        Cell(plain(metric)[:80]),
        cell(number(at(entry, "scores", metric))),
        span_cell((span[0], span[1]) if len(span) == 2 else None),
        Cell(str(entry.get("weights"))[:40] + ("" if step is None else f", step {step:.0f}")),
        _short(entry.get("k")),
        _short(entry.get("threshold")),
        Cell(str(entry.get("tta") or "-")[:40]),
        Cell(str(entry.get("scored_at"))[:40]),
        Cell(str(entry.get("date"))[:40]),
    ]


def _chosen(choice: Mapping[str, Any]) -> list[Cell]:
    runs = choice.get("runs")
    names = ", ".join(map(str, runs)) if isinstance(runs, list) else "-"
    return [
        _short(choice.get("k")),
        _short(choice.get("threshold")),
        Cell(plain(str(choice.get("metric")))[:80]),
        cell(number(choice.get("value"))),
        cell(number(choice.get("before"))),
        cell(number(choice.get("images")), 0),
        Cell(str(choice.get("scored_at"))[:40]),
        Cell(names[:200]),
    ]


def _short(value: Any) -> Cell:
    found = number(value)
    return cell(None) if found is None else Cell(f"{found:.3g}", found)
