"""A figure over an axis, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlseg.files import replacing, writing
from mlseg.sweeps.frame import Finished, aggregate
from mlseg.sweeps.settings import PictureSettings, file_stem
from mlseg.sweeps.showing import plain

if TYPE_CHECKING:
    import pandas as pd

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's bright colours, which colour-blind eyes can tell apart."""
KINDS = (".png", ".svg")


def draw(finished: Finished, out: Path) -> dict[str, Path]:
    """Every picture of the report, or one of each figure of scores where it names none.

    Returns:
        PNG files by name.

    Raises:
        RunError: one can't be written.
    """
    report = finished.grid.settings.report
    wanted = {name: picture for name, picture in report.pictures.items() if picture is not None}
    if not report.pictures:
        first = next(iter(finished.grid.axes))
        scores = [name for name, f in finished.figures.items() if "{split}" in (f.of or "")][:1]
        wanted = {name: PictureSettings(figure=name, x=first) for name in scores}
    found = {}
    for name, picture in wanted.items():
        records = finished.of([picture.figure], picture.where).dropna(subset=[picture.figure])
        if not records.empty:
            found[name] = _draw(finished, name, picture, records, out / file_stem(name))
    return found


def _draw(
    finished: Finished, name: str, picture: PictureSettings, records: pd.DataFrame, path: Path
) -> Path:
    # Here, since it is slow to import and only this needs it.
    from matplotlib.figure import Figure

    dimensions = finished.dimensions([picture.figure])
    rest = [d for d in dimensions if d not in (picture.x, picture.series)]
    panels: list[tuple[str, Any]] = [("", records)]
    if several := [d for d in rest if d == "split" or records[d].nunique() > 1]:
        panels = [(_title(place), part) for place, part in records.groupby(several, sort=False)]
    points = max(part[picture.x].nunique() for _, part in panels)
    # Whatever a panel lacks, a series has its colour and its place.
    series: list[str | None] = [None]
    if picture.series is not None:
        there = set(records[picture.series])
        series = [value for value in _order(finished, picture.series) if value in there]
    width = max(3.6, 0.25 * points * (len(series) + 1) + 1.8 + (picture.series is not None))
    per_row = max(1, min(len(panels), int(14 // width)))
    lines = -(-len(panels) // per_row)
    per_row = -(-len(panels) // lines)  # as many in each
    figure = Figure(figsize=(width * per_row, 3.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, per_row, squeeze=False, sharey=True).flatten()
    metric = ", ".join(records["metric"].unique()) if "metric" in dimensions else ""
    for place, (title, part) in zip(axes, panels, strict=False):
        _panel(place, finished, picture, part, series)
        place.set_title(title, fontsize=9)
    if picture.series is not None:
        found = [place.get_legend_handles_labels() for place in axes]
        handles = {name: handle for both in found for handle, name in zip(*both, strict=True)}
        figure.legend(
            handles.values(),
            map(plain, handles),
            loc="outside right center",
            title=plain(picture.series),
            fontsize=8,
            title_fontsize=8,
        )
    for place in axes[len(panels) :]:
        place.set_visible(False)
    shown = plain(metric)
    for row in range(lines):
        axes[row * per_row].set_ylabel(f"{shown} ({picture.figure})" if shown else picture.figure)
    figure.suptitle(name, fontsize=11)
    for kind in KINDS:
        target = path.with_suffix(kind)
        with writing(target), replacing(target) as temporary:
            # The same picture from the same figures: no date, no random names.
            more = {"metadata": {"Date": None}} if kind == ".svg" else {"dpi": 110}
            with _steady():
                figure.savefig(temporary, format=kind[1:], **more)
    return path.with_suffix(".png")


def _panel(
    place: Any,
    finished: Finished,
    picture: PictureSettings,
    part: pd.DataFrame,
    series: Sequence[str | None],
) -> None:
    """Means with their deviations, and beside each its seeds; joined where the axis has numbers."""
    there = set(part[picture.x])
    order = [value for value in _order(finished, picture.x) if value in there]
    numbers = _numbers(order)
    log = numbers is not None and min(numbers) > 0 and max(numbers) > 20 * min(numbers)
    for index, name in enumerate(series):
        own = part if name is None else part[part[picture.series] == name]
        means = aggregate(own, [picture.x], picture.figure)
        values = [value for value in order if (value,) in means]
        if not values:
            continue
        aside = (index + 0.5) / len(series) - 0.5  # series beside each other
        x = [order.index(value) + 0.6 * aside for value in values]
        if numbers is not None:
            span = max(numbers) - min(numbers)
            x = [numbers[order.index(value)] for value in values]
            x = [n * 1.15**aside if log else n + 0.04 * aside * span for n in x]
        y, error = zip(*((means[v,][0], means[v,][1] or 0.0) for v in values), strict=True)
        colour, style = PALETTE[index % len(PALETTE)], "o" if numbers is None else "o-"
        place.errorbar(x, y, error, fmt=style, color=colour, ms=5, capsize=3, lw=1.2, label=name)
        for at, value in zip(x, values, strict=True):
            seeds = own.loc[own[picture.x] == value, picture.figure].to_numpy()
            beside = at if numbers is not None else at + 0.12 / len(series)
            place.plot([beside] * len(seeds), seeds, "o", color=colour, ms=2.5, alpha=0.55)
    if numbers is None:
        long = max(map(len, order)) * len(order) > 32
        turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        place.set_xticks(range(len(order)), map(plain, order), fontsize=8, **(turn if long else {}))
        place.set_xlim(-0.6, len(order) - 0.4)
    else:
        if log:
            place.set_xscale("log")
            place.minorticks_off()
        place.set_xticks(numbers, order, fontsize=8)
        place.set_xlabel(plain(picture.x))
    place.grid(axis="y", lw=0.4, alpha=0.6)


def _order(finished: Finished, dimension: str) -> Sequence[str]:
    if dimension == "split":
        return finished.splits
    if dimension == "metric":
        return finished.metrics
    return list(finished.grid.axes[dimension])


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values] if len(values) > 1 else None
    except ValueError:
        return None


def _title(place: Any) -> str:
    return ", ".join(plain(str(v)) for v in (place if isinstance(place, tuple) else (place,)))


def _steady() -> Any:
    import matplotlib as mpl

    return mpl.rc_context({"svg.hashsalt": "mlseg", "svg.fonttype": "none"})
