"""What a run wrote down on its way, as charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from mlseg.problems.reporting import Chart, Series
from mlseg.reports.charts import MOST, line_chart
from mlseg.reports.figures import plain
from mlseg.reports.parts import Drawing, Grid, Part, Section, Text
from mlseg.reports.reading import Run, mapping, number

_CHARTS = 60
_TIMES = {
    "seconds_per_step": "Seconds per step, validations included",
    "peak_memory_mib": "Memory at its most, MiB",
}


def curves(run: Run) -> Section | None:
    """Losses, validation, rates, hypergradients, seconds, memory."""
    drawn = []
    for chart in _charts(run):
        markup = line_chart(chart)
        if markup:
            drawn.append(Drawing(chart.title, markup))
    if not drawn:
        return None
    parts: list[Part] = [Grid(drawn[:_CHARTS])]
    if len(drawn) > _CHARTS:
        parts.append(Text(f"{len(drawn) - _CHARTS} more charts are left out."))
    return Section("Curves", parts)


def _charts(run: Run) -> Iterator[Chart]:
    best = mapping(run.recorded.results.get("best"))
    step = number(best.get("step"))
    marks = {} if step is None else {step: "best on validation"}
    rates, hyper = {}, {}
    for problem, own in run.recorded.curves.items():
        rest = {}
        for key, line in own.items():
            if key == "learning_rate":
                rates[problem] = line
            elif key.startswith("hypergradient/"):
                hyper[f"{problem}: {key.removeprefix('hypergradient/')}"] = line
            elif not _is_count(line):
                rest[key] = line
        if problem == "validation":
            yield from _apart("Validation", {plain(k): v for k, v in rest.items()}, marks)
        elif set(rest) == {"loss"}:
            yield Chart(f"Loss of {problem}", {"loss": rest["loss"]})
        else:
            yield from _apart(f"Losses and figures of {problem}", rest, {})
    yield from _apart("Learning rates", rates, {})
    yield from _hypergradients(hyper)
    for key, title in _TIMES.items():
        if key in run.times:
            yield Chart(title, {title: run.times[key]})


def _is_count(line: Series) -> bool:
    """Whole numbers that only grow, such as an epoch's: no figure that eyes would follow."""
    values = line.values
    whole = all(value.is_integer() for value in values)
    return whole and values[0] < values[-1] and all(a <= b for a, b in pairwise(values))


def _hypergradients(lines: Mapping[str, Series]) -> Iterator[Chart]:
    groups: dict[str, dict[str, Series]] = {}
    for name, line in lines.items():
        key = name.partition(": ")[2]
        if key.startswith(("into_", "via_")):
            title = "Hypergradients: norms"
        elif key.endswith("_seconds"):
            title = "Hypergradients: seconds of a hop"
        elif key.endswith(("_evaluations", "_products")):
            title = "Hypergradients: evaluations and products"
        else:
            title = f"Hypergradients: {key.rpartition('_')[2]}"
        groups.setdefault(title, {})[name] = line
    for title, own in sorted(groups.items()):
        yield from _apart(title, own, {})


def _apart(title: str, lines: Mapping[str, Series], marks: Mapping[float, str]) -> Iterator[Chart]:
    """As many charts as it takes for eyes to follow their lines."""
    names = list(lines)
    for start in range(0, len(names), MOST):
        part = {name: lines[name] for name in names[start : start + MOST]}
        yield Chart(title if start == 0 else f"{title}, more", part, marks=marks)
