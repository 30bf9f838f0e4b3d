"""A run directory as it is found: whole, interrupted, old, or somebody else's.

Nothing in it is trusted: what can't be read is missing, and said to be; numbers that are none are
left out; files have bounds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlseg import config
from mlseg.engines.evaluation import EVALUATION
from mlseg.engines.recording import EVENTS, METRICS, TIMES
from mlseg.errors import UserError
from mlseg.files import require_file
from mlseg.problems.reporting import RecordedRun, Series
from mlseg.reports.starting import STARTS
from mlseg.segmentation.calibration import FILE as CHOICES

RESULTS = "results.json"
LATER = "later"
"""Key of ``evaluation.json``: what ``evaluate`` found since, the newest last."""
MOST_BYTES = 2**28
"""Of a file that is read whole."""
_LINES = 2**25
"""Bytes of lines that are looked at; of longer files a part of the lines, drawn by chance."""
_LARGEST = 1e100
"""Of a number that can be drawn; NaN is none either."""
_KEYS = 400
"""Figures of one kind that a file may have; further ones are left out."""


@dataclass
class Run:
    """What a directory holds.

    Attributes:
        recorded: what the sections of systems see.
        evaluation: ``evaluation.json``.
        starts: ``starts.json``: commands, machines, what the config sets.
        times: ``times.jsonl``.
        choices: ``calibration.json``.
        missing: what isn't there, in words.
        label: among several runs.
        split_provenance: of the data, as ``splits.json`` has it.
    """

    recorded: RecordedRun
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()
    times: Mapping[str, Series] = field(default_factory=dict)
    choices: Sequence[Mapping[str, Any]] = ()
    missing: list[str] = field(default_factory=list)
    label: str = ""
    split_provenance: str = "not known"

    @property
    def state(self) -> str:
        """``finished``, ``interrupted``, ``failed`` or ``not finished``."""
        if self.recorded.results:
            return "finished"
        for event in reversed(self.recorded.events):
            if event.get("event") in ("interrupted", "finished"):
                return str(event["event"])
            if event.get("event") == "nan":
                return "failed"
        return "not finished"

    @property
    def last_step(self) -> int:
        """Of anything that was written down."""
        steps = [s.steps[-1] for own in self.recorded.curves.values() for s in own.values()]
        steps += [e["step"] for e in self.recorded.events[-1:] if number(e.get("step")) is not None]
        return int(max(steps, default=0))


def require_run(directory: Path) -> None:
    """Check that there is a run directory.

    Raises:
        UserError: there is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory")
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: no run directory (it has no config.yaml)")


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is none.
    """
    require_run(directory)
    values = config.load(directory / "config.yaml").values
    results = mapping(_json(directory / RESULTS))
    recorded = RecordedRun(
        directory=directory,
        results=results,
        config=values,
        events=[line for line in _lines(directory / EVENTS) if isinstance(line.get("event"), str)],
        curves=_curves(_lines(directory / METRICS)),
    )
    evaluation, starts = _json(directory / EVALUATION), _json(directory / STARTS)
    choices = _json(directory / CHOICES)
    run = Run(
        recorded,
        evaluation=mapping(evaluation),
        starts=[mapping(s) for s in starts] if isinstance(starts, list) else [],
        times=_curves({"problem": "", **line} for line in _lines(directory / TIMES)).get("", {}),
        choices=[mapping(c) for c in choices] if isinstance(choices, list) else [],
        label=directory.name or str(directory),
        split_provenance=str(at(_json(directory / "splits.json"), "provenance") or "not known"),
    )
    of_images = run.evaluation.get("scores")
    contents = {
        RESULTS: (results, "final scores"),
        EVALUATION: (of_images, "scores of every image, intervals, reliability, pictures"),
        STARTS: (run.starts, "command, revision, machine, what the config sets itself"),
        TIMES: (run.times, "seconds per step, memory"),
        METRICS: (recorded.curves, "curves"),
    }
    for name, (found, what) in contents.items():
        if not found:
            path = directory / name
            damaged = path.is_file() and path.stat().st_size > 0
            run.missing.append(f"{name}: {what}" + " (it is there and can't be read)" * damaged)
    return run


# ------------------------------------------------------------------- plain values


def number(value: Any) -> float | None:
    """A number of ordinary size, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _LARGEST else None


def numbers(values: Any) -> list[float]:
    """A list of finite numbers; empty for anything else."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [] if None in found else [value for value in found if value is not None]


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def at(values: Any, *keys: str) -> Any:
    """What lies at a path of keys; None where there is nothing."""
    for key in keys:
        values = mapping(values).get(key)
    return values


def _json(path: Path) -> Any:
    try:
        require_file(path, MOST_BYTES)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # UserError and JSON's are ValueErrors
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; of a very long one a part of them."""
    try:
        require_file(path)
        share = _LINES / max(1, path.stat().st_size)
        draw = random.Random(0)
        with path.open("rb") as file:
            while line := file.readline(_LINES):
                if share < 1 and draw.random() > share:
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(found, dict):
                    yield found
    except (OSError, UserError):
        return


def _curves(lines: Iterator[dict[str, Any]]) -> dict[str, dict[str, Series]]:
    """By problem and figure, steps ascending."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        step, problem = number(line.get("step")), line.get("problem")
        if step is None or not isinstance(problem, str):
            continue
        for key, value in line.items():
            figure = None if key in ("step", "problem") else number(value)
            if figure is not None and ((problem, key) in found or len(found) < _KEYS):
                found.setdefault((problem, key), []).append((step, figure))
    curves: dict[str, dict[str, Series]] = {}
    for (problem, key), points in found.items():
        points.sort()
        steps, values = zip(*points, strict=True)
        curves.setdefault(problem, {})[key] = Series(list(steps), list(values))
    return curves
