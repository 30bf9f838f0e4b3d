"""The figures of a comparison: accuracy against cost, scores against steps and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlseg.comparison.cells import Figures
from mlseg.comparison.phases import Measured, Results, Spread, of, spread
from mlseg.comparison.settings import Comparison
from mlseg.comparison.tables import MIB, score_name
from mlseg.files import replacing, writing

_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X<>hpd8"
_SMALLEST = 1e-16
"""Errors below it, zero included, are drawn here."""


def draw(comparison: Comparison, results: Results, directory: Path) -> dict[tuple[str, str], Path]:
    """Write all figures.

    Returns:
        the PNG files by task and what they show: a dtype, or ``training``.

    Raises:
        RunError: one can't be written.
    """
    import matplotlib

    with matplotlib.rc_context({"backend": "agg", "font.size": 10, "axes.grid": True}):
        return _draw(comparison, results, directory)


def _draw(comparison: Comparison, results: Results, directory: Path) -> dict[tuple[str, str], Path]:
    import matplotlib.pyplot as plt

    made: dict[tuple[str, str], Path] = {}
    settings = comparison.settings
    for task in comparison.tasks:
        for dtype in settings.accuracy.dtypes if settings.accuracy else ():
            figure = _accuracy(
                of(results.accuracy, task=task, dtype=dtype), task, dtype, comparison.groups
            )
            made[task, dtype] = directory / f"accuracy_{_slug(task)}_{dtype}.png"
            _save(figure, made[task, dtype])
        if results.training:
            cells = of(results.training, task=task)
            figure = _training(cells, task, score_name(results, task), comparison.trained)
            made[task, "training"] = directory / f"training_{_slug(task)}.png"
            _save(figure, made[task, "training"])
    plt.close("all")
    return made


def _accuracy(
    cells: Mapping[str, Measured], task: str, dtype: str, groups: Mapping[str, Sequence[str]]
) -> Any:
    """Three panels: error against time and memory, and angle against time.

    Methods that came of one entry of the config are joined by a line. Whiskers are over seeds.
    """
    import matplotlib.pyplot as plt

    panels = (
        ("milliseconds", 1.0, "milliseconds per hypergradient", "error"),
        ("memory_bytes", 1.0 / MIB, "peak extra memory [MiB]", "error"),
        ("milliseconds", 1.0, "milliseconds per hypergradient", "angle"),
    )
    texts = {"error": "relative error", "angle": "1 - cosine"}
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained")
    handles: dict[str, Any] = {}
    for place, (cost, factor, label, quality) in zip(axes, panels, strict=True):
        for index, (group, methods) in enumerate(groups.items()):
            points = [_point(cells.get(method, ()), cost, factor, quality) for method in methods]
            shown = [point for point in points if point is not None]
            if shown:
                handles[_legend(group, methods)] = _whiskers(place, shown, index)
        place.set(xlabel=label, ylabel=texts[quality])
        _tidy(place)
        _in_decades(place.xaxis)
        _in_decades(place.yaxis)
    exact = {str(f["exact"]) for rows in cells.values() for _, f in rows if "exact" in f}
    figure.suptitle(
        f"{task}, {dtype}: against the exact hypergradient ({', '.join(sorted(exact)) or 'none'}); "
        "median, least and largest over seeds"
    )
    if handles:
        figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return figure


def _point(
    measured: Measured, cost: str, factor: float, quality: str
) -> tuple[Spread, Spread] | None:
    """Where a method lies, and how far it spreads; None where its error isn't known."""
    known = [(c, {**f, "angle": _angle(f)}) for c, f in measured if f.get("error") is not None]
    x, y = spread(known, cost), spread(known, quality)
    if x is None or y is None:
        return None
    return (
        Spread(x.median * factor, x.least * factor, x.largest * factor),
        Spread(*(max(value, _SMALLEST) for value in (y.median, y.least, y.largest))),
    )


