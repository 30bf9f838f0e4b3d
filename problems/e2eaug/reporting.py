"""What E2EAug adds to the tables of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlseg.problems.e2eaug.settings import GanSettings
from mlseg.problems.reporting import FIGURES, SECTIONS, Block, FinishedRun


@FIGURES.register("e2eaug.selected_step")
def selected_step(run: FinishedRun) -> float:
    """The selected step, counted from the segmentor's first: what pre-training took is left out."""
    step, gan = int(run.results["best"]["step"]), run.config.get("gan")
    if not gan or gan["pretrained"] is not None or not run.config["synthetic_weight"]:
        return float(step)
    splits = json.loads((run.directory / "splits.json").read_text(encoding="utf-8"))
    batch_size = run.config["problems"]["generator"]["batch_size"]
    settings = GanSettings.model_validate(gan)
    return float(step - settings.pretraining(len(splits["train"]), batch_size))


@FIGURES.register("e2eaug.entropy")
def entropy(run: FinishedRun) -> float | None:
    """Of the alphas, mean over cells, in nats; undecided is log 3. None where none are learned."""
    record = _record(run)
    return None if record is None else float(record["entropy"])


@FIGURES.register("e2eaug.largest_move")
def largest_move(run: FinishedRun) -> float | None:
    """How far a selection weight went at most."""
    record = _record(run)
    return None if record is None else float(max(max(cell) for cell in record["moved"]))


@SECTIONS.register("e2eaug.choices")
def choices(rows: Mapping[str, Sequence[FinishedRun]]) -> list[Block]:
    """Of each run that learns alphas, the operator that every cell would be given."""
    body = [
        [name, str(run.seed), ", ".join(map(str, record["choice"]))]
        for name, runs in rows.items()
        for run in runs
        if (record := _record(run)) is not None
    ]
    return [Block("Operators chosen", ["row", "seed", "cells"], body)] if body else []


def _record(run: FinishedRun) -> dict[str, Any] | None:
    """``architecture.json`` of a run that learns its alphas."""
    learned = run.config.get("architecture", {}).get("mode") == "learned"
    path = run.directory / "architecture.json"
    if not learned or run.config["gan"]["frozen"] or not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
