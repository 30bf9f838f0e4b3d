"""The sections of a run's page that every system has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mlseg.reports.charts import short
from mlseg.reports.curves import curves
from mlseg.reports.figures import FIRST, headline, interval, plain, provenance, score
from mlseg.reports.images import calibration, image_table
from mlseg.reports.later import since
from mlseg.reports.parts import (
    Cell,
    Fold,
    Headline,
    Part,
    Pre,
    Section,
    Table,
    Text,
    cell,
    span_cell,
    words,
)
from mlseg.reports.reading import Run, at, mapping, number


def summary(run: Run) -> Section:
    """The score, what it is of, and what the run is."""
    parts: list[Part] = []
    if provenance(run) == "synthetic":
        parts.append(
            Text(
                "SYNTHETIC DATA: the images are drawn stand-ins. Nothing here is comparable with "
                "figures on real images.",
                loud=True,
            )
        )
    results, events = run.recorded.results, run.recorded.events
    found = headline(run)
    if found is not None:
        weights, split, metric = found
        value, span = score(run, *found), interval(run, *found)
        count = number(at(results, "scores", weights, split, "images"))
        images = "" if count is None else f"{count:.0f} images"
        small = f"{weights} weights, {split} split, {images}"
        if span is not None:
            small += f"; 95 % interval over images {span[0]:.4f} to {span[1]:.4f}"
        parts.append(Headline(f"{value:.4f}", f"{plain(metric)} on {split}", small))
    best = mapping(results.get("best"))
    validations = [e for e in events if e.get("event") == "new_best"]
    if not best and validations:
        best = validations[-1]
    if run.state == "interrupted":
        parts.append(
            Text(f"Interrupted after step {run.last_step}: it goes on with --resume.", loud=True)
        )
    elif run.state != "finished":
        parts.append(Text(f"Not finished: its records end at step {run.last_step}.", loud=True))
    facts: dict[str, Any] = {
        "state": run.state,
        "system": results.get("system", run.recorded.config.get("system")),
        "data": at(run.recorded.config, "data", "name") or results.get("data"),
        "provenance": provenance(run),
        "steps": results.get("steps", run.last_step),
        "best on validation": (
            f"{best.get('metric')} {short(number(best.get('value')) or 0.0)} at step "
            f"{best.get('step')}"
            if best
            else None
        ),
        "seconds": results.get("seconds"),
        "seed": results.get("seed", run.recorded.config.get("seed")),
        "precision": results.get("precision", run.recorded.config.get("precision")),
        "device": results.get("device"),
        "split hash": results.get("split_hash"),
        "directory": str(run.recorded.directory),
    }
    rows = [[Cell(key), words(value)] for key, value in facts.items() if value is not None]
    parts.append(Table("The run", ["what", "value"], rows))
    lost = mapping(results.get("lost"))
    parts += [Text(f"Not scored: {reason}", loud=True) for reason in map(str, lost.values())]
    if run.missing:
        gone = "; ".join(run.missing)
        parts.append(Text(f"Not to be had from the run directory, so not on this page: {gone}."))
    return Section("Summary", parts)


def scores(run: Run) -> Section | None:
    """Every score of ``results.json``, and intervals."""
    found = mapping(run.recorded.results.get("scores"))
    metric = str(run.recorded.results.get("metric"))
    shown = list(dict.fromkeys([metric, *FIRST, "thresholded_jaccard", "hd95"]))
    counted = [mapping(own) for splits in found.values() for own in mapping(splits).values()]
    if "nsd" not in shown and any("nsd" in own for own in counted):
        shown.append("nsd")  # runs of former times haven't counted it
    rows, spans = [], []
    for weights, splits in found.items():
        for split, own in mapping(splits).items():
            values = mapping(own)
            row = [Cell(f"{weights}, {split}"), cell(number(values.get("images")), 0)]
            row += [_with_std(values, name) for name in shown]
            rows.append(row)
            pairs = [interval(run, weights, split, name) for name in shown]
            if any(pairs):
                spans.append([Cell(f"{weights}, {split}"), *map(span_cell, pairs)])
    if not rows:
        return None
    head = [plain(name) for name in shown]
    at_size = {"native": "the size of each mask's file", "trained": "the network's size"}
    where = at_size.get(str(run.recorded.results.get("scored_at")), "a size not said")
    parts: list[Part] = [
        Table(
            f"Means over images (mIoU: pooled), counted at {where}; ± standard deviation",
            ["weights, split", "images", *head],
            rows,
            sortable=True,
        )
    ]
    if spans:
        parts.append(
            Table(
                "95 % intervals: percentile bootstrap over the images",
                ["weights, split", *head],
                spans,
            )
        )
    return Section("Scores", parts)


def class_table(run: Run) -> Section | None:
    """Scores of every class of the headline split."""
    found = headline(run)
    if found is None:
        return None
    weights, split, _ = found
    own = mapping(at(run.evaluation, "scores", weights, split, "classes"))
    if own:
        names = list(dict.fromkeys(key for values in own.values() for key in mapping(values)))
        rows = [
            [Cell(name), *(_of_class(mapping(values), key) for key in names)]
            for name, values in own.items()
        ]
        head = ["class", *("images that show it" if n == "images" else plain(n) for n in names)]
    else:
        values = mapping(at(run.recorded.results, "scores", weights, split))
        rows = [
            [Cell(key.removeprefix("iou_")), cell(number(value))]
            for key, value in values.items()
            if key.startswith("iou_")
        ]
        head = ["class", "jaccard"]
    if not rows:
        return None
    caption = f"Pooled over all pixels, {weights} weights, {split} split"
    return Section("Classes", [Table(caption, head, rows, sortable=True)])


def how(run: Run) -> Section:
    """Commands, machine, revision, and what the config sets itself."""
    parts: list[Part] = []
    for index, start in enumerate(run.starts):
        machine = mapping(start.get("machine"))
        facts = {key: start.get(key) for key in ("command", "folder", "date", "step", "config")}
        facts |= {key: machine[key] for key in machine if key != "date"}
        rows = [[Cell(key), words(value)] for key, value in facts.items() if value is not None]
        began = "Started" if not number(start.get("step")) else "Went on"
        table = Table(began, ["what", "value"], rows)
        parts.append(
            table if index == 0 else Fold(f"{began} after step {start.get('step')}", [table])
        )
        for place, values in mapping(start.get("set")).items():
            own = [[Cell(key), Cell(json.dumps(value))] for key, value in mapping(values).items()]
            if own:
                what = "the command line" if place == "command line" else place
                parts.append(Table(f"Set by {what}; the rest is its base's", ["key", "value"], own))
    versions = mapping(run.recorded.results.get("versions"))
    if versions and not run.starts:
        rows = [[Cell(name), Cell(str(number))] for name, number in versions.items()]
        parts.append(Table("Versions", ["package", "version"], rows))
    whole = yaml.safe_dump(dict(run.recorded.config), sort_keys=False, allow_unicode=True)
    parts.append(Fold("The whole config", [Pre(whole[:200_000])]))
    return Section("How it was made", parts)


def events(run: Run) -> Section | None:
    """What the engine decided, but for validations, which are curves."""
    kept = [e for e in run.recorded.events if e.get("event") not in ("validation", "update")]
    if not kept:
        return None
    rows = []
    for event in kept[-300:]:
        rest = {k: v for k, v in event.items() if k not in ("event", "step")}
        said = ", ".join(f"{k} {_brief(v)}" for k, v in rest.items())
        name, step = str(event["event"]).replace("_", " "), number(event.get("step"))
        rows.append([Cell(name), cell(step, 0), Cell(said)])
    caption = "Events" if len(kept) <= 300 else f"The last 300 of {len(kept)} events"
    return Section("Events", [Fold(caption, [Table(caption, ["event", "step", "about"], rows)])])


def _of_class(values: Mapping[str, Any], key: str) -> Cell:
    return cell(number(values.get(key)), 0 if key == "images" else 4)


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return short(value)
    return str(value)[:200]


def _with_std(values: Mapping[str, Any], name: str) -> Cell:
    mean, std = number(values.get(name)), number(values.get(f"{name}_std"))
    made = cell(mean, 2 if name == "hd95" else 4)
    if mean is None or std is None:
        return made
    return Cell(f"{made.text} ± {std:.{1 if name == 'hd95' else 3}f}", mean)


def every(run: Run, prefix: str) -> Sequence[Section]:
    """All of them, without those of systems."""
    found = [
        summary(run),
        scores(run),
        since(run),
        curves(run),
        class_table(run),
        image_table(run, prefix),
        calibration(run),
    ]
    return [section for section in found if section is not None]