def _whiskers(place: Any, points: Sequence[tuple[Spread, Spread]], index: int) -> Any:
    """Draw the points of one group; its handle for the legend."""

    def ends(spreads: Sequence[Spread]) -> list[list[float]]:
        return [[s.median - s.least for s in spreads], [s.largest - s.median for s in spreads]]

    xs, ys = zip(*points, strict=True)
    return place.errorbar(
        [x.median for x in xs],
        [y.median for y in ys],
        xerr=ends(xs),
        yerr=ends(ys),
        capsize=2,
        elinewidth=1,
        linestyle=":",
        linewidth=1,
        color=_colour(index),
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=8,
        markeredgecolor="black",
        markeredgewidth=0.5,
    )


def _legend(group: str, methods: Sequence[str]) -> str:
    """``cg`` or, of several, ``neumann terms=10, 100``."""
    parts = [method.removeprefix(group).strip() for method in methods]
    keys = {part.partition("=")[0] for part in parts}
    if len(parts) > 1 and len(keys) == 1 and not any(" " in part for part in parts):
        return f"{group} {keys.pop()}=" + ", ".join(part.partition("=")[2] for part in parts)
    return "\n".join([group, *(f"  {part}" for part in parts if part)])


def _angle(figures: Figures) -> float | None:
    return None if figures.get("cosine") is None else 1.0 - float(figures["cosine"])


def _training(cells: Mapping[str, Measured], task: str, name: str, methods: Sequence[str]) -> Any:
    """Four panels: validation loss and score, against upper steps and against seconds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    handles: dict[str, Any] = {}
    for row, key in enumerate(("objective", "score")):
        for column, axis in enumerate(("step", "seconds")):
            place = axes[row][column]
            values: list[float] = []
            ends: list[float] = []
            for index, method in enumerate(methods):
                curve = _mean_curve(cells.get(method, ()), axis, key)
                if not curve:
                    continue
                x, middle, low, high = zip(*curve, strict=True)
                values += [*low, *high]
                ends.append(x[-1])
                colour = _colour(index)
                (handles[method],) = place.plot(
                    x, middle, color=colour, linestyle=_LINES[index % len(_LINES)], linewidth=1.6
                )
                place.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            place.set_xlabel("upper steps" if axis == "step" else "seconds of training")
            place.xaxis.set_major_locator(MaxNLocator(integer=axis == "step"))
            place.set_ylabel("upper loss" if key == "objective" else name)
            _tidy(place)
            if values and min(values) > 0 and max(values) > 10 * min(values):
                _in_decades(place.yaxis)
            # The start, at no time at all, has no place on a logarithmic axis.
            if axis == "seconds" and ends and max(ends) > 10 * min(ends):
                _in_decades(place.xaxis)
    figure.suptitle(f"{task}, from end to end: median, least and largest over seeds")
    if handles:
        figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return figure


def _mean_curve(measured: Measured, axis: str, key: str) -> list[tuple[float, float, float, float]]:
    """(x, median, least, largest) per evaluation, over the seeds that went well."""
    curves = [f["curve"] for _, f in measured if f.get("status") == "ok"]
    points = []
    for at_step in zip(*curves, strict=False):
        x, values = (
            spread([(measured[0][0], point) for point in at_step], name) for name in (axis, key)
        )
        if x is not None and values is not None:
            points.append((x.median, values.median, values.least, values.largest))
    return points


def _colour(index: int) -> Any:
    """The same for a group of methods or a method in every figure: the ten strong ones first."""
    import matplotlib

    return matplotlib.colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)][index % 20])


def _in_decades(axis: Any) -> None:
    """A logarithmic axis from one power of ten to another, with no numbers between."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    if not 0 < low <= high < math.inf:
        return  # nothing is drawn
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = math.log10(low), math.log10(high)
    first = math.floor(low + 1e-9)
    last = max(math.ceil(high - 1e-9), first + 1)
    room = 0.03 * (last - first)  # for a marker that lies on the frame
    axis.axes.set(**{f"{axis.axis_name}lim": (10.0 ** (first - room), 10.0 ** (last + room))})
    axis.set_major_locator(LogLocator(numticks=10))
    axis.set_minor_formatter(NullFormatter())


def _tidy(axes: Any) -> None:
    """A quiet grid, behind everything."""
    axes.grid(visible=True, which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    with writing(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label)
