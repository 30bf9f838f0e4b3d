"""What a run of LoAd leaves beside every run's records: how it converged, and what changed.

``convergence.png``   mIoU over updates with cycles, peaks and roll-backs; the buffer over time
``classes.md, .json`` IoU of every class before and after, by gain
``samples/changed.png`` validation images whose label maps changed most
``samples/improved.png`` those of which most pixels became right

Label maps across the cycles: :mod:`mlseg.problems.load.maps`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.lookahead.loop import LookaheadLoop
from mlseg.engines.recording import EVENTS
from mlseg.engines.segmentation import Segmentation
from mlseg.files import write_json, write_text, writing
from mlseg.problems.load.maps import draw_changes

SPLITS = ("val", "val_hold_out", "val_rest", "test")
Events = Sequence[Mapping[str, Any]]


class LoadRecords(Hooks):
    """Writes all of it at the end.

    Args:
        segmentation: the engine's hook that scores the models.
        loop: the one that obeys the controller.
        pictures: images in each sheet of ``samples/``; 0 for none.
    """

    def __init__(self, segmentation: Segmentation, loop: LookaheadLoop, pictures: int) -> None:
        self.segmentation = segmentation
        self.loop = loop
        self.pictures = pictures
        self._changes: dict[str, Any] | None = None

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """Which classes the scores are of, and prints by which other runs know the models."""
        counts = self.segmentation.counts
        shown = {
            split: metrics.shown()
            for by_split in counts.values()
            for split, metrics in by_split.items()
        }
        prints = {}
        for name in counts:
            with self.segmentation.weights(engine, name):
                module = self.segmentation.problem.module
                prints[name] = checkpoint.fingerprint(module.state_dict())
        directory = engine.recorder.directory
        if directory is not None:
            self._changes = class_changes(report["scores"], shown)
            write_json(directory / "classes.json", self._changes)
            write_text(directory / "classes.md", markdown(self._changes))
            draw(read_events(directory), directory / "convergence.png")
            if self.pictures:
                draw_changes(engine, self.segmentation, self.loop, self.pictures)
        return {"classes": shown, "models": prints}

    def summary(self, engine: Engine) -> Table | None:
        """The gain of each class."""
        return None if self._changes is None else summary(self._changes, engine.stopped_early)


# ------------------------------------------------------------------------ per class


def class_changes(
    scores: Mapping[str, Any], classes: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """IoU, as fractions, of the start and of the best model; classes by gain on the split.

    Args:
        scores: of both models.
        classes: those that each split's truth shows; of others nothing could be hit.

    Returns:
        {split: {"miou": [start, best], "classes": {class: [start, best]}}}
    """
    found: dict[str, Any] = {}
    for split in SPLITS:
        if not all(split in scores.get(name, {}) for name in ("start", "best")):
            continue
        start, best = scores["start"][split], scores["best"][split]
        rows = {name: [start[f"iou_{name}"], best[f"iou_{name}"]] for name in classes[split]}
        found[split] = {
            "miou": [start["miou"], best["miou"]],
            "classes": dict(sorted(rows.items(), key=lambda row: row[1][0] - row[1][1])),
        }
    return found


def _lines(changes: Mapping[str, Any], split: str) -> list[list[str]]:
    rows = {**changes[split]["classes"], "mIoU": changes[split]["miou"]}
    return [
        [name, f"{100 * a:.2f}", f"{100 * b:.2f}", f"{100 * (b - a):+.2f}"]
        for name, (a, b) in rows.items()
    ]


def markdown(changes: Mapping[str, Any]) -> str:
    """A table per split."""
    text = "# IoU before and after, per cent\n"
    for split in changes:
        text += f"\n## {split}\n\n| class | start | best | gain |\n| --- | --- | --- | --- |\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in _lines(changes, split))
    return text


def summary(changes: Mapping[str, Any], over: bool) -> Table:
    """The table of the test split, or of the validation images that chose nothing.

    Args:
        changes: of :func:`class_changes`.
        over: whether the controller has ended the run.
    """
    split = next((s for s in ("test", "val_rest", "val") if s in changes), None)
    table = Table("class", "start", "best", "gain", title=f"IoU on {split}, per cent, by gain")
    for line in _lines(changes, split) if split else []:
        table.add_row(*line)
    if not over:
        table.caption = "engine.iterations has cut the lookahead off: this is no result"
    elif changes and all(start == best for start, best in (c["miou"] for c in changes.values())):
        table.caption = "no peak was found: the best model is the one it started from"
    return table


# ---------------------------------------------------------------------- convergence


def read_events(directory: Path) -> list[dict[str, Any]]:
    """``events.jsonl`` of a run."""
    with writing(directory / EVENTS), (directory / EVENTS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw(events: Events, path: Path) -> None:
    """The run as in the paper's figure 3, and below it the buffer over time.

    Raises:
        RunError: the file can't be written.
    """
    # Here, since it is slow to import and only this needs it.
    from matplotlib.figure import Figure

    found = [e for e in events if e["event"] == "start"]
    if not found:
        return  # it ended before the lookahead began
    ends = [e for e in events if e["event"] == "cycle_end"]
    figure = Figure(figsize=(11, 6.5 if ends else 4), layout="constrained")
    axes = figure.subplots(
        2 if ends else 1, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1] if ends else None
    )[:, 0]
    _convergence(axes[0], events, found[0]["miou"])
    if ends:
        _buffer(axes[1], events, ends)
    axes[-1].set_xlabel("updates")
    with writing(path):
        figure.savefig(path, dpi=110)


def _convergence(axes: Any, events: Events, start: float) -> None:
    updates = [e for e in events if e["event"] == "update"]
    ends = {e["cycle"]: e for e in events if e["event"] == "cycle_end"}
    begun = {e["cycle"]: e for e in events if e["event"] == "cycle"}
    first, drawn = 0, False
    for cycle in sorted({e["cycle"] for e in updates}):
        own = [e for e in updates if e["cycle"] == cycle]
        level = begun[cycle]["miou"] if cycle in begun else start
        x = [first, *(e["update"] for e in own)]
        y = [100 * level, *(100 * e["miou"] for e in own)]
        axes.plot(x, y, "-", color="tab:blue", lw=1.3, marker="." if len(updates) < 200 else "")
        if cycle % 2 == 0:
            axes.axvspan(x[0], x[-1], color="0.93", lw=0)
        if len(begun) <= 40:
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(
                str(cycle), ((x[0] + x[-1]) / 2, 1.0), (0, 2), ha="center", fontsize=8, **place
            )
        back = next((e for e in events if e["event"] == "rollback" and e["cycle"] == cycle), None)
        if cycle in ends and back is not None:
            label = None if drawn else "roll-back"
            axes.plot([x[-1]] * 2, [y[-1], 100 * back["miou"]], ":", color="tab:red", label=label)
            drawn = True
        first = x[-1]
    for kind, marker, tint in (("peak", "*", "tab:orange"), ("restart", "^", "tab:green")):
        marked = [e for e in events if e["event"] == kind]
        if marked:
            x, y = [e["update"] for e in marked], [100 * e["miou"] for e in marked]
            axes.plot(x, y, marker, color=tint, ms=9, label=kind, zorder=3)
    axes.axhline(100 * start, color="0.5", lw=0.8, ls="--", label="start")
    axes.set_ylabel("mIoU on the hold-out, %")
    axes.legend(loc="best", fontsize=8)
    axes.margins(x=0.01)


def _buffer(axes: Any, events: Events, ends: Events) -> None:
    last = max(e["update"] for e in events if e["event"] == "update")
    first = ends[0]["buffer_before"]
    contents = [(0, first), *((e["update"], e["buffer_after"]) for e in ends)]
    stops = [update for update, _ in contents[1:]] + [max(last, contents[-1][0])]
    # What the last cycle left behind has no further updates: give it some width.
    stops[-1] = max(stops[-1], contents[-1][0] + max(1, last // 20))
    slots = max(len(labels) for _, labels in contents)
    total = max(stops)
    for (update, labels), stop in zip(contents, stops, strict=True):
        for slot, label in enumerate(labels):
            shade = 0.25 + 0.6 * int(label[1:]) / max(last, 1)
            axes.barh(
                slot, stop - update, left=update, height=0.9, edgecolor="white",
                color=(0.35, 0.55, 1 - 0.5 * shade, shade),
            )  # fmt: skip
            if stop - update > total * 0.03:
                axes.text((update + stop) / 2, slot, label, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(slots), [f"B[{slot}]" for slot in range(slots)])
    axes.invert_yaxis()
    axes.set_ylabel("label maps of")
