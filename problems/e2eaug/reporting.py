"""What E2EAug adds to the tables of a sweep, and to the page of a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlseg import checkpoint
from mlseg.problems.e2eaug.learned_masks import LearnedMasks
from mlseg.problems.e2eaug.masks import Augmented, Masks, label_channels
from mlseg.problems.e2eaug.networks.finished import finished
from mlseg.problems.e2eaug.settings import GanSettings
from mlseg.problems.reporting import (
    FIGURES,
    ILLUSTRATIONS,
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
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import (
    Augmentation,
    AugmentationSettings,
    DatasetSpec,
    SegmentationData,
    to_uint8,
)
from mlseg.segmentation.pictures import Picture as Pixels
from mlseg.segmentation.pictures import colour, to_rgb


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


@FIGURES.register("e2eaug.direct_path")
def direct_path(run: FinishedRun) -> float | None:
    """Norm of the alphas' gradient over the segmentor alone, mean over the logged steps."""
    return _mean_of(run, "hypergradient/via_segmentor")


@FIGURES.register("e2eaug.path_through_generator")
def path_through_generator(run: FinishedRun) -> float | None:
    """Norm of the alphas' gradient over segmentor and generator, mean over the logged steps."""
    return _mean_of(run, "hypergradient/via_generator")


@FIGURES.register("e2eaug.hypergradient_seconds")
def hypergradient_seconds(run: FinishedRun) -> float | None:
    """Of both hops of a step of the alphas, mean over the logged steps."""
    parts = [
        _mean_of(run, f"hypergradient/{level}_seconds") for level in ("segmentor", "generator")
    ]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


@ILLUSTRATIONS.register("e2eaug.pairs")
def illustrated(
    run: FinishedRun, data: SegmentationData, count: int
) -> list[tuple[str, Sequence[Pixels]]]:
    """Augmented masks of training images, and the images that the finished generator makes of them.

    Both by draws of the run's seed; in training mode, as the segmentor was given them.
    """
    path = run.directory / "checkpoints" / "generator.pt"
    if not path.exists() or not run.config.get("synthetic_weight"):
        return []
    generator = finished(path, label_channels(data.spec.num_classes), data.spec.channels)
    masks = _masks(run, data.spec)
    chosen = data.train.masks[[index % len(data.train) for index in range(count)]].long()
    with seeded(run.seed, "pairs"), torch.no_grad():
        draw = torch.Generator().manual_seed(derived(run.seed, "masks"))
        label, augmented = masks(chosen, masks.draw(chosen, draw))
        images = to_uint8(generator.train()(label))
    maps = augmented.to(torch.uint8).numpy()
    return [
        ("masks, augmented", [colour(mask, data.spec.palette) for mask in maps]),
        ("images made of them", [to_rgb(image) for image in images]),
    ]


def _masks(run: FinishedRun, spec: DatasetSpec) -> Masks:
    """As the run augments them in the end."""
    settings = AugmentationSettings.model_validate(run.config["mask_augmentation"])
    level3 = run.config.get("level3", {})  # older runs have none
    if not level3.get("mask_augmentation"):
        return Augmented(Augmentation(settings, spec.ignore_index), spec.num_classes)
    temperature = level3["mask_temperature"]
    masks = LearnedMasks(settings, spec.num_classes, spec.ignore_index, temperature)
    state = checkpoint.load(run.directory / "checkpoints" / checkpoint.LAST)
    learned = state["problems"]["architecture"]["module"]
    checkpoint.load_module(masks, {"logits": learned["masks.logits"]})
    return masks


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
    """The alphas over time, cell by cell, what would be chosen in the end, what else is learned."""
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
    for name in history[0]:  # lambda, ranges
        if isinstance(history[0][name], float):
            course = [entry[name] for entry in history]
            pieces.append(Chart(f"Learned besides: {name}", {name: Series(steps, course)}))
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


def _mean_of(run: FinishedRun, key: str) -> float | None:
    """A figure of the architecture's steps, mean over the logged ones; None where it has none."""
    path = run.directory / "metrics.jsonl"
    if not path.exists():
        return None
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    values = [line[key] for line in lines if line["problem"] == "architecture" and key in line]
    return statistics.fmean(values) if values else None
