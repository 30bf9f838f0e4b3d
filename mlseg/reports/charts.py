"""Small charts as SVG within a page: they take its colours, so that dark and light both fit.

A chart is 360 by 220 units and as wide as its place; texts are 11 units high, which on a telephone
is some 11 pixels. Lines differ by colour and by dashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mlseg.problems.reporting import Chart, Series

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 34
_POINTS = 400
"""Of a line; longer ones are drawn by the lowest and highest of each stretch."""
COLOURS = 7
"""Classes c0 to c6 of the page's style: Okabe and Ito's, without black."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
MOST = 8
"""Lines of a chart that eyes can follow."""


@dataclass(frozen=True)
class _Axis:
    """Values along one side.

    Attributes:
        low, high: values at its ends; logarithms for a log axis.
        ticks: values with a mark.
    """

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one."""
        shown = math.log10(max(value, 1e-300)) if self.log else value
        return (shown - self.low) / (self.high - self.low)


def line_chart(chart: Chart) -> Markup:
    """A chart of lines, with a legend below; empty where there is nothing to draw."""
    lines = {name: _thinned(line) for name, line in chart.lines.items() if line.steps}
    lines = dict(list(lines.items())[:MOST])
    if not lines:
        return Markup("")
    everything = [value for line in lines.values() for value in line.values]
    x = _linear([step for line in lines.values() for step in line.steps])
    wide = min(everything) > 0 and max(everything) > 100 * min(everything)
    y = _logarithmic(everything) if wide else _linear(everything)
    parts = [_frame(x, y, chart.x, chart.y)]
    for step, words in chart.marks.items():
        if 0 <= x.place(step) <= 1:
            across = _across(x.place(step))
            parts.append(
                Markup(
                    '<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}">'
                    "<title>{3}</title></line>"
                ).format(across, _TOP, HEIGHT - _BOTTOM, words)
            )
    for index, (name, line) in enumerate(lines.items()):
        parts.append(_line(index, name, line, x, y))
    described = "; ".join(
        f"{name}: from {short(line.values[0])} to {short(line.values[-1])}"
        for name, line in lines.items()
    )
    legend = _legend(list(lines)) if len(lines) > 1 or chart.marks else Markup("")
    if chart.marks:
        named = ", ".join(f"{words} at {step:g}" for step, words in chart.marks.items())
        legend += Markup('<p class="note">Upright line: {}.</p>').format(named)
    return _svg(parts, f"{chart.title}. {described}") + legend


def histogram(values: Sequence[float], title: str, x: str, low: float, high: float) -> Markup:
    """How many values lie in each of 20 stretches."""
    bins = [0] * 20
    for value in values:
        share = (value - low) / (high - low)
        bins[min(19, max(0, int(share * 20)))] += 1
    across, up = _linear([low, high]), _linear([0, max([*bins, 1])])
    parts = [_frame(across, up, x, "images")]
    for index, count in enumerate(bins):
        start, end = low + (high - low) * index / 20, low + (high - low) * (index + 1) / 20
        left, right = _across(across.place(start)), _across(across.place(end))
        top = _up(up.place(count))
        parts.append(
            Markup(
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}">'
                "<title>{} to {}: {}</title></rect>"
            ).format(
                round(left + 0.5, 2), top, round(right - left - 1, 2),
                round(HEIGHT - _BOTTOM - top, 2), short(start), short(end), count,
            )
        )  # fmt: skip
    return _svg(parts, f"{title}: {len(values)} values between {short(low)} and {short(high)}")


def reliability(confidence: Sequence[float | None], accuracy: Sequence[float | None]) -> Markup:
    """The share of pixels that are right over the probability of what was chosen for them."""
    axis = _linear([0, 1])
    parts = [_frame(axis, axis, "probability of the chosen class", "share that is right")]
    parts.append(
        Markup('<line class="mark" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            _across(0), _up(0), _across(1), _up(1)
        )
    )
    found = [(c, a) for c, a in zip(confidence, accuracy, strict=True) if None not in (c, a)]
    pairs = sorted((float(c), float(a)) for c, a in found if c is not None and a is not None)
    if pairs:
        steps, values = zip(*pairs, strict=True)
        parts.append(_line(0, "share that is right", Series(steps, values), axis, axis, dots=True))
    words = ", ".join(f"{short(a)} at {short(c)}" for c, a in pairs)
    return _svg(parts, f"Share of pixels that are right by their probability: {words}")


def short(value: float) -> str:
    """A number as an axis or a cell shows it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:.4g}"


