"""Several runs side by side, and paired where they were scored on the same images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from mlseg.problems.reporting import Chart
from mlseg.reports.charts import MOST, line_chart
from mlseg.reports.figures import headline, interval, of_images, plain, provenance, score
from mlseg.reports.parts import Cell, Drawing, Grid, Part, Section, Table, Text, cell, span_cell
from mlseg.reports.reading import Run, number
from mlseg.segmentation import intervals

_NO_PART = ("seed", "device", "threads", "imports", "log")
"""Keys of a config that runs of one kind may differ in."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """Scores beside each other, spread over seeds, differences image by image, curves."""
    parts: list[Part] = []
    if len({provenance(run) for run in runs}) > 1:
        parts.append(Text("Real beside SYNTHETIC data: these runs are not comparable.", loud=True))
    elif any(provenance(run) == "synthetic" for run in runs):
        parts.append(Text("SYNTHETIC DATA: comparable with no figures on real images.", loud=True))
    hashes = {str(run.recorded.results.get("split_hash")) for run in runs if run.recorded.results}
    if len(hashes) > 1:
        parts.append(
            Text("The runs are not all on one split: means are over different images.", loud=True)
        )
    parts.append(_beside(runs))
    parts += _seeds(runs)
    parts += _paired(runs)
    drawn = _curves(runs)
    if drawn:
        parts.append(Grid(drawn))
    return [Section("Side by side", parts)]


def _beside(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        found, results = headline(run), run.recorded.results
        row = [Cell(run.label), Cell(run.state), Cell(provenance(run))]
        row.append(Cell(str(results.get("seed", run.recorded.config.get("seed")))))
        if found is None:
            row += [Cell("-")] * 4
        else:
            weights, split, metric = found
            span = interval(run, *found)
            row += [
                Cell(f"{weights}, {split}"),
                Cell(plain(metric)),
                cell(score(run, *found)),
                span_cell(span),
            ]
        row.append(cell(number(results.get("seconds")), 1))
        rows.append(row)
    head = ["run", "state", "data", "seed", "of", "metric", "score", "95 % over images", "seconds"]
    return Table("Runs", head, rows, sortable=True)


def _seeds(runs: Sequence[Run]) -> list[Part]:
    """Mean and deviation of runs that differ in their seed alone."""
    groups: dict[tuple[str, ...], list[tuple[Run, float]]] = {}
    for run in runs:
        found = headline(run)
        value = None if found is None else score(run, *found)
        if found is None or value is None:
            continue
        kept = {k: v for k, v in run.recorded.config.items() if k not in _NO_PART}
        key = (json.dumps(kept, sort_keys=True, default=str), provenance(run), *found)
        groups.setdefault(key, []).append((run, value))
    rows = []
    for (_, _, weights, split, metric), own in groups.items():
        if len(own) > 1:
            values = [value for _, value in own]
            names = ", ".join(run.label for run, _ in own)
            rows.append(
                [
                    Cell(names),
                    Cell(f"{weights}, {split}, {plain(metric)}"),
                    cell(len(values), 0),
                    cell(statistics.fmean(values)),
                    cell(statistics.stdev(values)),
                ]
            )
    if not rows:
        return []
    head = ["runs", "of", "seeds", "mean", "standard deviation"]
    return [Table("Over seeds: runs whose configs differ in nothing else", head, rows)]


def _paired(runs: Sequence[Run]) -> list[Part]:
    """The first run against each other one, on the images that both were scored on."""
    found = headline(runs[0])
    if found is None:
        return []
    rows, without = [], []
    for other in runs[1:]:
        its = headline(other)
        if its is None or its[1:] != found[1:]:
            without.append(other.label)
            continue
        mine, theirs = of_images(runs[0], *found), of_images(other, *its)
        if not mine or mine.keys() != theirs.keys():
            without.append(other.label)
            continue
        differences = [theirs[name] - mine[name] for name in mine]
        span = intervals.of_mean(differences)
        rows.append(
            [
                Cell(f"{other.label} less {runs[0].label}"),
                cell(len(differences), 0),
                Cell(f"{statistics.fmean(differences):+.4f}", statistics.fmean(differences)),
                span_cell(span, "+"),
                cell(sum(d > 0 for d in differences), 0),
                cell(sum(d < 0 for d in differences), 0),
            ]
        )
    parts: list[Part] = []
    if rows:
        head = ["difference", "images", "mean", "95 % over images", "images better", "images worse"]
        caption = f"Paired by image: {plain(found[2])} on {found[1]}"
        parts.append(Table(caption, head, rows, sortable=True))
    if without:
        why = f"Not paired with {runs[0].label}, for want of the same images with scores"
        parts.append(Text(f"{why}: {', '.join(without)}."))
    return parts


def _curves(runs: Sequence[Run]) -> list[Drawing]:
    """Validations of all runs in one chart, and their losses."""
    names = dict.fromkeys(
        (problem, key)
        for run in runs
        for problem, own in run.recorded.curves.items()
        for key in own
        if key == "loss" or (problem == "validation" and key in ("jaccard", "dice", "miou"))
    )
    drawn = []
    for problem, key in names:
        lines = {
            run.label: run.recorded.curves[problem][key]
            for run in runs
            if key in run.recorded.curves.get(problem, {})
        }
        title = f"{problem}: {plain(key)}"
        if len(lines) > MOST:
            title += f" (the first {MOST} runs)"
        drawn.append(Drawing(title, line_chart(Chart(title, lines))))
    return drawn[:20]
