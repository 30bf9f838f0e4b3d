"""What E2EAug adds to the tables of a sweep, and to the page of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlseg.problems.e2eaug.settings import GanSettings
from mlseg.problems.reporting import (
    FIGURES,
    PAGES,
    SECTIONS,
    Block,
    Chart,
    FinishedRun,
    Picture,
    Piece,
    RecordedRun,
    Series,
)


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


@PAGES.register("e2eaug.pairs")
def pairs(run: RecordedRun) -> list[Piece]:
    """Augmented masks and the images made of them: at first, half-way, at last."""
    found = sorted((run.directory / "samples").glob("synthetic_*.png"))
    chosen = dict.fromkeys(found[place] for place in (0, len(found) // 2, -1)) if found else ()
    words = "rows of a real image, its mask, the mask augmented, and the image made of that"
    return [
        Picture(f"Synthetic pairs at step {int(path.stem.rpartition('_')[2])}", path, words)
        for path in chosen
    ]


@PAGES.register("e2eaug.architecture")
def architecture(run: RecordedRun) -> list[Piece]:
    """The alphas over time, cell by cell, and what would be chosen in the end."""
    record = _record(run)
    if record is None:
        return []
    names, candidates = record["cells"], record["candidates"]
    history = record["history"]
    steps = [entry["step"] for entry in history]
    last = history[-1]["weights"]
    rows = [
        [name, *(f"{weight:.3f}" for weight in weights), choice]
        for name, weights, choice in zip(names, last, record["choice"], strict=True)
    ]
    entropy = [sum(entry["entropy"]) / len(entry["entropy"]) for entry in history]
    pieces: list[Piece] = [
        Block("Selection weights in the end", ["cell", *candidates, "choice"], rows),
        Block(f"Entropy: {record['entropy_unit']}."),
        Chart("Entropy of the alphas", {"mean over cells": Series(steps, entropy)}),
    ]
    for place, name in enumerate(names):
        lines = {
            candidate: Series(steps, [entry["weights"][place][index] for entry in history])
            for index, candidate in enumerate(candidates)
        }
        pieces.append(Chart(f"Selection weights of {name}", lines))
    return pieces


def _record(run: FinishedRun | RecordedRun) -> dict[str, Any] | None:
    """``architecture.json`` of a run that learns its alphas."""
    learned = run.config.get("architecture", {}).get("mode") == "learned"
    path = run.directory / "architecture.json"
    if not learned or run.config["gan"]["frozen"] or not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