# ------------------------------------------------------------------------- parts


def _svg(parts: Sequence[Markup], words: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, words, Markup("").join(parts)
    )


def _frame(x: _Axis, y: _Axis, x_words: str, y_words: str) -> Markup:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for value in y.ticks:
        up = _up(y.place(value))
        parts.append(
            Markup(
                '<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(_LEFT, WIDTH - _RIGHT, up, up, _LEFT - 5, round(up + 4, 2), short(value))
        )
    for index, value in enumerate(x.ticks):
        across = _across(x.place(value))
        anchor = "end" if index == len(x.ticks) - 1 and across > WIDTH - 24 else "middle"
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                min(across, WIDTH - 2) if anchor == "end" else across, bottom + 15, anchor,
                short(value),
            )
        )  # fmt: skip
    parts.append(
        Markup('<path class="axis" d="M{0} {1}V{2}H{3}"/>').format(
            _LEFT, _TOP, bottom, WIDTH - _RIGHT
        )
    )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, x_words
        )
    )
    if y_words:
        parts.append(
            Markup('<text transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>')
            .format((_TOP + bottom) / 2, y_words)
        )  # fmt: skip
    return Markup("").join(parts)


def _line(index: int, name: str, line: Series, x: _Axis, y: _Axis, dots: bool = False) -> Markup:
    points = [
        (_across(x.place(step)), _up(y.place(value)))
        for step, value in zip(line.steps, line.values, strict=True)
    ]
    drawn = Markup('<polyline class="line c{}"{} points="{}"><title>{}</title></polyline>').format(
        index % COLOURS, _dash(index), " ".join(f"{a},{b}" for a, b in points), name
    )
    if dots or len(points) == 1:
        for across, up in points:
            drawn += Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"/>').format(
                index % COLOURS, across, up
            )
    return drawn


def _dash(index: int) -> Markup:
    dash = _DASHES[index % len(_DASHES)]
    return Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup("")


def swatches(shades: Mapping[str, tuple[int, int, int]]) -> Markup:
    """A legend of classes, by name, each with its own colour in 0 to 255."""
    key = Markup('<li><span class="key" style="background: rgb({}, {}, {})"></span> {}</li>')
    keys = [key.format(*shade, name) for name, shade in shades.items()]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(keys))


def _legend(names: Sequence[str]) -> Markup:
    keys = [
        Markup(
            '<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
            '<line class="line c{}"{} x1="0" x2="24" y1="4" y2="4"/></svg> {}</li>'
        ).format(index % COLOURS, _dash(index), name)
        for index, name in enumerate(names)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(keys))


def _across(share: float) -> float:
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 2)


def _up(share: float) -> float:
    return round(HEIGHT - _BOTTOM - min(max(share, 0), 1) * (HEIGHT - _TOP - _BOTTOM), 2)


def _linear(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        spare = max(0.1 * abs(high), 1e-30) if high else 1.0
        low, high = low - spare, high + spare
    step = _round_step((high - low) / 4)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return _Axis(ticks[0], ticks[-1], ticks)


def _logarithmic(values: Sequence[float]) -> _Axis:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    every = -(-(high - low) // 5)
    return _Axis(low, high, [10.0**power for power in range(low, high + 1, every)], log=True)


def _round_step(wanted: float) -> float:
    power = 10.0 ** math.floor(math.log10(wanted))
    return power * next(times for times in (1, 2, 5, 10) if times * power >= wanted * 0.999)


def _thinned(line: Series) -> Series:
    """At most `_POINTS`: the lowest and highest of each stretch, so that no peak is lost."""
    count = len(line.steps)
    if count <= _POINTS:
        return line
    stretches = _POINTS // 2
    steps: list[float] = []
    values: list[float] = []
    for index in range(stretches):
        own = range(index * count // stretches, (index + 1) * count // stretches)
        ends = {min(own, key=line.values.__getitem__), max(own, key=line.values.__getitem__)}
        if index == 0:
            ends.add(0)
        if index == stretches - 1:
            ends.add(count - 1)
        for place in sorted(ends):
            steps.append(line.steps[place])
            values.append(line.values[place])
    return Series(steps, values)
