"""Finished cells as a table of numbers, and what is computed of it."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlseg import config
from mlseg.errors import UserError
from mlseg.problems.reporting import FIGURES, FinishedRun
from mlseg.problems.systems import parse_run
from mlseg.sweeps.checks import fits, value_at
from mlseg.sweeps.grid import CONFIG, Cell, Grid
from mlseg.sweeps.running import finished, results
from mlseg.sweeps.settings import BESIDE_AXES, FigureSettings, TableSettings, Where

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 9999
"""Of the bootstrap; its draws are the same every time."""


class Finished:
    """The finished cells of a grid, whose scores can be compared.

    Args:
        cells: those to look at.

    Raises:
        UserError: nothing has finished, or the runs are on different data or splits.
    """

    def __init__(self, grid: Grid, cells: Iterable[Cell]) -> None:
        self.grid = grid
        self.runs: dict[Cell, FinishedRun] = {}
        for cell in cells:
            if finished(grid, cell):
                directory = grid.directory(cell)
                stored = parse_run(config.load(directory / CONFIG))[0].model_dump(mode="json")
                self.runs[cell] = FinishedRun(directory, cell.seed, results(grid, cell), stored)
        if not self.runs:
            raise UserError(f"no run below {grid.out} has finished yet")
        self._check()
        if chosen := grid.settings.report.calibrated:
            from mlseg.sweeps.sections import calibrated

            alone = chosen == "threshold"
            self.runs = {cell: calibrated(run, alone) for cell, run in self.runs.items()}
        report = grid.settings.report
        own = dict.fromkeys(str(run.results.get("metric")) for run in self.runs.values())
        self.metrics = report.metrics or list(own)
        found = dict.fromkeys(
            split
            for run in self.runs.values()
            for by_split in run.results.get("scores", {}).values()
            for split in by_split
        )
        given = report.splits
        self.splits = [s for s in (given or found) if s in found and (given or s != "val")]
        self.missing = [split for split in given or () if split not in found]
        """Splits that the report names and no run has."""
        self.figures = {n: f for n, f in report.figures.items() if f is not None}
        self.frame = self._frame()

    @property
    def provenance(self) -> dict[str, list[str]]:
        """By data set, whether its images are real or stand-ins; more than one is a mistake."""
        found: dict[str, set[str]] = {}
        for run in self.runs.values():
            own = found.setdefault(str(run.results.get("data")), set())
            own.add(str(run.results.get("provenance")))
        return {data: sorted(found[data]) for data in sorted(found)}

    def _check(self) -> None:
        """Refuse real beside synthetic images of one data set, and other data in one place."""
        for data, found in self.provenance.items():
            if len(found) > 1:
                raise UserError(
                    f"the runs on {data} below {self.grid.out} differ in provenance: "
                    f"{', '.join(found)}; keep them apart"
                )
        first: dict[Any, tuple[Cell, Any]] = {}
        for cell, run in self.runs.items():
            for key in ("data", "split_hash"):
                place = (key, cell.at[1:], cell.seed)
                other, value = first.setdefault(place, (cell, run.results.get(key)))
                if value != run.results.get(key):
                    raise UserError(
                        f"{run.directory}: {key} is not that of {self.grid.directory(other)}, "
                        "beside which it would stand; keep them apart"
                    )

    # ------------------------------------------------------------------------- numbers

    def _frame(self) -> pd.DataFrame:
        import pandas as pd

        records, wanted = [], self.grid.settings.report.metrics
        for cell, run in self.runs.items():
            for split in self.splits or [""]:
                for metric in wanted or [str(run.results.get("metric"))]:
                    values = {n: _value(f, run, split, metric) for n, f in self.figures.items()}
                    place = {"seed": cell.seed, "split": split, "metric": metric}
                    records.append({**cell.values, **place, **values})
        made = pd.DataFrame(records)
        tree, open_ones = self.grid.tree, []
        for name, figure in self.figures.items():
            if figure.of is not None and not made[name].notna().any():
                raise tree.error(("report", "figures", name, "of"), self._hint(str(figure.of)))
            if "{metric}" in (figure.of or ""):
                open_ones.append(name)
        for position, metric in enumerate(wanted or ()):
            if open_ones and not made.loc[made["metric"] == metric, open_ones].notna().any(
                axis=None
            ):
                path = str(self.figures[open_ones[0]].of).replace("{metric}", metric)
                raise tree.error(("report", "metrics", position), self._hint(path))
        return made

    def _hint(self, wanted: str) -> str:
        known = [
            path.replace(f".{split}.", ".{split}.")
            for run in self.runs.values()
            for split in self.splits or [""]
            for path in _paths(run.results)
        ]
        near = difflib.get_close_matches(wanted, dict.fromkeys(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"no finished run has a number at {wanted}{hint}"

    def dimensions(self, figures: Sequence[str]) -> list[str]:
        """What a figure may differ by: the axes, and what its path leaves open."""
        paths = [f"{self.figures[name].of} {self.figures[name].minus}" for name in figures]
        beside = [d for d in BESIDE_AXES if any(f"{{{d}}}" in path for path in paths)]
        return [*self.grid.axes, *beside]

    def of(self, figures: Sequence[str], where: Where) -> pd.DataFrame:
        """One record for each cell, split and metric that ``where`` names and that have any."""
        dimensions = self.dimensions(figures)
        kept = self.frame[[fits(where, r) for r in self.frame.to_dict("records")]]
        kept = kept.drop_duplicates([*dimensions, "seed"])[[*dimensions, "seed", *figures]]
        return kept.dropna(how="all", subset=list(figures))

    def scored(self, records: pd.DataFrame, figures: Sequence[str]) -> pd.DataFrame:
        """Less splits and metrics on which no record has a figure that goes by them."""
        axes = list(self.grid.axes)
        by_them = [name for name in figures if self.dimensions([name]) != axes]
        if not by_them:
            return records
        beside = self.dimensions(by_them)[len(axes) :]
        there = records.groupby(beside)[by_them].transform("count").any(axis=1)
        return records[there] if there.any() else records

    def selected(self, table: TableSettings) -> tuple[pd.DataFrame, list[dict[str, str]]]:
        """The records of a table, and what was chosen on validation images where."""
        chosen_by = list(table.select.values())
        records = self.of([*dict.fromkeys([*table.figures, *chosen_by])], table.where)
        chosen: list[dict[str, str]] = []
        for axis, figure in table.select.items():
            others = [
                d for d in self.dimensions(table.figures) if d not in (axis, "metric", "split")
            ]
            # Groups by hand: there may be no other axis.
            places = [tuple(str(r[d]) for d in others) for r in records.to_dict("records")]
            best: dict[tuple[str, ...], str] = {}
            for place in dict.fromkeys(places):
                group = records[[other == place for other in places]]
                means = group.groupby(axis, sort=False)[figure].mean()
                if means.notna().any():
                    best[place] = str(means.idxmax())
                    names = dict(zip(others, place, strict=True))
                    chosen.append({**names, axis: best[place]})
            records = records[
                [best.get(p) == v for p, v in zip(places, records[axis], strict=True)]
            ]
        return records, chosen

    def differences(
        self, records: pd.DataFrame, versus: Mapping[str, str], figures: Sequence[str]
    ) -> pd.DataFrame:
        """A named row less every other, seed by seed: mean, spread, interval, test."""
        import pandas as pd

        dimensions = self.dimensions(figures)
        named = records[[fits(dict(versus), r) for r in records.to_dict("records")]]
        rest = records.drop(named.index)
        shared = [d for d in dimensions if d not in versus]
        both = rest.merge(named, on=[*shared, "seed"], suffixes=("", " of the named"))
        found = []
        for place, group in both.groupby(dimensions, sort=False):
            for figure in figures:
                pairs = group[f"{figure} of the named"] - group[figure]
                values = [float(v) for v in pairs.dropna()]
                if values:
                    names = dict(zip(dimensions, _tuple(place), strict=True))
                    found.append({**names, "figure": figure, **paired(values)})
        return pd.DataFrame(found)


def aggregate(
    records: pd.DataFrame, by: Sequence[str], figure: str
) -> dict[tuple[Any, ...], Spread]:
    """Mean and sample standard deviation over what ``by`` leaves: the seeds."""
    found = {}
    for place, group in records.groupby(list(by), sort=False):
        values = [float(value) for value in group[figure].dropna()]
        if values:
            found[_tuple(place)] = spread(values)
    return found


Spread = tuple[float, float | None, int]
"""Mean, sample standard deviation (None of a single value), and of how many."""


def spread(values: Sequence[float]) -> Spread:
    """Of values over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation, len(values)


