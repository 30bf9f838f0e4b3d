"""What LoAd adds to sweeps' tables and runs' pages: how its cycles ended, which classes gained."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mlseg.problems.load.records import read_events
from mlseg.problems.reporting import (
    PAGES,
    SECTIONS,
    Block,
    Chart,
    FinishedRun,
    Picture,
    Piece,
    RecordedRun,
    Series,
    mean_and_deviation,
)

Rows = Mapping[str, Sequence[FinishedRun]]


@SECTIONS.register("load.cycles")
def cycles(rows: Rows) -> list[Block]:
    """Of each run: how many cycles ended how, how long they were, which of them had a peak."""
    body = []
    for name, runs in rows.items():
        for run in runs:
            ends = [e for e in read_events(run.directory) if e["event"] == "cycle_end"]
            if not ends:
                continue  # a control
            lengths = [b - a for a, b in itertools.pairwise([0, *(e["update"] for e in ends)])]
            late = lengths[len(lengths) // 2 :]
            diverged = sum(end["reason"] == "divergence" for end in ends)
            peaks = [str(end["cycle"]) for end in ends if end["peak"] is not None]
            span = f"{min(late)} to {max(late)}, median {statistics.median(late):g}"
            figures = [str(number) for number in (run.seed, len(ends), diverged, lengths[0])]
            body.append([name, *figures, span, ", ".join(peaks) or "none"])
    head = ["row", "seed", "cycles", "diverged", "updates in the first"]
    head += ["in the latter half of the cycles", "cycles with a peak"]
    return [Block("Cycles", head, body)] if body else []


@SECTIONS.register("load.classes")
def classes(rows: Rows, splits: Sequence[str] = ("test", "val_rest")) -> list[Block]:
    """IoU of every class before and after, in per cent, by mean gain.

    Args:
        splits: the first that all runs of a row have is shown.
    """
    blocks = []
    for name, runs in rows.items():
        changes = [_changes(run) for run in runs]
        split = next((s for s in splits if all(s in change for change in changes)), None)
        if split is None:
            continue
        found = []
        for key in changes[0][split]["classes"]:
            pairs = [[100 * iou for iou in change[split]["classes"][key]] for change in changes]
            gains = [best - start for start, best in pairs]
            body = [key, *(mean_and_deviation([p[which] for p in pairs], 2) for which in (0, 1))]
            found.append((statistics.fmean(gains), [*body, mean_and_deviation(gains, 2, "+")]))
        found.sort(key=lambda row: -row[0])
        title = f"{name}: IoU by class, {split}, per cent, by gain"
        blocks.append(Block(title, ["class", "start", "final", "gain"], [row for _, row in found]))
    return blocks


@PAGES.register("load.convergence")
def convergence(run: RecordedRun) -> list[Piece]:
    """mIoU on the hold-out over updates, roll-backs, peaks, and how the cycles ended."""
    updates = [e for e in run.events if e["event"] in ("start", "update")]
    if run.config.get("system") != "load" or not updates:
        return []
    steps = [float(e.get("update", 0)) for e in updates]
    line = Series(steps, [100 * e["miou"] for e in updates])
    peaks = {float(e["update"]): "peak" for e in run.events if e["event"] == "peak"}
    title = "mIoU on the hold-out, per cent"
    pieces: list[Piece] = [Chart(title, {title: line}, x="update", marks=peaks)]
    ends = [e for e in run.events if e["event"] == "cycle_end"]
    body = [
        [str(e["cycle"]), str(e["update"]), str(e["reason"]), "yes" if e["peak"] else "no"]
        for e in ends
    ]
    if body:
        pieces.append(Block("Cycles", ["cycle", "ended at update", "reason", "had a peak"], body))
    drawn = run.directory / "convergence.png"
    if drawn.is_file():
        words = "mIoU over updates with cycles, peaks and roll-backs; the buffer of label maps"
        pieces.append(Picture("Convergence", drawn, words))
    changed = run.directory / "samples" / "changed.png"
    if changed.is_file():
        words = "validation images with truth and label maps before and after"
        pieces.append(Picture("Label maps that changed most", changed, words))
    return pieces


@PAGES.register("load.classes")
def changed_classes(run: RecordedRun) -> list[Piece]:
    """IoU of every class before and after."""
    if not (run.directory / "classes.json").is_file():
        return []
    pieces: list[Piece] = []
    for split, change in _changes(run).items():
        body = [
            [
                name,
                *(f"{100 * iou:.2f}" for iou in (before, after)),
                f"{100 * (after - before):+.2f}",
            ]
            for name, (before, after) in change["classes"].items()
        ]
        title = f"IoU by class before and after, {split}, per cent"
        pieces.append(Block(title, ["class", "start", "best", "gain"], body))
    return pieces


def _changes(run: FinishedRun | RecordedRun) -> dict[str, Any]:
    path = run.directory / "classes.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
