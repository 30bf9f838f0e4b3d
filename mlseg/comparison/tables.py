"""The tables of a comparison, as text: the same in the terminal and in the report."""

from __future__ import annotations

from dataclasses import dataclass

from mlseg.comparison.phases import Measured, Results, of, spread
from mlseg.comparison.settings import Comparison

NOTHING = "-"
MIB = 2**20

_REPORTED = {
    "evaluations": "evals",
    "products": "HVPs",
    "iterations": "iters",
    "residual": "residual",
}
"""Diagnostics that have a column where any method reports them."""


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table, the first column left, the others right."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [self.columns, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy(results: Results, task: str, dtype: str) -> Table:
    """Accuracy and cost, a row per method: medians over seeds, least and largest in brackets."""
    cells = of(results.accuracy, task=task, dtype=dtype)
    reported = {
        key: title
        for key, title in _REPORTED.items()
        if any(figures.get(key) is not None for rows in cells.values() for _, figures in rows)
    }
    columns = ["method", "aim", "cosine", "error", "aim error", "ms", "MiB"]
    rows = []
    for method, measured in cells.items():
        aims = dict.fromkeys(str(f["aim"]) for _, f in measured if "aim" in f)
        rows.append(
            [
                method,
                ", ".join(aims) or NOTHING,
                _cosine(measured),
                _spread(measured, "error"),
                _number(measured, "aim_error"),
                _number(measured, "milliseconds"),
                _number(measured, "memory_bytes", 1.0 / MIB),
                *(_number(measured, key) for key in reported),
                status(measured),
            ]
        )
    return Table(f"{task}, {dtype}", [*columns, *reported.values(), "status"], rows)


def training(comparison: Comparison, results: Results, task: str) -> Table:
    """Scores from end to end, a row per method."""
    settings = comparison.settings.training
    assert settings is not None
    cells = of(results.training, task=task)
    name = score_name(results, task)
    columns = ["method", "rate", "upper loss", name, "seconds", "status"]
    rows = []
    for method in comparison.trained:
        rate = results.rates.get((task, method))
        measured = cells.get(method, [])
        if rate is None:
            tried = [
                (c, f) for c, f in results.tuning.items() if (c.task, c.method) == (task, method)
            ]
            rows.append([method, "none", *[NOTHING] * 3, f"at every rate: {status(tried)}"])
            continue
        edge = len(settings.rates) > 1 and rate in (min(settings.rates), max(settings.rates))
        rows.append(
            [
                method,
                f"{rate:g}" + (" (edge)" if edge else ""),
                _spread(measured, "objective"),
                _spread(measured, "score"),
                _number(measured, "seconds"),
                status(measured),
            ]
        )
    return Table(f"{task}, from end to end", columns, rows)


def score_name(results: Results, task: str) -> str:
    """Of the task's final figure."""
    for cells in (results.training, results.tuning):
        for cell, figures in cells.items():
            if cell.task == task and "score_name" in figures:
                return str(figures["score_name"])
    return "score"


def status(measured: Measured) -> str:
    """``ok``, or how many seeds were what."""
    found = [str(figures["status"]) for _, figures in measured]
    if not found:
        return NOTHING
    counts = {name: found.count(name) for name in dict.fromkeys(found)}
    if len(counts) == 1:
        return found[0]
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def format_number(value: float) -> str:
    """Three significant digits; powers of ten where the number is far from 1."""
    size = abs(value)
    if value == 0.0:
        return "0"
    if size < 1e-3 or size >= 1e5:
        return f"{value:.1e}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _spread(measured: Measured, key: str) -> str:
    found = spread(measured, key)
    if found is None:
        return NOTHING
    if found.least == found.largest:
        return format_number(found.median)
    ends = format_number(found.least), format_number(found.largest)
    return f"{format_number(found.median)} ({ends[0]} to {ends[1]})"


def _number(measured: Measured, key: str, factor: float = 1.0) -> str:
    found = spread(measured, key)
    return NOTHING if found is None else format_number(found.median * factor)


def _cosine(measured: Measured) -> str:
    found = spread(measured, "cosine")
    return NOTHING if found is None else f"{found.median:.4f}"