def paired(values: Sequence[float]) -> dict[str, float | int | None]:
    """Of differences over seeds: mean, deviation, how many above 0, interval, signed-rank test.

    The interval holds 95 % of the means of samples drawn with replacement (percentile bootstrap);
    ``p`` is Wilcoxon's signed-rank test against a median of 0, two-sided, exact for few pairs.
    """
    import numpy as np
    from scipy import stats

    mean, deviation, number = spread(values)
    low = high = p = None
    if number > 1:
        array = np.asarray(values)
        drawn = np.random.default_rng(0).integers(0, number, (RESAMPLES, number))
        low, high = (float(x) for x in np.quantile(array[drawn].mean(1), (0.025, 0.975)))
        p = float(stats.wilcoxon(array).pvalue) if array.any() else 1.0
    above = sum(value > 0 for value in values)
    result = {"mean": mean, "std": deviation, "seeds": number, "above": above}
    return {**result, "low": low, "high": high, "p": p}


def _value(figure: FigureSettings, run: FinishedRun, split: str, metric: str) -> float | None:
    if figure.by is not None:
        found = FIGURES.get(figure.by)(run)
        return None if found is None else figure.times * float(found)
    total = 0.0
    for path, sign in ((figure.of, 1.0), (figure.minus, -1.0)):
        if path is None:
            continue
        key = path.replace("{split}", split).replace("{metric}", metric)
        inside = key.removeprefix("config.")
        value = value_at(run.config if inside != key else run.results, inside)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        total += sign * figure.times * value
    return total


def _paths(values: Mapping[str, Any], above: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _tuple(place: Any) -> tuple[Any, ...]:
    return place if isinstance(place, tuple) else (place,)
