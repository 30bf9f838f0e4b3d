"""Which cells a comparison has, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlseg.comparison.cells import Cell, Figures, Runner
from mlseg.comparison.settings import Comparison

Measured = Sequence[tuple[Cell, Figures]]
"""A method's cells that belong to one row: one per seed."""


@dataclass(frozen=True)
class Results:
    """Figures of all cells.

    Attributes:
        accuracy, tuning, training: by cell.
        rates: chosen for each (task, method); None where no rate of the grid stayed finite.
    """

    accuracy: Mapping[Cell, Figures]
    tuning: Mapping[Cell, Figures]
    training: Mapping[Cell, Figures]
    rates: Mapping[tuple[str, str], float | None]


def accuracy_cells(comparison: Comparison) -> list[Cell]:
    """Of the first phase."""
    settings = comparison.settings.accuracy
    if settings is None:
        return []
    return [
        Cell("accuracy", task, method, dtype, seed)
        for task in comparison.tasks
        for dtype in settings.dtypes
        for method in comparison.methods
        for seed in comparison.settings.seeds
    ]


def tuning_cells(comparison: Comparison) -> list[Cell]:
    """Of the search for learning rates: the same for every method."""
    settings = comparison.settings.training
    if settings is None:
        return []
    return [
        Cell("tuning", task, method, settings.dtype, seed, rate)
        for task in comparison.tasks
        for method in comparison.trained
        for rate in settings.rates
        for seed in settings.tuning_seeds
    ]


def count(comparison: Comparison) -> int:
    """Of all cells, as far as can be told before tuning."""
    trained = len(comparison.trained) * len(comparison.tasks) * len(comparison.settings.seeds)
    training = trained if comparison.settings.training is not None else 0
    return len(accuracy_cells(comparison)) + len(tuning_cells(comparison)) + training


def chosen_rates(
    comparison: Comparison, tuning: Mapping[Cell, Figures]
) -> dict[tuple[str, str], float | None]:
    """For each task and method the rate with the lowest mean objective over the tuning seeds."""
    assert comparison.settings.training is not None
    chosen: dict[tuple[str, str], float | None] = {}
    for task in comparison.tasks:
        for method in comparison.trained:
            mean: dict[float, float] = {}
            for rate in comparison.settings.training.rates:
                runs = [
                    figures
                    for cell, figures in tuning.items()
                    if (cell.task, cell.method, cell.rate) == (task, method, rate)
                ]
                if all(figures["status"] == "ok" for figures in runs):
                    mean[rate] = math.fsum(f["objective"] for f in runs) / len(runs)
            chosen[task, method] = min(mean, key=mean.__getitem__) if mean else None
    return chosen


def run(comparison: Comparison, runner: Runner) -> Results:
    """All phases, one after the other; without the last where cells of other parts are missing."""
    accuracy = runner(accuracy_cells(comparison))
    settings = comparison.settings.training
    if settings is None:
        return Results(accuracy, {}, {}, {})
    wanted = tuning_cells(comparison)
    tuning = runner(wanted)
    if len(tuning) < len(wanted):
        return Results(accuracy, tuning, {}, {})
    rates = chosen_rates(comparison, tuning)
    cells = [
        Cell("training", task, method, settings.dtype, seed, rate)
        for (task, method), rate in rates.items()
        for seed in comparison.settings.seeds
        if rate is not None
    ]
    return Results(accuracy, tuning, runner(cells), rates)


def row(cell: Cell, figures: Figures) -> dict[str, Any]:
    """A cell as a flat row: no curve, no traceback."""
    left_out = ("curve", "traceback", "machine")
    return {**vars(cell), **{k: v for k, v in figures.items() if k not in left_out}}


def of(results: Mapping[Cell, Figures], **where: Any) -> dict[str, list[tuple[Cell, Figures]]]:
    """By method, in order, the cells that agree with ``where``."""
    found: dict[str, list[tuple[Cell, Figures]]] = {}
    for cell, figures in results.items():
        if all(getattr(cell, key) == value for key, value in where.items()):
            found.setdefault(cell.method, []).append((cell, figures))
    return found


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of a figure over seeds; None where nothing was measured."""

    median: float
    least: float
    largest: float


def spread(cells: Measured, key: str) -> Spread | None:
    """Of the figure ``key`` over those cells that have it."""
    values = sorted(f[key] for _, f in cells if isinstance(f.get(key), (int, float)))
    if not values:
        return None
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    return Spread(median, values[0], values[-1])
